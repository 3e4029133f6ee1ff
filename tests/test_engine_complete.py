"""Completion: the base bit for bit, adapters like plain peft, batches, stops, sampling, cancel, bad input."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from engine_parts import (
    PROMPTS,
    SAME_LOGITS,
    adapted_engine,
    ask,
    ask_all,
    chat_ids,
    greedy,
    peft_model,
    strong,
    tiny_base,
    tiny_engine,
    tiny_layout,
)
from helpers import FAMILIES

from dnd_sdk.config import SamplingOptions
from dnd_sdk.engine import CompletionRequest, Engine
from dnd_sdk.engine.forward import FlatForward
from dnd_sdk.engine.sampling import Sampler
from dnd_sdk.errors import AdapterCorruptError, AdapterNotFoundError, ConfigError, InputError, LayoutMismatchError
from dnd_sdk.lora import using

SHORT = SamplingOptions(max_new_tokens=8)
LONG = SamplingOptions(max_new_tokens=400)


@pytest.fixture(scope="module")
def engine() -> Engine:
    return adapted_engine(n_slots=3)


def logits(engine: Engine, prompts: list[str], adapters: list[str | None]) -> torch.Tensor:
    """Logits of every position `(B, T, V)`; the prompts are equally long."""
    ids = torch.cat([chat_ids(engine.base, p) for p in prompts])
    with engine.running(adapters):
        return engine.base.model(input_ids=ids).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_adapters_answer_like_peft_and_the_base_like_the_plain_model(family: str) -> None:
    base = tiny_base(family)
    layout = tiny_layout(base)
    flats = {name: strong(layout, i) for i, name in enumerate("ab")}
    plain = copy.deepcopy(base.model)
    oracles = {name: peft_model(base, layout, flat) for name, flat in flats.items()}
    engine = Engine(base, layout)
    for name, flat in flats.items():
        engine.bank.load(name, flat)
    ids = chat_ids(base, PROMPTS[1])
    want = {name: oracle(input_ids=ids).logits for name, oracle in oracles.items()}
    assert not torch.allclose(want["a"], want["b"], atol=0.1)
    got = logits(engine, [PROMPTS[1]] * 4, ["a", None, "b", "a"])
    torch.testing.assert_close(got[[0, 2, 3]], torch.cat([want["a"], want["b"], want["a"]]), **SAME_LOGITS)
    assert torch.equal(got[1], plain(input_ids=ids.repeat(4, 1)).logits[1])
    for name in "ab":
        torch.testing.assert_close(logits(engine, [PROMPTS[1]], [name]), want[name], **SAME_LOGITS)
        assert ask(engine, PROMPTS[1], name, SHORT).text == greedy(oracles[name], base, PROMPTS[1], 8)
    assert torch.equal(logits(engine, [PROMPTS[1]], [None]), plain(input_ids=ids).logits)
    assert ask(engine, PROMPTS[1], None, SHORT).text == greedy(plain, base, PROMPTS[1], 8)


def test_a_then_b_then_a(engine: Engine) -> None:
    first, other, again = (logits(engine, ["hi"], [name]) for name in "aba")
    assert not torch.allclose(first, other, atol=0.1)
    assert torch.equal(first, again)


@pytest.mark.parametrize("kind", ["nan", "size"])
def test_a_refused_adapter_leaves_logits_as_they_were(engine: Engine, kind: str) -> None:
    bad = strong(engine.layout, 9)
    bad = bad[:-3] if kind == "size" else bad.index_fill(0, torch.tensor([7]), float("nan"))
    before = {name: logits(engine, ["hi"], [name]) for name in ("a", "b", None)}
    with pytest.raises(LayoutMismatchError if kind == "size" else AdapterCorruptError):
        engine.bank.load("bad", bad)
    assert all(torch.equal(logits(engine, ["hi"], [name]), was) for name, was in before.items())
    assert engine.bank.resident() == ["a", "b"]


def test_a_base_is_hooked_once_however_many_engines() -> None:
    base = tiny_base()
    layout = tiny_layout(base)
    engines = [Engine(base, layout) for _ in range(2)]
    engines[0].bank.load("a", strong(layout, 1))
    once = tiny_engine()
    once.bank.load("a", strong(layout, 1))
    assert torch.equal(logits(engines[0], ["hi"], ["a"]), logits(once, ["hi"], ["a"]))


def test_mixed_batches_keep_order_and_equal_single_calls(engine: Engine) -> None:
    prompts = [p + " more" * (i % 4) for i, p in enumerate(PROMPTS * 3)]
    adapters = [("a", None, "b")[i % 3] for i in range(len(prompts))]
    # one slot: the batch must be cut so that adapters fit
    small = Engine(
        engine.base, engine.layout, n_slots=1, max_batch=4, fetch=lambda name: strong(engine.layout, "ab".index(name))
    )
    single = [ask(engine, p, a, SHORT) for p, a in zip(prompts, adapters, strict=True)]
    assert len({g.text for g in single}) > 5
    assert ask_all(engine, prompts, adapters, SHORT) == single
    assert ask_all(small, prompts, adapters, SHORT) == single


def steps(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, list[int]]]:
    """Grows by (rows that write, prompt tokens read by row) of every step."""
    seen: list[tuple[int, list[int]]] = []
    run = FlatForward.run

    def watched(self: FlatForward, writing: Any, reading: Any) -> torch.Tensor:
        seen.append((len(writing), [n for _, n in reading]))
        return run(self, writing, reading)

    monkeypatch.setattr(FlatForward, "run", watched)
    return seen


def test_a_long_prompt_is_read_in_pieces_while_others_write(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = adapted_engine()
    whole = engine.prompt_ids("so long " * 50, 8)
    alone = [ask(engine, p, a, SHORT) for p, a in (("hi", "a"), ("so long " * 50, "b"))]
    engine.close()
    engine.bank.load("a", strong(engine.layout, 0))
    engine.bank.load("b", strong(engine.layout, 1))
    seen = steps(engine, monkeypatch)
    writer = engine.stream(CompletionRequest("hi", "a", LONG))
    next(writer)
    got = ask(engine, "so long " * 50, "b", SHORT)
    assert writer.generation is None
    assert (got, "".join(writer)[:4]) == (alone[1], alone[0].text[1:5])
    pieces = [n for n_writing, reading in seen if n_writing for n in reading]
    assert sum(pieces) == len(whole) and max(pieces) == 128 and len(pieces) == -(-len(whole) // 128)


def test_no_prompts_no_completions(engine: Engine) -> None:
    assert ask_all(engine, [], [], SHORT) == []


def test_a_chat_is_templated_once(engine: Engine) -> None:
    chat = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}]
    text = "<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    want = engine.base.tokenizer(text, add_special_tokens=False)["input_ids"]
    assert engine.prompt_ids(chat, 1) == want
    assert ask(engine, chat, "a", SHORT).prompt_tokens == len(want)


def test_a_base_without_template_gets_the_raw_text() -> None:
    engine = tiny_engine()
    engine.base.tokenizer.chat_template = None
    assert engine.prompt_ids("hi", 1) == engine.base.tokenizer("hi")["input_ids"]


def test_stop_strings_cut_the_text_and_end_the_row(engine: Engine) -> None:
    whole = ask(engine, "hi", "a", SamplingOptions(max_new_tokens=30))
    stop = whole.text[4:6]
    cut = ask(engine, "hi", "a", SamplingOptions(max_new_tokens=30, stop=("never", stop)))
    assert cut.text == whole.text[: whole.text.index(stop)]
    assert cut.finish_reason == "stop" and cut.completion_tokens < 30
    both = ask_all(engine, ["hi", "x"], ["a", "b"], SamplingOptions(max_new_tokens=30, stop=(stop,)))
    assert both[0] == cut and both[1].text == ask(engine, "x", "b", SamplingOptions(max_new_tokens=30)).text


def test_the_end_token_finishes_a_row() -> None:
    engine = tiny_engine()
    ends = ask(engine, "hi", None, SHORT)
    first = engine.base.tokenizer(ends.text, add_special_tokens=False)["input_ids"][0]
    ending = tiny_engine()
    ending.base.model.generation_config.eos_token_id = [first, 2]
    got = ask(Engine(ending.base, ending.layout), "hi", None, SHORT)
    assert (got.text, got.completion_tokens, got.finish_reason) == ("", 1, "stop")


def test_the_bases_own_sampling_defaults_do_not_leak_in() -> None:
    plain = ask(tiny_engine(), "hi", None, SHORT)
    engine = tiny_engine()
    engine.base.model.generation_config.update(do_sample=True, temperature=0.7, top_k=3, repetition_penalty=1.9)
    assert ask(engine, "hi", None, SHORT) == plain


def test_seeded_sampling_repeats_alone_and_in_a_batch(engine: Engine) -> None:
    def drawn(prompts: list[str], *seeds: int | None) -> list[str]:
        options = [SamplingOptions(max_new_tokens=8, temperature=1.0, seed=seed) for seed in seeds]
        asked = [CompletionRequest(p, "a", o) for p, o in zip(prompts, options, strict=True)]
        return [g.text for g in engine.complete(asked)]

    state = torch.get_rng_state()
    alone = drawn(["hi"], 5)
    assert alone == drawn(["hi"], 5) and alone != drawn(["hi"], 6)
    batch = drawn(["hi", "hi", "a longer prompt", "hi"], 5, 6, 5, 5)
    assert batch[0] == batch[3] == alone[0] and batch[1] == drawn(["hi"], 6)[0]
    assert drawn(["hi"], None) != drawn(["hi"], None)
    assert torch.equal(torch.get_rng_state(), state)


def test_sampling_follows_the_distribution() -> None:
    n, logit = 4000, torch.tensor([2.0, 1.0, 0.0, 0.5, -1.0, -2.0])
    samplers = [Sampler(SamplingOptions(temperature=0.7, top_k=4, seed=i), torch.device("cpu")) for i in range(n)]
    drawn = torch.tensor([sampler.draw(logit, []).token for sampler in samplers]).bincount(minlength=6)
    want = n * (logit / 0.7)[:4].softmax(0)
    assert drawn[4:].tolist() == [0, 0]
    chi2 = ((drawn[:4] - want) ** 2 / want).sum().item()
    assert chi2 < 16.3  # 0.1 % point for 3 degrees of freedom; the draw is seeded


def test_top_p_keeps_the_nucleus(engine: Engine) -> None:
    options = SamplingOptions(max_new_tokens=8, temperature=2.0, top_p=1e-6, seed=1)
    assert ask(engine, "hi", "b", options).text == ask(engine, "hi", "b", SHORT).text


def test_a_prompt_beyond_the_context_is_refused(engine: Engine) -> None:
    n = ask(engine, "x", None, SHORT).prompt_tokens
    room = engine.context_tokens - 8 - n + 1
    assert ask(engine, "x" * room, None, SHORT).prompt_tokens == engine.context_tokens - 8
    most = engine.context_tokens - 8
    with pytest.raises(InputError, match=rf"has {most + 1} tokens, at most {most} fit"):
        ask(engine, "x" * (room + 1), None, SHORT)


@pytest.mark.parametrize(
    ("messages", "words"),
    [([], "no messages"), ([{"role": "user"}], "message 0"), ([{"role": "user", "content": 3}], "message 0")],
)
def test_malformed_messages(engine: Engine, messages: list[dict[str, str]], words: str) -> None:
    with pytest.raises(InputError, match=words):
        ask(engine, messages, None, SHORT)


def test_what_the_template_refuses_is_bad_input() -> None:
    engine = tiny_engine()
    engine.base.tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(InputError, match="roles must alternate"):
        ask(engine, "hi", None, SHORT)


def test_wrong_calls(engine: Engine) -> None:
    with pytest.raises(AdapterNotFoundError, match="'zzz'"):
        ask(engine, "hi", "zzz", SHORT)
    with pytest.raises(ConfigError, match="max_batch"):
        Engine(engine.base, engine.layout, max_batch=0)


def test_an_error_in_the_model_frees_lease_and_turn(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(engine.base.model, "forward", lambda **_: (_ for _ in ()).throw(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            ask(engine, "hi", "a", SHORT)
    assert ask(engine, "hi", "a", SHORT).completion_tokens == 8
    assert engine.bank.evict("a")
    engine.bank.load("a", strong(engine.layout, 0))


def test_a_lease_serves_a_hand_written_forward(engine: Engine) -> None:
    ids = chat_ids(engine.base, "hi")
    with engine.bank.lease(["b"]) as rows, using(engine.bank.adapted(rows)), torch.no_grad():
        got = engine.base.model(input_ids=ids).logits
    assert torch.equal(got, logits(engine, ["hi"], ["b"]))


def counting(**settings: int) -> tuple[Engine, list[str]]:
    """An engine that fetches adapters `0`, `1`, ...; the list tells which it did."""
    called, base = list[str](), tiny_base()
    layout = tiny_layout(base)

    def fetch(name: str) -> torch.Tensor:
        called.append(name)
        return strong(layout, int(name))

    return Engine(base, layout, fetch=fetch, **settings), called


def test_a_list_brings_every_adapter_in_once_whatever_its_order() -> None:
    engine, called = counting(n_slots=4, max_batch=8)
    names = [str(i * 7 % 12) for i in range(48)]
    options = SamplingOptions(max_new_tokens=2)
    answers = ask_all(engine, ["hi" + " there" * (i % 5) for i in range(48)], names, options)
    assert len(called) == len(set(called)) == 12
    alone = [ask(engine, "hi" + " there" * (i % 5), names[i], options).text for i in range(48)]
    assert [a.text for a in answers] == alone


def test_pinned_slots_make_smaller_batches_and_no_error() -> None:
    engine, _ = counting(n_slots=4)
    for name in "012":
        engine.bank.ensure(name, lambda name=name: strong(engine.layout, int(name)))
        engine.bank.pin(name)
    options, names = SamplingOptions(max_new_tokens=2), ["3", "4", "0", None, "5"]
    answers = ask_all(engine, ["hi"] * 5, names, options)
    assert [a.text for a in answers] == [ask(engine, "hi", n, options).text for n in names]
    scores = engine.option_logprobs(["hi"] * 5, names, ["yes", "no"])
    torch.testing.assert_close(scores, torch.cat([engine.option_logprobs(["hi"], [n], ["yes", "no"]) for n in names]))


def test_after_a_refused_adapter_all_others_answer_as_before_bit_for_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = adapted_engine(n_slots=1)  # "b" has the slot, "a" is kept
    chats, names = ["hi", "so"], ["a", "b", None]
    want = {name: logits(engine, chats, [name] * 2) for name in names}
    broken = strong(engine.layout, 2)
    broken[-1] = torch.nan
    for _ in range(3):
        with pytest.raises(AdapterCorruptError):
            engine.bank.load("c", broken)
        with monkeypatch.context() as patch:
            patch.setattr(engine.bank.packing, "pack", lambda *_: (_ for _ in ()).throw(MemoryError()))
            with pytest.raises(MemoryError):
                engine.bank.load("c", strong(engine.layout, 2))
            for name in names:
                assert torch.equal(logits(engine, chats, [name] * 2), want[name])
    engine.bank.load("c", strong(engine.layout, 2))
    assert all(torch.equal(logits(engine, chats, [name] * 2), want[name]) for name in names)

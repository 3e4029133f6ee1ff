"""`DnD` on a tiny real installation: decisions, reuse, completion, threads, and that failures leave nothing behind."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from operator import attrgetter
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import random_flat
from tiny_world import World, prompts_of, save_base

from dnd_sdk.adaptation import Limits
from dnd_sdk.adaptation.results import STEPS
from dnd_sdk.adaptation.vetting import PROBE, PROBE_TOKENS, Probe, Vetting
from dnd_sdk.adapters import AdapterStore
from dnd_sdk.errors import (
    AdapterNotFoundError,
    BankFullError,
    ConfigError,
    GeneratorError,
    InputError,
    LayoutMismatchError,
    StorageError,
)
from dnd_sdk.session import DnD

MESSAGES = [[{"role": "user", "content": "hello there"}]]


def logits(dnd: DnD, adapter_id: str | None = None) -> torch.Tensor:
    """Next-token logits of the resident base, with an adapter of its bank."""
    ids = torch.tensor([dnd.base.tokenizer("hello there")["input_ids"]])
    with dnd.engine.running([adapter_id]):
        return dnd.base.model(input_ids=ids).logits.clone()


def state(dnd: DnD) -> tuple[Any, ...]:
    """Everything an adaptation may change."""
    return sorted(a.name for a in dnd.store.ls()), dnd.engine.bank.resident(), dnd.store.verify()


@pytest.fixture
def dnd(world: World) -> DnD:
    return world.session()


def test_new_prompts_generate_store_and_swap_in(dnd: DnD) -> None:
    result = dnd.adapt(prompts_of("upper"), name="upper")
    assert (result.decision, result.n_prompts, result.notes) == ("generate", 20, ())
    assert result.adapter is not None and result.adapter == dnd.store.get("upper")
    assert result.adapter.id in dnd.engine.bank.resident()
    assert set(result.timings_s) == set(STEPS)
    assert all(result.timings_s[s] > 0 for s in STEPS)
    assert sum(v for k, v in result.timings_s.items() if k != "total") <= result.timings_s["total"]
    assert not torch.equal(logits(dnd), logits(dnd, result.adapter.id))


def test_the_stored_weights_are_what_the_generator_gives(dnd: DnD) -> None:
    adapter = dnd.adapt(prompts_of("digits")).adapter
    assert adapter is not None and dnd.generator is not None
    states = dnd.encoder.encode(prompts_of("digits"), state_tokens=dnd.generator.state_tokens).states
    assert torch.equal(dnd.store.load(adapter, dnd.layout), dnd.generator.generate(states))


def test_the_same_prompts_are_reused_without_encoding(dnd: DnD, monkeypatch: pytest.MonkeyPatch) -> None:
    made = dnd.adapt(prompts_of("upper"))
    monkeypatch.setattr(dnd.encoder, "encode", lambda *a, **k: pytest.fail("encoded"))
    again = dnd.adapt(list(reversed(prompts_of("upper"))), name="unused")
    assert (again.decision, again.score, again.adapter) == ("reuse", 1.0, made.adapter)
    assert again.timings_s["encode"] == again.timings_s["generate"] == 0.0
    assert again.timings_s["total"] < 0.25


def test_other_prompts_of_a_task_reuse_and_another_task_generates(world: World) -> None:
    dnd = world.session(reuse=0.99)
    made = dnd.adapt(prompts_of("lower", 20))
    near = dnd.adapt([f"the cat {i} sat on it" for i in range(40, 60)])
    assert (near.decision, near.adapter) == ("reuse", made.adapter)
    assert near.score is not None and near.neighbours[0] == (made.adapter.name, near.score)
    assert dnd.adapt(prompts_of("upper")).decision == "generate"


def test_a_new_process_reuses_what_another_one_made(world: World) -> None:
    made = world.session().adapt(prompts_of("upper"))
    again = world.session().adapt(prompts_of("upper"))
    assert (again.decision, again.adapter) == ("reuse", made.adapter)


def test_modes(dnd: DnD) -> None:
    nothing = dnd.adapt(prompts_of("upper"), mode="reuse")
    assert (nothing.decision, nothing.adapter, nothing.score) == ("base", None, None)
    made = dnd.adapt(prompts_of("upper"), mode="generate")
    forced = dnd.adapt(prompts_of("upper"), mode="generate")
    assert (forced.decision, forced.adapter) == ("generate", made.adapter)
    assert len(dnd.store.ls()) == 1
    with pytest.raises(ConfigError, match="mode must be one of auto, reuse, generate"):
        dnd.adapt(prompts_of("upper"), mode="base")  # type: ignore[arg-type]


def test_without_a_generator_adapt_reuses_or_stays_on_the_base(world: World) -> None:
    made = world.session().adapt(prompts_of("upper"))
    plain = world.session(generator=False)
    assert plain.adapt(prompts_of("upper")).adapter == made.adapter
    other = plain.adapt(prompts_of("digits"))
    assert (other.decision, other.adapter) == ("base", None)
    assert "there is no generator for" in other.reason
    with pytest.raises(GeneratorError, match="there is no generator"):
        plain.adapt(prompts_of("digits"), mode="generate")


def test_one_prompt_and_very_many_prompts_are_fine(dnd: DnD) -> None:
    one = dnd.adapt(["only one"])
    assert (one.decision, one.n_prompts) == ("generate", 1)
    many = dnd.adapt([f"prompt {i}" for i in range(100_000)])
    assert (many.n_prompts, many.notes) == (512, ("read 100000 prompts, sampled 512",))


@pytest.mark.parametrize(
    ("prompts", "match"),
    [([], "no prompts"), ([" ", "\n"], "no prompts"), (["a", 3], "prompt 1 is a int"), ("text", "list of strings")],
)
def test_unusable_prompts_change_nothing(dnd: DnD, prompts: Any, match: str) -> None:
    before = logits(dnd)
    with pytest.raises(InputError, match=match):
        dnd.adapt(prompts)
    assert state(dnd) == ([], [], [])
    assert torch.equal(logits(dnd), before)


@pytest.mark.parametrize("name", ["../evil", "a/b", "UPPER", "a___b", "", "-x", "x" * 65])
def test_names_that_could_leave_the_store_are_refused(dnd: DnD, name: str) -> None:
    with pytest.raises(ConfigError, match="is not allowed"):
        dnd.adapt(prompts_of("upper"), name=name)
    assert state(dnd) == ([], [], [])


def test_a_taken_name_is_refused_and_nothing_changes(dnd: DnD) -> None:
    dnd.adapt(prompts_of("upper"), name="mine")
    before, same = state(dnd), logits(dnd, dnd.store.get("mine").id)
    with pytest.raises(ConfigError, match="named 'mine' with other weights exists"):
        dnd.adapt(prompts_of("digits"), name="mine", mode="generate")
    assert state(dnd) == before
    assert torch.equal(logits(dnd, dnd.store.get("mine").id), same)


class Interrupt:
    """Raises when called the n-th time, before or after doing the real thing."""

    def __init__(self, real: Any, error: BaseException, *, after: bool) -> None:
        self.real, self.error, self.after = real, error, after

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.after:
            self.real(*args, **kwargs)
        raise self.error


STEPS_OF_ADAPT = [
    ("encoder", "encode"),
    ("router", "route"),
    ("generator", "generate"),
    ("store", "put"),
    ("engine", "hold"),
]


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("error", [KeyboardInterrupt(), StorageError("disk full"), RuntimeError("out of memory")])
@pytest.mark.parametrize(("part", "method"), STEPS_OF_ADAPT)
def test_an_error_or_ctrl_c_at_any_step_leaves_everything_as_it_was(
    dnd: DnD, monkeypatch: pytest.MonkeyPatch, part: str, method: str, error: BaseException, after: bool
) -> None:
    kept = dnd.adapt(prompts_of("lower"), name="kept").adapter
    assert kept is not None
    before, base, adapted = state(dnd), logits(dnd), logits(dnd, kept.id)
    target = attrgetter(part)(dnd)
    with monkeypatch.context() as patched:
        patched.setattr(target, method, Interrupt(getattr(target, method), error, after=after), raising=True)
        with pytest.raises(type(error)):
            dnd.adapt(prompts_of("upper"))
    assert state(dnd) == before
    assert torch.equal(logits(dnd), base) and torch.equal(logits(dnd, kept.id), adapted)
    assert not list(dnd.store.root.glob(".*"))
    assert dnd.adapt(prompts_of("upper")).decision == "generate"  # and it works afterwards


def test_a_full_bank_is_an_error_that_leaves_nothing(world: World) -> None:
    dnd = world.session(n_slots=2)
    first = dnd.adapt(prompts_of("upper")).adapter
    second = dnd.adapt(prompts_of("digits")).adapter
    before = state(dnd)
    dnd.engine.bank._table._wait_s = 0.05
    with dnd.engine.bank.lease([first.id, second.id]), pytest.raises(BankFullError, match="adapter slots"):
        dnd.adapt(prompts_of("lower"))
    assert state(dnd) == before


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e6, 0.0])
def test_unusable_generated_weights_fall_back_to_the_base(
    dnd: DnD, monkeypatch: pytest.MonkeyPatch, bad: float
) -> None:
    monkeypatch.setattr(dnd.generator, "generate", lambda states: torch.full((dnd.layout.n_parameters,), bad))
    result = dnd.adapt(prompts_of("upper"))
    assert (result.decision, result.adapter) == ("base", None)
    assert "the generated weights" in result.reason
    assert state(dnd) == ([], [], [])


def test_weights_that_derail_the_base_are_refused(dnd: DnD) -> None:
    flat, mean = random_flat(dnd.layout, seed=1), random_flat(dnd.layout, seed=2)
    vetting, strict = (Vetting(dnd.layout, lim, dnd.engine) for lim in (Limits(), Limits(max_kl=1e-6)))
    assert vetting.complaint(flat, mean) is None
    assert "KL" in str(strict.complaint(flat, mean))
    assert "times the usual norm" in str(vetting.complaint(flat * 100, mean))


def test_the_probe_is_the_divergence_of_two_plain_forwards(dnd: DnD) -> None:
    flat = random_flat(dnd.layout, seed=1)
    dnd.engine.bank.load("probe", flat)
    ids = torch.tensor([dnd.base.tokenizer(PROBE)["input_ids"][:PROBE_TOKENS]])
    with dnd.engine.running([None]):
        base = dnd.base.model(input_ids=ids).logits[0].log_softmax(-1)
    with dnd.engine.running(["probe"]):
        adapted = dnd.base.model(input_ids=ids).logits[0].log_softmax(-1)
    expected = torch.nn.functional.kl_div(base, adapted, reduction="batchmean", log_target=True).item()
    probe = Probe(dnd.engine)
    assert probe.kl(flat) == pytest.approx(expected, rel=1e-4) and expected > 0.0
    assert probe.kl(torch.zeros_like(flat)) == 0.0
    assert probe.kl(flat) == pytest.approx(expected, rel=1e-4)  # the base's side was computed without adapter


def test_completions_name_their_adapter(dnd: DnD) -> None:
    made = dnd.adapt(prompts_of("upper"), name="upper").adapter
    plain, by_value, by_name = (dnd.complete("hello", adapter=a, max_new_tokens=8) for a in (None, made, "upper"))
    assert (plain.adapter, plain.decision) == (None, "base")
    assert (by_name.adapter, by_name.decision) == ("upper", "reuse")
    assert by_name == by_value and by_name.text != plain.text
    assert by_name.usage["prompt_tokens"] == plain.usage["prompt_tokens"] > 5
    assert 1 <= by_name.usage["completion_tokens"] <= 8
    assert dnd.complete([{"role": "user", "content": "hello"}], max_new_tokens=8) == plain


def test_auto_routes_a_single_prompt(world: World) -> None:
    dnd = world.session(reuse=0.98)
    made = dnd.adapt(prompts_of("lower"), name="cats").adapter
    assert dnd.complete("the cat 7 sat on it", adapter="auto", max_new_tokens=4).adapter == made.name
    assert dnd.complete("0123456789 ** 99 !!", adapter="auto", max_new_tokens=4).decision == "base"
    assert dnd.route("the cat 7 sat on it").adapter == made
    chat = [{"role": "system", "content": "0 1 2"}, {"role": "user", "content": "the cat 7 sat on it"}]
    assert dnd.complete(chat, adapter="auto", max_new_tokens=4).adapter == made.name
    with pytest.raises(InputError, match="no user message"):
        dnd.complete([{"role": "system", "content": "x"}], adapter="auto")


def test_a_batch_of_mixed_adapters_equals_one_by_one(dnd: DnD) -> None:
    names = [dnd.adapt(prompts_of(t), name=t).adapter.name for t in ("upper", "lower", "digits")]
    prompts, adapters = ["hello", "hello", "what", "why not"], [*names, None]
    together = dnd.complete_batch(prompts, adapters=adapters, max_new_tokens=6)
    assert together == [dnd.complete(p, adapter=a, max_new_tokens=6) for p, a in zip(prompts, adapters, strict=True)]
    assert [c.adapter for c in together] == adapters
    assert dnd.complete_batch(["hello"], max_new_tokens=6)[0].decision == "base"


def test_a_list_with_more_adapters_than_slots_is_answered(world: World) -> None:
    few, many = world.session(n_slots=1), world.session(n_slots=4)
    adapters = [few.adapt(prompts_of(task), name=task).adapter for task in ("upper", "digits", "lower")] * 2
    want = [many.complete("hello", a, max_new_tokens=6) for a in adapters]
    assert few.complete_batch(["hello"] * 6, adapters=adapters, max_new_tokens=6) == want
    assert len({w.text for w in want}) == 3 and len(few.engine.bank.resident()) == 1


def test_with_one_seed_the_rows_of_a_batch_draw_apart(dnd: DnD) -> None:
    warm = {"max_new_tokens": 8, "temperature": 1.0}
    first, second = dnd.complete_batch(["hello", "hello"], seed=5, **warm)
    assert [first, second] == [dnd.complete("hello", seed=seed, **warm) for seed in (5, 6)] and first != second


def test_streamed_pieces_join_to_the_whole_answer(dnd: DnD) -> None:
    made = dnd.adapt(prompts_of("upper")).adapter
    stream = dnd.stream("hello", adapter=made, max_new_tokens=12)
    pieces = list(stream)
    assert "".join(pieces) == stream.result.text
    assert stream.result == dnd.complete("hello", adapter=made, max_new_tokens=12)
    assert dnd.stream("hello", max_new_tokens=5).result == dnd.complete("hello", max_new_tokens=5)


def test_a_cancelled_stream_ends_early_and_has_a_result(dnd: DnD) -> None:
    with torch.no_grad():
        dnd.base.model.get_output_embeddings().weight[dnd.base.tokenizer.eos_token_id] = 0.0  # it never ends by itself
    assert dnd.complete("hello", max_new_tokens=200).usage["completion_tokens"] == 200
    stream = dnd.stream("hello", max_new_tokens=200)
    next(stream)
    stream.cancel()
    assert stream.result.usage["completion_tokens"] < 200
    with dnd.stream("hello", max_new_tokens=400) as closed:
        next(closed)
    with pytest.raises(RuntimeError, match="closed before its end"):
        _ = closed.result


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda d: d.complete("x", adapter="nope"), AdapterNotFoundError, "no adapter 'nope'"),
        (lambda d: d.complete("x", heat=1), ConfigError, "unknown sampling option.*heat"),
        (lambda d: d.complete("x", temperature=-1.0), ConfigError, "temperature must be"),
        (lambda d: d.complete("x" * 9999), InputError, "at most .* fit"),
        (lambda d: d.complete([]), InputError, "no messages"),
        (lambda d: d.complete_batch("x"), InputError, "must be a list"),
        (lambda d: d.complete_batch(["x"], adapters=[None, None]), InputError, "1 prompts but 2 adapters"),
    ],
)
def test_bad_requests(dnd: DnD, call: Any, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        call(dnd)


def test_adapters_beyond_the_slots_come_back_on_demand(world: World) -> None:
    dnd = world.session(n_slots=1)
    for task in ("upper", "lower", "digits"):
        dnd.adapt(prompts_of(task), name=task)
    fresh = {t: world.session().complete("hello", adapter=t, max_new_tokens=6) for t in ("upper", "lower", "digits")}
    for task in ("upper", "digits", "upper", "lower"):
        assert dnd.complete("hello", adapter=task, max_new_tokens=6) == fresh[task]
        assert len(dnd.engine.bank.resident()) == 1


def test_four_threads_get_what_one_thread_gets(world: World) -> None:
    """8 adapters in 6 slots, 4 x 250 calls: nothing is mixed up."""
    dnd = world.session(n_slots=6)
    store = dnd.store
    names: list[str | None] = [None]
    for i in range(8):
        flat = random_flat(dnd.layout, seed=i, std=0.3)
        names.append(
            store.put(
                flat,
                dnd.layout,
                base_name="tiny",
                base_fingerprint=dnd.base.fingerprint,
                source="trained",
                name=f"t{i}",
            ).name
        )
    calls = [(f"question {i % 13}", names[(7 * i) % len(names)]) for i in range(250)]
    expected = {c: dnd.complete(c[0], adapter=c[1], max_new_tokens=2) for c in set(calls)}
    assert len({e.text for e in expected.values()}) > 20
    start = threading.Barrier(4)

    def work(seed: int) -> list[bool]:
        start.wait()
        order = [calls[(i * 17 + seed) % len(calls)] for i in range(len(calls))]
        return [dnd.complete(p, adapter=a, max_new_tokens=2) == expected[(p, a)] for p, a in order]

    with ThreadPoolExecutor(4) as pool:
        results = [ok for part in pool.map(work, range(4)) for ok in part]
    assert len(results) == 1000 and all(results)


def test_threads_adapting_the_same_prompts_make_one_adapter(dnd: DnD) -> None:
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: dnd.adapt(prompts_of("upper")), range(4)))
    assert sorted(r.decision for r in found) == ["generate", "reuse", "reuse", "reuse"]
    assert len({r.adapter for r in found}) == len(dnd.store.ls()) == 1


def test_imported_adapters_are_found_by_their_prompts(dnd: DnD, tmp_path: Path) -> None:
    made = dnd.adapt(prompts_of("upper"), name="upper").adapter
    dnd.store.export("upper", tmp_path / "out")
    (tmp_path / "out" / "dnd.json").unlink()
    flat = dnd.store.load(made, dnd.layout)
    dnd.store.rm("upper")
    back = dnd.import_adapter(tmp_path / "out", name="back", prompts=prompts_of("upper"))
    assert (back.source, back.encoder, back.encoder_fingerprint) == (
        "imported",
        dnd.encoder.name,
        dnd.encoder.fingerprint,
    )
    assert torch.equal(dnd.store.load(back, dnd.layout), flat)
    assert dnd.route(prompts_of("upper")).adapter == back
    assert dnd.complete("hello", adapter="back", max_new_tokens=5).adapter == "back"


def test_close_empties_the_slots_and_the_context_manager_closes(dnd: DnD) -> None:
    with dnd:
        dnd.adapt(prompts_of("upper"))
        assert dnd.engine.bank.resident()
    assert dnd.engine.bank.resident() == []


def test_load_makes_a_session_from_folders(world: World) -> None:
    dnd = DnD.load(str(world.base), world.generator, home=world.home)
    assert (dnd.layout, dnd.encoder.name, dnd.home) == (dnd.generator.layout, str(world.encoder), world.home)
    assert dnd.adapt(prompts_of("upper")).decision == "generate"
    assert dnd.adapt(prompts_of("upper")).decision == "reuse"
    bare = DnD.load(str(world.base), encoder=str(world.encoder), home=world.home)
    assert bare.generator is None and bare.layout.r == 8


def test_load_refuses_what_does_not_fit(world: World, tmp_path: Path) -> None:
    other = save_base(tmp_path / "other", seed=5)
    with pytest.raises(LayoutMismatchError, match="same shapes, other weights"):
        DnD.load(str(other), world.generator, home=world.home)
    with pytest.raises(GeneratorError, match="no generator folder"):
        DnD.load(str(world.base), tmp_path / "nothing", home=world.home)
    (tmp_path / "empty").mkdir()
    with pytest.raises(GeneratorError, match=r"no config\.json"):
        DnD.load(str(world.base), tmp_path / "empty", home=world.home)
    assert not world.home.root.exists()


def test_an_adapter_of_another_base_is_refused(world: World) -> None:
    dnd = world.session()
    flat = random_flat(dnd.layout)
    dnd.store.put(flat, dnd.layout, base_name="x", base_fingerprint="other", source="trained", name="foreign")
    before = logits(dnd)
    with pytest.raises(LayoutMismatchError, match="made for another base model"):
        dnd.complete("hello", adapter="foreign")
    assert dnd.engine.bank.resident() == [] and torch.equal(logits(dnd), before)


def test_a_store_shared_by_two_sessions_stays_in_step(world: World) -> None:
    one, two = world.session(), world.session()
    made = one.adapt(prompts_of("upper"), name="shared")
    assert two.complete("hello", adapter="shared", max_new_tokens=4).adapter == "shared"
    assert two.adapt(prompts_of("upper")).adapter == made.adapter
    AdapterStore(world.home).rm("shared")
    assert two.route(prompts_of("upper")).decision == "generate"
    assert two.adapt(prompts_of("upper")).decision == "generate"

"""What cannot be adapted to, or fails on the way, leaves a session as it was."""

from __future__ import annotations

from operator import attrgetter
from typing import Any

import pytest
import torch
from adapter_folders import listed
from helpers import random_flat
from session_parts import Interrupt, logits, state
from tiny_world import World, prompts_of

from dnd_sdk.adaptation import Limits
from dnd_sdk.adaptation.vetting import PROBE, PROBE_TOKENS, Probe, Vetting
from dnd_sdk.errors import BankFullError, ConfigError, InputError, StorageError
from dnd_sdk.session import DnD


@pytest.fixture
def dnd(world: World) -> DnD:
    return world.session()


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
    assert not [name for name in listed(dnd.store.root) if name.startswith(".")]
    assert dnd.adapt(prompts_of("upper")).decision == "generate"  # and it works afterwards


def test_adapting_does_not_wait_for_a_slot_and_who_asks_for_the_adapter_does(world: World) -> None:
    dnd = world.session(n_slots=2)
    first = dnd.adapt(prompts_of("upper")).adapter
    second = dnd.adapt(prompts_of("digits")).adapter
    dnd.engine.bank.wait_s = 0.05
    with dnd.engine.bank.lease([first.id, second.id]):
        made = dnd.adapt(prompts_of("lower"))
        assert made.decision == "generate" and set(dnd.engine.resident()) == {first.id, second.id}
        with pytest.raises(BankFullError, match="adapter slots"):
            dnd.complete("hi", made.adapter, max_new_tokens=2)
    assert dnd.complete("hi", made.adapter, max_new_tokens=2).adapter == made.adapter.name
    assert made.adapter.id in dnd.engine.resident()


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

"""`DnD.observe`: tasks adapted to once, across restarts, failures, threads and removed adapters; and its log."""

from __future__ import annotations

import logging
import random
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
import torch
from session_parts import Interrupt
from tiny_world import World, prompts_of

from dnd_sdk.errors import InputError, StorageError
from dnd_sdk.observing import observer as observing
from dnd_sdk.observing.prompt_stream import StreamSettings
from dnd_sdk.routing import Thresholds
from dnd_sdk.routing.decision_log import LOG_FILE, read_decisions
from dnd_sdk.routing.replay import replay_decisions
from dnd_sdk.session import DnD

TASKS = ("upper", "digits", "lower")


def tell_apart(dnd: DnD, monkeypatch: pytest.MonkeyPatch) -> DnD:
    """Give the tasks of `prompts_of` embeddings that a random encoder cannot: near within, orthogonal between."""
    real = dnd.encoder.encode

    def encode(prompts: Any, **how: Any) -> Any:
        own = torch.tensor([[len(p) % 7 / 50.0, p[0].isupper(), p[0].isdigit(), p[0].islower()] for p in prompts])
        wide = torch.nn.functional.pad(own.float(), (0, dnd.encoder.width - 4))
        return replace(real(prompts, **how), pooled=torch.nn.functional.normalize(wide, dim=1))

    monkeypatch.setattr(dnd.encoder, "encode", encode)
    return dnd


def test_a_mixed_stream_is_sorted_into_tasks_and_each_adapted_once(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    dnd = tell_apart(world.session(stream=StreamSettings(min_prompts=8)), monkeypatch)
    mixed = [p for three in zip(*(prompts_of(t, 12) for t in ("upper", "digits", "lower")), strict=True) for p in three]
    results = [dnd.observe(p) for p in mixed]
    adapted = [r.adapted for r in results if r.adapted is not None]
    assert [(a.decision, a.n_prompts) for a in adapted] == [("generate", 8)] * 3
    assert len(dnd.store.ls()) == 3
    assert all(r.adapter is None for r in results[:21]) and all(r.adapter is not None for r in results[21:])
    assert [r.adapter for r in results[-3:]] == [a.adapter for a in adapted]
    assert len({r.cluster for r in results}) == len({r.adapter.name for r in results if r.adapter}) == 3
    assert dnd.complete(mixed[-1], adapter=results[-1].adapter, max_new_tokens=3).adapter == adapted[-1].adapter.name


def test_an_adaptation_that_fails_is_tried_again_with_the_next_prompt(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    dnd = tell_apart(world.session(stream=StreamSettings(min_prompts=4)), monkeypatch)
    prompts = prompts_of("upper")
    for p in prompts[:3]:
        assert dnd.observe(p).adapter is None
    with monkeypatch.context() as patched:
        patched.setattr(dnd.store, "put", Interrupt(None, StorageError("disk full"), after=False))
        with pytest.raises(StorageError, match="disk full"):
            dnd.observe(prompts[3])
    again = dnd.observe(prompts[4])
    assert again.adapted is not None and again.adapted.n_prompts == 5
    assert again.adapter == again.adapted.adapter is not None
    assert dnd.observe(prompts[5]).adapted is None


def test_observed_prompts_use_adapters_that_exist_already(world: World) -> None:
    made = world.session().adapt(prompts_of("lower")).adapter
    dnd = world.session(reuse=0.98)
    assert dnd.observe("the cat 7 sat on it").adapter == made
    with pytest.raises(InputError, match="blank"):
        dnd.observe("  ")


def observed(dnd: DnD, prompts: list[str]) -> list[tuple[int, str | None, bool]]:
    """Cluster, adapter and whether it adapted, per prompt."""
    results = [dnd.observe(p) for p in prompts]
    return [(r.cluster, r.adapter and r.adapter.name, r.adapted is not None) for r in results]


def shuffled(n: int = 16) -> list[str]:
    mixed = [p for task in TASKS for p in prompts_of(task, n)]
    random.Random(0).shuffle(mixed)
    return mixed


def small(world: World, monkeypatch: pytest.MonkeyPatch, n: int = 8) -> DnD:
    return tell_apart(world.session(stream=StreamSettings(min_prompts=n)), monkeypatch)


@pytest.mark.parametrize("at", [5, 24, 40])
def test_a_restart_in_the_middle_changes_nothing(
    world: World, monkeypatch: pytest.MonkeyPatch, at: int, tmp_path: Any
) -> None:
    elsewhere = world._replace(home=replace(world.home, root=tmp_path / "elsewhere"))
    expected = observed(small(elsewhere, monkeypatch), shuffled())
    with small(world, monkeypatch) as dnd:
        found = observed(dnd, shuffled()[:at])
    with small(world, monkeypatch) as dnd:
        found += observed(dnd, shuffled()[at:])
        assert len(dnd.store.ls()) == 3
    assert found == expected and sum(adapted for _, _, adapted in found) == 3


def test_a_crash_forgets_few_prompts_and_no_adapter(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    dnd = small(world, monkeypatch)
    before = observed(dnd, prompts_of("upper", 12))
    again = small(world, monkeypatch)  # the first was never closed
    assert sum(again.observed.sizes().values()) == 8, "what came up to the adaptation"
    assert observed(again, prompts_of("upper", 14)[12:]) == [(before[-1][0], before[-1][1], False)] * 2


def test_it_is_kept_now_and_then_not_with_every_prompt(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    saves: list[int] = []
    monkeypatch.setattr(observing, "save_stream", lambda stream, *_, **__: saves.append(stream.seen))
    monkeypatch.setattr(observing, "SAVE_EVERY", 10)
    with small(world, monkeypatch, 32) as dnd:
        observed(dnd, prompts_of("upper", 25))
        assert saves == [10, 20]
    assert saves == [10, 20, 25]


def test_a_disk_that_refuses_is_warned_of_once(
    world: World, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(observing, "save_stream", Interrupt(None, StorageError("disk full"), after=False))
    monkeypatch.setattr(observing, "SAVE_EVERY", 2)
    with small(world, monkeypatch) as dnd:
        assert observed(dnd, prompts_of("upper", 12))[-1][1] is not None
    assert caplog.text.count("the prompt stream is not kept: disk full") == 1


def test_nothing_is_read_or_written_without_observing(world: World) -> None:
    with world.session():
        pass
    assert not world.home.streams.exists()


def test_another_encoder_or_base_has_a_stream_of_its_own(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    with small(world, monkeypatch) as dnd:
        observed(dnd, prompts_of("upper", 3))
    other = world.session(generator=False)
    other.encoder.fingerprint = "f" * 64
    assert DnD(replace(other.parts, generator=None)).observed.sizes() == {}


def test_late_prompts_refine_what_the_router_knows(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    dnd, writes = small(world, monkeypatch), []
    real = dnd.store.set_exemplars
    monkeypatch.setattr(dnd.store, "set_exemplars", lambda a, e: (writes.append(len(e)), real(a, e))[1])
    made = observed(dnd, prompts_of("upper", 15))[-1][1]
    other = world.session()  # another process, say
    before = other.route("QUESTION 3 ABOUT THE ORDER").score
    assert not writes and dnd.store.get(str(made)).refined is None
    observed(dnd, prompts_of("upper", 40)[15:])
    assert writes == [16, 32], "once each time it has doubled"
    stored = dnd.store.exemplars(dnd.store.get(str(made)))
    assert stored is not None and len(stored) == 32 and dnd.store.get(str(made)).refined is not None
    assert dnd.store.verify() == []
    assert other.route("QUESTION 3 ABOUT THE ORDER").score != before, "the other session has read them"


def test_a_reused_adapter_is_not_refined(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    tell_apart(world.session(), monkeypatch).adapt(prompts_of("upper"), name="mine")
    dnd = small(world, monkeypatch)
    assert {name for _, name, _ in observed(dnd, prompts_of("upper", 40))} == {"mine"}
    assert dnd.store.get("mine").refined is None


def test_a_task_with_an_adapter_is_known_by_a_handful_of_prompts(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    tell_apart(world.session(), monkeypatch).adapt(prompts_of("upper"), name="mine")
    dnd = small(world, monkeypatch, 16)
    dnd.router.thresholds = Thresholds(reuse=0.9, reuse_single=2.0, support=-1.0)  # one prompt says nothing
    found = observed(dnd, [f"QUESTION {i} OF ANOTHER WORDING" for i in range(20)])
    assert [name for _, name, _ in found] == [None] * 7 + ["mine"] * 13
    assert [adapted for _, _, adapted in found].index(True) == 15, "chosen again when there is enough of it"
    assert len(dnd.store.ls()) == 1


def test_a_removed_adapter_is_made_anew(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    dnd = small(world, monkeypatch)
    made = observed(dnd, prompts_of("upper", 9))[-1][1]
    dnd.store.rm(str(made))
    again = dnd.observe(prompts_of("upper", 10)[9])
    assert again.adapted is not None and again.adapted.decision == "generate" and len(dnd.store.ls()) == 1


def test_a_decision_for_the_base_is_final(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    dnd = tell_apart(world.session(generator=False, stream=StreamSettings(min_prompts=8)), monkeypatch)
    assert [a for _, _, a in observed(dnd, prompts_of("upper", 20))].count(True) == 1
    dnd.close()
    dnd = tell_apart(world.session(generator=False, stream=StreamSettings(min_prompts=8)), monkeypatch)
    assert observed(dnd, ["QUESTION 77 ABOUT THE ORDER"]) == [(0, None, False)]


def test_a_prompt_with_half_a_character_blocks_nothing(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    dnd = small(world, monkeypatch)
    found = observed(dnd, ["QUESTION \ud800 ABOUT THE ORDER", *prompts_of("upper", 7)])
    assert found[-1][2] and found[-1][1] is not None


def test_threads_make_one_adapter_per_task(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    dnd = small(world, monkeypatch)
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(dnd.observe, shuffled(20)))
    assert Counter(r.adapted.decision for r in results if r.adapted) == {"generate": 3} and len(dnd.store.ls()) == 3


def test_every_decision_is_logged_without_a_prompt(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    dnd = small(world, monkeypatch)
    prompts = shuffled(12)
    observed(dnd, prompts)
    dnd.complete("the cat sat on it", adapter="auto", max_new_tokens=1)
    found, n_bad = read_decisions(world.home.logs)
    assert n_bad == 0 and Counter(d.kind for d in found) == {"observe": len(prompts), "adapt": 3, "auto": 1}
    assert {d.decision for d in found if d.kind == "adapt"} == {"generate"}
    assert {d.by for d in found if d.kind == "observe"} == {"scores", "cluster"}
    assert all(d.cluster is not None for d in found if d.kind == "observe")
    text = (world.home.logs / LOG_FILE).read_text()
    assert "QUESTION" not in text and "cat" not in text
    assert replay_decisions(found, dnd.router.thresholds)[0] == []
    assert len(replay_decisions(found, Thresholds(reuse=-1.0, reuse_single=-1.0, support=-1.0))[0]) > 0


def test_a_log_that_cannot_be_written_stops_nothing(
    world: World, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    world.home.root.mkdir()
    world.home.logs.write_text("in the way")
    with caplog.at_level(logging.WARNING):
        assert observed(small(world, monkeypatch), prompts_of("upper", 9))[-1][1] is not None
    assert caplog.text.count("decisions are not logged") == 1

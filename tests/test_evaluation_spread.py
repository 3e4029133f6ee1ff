"""An evaluation over workers is the evaluation alone: the same report, the same answers kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from spread_parts import Backwards, eval_task
from tiny_world import World

from dnd_sdk.errors import ConfigError
from dnd_sdk.evaluation import EvalSettings, Standing, evaluate_on, evaluate_session
from dnd_sdk.evaluation.cache import Answer, AnswerCache, CollectedAnswers
from dnd_sdk.protocols import ThisProcess
from dnd_sdk.session import DnD

TASKS = [eval_task(name) for name in ("upper", "digits")]
METHODS = ["base", "generated", "shuffled", "scratch-2"]


def load_arguments(world: World) -> dict[str, Any]:
    """Of a session whose answers are the same, bit by bit, whatever it was asked before."""
    parts = {"base": str(world.base), "generator": str(world.generator), "encoder": str(world.encoder)}
    return {**parts, "home": str(world.home.root), "deterministic": True}


def kept(folder: Path) -> dict[Any, Any]:
    """What a run folder says of every unit, and its answers."""
    cache = AnswerCache(folder / "results.jsonl")
    return {name: (about, cache.get(about["key"])) for name, about in cache.units.items()}


def test_workers_give_the_report_of_the_session(world: World, tmp_path: Path) -> None:
    load = load_arguments(world)
    alone, spread = (
        EvalSettings(limit=3, max_new_tokens=5, seeds=2, unrelated=1, run_dir=tmp_path / d) for d in ("a", "b")
    )
    report = evaluate_session(DnD.load(**load), TASKS, METHODS, alone)
    told: list[Standing] = []
    assert evaluate_on(Backwards(), load, TASKS, METHODS, spread, told.append) == report
    assert report["failures"] == [] and len(report["methods"]) == len(METHODS)
    assert [(n.done, n.total) for n in told] == [(i, 2 * 7) for i in range(1, 15)]
    assert kept(tmp_path / "a") == kept(tmp_path / "b")

    again: list[Standing] = []
    assert evaluate_on(ThisProcess(), load, TASKS, METHODS, spread, again.append) == report
    assert all(n.cached for n in again) and len(again) == 14


def test_a_unit_that_fails_is_among_the_failures_and_the_others_count(world: World) -> None:
    settings = EvalSettings(limit=2, max_new_tokens=3)
    workers = Backwards("task digits, method generated, seed 0")
    report = evaluate_on(workers, load_arguments(world), TASKS, ["base", "generated"], settings)
    [failure] = report["failures"]
    assert (failure["task"], failure["method"], failure["seed"]) == ("digits", "generated", 0)
    assert "no such luck" in failure["error"]
    assert list(report["methods"]["generated"]["tasks"]) == ["upper"]


def test_what_cannot_be_is_refused(world: World, tmp_path: Path) -> None:
    load = load_arguments(world)
    with pytest.raises(ConfigError, match="unknown evaluation methods"):
        evaluate_on(Backwards(), {}, TASKS, ["magic"], EvalSettings())
    with pytest.raises(ConfigError, match="needs a zoo"):
        evaluate_on(Backwards(), load, TASKS, ["nearest"], EvalSettings())
    with pytest.raises(ConfigError, match="'oracle' to compare against is not run"):
        evaluate_on(Backwards(), load, TASKS, [], EvalSettings(against="oracle"))


def test_a_worker_reads_what_is_kept_and_writes_nothing(tmp_path: Path) -> None:
    file = tmp_path / "results.jsonl"
    AnswerCache(file).put("k", {"r1": Answer("yes", 0)}, task="t", method="m", seed=0)
    with file.open("ab") as f:
        f.write(b'{"key": "k", "ta')  # of one who is writing
    before = file.read_bytes()
    worker = CollectedAnswers(file)
    assert worker.get("k") == {"r1": Answer("yes", 0)}
    worker.put("k", {"r2": Answer("no", 1)}, task="t", method="m", seed=0)
    [record] = worker.collect()
    assert file.read_bytes() == before and worker.collect() == []
    writer = AnswerCache(file)
    writer.add(record)
    assert writer.get("k") == AnswerCache(file).get("k") == {"r1": Answer("yes", 0), "r2": Answer("no", 1)}
    assert AnswerCache(file).units == writer.units

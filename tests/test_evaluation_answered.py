"""What is kept of an evaluation: nothing is asked twice, and a report needs no model."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
from eval_fakes import FIVE, LABELS, TASKS, FakeEngine, make_parts, make_task, run

from dnd_sdk.errors import ConfigError, InputError
from dnd_sdk.evaluation import EvalSettings, Standing, evaluate, report_answered
from dnd_sdk.evaluation.drawing import example_rows
from dnd_sdk.evaluation.job import TaskJob
from dnd_sdk.evaluation.treatment import Treatment
from dnd_sdk.tasks.reading import Row, data_hash


def test_examples_change_the_cache_key_and_nothing_else_does() -> None:
    parts, rows = make_parts(), example_rows(TASKS[0], 0, 2)
    job = TaskJob.of(TASKS[0], parts, EvalSettings(limit=4))
    keys = {job.key(Treatment(shots=shots), parts) for shots in ((), rows[:1], rows, rows[::-1])}
    assert len(keys) == 4
    # spelt out: a key that changes loses every answer kept so far
    identity = [data_hash(TASKS[0]), LABELS, 5, "f" * 64, "cpu/float32", None, None]
    assert job.key(Treatment(), parts) == hashlib.sha256(json.dumps(identity).encode()).hexdigest()


def test_a_second_run_answers_from_the_cache(tmp_path: Path) -> None:
    first, second = make_parts(), make_parts()
    told: list[Standing] = []
    expected = run(first, seeds=2, run_dir=tmp_path)
    again = evaluate(second, TASKS, FIVE, EvalSettings(limit=4, seeds=2, run_dir=tmp_path), told.append)
    assert again == expected
    assert second.engine.asked == []
    assert all(p.cached and p.eta_s is None for p in told)
    assert (told[-1].done, told[-1].total) == (21, 21)  # 3 tasks x (3 unseeded + 2 x 2 seeded)


def test_an_interrupted_run_goes_on_where_it_was(tmp_path: Path) -> None:
    expected = run(make_parts())
    with pytest.raises(KeyboardInterrupt):
        run(make_parts(engine=FakeEngine(interrupt_after=6)), run_dir=tmp_path)
    kept = (tmp_path / "results.jsonl").read_bytes()
    assert kept.count(b"\n") == 6
    (tmp_path / "results.jsonl").write_bytes(kept[:-20])  # torn last line
    resumed = make_parts()
    assert run(resumed, run_dir=tmp_path) == expected
    assert len(resumed.engine.batches) == 15 - 5
    last = make_parts()
    assert run(last, run_dir=tmp_path) == expected and last.engine.batches == []


@pytest.mark.parametrize(
    "change",
    [
        {"base_fingerprint": "e" * 64},
        {"numerics": "cuda/bfloat16"},
    ],
)
def test_another_base_is_not_answered_from_the_cache(tmp_path: Path, change: dict[str, str]) -> None:
    run(make_parts(), ["base"], run_dir=tmp_path)
    other = make_parts(**change)
    run(other, ["base"], run_dir=tmp_path)
    assert len(other.engine.batches) == 3


def test_more_rows_ask_only_the_new_ones(tmp_path: Path) -> None:
    expected = run(make_parts(), ["base", "zero"], limit=6)
    few = run(make_parts(), ["base", "zero"], limit=2, run_dir=tmp_path)
    parts, told = make_parts(), []
    more = evaluate(parts, TASKS, ["base", "zero"], EvalSettings(limit=6, run_dir=tmp_path), told.append)
    assert more == expected != few
    assert parts.engine.batches == [4] * 6 and not any(p.cached for p in told)
    again = make_parts()
    assert run(again, ["base", "zero"], limit=2, run_dir=tmp_path) == few and again.engine.batches == []


def test_rows_that_ask_the_same_are_asked_once(tmp_path: Path) -> None:
    same = make_task(
        "same", test=(Row("one", "yes", "test"), Row("one", "no", "test"), Row("one", "no", "test", "kind"))
    )
    parts = make_parts()
    found = run(parts, ["base"], tasks=[same], limit=3, run_dir=tmp_path)["methods"]["base"]["tasks"]["same"]
    assert parts.engine.batches == [2] and found["n"] == 3
    assert found["option_accuracy"] == pytest.approx(1 / 3)  # an odd prompt's choice is "yes"


def test_what_was_answered_is_reported_without_a_model(tmp_path: Path) -> None:
    settings = {"limit": 4, "seeds": 2, "run_dir": tmp_path, "against": "zero"}
    expected = run(make_parts(), **settings)
    assert report_answered(TASKS, FIVE, EvalSettings(**settings)) == expected
    assert report_answered(TASKS, [], EvalSettings(**settings)) == expected  # in the order they were run
    few = report_answered(TASKS[:1], ["zero", "base"], EvalSettings(**settings | {"limit": 2}))
    assert few["methods"]["zero"]["tasks"].keys() == {"alpha"} and few["methods"]["zero"]["tasks"]["alpha"]["n"] == 2
    more = report_answered(TASKS, FIVE, EvalSettings(**settings | {"limit": 6}))
    assert len(more["failures"]) == 3 * 3 + 2 * 3 * 2
    assert more["failures"][0]["error"] == "2 of 6 rows are not answered yet"
    assert more["methods"]["base"]["tasks"] == {}


def test_a_task_without_test_rows_fails_alone_there_too(tmp_path: Path) -> None:
    tasks = [*TASKS, make_task("bad", test=())]
    expected = run(make_parts(), ["base"], tasks=tasks, run_dir=tmp_path)
    assert report_answered(tasks, ["base"], EvalSettings(limit=4, run_dir=tmp_path)) == expected
    assert [f["task"] for f in expected["failures"]] == ["bad"]


def test_the_last_answers_of_a_unit_are_those_reported(tmp_path: Path) -> None:
    run(make_parts(), ["zero"], run_dir=tmp_path)
    other = make_parts()
    other.generator.mean, other.generator.id = (lambda: torch.ones(4)), "gen1"
    later = run(other, ["zero"], run_dir=tmp_path)
    assert report_answered(TASKS, ["zero"], EvalSettings(limit=4, run_dir=tmp_path)) == later
    assert later["generator"] == "gen1" and later["methods"]["zero"]["mean"]["exact_match"] > 0
    back = run(make_parts(), ["zero"], run_dir=tmp_path)  # nothing new is asked, but it is noted whose answers count
    assert report_answered(TASKS, ["zero"], EvalSettings(limit=4, run_dir=tmp_path)) == back != later


def test_what_cannot_be_reported_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no answers"):
        report_answered(TASKS, FIVE, EvalSettings(run_dir=tmp_path / "mistyped"))
    assert not (tmp_path / "mistyped").exists()
    for settings in (EvalSettings(), EvalSettings(run_dir=tmp_path, unrelated=1)):
        with pytest.raises(ConfigError, match="run folder"):
            report_answered(TASKS, FIVE, settings)
    run(make_parts(), ["base"], run_dir=tmp_path)
    with pytest.raises(ConfigError, match="unknown evaluation methods"):
        report_answered(TASKS, ["magic"], EvalSettings(run_dir=tmp_path))


def test_parts_answer_what_a_run_of_all_tasks_asks(tmp_path: Path) -> None:
    expected = run(make_parts())
    found: list[str] = []
    for k in (1, 2):
        report = run(make_parts(), run_dir=tmp_path, part=(k, 2))
        assert report["settings"]["part"] == (k, 2)
        found += report["methods"]["base"]["tasks"]
    whole = make_parts()
    assert run(whole, run_dir=tmp_path) == expected and whole.engine.batches == []
    assert found == ["alpha", "gamma", "beta"]
    for part in ((0, 2), (3, 2), (1, 0)):
        with pytest.raises(ConfigError, match="part"):
            EvalSettings(part=part)


def test_other_limits_and_weights_are_not_answered_from_the_cache(tmp_path: Path) -> None:
    run(make_parts(), ["base", "zero"], run_dir=tmp_path)
    parts = make_parts()
    run(parts, ["base"], run_dir=tmp_path, max_new_tokens=3)
    assert len(parts.engine.batches) == 3
    parts = make_parts()
    parts.generator.mean = lambda: parts.generator.generate(-torch.ones(3))
    run(parts, ["zero"], run_dir=tmp_path)
    assert len(parts.engine.batches) == 3

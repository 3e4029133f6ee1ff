from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from eval_fakes import LABELS, FakeEngine, make_parts, make_task

from dnd_sdk.errors import ConfigError, StorageError
from dnd_sdk.evaluation import EvalSettings, Parts, Progress, evaluate, render
from dnd_sdk.evaluation.scoring import mean_ci95
from dnd_sdk.tasks import Row

TASKS = [make_task("alpha"), make_task("beta", answer_type="short-text", metric="rouge_l"), make_task("gamma")]
FIVE = ["base", "instruction", "generated", "shuffled", "zero"]


def run(parts: Parts, methods: list[str] = FIVE, **changes: Any) -> dict[str, Any]:
    tasks = changes.pop("tasks", TASKS)
    return evaluate(parts, tasks, methods, EvalSettings(**{"limit": 4} | changes))


def test_the_report_keeps_the_contract() -> None:
    report = json.loads(json.dumps(run(make_parts(), seeds=2), allow_nan=False))
    assert (report["schema_version"], report["base"], report["generator"]) == (1, "tiny", "gen0")
    assert list(report["methods"]) == FIVE and report["failures"] == []
    assert report["settings"]["limit"] == 4 and report["settings"]["n_tasks"] == 3
    for name, block in report["methods"].items():
        assert set(block["tasks"]) == {"alpha", "beta", "gamma"}
        assert set(block["tasks"]["alpha"]) == {"exact_match", "rouge_l", "option_accuracy", "valid_format", "n"}
        assert block["tasks"]["alpha"]["rouge_l"] is None and block["tasks"]["alpha"]["n"] == 4
        assert block["tasks"]["beta"]["option_accuracy"] is None
        assert set(block["ci95"]) == {"exact_match", "rouge_l", "option_accuracy", "valid_format"}
        assert ("delta_vs_base" in block["mean"]) == (name != "base")


def test_scores_follow_what_the_engine_said() -> None:
    methods = run(make_parts())["methods"]
    # the fake engine says "Yes." with a generated adapter, "no" with the mean one, chats without
    assert [methods[m]["tasks"]["alpha"]["exact_match"] for m in FIVE] == [0, 0, 1, 1, 0]
    assert [methods[m]["tasks"]["alpha"]["valid_format"] for m in FIVE] == [0, 0, 1, 1, 1]
    assert methods["generated"]["mean"]["exact_match"] == pytest.approx(2 / 3)
    delta = methods["generated"]["mean"]["delta_vs_base"]["exact_match"]
    assert delta["mean"] == pytest.approx(2 / 3)
    assert delta["ci95"] == mean_ci95([1.0, 0.0, 1.0])[1] == (0.0, 1.0)
    assert methods["base"]["mean"]["rouge_l"] == 0.0
    # of three tasks the base is in the asked format on one, the generated adapter on all
    assert methods["base"]["mean"]["valid_format"] == pytest.approx(1 / 3)
    assert methods["generated"]["mean"]["delta_vs_base"]["valid_format"]["mean"] == pytest.approx(2 / 3)


def test_answers_and_options_are_matched_to_their_own_rows() -> None:
    class Echo(FakeEngine):
        def complete_batch(self, messages_list: Any, adapter_ids: Any, options: Any) -> list[SimpleNamespace]:
            return [SimpleNamespace(text=m[-1]["content"]) for m in messages_list]

    prompts = [f"row {i} {'x' * (7 * i % 5)}" for i in range(12)]
    echo = make_task("echo", answer_type="short-text", test=tuple(Row(p, p, "test") for p in prompts))
    odd = make_task("odd", test=tuple(Row(p, LABELS[0] if len(p) % 2 else LABELS[1], "test") for p in prompts))
    tasks = run(make_parts(engine=Echo()), ["base"], tasks=[echo, odd], limit=12)["methods"]["base"]["tasks"]
    assert tasks["echo"]["exact_match"] == 1.0
    assert tasks["odd"]["option_accuracy"] == 1.0 and tasks["odd"]["exact_match"] == 0.0


def test_a_task_is_asked_greedily_with_its_own_token_limit() -> None:
    parts = make_parts()
    run(parts, ["base"], tasks=TASKS[:2], limit=6)
    assert [o.max_new_tokens for o in parts.engine.options] == [5, 6]  # longest train response + 4
    assert all(o.temperature == 0.0 for o in parts.engine.options)
    run(parts, ["base"], tasks=TASKS[:1], max_new_tokens=2)
    assert parts.engine.options[-1].max_new_tokens == 2


def test_every_method_asks_the_same_rows_and_only_instruction_adds_words() -> None:
    parts = make_parts()
    system = [make_task("alpha", test=tuple(r._replace(system="be kind") for r in TASKS[0].test))]
    run(parts, ["base", "instruction", "zero"], tasks=system)
    base, told, zero = parts.engine.asked[:4], parts.engine.asked[4:8], parts.engine.asked[8:]
    assert base == zero and [m[-1] for m in base] == [m[-1] for m in told]
    assert base[0][0] == {"role": "system", "content": "be kind"}
    assert told[0][0]["content"] == "be kind\nAnswer with exactly one of: yes, no. Answer only."
    assert all(m[-1]["content"].startswith("alpha test") for m in parts.engine.asked)


def test_no_adapter_stays_behind() -> None:
    parts = make_parts()
    run(parts)
    assert parts.engine.resident == {}
    broken = make_parts(engine=FakeEngine(fail_on="alpha"))
    run(broken)
    assert broken.engine.resident == {}


def test_one_bad_task_does_not_lose_the_rest() -> None:
    bad = make_task("bad", test=())
    parts = make_parts(engine=FakeEngine(fail_on="beta"))
    report = run(parts, ["base", "zero"], tasks=[*TASKS, bad])
    assert set(report["methods"]["base"]["tasks"]) == {"alpha", "gamma"}
    assert [(f["task"], f["method"]) for f in report["failures"]] == [
        ("beta", "base"),
        ("beta", "zero"),
        ("bad", "base"),
        ("bad", "zero"),
    ]
    assert report["failures"][0]["error"] == "RuntimeError: this row cannot be answered"
    assert "no test rows" in report["failures"][2]["error"]
    assert "alpha" not in json.dumps(report["failures"])


def test_all_tasks_failing_still_gives_a_report() -> None:
    report = run(make_parts(engine=FakeEngine(fail_on=" ")), ["base", "zero"])
    assert report["methods"]["zero"]["mean"]["exact_match"] is None
    assert report["methods"]["zero"]["mean"]["delta_vs_base"]["exact_match"] is None
    json.dumps(report, allow_nan=False)
    assert "| zero |" in render(report)


def test_a_second_run_answers_from_the_cache(tmp_path: Path) -> None:
    first, second = make_parts(), make_parts()
    told: list[Progress] = []
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


def test_other_rows_limits_and_weights_are_not_answered_from_the_cache(tmp_path: Path) -> None:
    run(make_parts(), ["base", "zero"], run_dir=tmp_path)
    for changes in ({"limit": 5}, {"max_new_tokens": 3}):
        parts = make_parts()
        run(parts, ["base"], run_dir=tmp_path, **changes)
        assert len(parts.engine.batches) == 3
    parts = make_parts()
    parts.generator.mean = lambda: parts.generator.generate(-torch.ones(3))
    run(parts, ["zero"], run_dir=tmp_path)
    assert len(parts.engine.batches) == 3


def test_progress_counts_units_and_guesses_the_rest() -> None:
    told: list[Progress] = []
    evaluate(make_parts(), TASKS, ["base", "zero"], EvalSettings(limit=2), told.append)
    assert [(p.done, p.total) for p in told] == [(i, 6) for i in range(1, 7)]
    assert [(p.task, p.method) for p in told[:3]] == [("alpha", "base"), ("alpha", "zero"), ("beta", "base")]
    assert told[-1].eta_s == 0.0 and all(p.eta_s is not None and p.eta_s >= 0 for p in told)


def test_seeds_are_averaged() -> None:
    class BySeed(FakeEngine):
        def _say(self, adapter_id: str | None) -> str:
            said.append(adapter_id)
            return "yes" if len(set(said)) == 1 else "no"

    said: list[str | None] = []
    report = run(make_parts(engine=BySeed()), ["generated"], tasks=[make_task("alpha", n=100)], seeds=2)
    assert report["methods"]["generated"]["tasks"]["alpha"]["exact_match"] == 0.5


def test_settings_and_tasks_are_checked_first(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="limit must be at least 1, got 0"):
        EvalSettings(limit=0)
    with pytest.raises(ConfigError, match="n_prompts must be at most 64, got 65"):
        EvalSettings(n_prompts=65)
    with pytest.raises(ConfigError, match="one or more tasks of different names"):
        run(make_parts(), ["base"], tasks=[TASKS[0], TASKS[0]])
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot use"):
        run(make_parts(), ["base"], run_dir=tmp_path / "file" / "run")


def test_the_table_shows_every_method_in_points() -> None:
    table = render(run(make_parts()))
    assert "| generated | 66.7 [0.0, 100.0]" in table and "+66.7 [+0.0, +100.0]" in table
    assert len(table.splitlines()) == 2 + len(FIVE)

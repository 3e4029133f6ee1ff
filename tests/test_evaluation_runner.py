from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from eval_fakes import FIVE, LABELS, TASKS, FakeEngine, FakeTrainer, make_parts, make_task, run

from dnd_sdk.errors import ConfigError, StorageError
from dnd_sdk.evaluation import EvalSettings, Standing, evaluate, render
from dnd_sdk.evaluation.drawing import example_rows
from dnd_sdk.evaluation.job import MAX_SHOT_TOKENS
from dnd_sdk.evaluation.report import build_report
from dnd_sdk.evaluation.runner import unrelated_tasks
from dnd_sdk.evaluation.scoring import METRICS, mean_ci95, row_means
from dnd_sdk.evaluation.units import Unit
from dnd_sdk.tasks.reading import Row


def test_the_report_keeps_the_contract() -> None:
    report = json.loads(json.dumps(run(make_parts(), seeds=2), allow_nan=False))
    assert (report["schema_version"], report["base"], report["generator"]) == (1, "tiny", "gen0")
    assert list(report["methods"]) == FIVE and report["failures"] == []
    assert report["settings"]["limit"] == 4 and report["settings"]["n_tasks"] == 3
    for name, block in report["methods"].items():
        assert set(block["tasks"]) == {"alpha", "beta", "gamma"}
        paired = set() if name == "base" else {"vs_base"}
        assert set(block["tasks"]["alpha"]) == {*METRICS, "n", *paired}
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
    assert delta["ci95"] == mean_ci95([1.0, 0.0, 1.0])[1] == [0.0, 1.0]
    assert methods["base"]["mean"]["rouge_l"] == 0.0
    # of three tasks the base is in the asked format on one, the generated adapter on all
    assert methods["base"]["mean"]["valid_format"] == pytest.approx(1 / 3)
    assert methods["generated"]["mean"]["delta_vs_base"]["valid_format"]["mean"] == pytest.approx(2 / 3)


def test_answers_and_options_are_matched_to_their_own_rows() -> None:
    class Echo(FakeEngine):
        def complete(self, requests: Any) -> list[SimpleNamespace]:
            return [SimpleNamespace(text=r.chat[-1]["content"]) for r in requests]

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


def test_bare_rows_are_asked_without_what_the_prompts_share(tmp_path: Path) -> None:
    train = tuple(Row(f"Say yes: {i}", "yes", "train", "be kind") for i in range(6))
    told = [make_task("alpha", train=train, test=(Row("Say yes: 9", "yes", "test", "be kind"),)), TASKS[1]]
    parts = make_parts()
    report = run(parts, ["base", "generated"], tasks=told, bare=True, run_dir=tmp_path)
    assert report["settings"]["bare"] is True
    assert [m for m in parts.engine.asked if "Say" in m[-1]["content"]] == []
    assert parts.engine.asked[:2] == [[{"role": "user", "content": "9"}]] * 2
    assert sorted(parts.encoder.seen[0]) == [r.prompt for r in train]  # the condition is whole
    whole = make_parts()
    run(whole, ["base", "generated"], tasks=told[:1], run_dir=tmp_path)
    assert [m[-1]["content"] for m in whole.engine.asked] == ["Say yes: 9"] * 2  # other rows, other answers


def test_examples_are_turns_before_the_question() -> None:
    parts, task = make_parts(), TASKS[0]
    run(parts, ["base", "icl-2"], tasks=[task])
    base, shown = parts.engine.asked[:4], parts.engine.asked[4:]
    for plain, chat in zip(base, shown, strict=True):
        turns = [(m["role"], m["content"]) for m in chat]
        first, second = example_rows(task, 0, 2)
        assert turns[:4] == [
            ("user", first.prompt),
            ("assistant", first.response),
            ("user", second.prompt),
            ("assistant", second.response),
        ]
        assert chat[4:] == plain


@pytest.mark.parametrize(("context", "shown"), [(10_000, 3), (32, 3), (31, 2), (24, 2), (23, 1), (15, 0)])
def test_examples_that_do_not_fit_are_left_out(context: int, shown: int) -> None:
    # 3 words of question, 5 kept for the answer, 8 for every example with its answer
    rows = tuple(Row(f"one two three four five six {i}", "yes", "train") for i in range(3))
    task = make_task("t", train=rows, test=(Row("one two three", "yes", "test"),))
    parts = make_parts(engine=FakeEngine(context=context))
    run(parts, ["icl-3"], tasks=[task])
    assert [len(chat) for chat in parts.engine.asked] == [2 * shown + 1]


def test_examples_stay_within_their_own_limit_too() -> None:
    long = tuple(Row(f"{i} {'word ' * (MAX_SHOT_TOKENS // 2)}", "yes", "train") for i in range(3))
    parts = make_parts()
    run(parts, ["icl-3"], tasks=[make_task("t", train=long)])
    assert {len(chat) for chat in parts.engine.asked} == {3}


def test_an_adapter_is_asked_other_families_beside_the_base() -> None:
    # on "alpha" the base chats and the adapter says "Yes.": right, a gain of 1; on "numbers" both are wrong
    tasks = [make_task("alpha", family="a"), make_task("numbers", answer_type="number", family="b")]
    parts = make_parts()
    report = json.loads(json.dumps(run(parts, ["base", "instruction", "generated"], tasks=tasks, unrelated=1)))
    generated = report["methods"]["generated"]
    assert generated["tasks"]["numbers"]["unrelated"] == {"exact_match": 1.0, "option_accuracy": 0.0}
    assert generated["tasks"]["alpha"]["unrelated"] == {"exact_match": 0.0, "option_accuracy": None}
    assert generated["mean"]["unrelated"]["exact_match"] == {"mean": 0.5, "ci95": [0.0, 1.0], "n": 2}
    assert report["methods"]["instruction"]["tasks"]["alpha"]["unrelated"] is None
    assert report["methods"]["base"]["mean"]["unrelated"] == {"exact_match": None, "option_accuracy": None}
    assert len(parts.engine.batches) == 6 + 2  # the base's own answers are used again
    assert "exact_match elsewhere" in render(report) and parts.engine.resident == {}


def test_unrelated_tasks_are_of_other_families_and_one_bad_one_is_left_out() -> None:
    tasks = [make_task(f"t{i}", family="even" if i % 2 == 0 else "odd") for i in range(8)]
    drawn = unrelated_tasks(tasks[0], tasks, 3, 0)
    assert {t.family for t in drawn} == {"odd"} and len(drawn) == 3
    assert drawn == unrelated_tasks(tasks[0], tasks[::-1], 3, 0) and len(unrelated_tasks(tasks[0], tasks, 9, 0)) == 4
    assert any(drawn != unrelated_tasks(tasks[0], tasks, 3, seed) for seed in range(5))
    pair = [make_task("alpha", family="a"), make_task("bad", family="b", test=())]
    report = run(make_parts(), ["base", "generated"], tasks=pair, unrelated=1)
    assert report["methods"]["generated"]["tasks"]["alpha"]["unrelated"] is None
    assert {f["task"] for f in report["failures"]} == {"bad"}
    with pytest.raises(ConfigError, match="two families"):
        run(make_parts(), ["base"], tasks=TASKS[:1], unrelated=1)


def test_differences_are_paired_over_the_tasks_both_have() -> None:
    report = run(make_parts(), ["base", "generated", "zero"], against="generated")
    versus = {m: block["vs"] for m, block in report["methods"].items()}
    assert {m: set(found) for m, found in versus.items()} == {
        "base": {"generated"},
        "generated": {"base"},
        "zero": {"base", "generated"},
    }
    # of three tasks the generated adapter is right on two, the others on none
    lost = {"mean": pytest.approx(-2 / 3), "ci95": mean_ci95([-1.0, 0.0, -1.0])[1], "n": 3}
    assert versus["zero"]["generated"]["exact_match"] == versus["base"]["generated"]["exact_match"] == lost
    assert versus["generated"]["base"]["exact_match"]["mean"] == pytest.approx(2 / 3)
    assert versus["zero"]["base"]["exact_match"]["mean"] == 0
    assert versus["zero"]["generated"]["option_accuracy"]["n"] == 2
    head = render(report).splitlines()[0]
    assert head.index("exact_match vs base") < head.index("exact_match vs generated")
    with pytest.raises(ConfigError, match="'zero' to compare against is not run"):
        run(make_parts(), ["base"], against="zero")


def test_the_share_of_the_oracles_gain_is_reported() -> None:
    scores = {"base": (0.1, 0.2), "generated": (0.3, 0.3), "oracle-9": (0.5, 0.4), "zero": (0.1, None)}
    units = [
        Unit(f"t{i}", m, 0, 4, {**dict.fromkeys(METRICS), "exact_match": value})
        for m, values in scores.items()
        for i, value in enumerate(values)
        if value is not None
    ]
    report = build_report(make_parts().made, list(scores), EvalSettings(), units)
    blocks = report["methods"]
    assert blocks["generated"]["recovered"]["exact_match"] == pytest.approx((0.2 + 0.1) / (0.4 + 0.2))
    assert blocks["oracle-9"]["recovered"]["exact_match"] == 1.0
    assert blocks["zero"]["recovered"] == {**dict.fromkeys(METRICS), "exact_match": 0.0}
    assert "recovered" not in blocks["base"] and "| 50 % |" in render(report)
    without = build_report(make_parts().made, ["base", "generated"], EvalSettings(), units)
    assert "recovered" not in without["methods"]["generated"]


def test_a_task_is_compared_with_the_base_over_its_own_rows() -> None:
    rows = {"base": [[1.0, 0.0, 0.0, 1.0]], "generated": [[1.0, 1.0, 0.0, 0.0], [1.0, 1.0, 1.0, 0.0]]}
    blank = dict.fromkeys(METRICS)
    units = [
        Unit("t", method, seed, 4, row_means(scores := {**blank, "exact_match": values}), rows=scores)
        for method, runs in rows.items()
        for seed, values in enumerate(runs)
    ]
    blocks = build_report(make_parts().made, list(rows), EvalSettings(seeds=2), units)["methods"]
    mean, ci95 = mean_ci95([0.0, 1.0, 0.5, -1.0])  # seeds averaged
    assert blocks["generated"]["tasks"]["t"]["vs_base"] == {
        "exact_match": {"mean": mean, "ci95": ci95, "n": 4},
        "option_accuracy": None,
    }
    assert "vs_base" not in blocks["base"]["tasks"]["t"]


def test_a_task_without_rows_is_not_trained_on() -> None:
    trainer = FakeTrainer()
    report = evaluate(make_parts(), [make_task("bad", test=()), TASKS[0]], ["scratch-1"], trainer=trainer)
    assert [name for name, *_ in trainer.asked] == ["alpha"] and len(report["failures"]) == 1


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


def test_progress_counts_units_and_guesses_the_rest() -> None:
    told: list[Standing] = []
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
    with pytest.raises(ConfigError, match="unrelated must be 0 or more, got -1"):
        EvalSettings(unrelated=-1)
    with pytest.raises(ConfigError, match="one or more tasks of different names"):
        run(make_parts(), ["base"], tasks=[TASKS[0], TASKS[0]])
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot use"):
        run(make_parts(), ["base"], run_dir=tmp_path / "file" / "run")


def test_the_table_shows_every_method_in_points() -> None:
    table = render(run(make_parts()))
    assert "| generated | 66.7 [0.0, 100.0]" in table and "+66.7 [+0.0, +100.0]" in table
    assert len(table.splitlines()) == 2 + len(FIVE)

"""The paper's comparisons on a tiny base: figures against something simpler, nothing leaks, a killed run goes on."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_runner import dnd, dnd_json
from tiny_world import save_base, save_encoder

from dnd_sdk.adapters import AdapterStore
from dnd_sdk.config import Home
from dnd_sdk.errors import ConfigError, InputError
from dnd_sdk.evaluation import EvalSettings
from dnd_sdk.evaluation.drawing import conditioning_prompts
from dnd_sdk.evaluation.job import TaskJob
from dnd_sdk.evaluation.paper.comparison import METHODS, SEVEN, compare, make_plan, render_paper
from dnd_sdk.evaluation.paper.training import OWN, PaperTrainer, Seconds, apart
from dnd_sdk.generator.generator import Generator
from dnd_sdk.tasks.reading import Row, Task, read_tasks
from dnd_sdk.training import parts as training_parts
from dnd_sdk.training.settings import read_settings
from dnd_sdk.training.zoo import initial_adapter

SETS = ("arc_e", "boolq", "piqa")
MATH = ("svamp", "mawps", "mathqa_choice")
LABELS = ["[A]", "[B]"]
EVAL = {"limit": 4, "max_new_tokens": 4}
RECIPE = """
base = "{root}/base"
encoder = "{root}/encoder"
[lora]
r = 4
[data]
max_tokens = 200
[shared]
steps = 4
rows = 2
lr = 5e-2
[per_task]
steps = 2
tasks = 2
rows = 2
lr = 5e-2
checkpoints = 1
[few_shot]
examples = 3
steps = 3
rows = 2
lr = 5e-2
[full_shot]
steps = 6
rows = 2
lr = 5e-2
[generator]
n_prompts = 4
state_tokens = 8
width = 8
pool = 8
[[stages]]
objective = "end-to-end"
steps = 3
tasks = 2
rows = 2
train_shared = true
"""


def write_set(folder: Path, name: str, *, n: int = 16) -> None:
    """A made-up set: its prompts carry its name, the right letter is drawn by the row's number."""
    number = name in ("svamp", "mawps")
    lines = []
    for i in range(n):
        said = str(i % 3) if number else LABELS[i * i % 3 % 2]
        split = "train" if i < n - 6 else "test"
        lines.append(json.dumps({"prompt": f"{name} row {i} of {i * 7 % 5}", "response": said, "split": split}))
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("paper")
    save_base(folder / "base")
    save_encoder(folder / "encoder")
    for name in (*SETS, *MATH):
        write_set(folder / "tasks", name)
    numbers = [{"name": name, "answer_type": "number"} for name in ("svamp", "mawps")]
    (folder / "tasks" / "index.json").write_text(json.dumps(numbers))
    (folder / "recipe.toml").write_text(RECIPE.format(root=folder))
    return folder


def silent(*_: Any) -> None:
    """No progress."""


def trainer(root: Path, progress: Any = silent, **changes: Any) -> PaperTrainer:
    settings = read_settings(root / "recipe.toml")
    settings = settings.model_copy(update={"run": settings.run.model_copy(update=changes)})
    return PaperTrainer(settings, Home(root / "home"), progress)


def run(root: Path, run_dir: Path, held_out: Any = None, train: Any = silent, told: Any = None) -> dict[str, Any]:
    made = trainer(root, train, checkpoint_every_s=0.0 if train is not silent else 60.0)
    return compare(root / "tasks", made, EvalSettings(**EVAL, run_dir=run_dir), held_out, told)


@pytest.fixture(scope="module")
def done(root: Path) -> dict[str, Any]:
    """A whole run in `root / "run"`; what the training code was given, by (folder, set)."""
    given: dict[tuple[str, str], tuple[Row, ...]] = {}
    real = training_parts.read_tasks

    def watched(folder: Path, **kw: Any) -> list[Task]:
        tasks = real(folder, **kw)
        given.update({(str(folder.relative_to(root / "run")), t.name): (*t.train, *t.test) for t in tasks})
        return tasks

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training_parts, "read_tasks", watched)
        report = run(root, root / "run")
    return {"report": json.loads(json.dumps(report, allow_nan=False)), "given": given}


def timeless(report: dict[str, Any]) -> dict[str, Any]:
    """The report without what a clock says."""
    generators = {n: g["id"] for n, g in report["generators"].items()}
    return {**report, "time_s": None, "generators": generators}


def test_the_report_keeps_the_contract(done: dict[str, Any]) -> None:
    report = done["report"]
    assert report["schema_version"] == 1 and report["failures"] == [] and report["generator"] is None
    assert list(report["methods"]) == list(METHODS)
    for name, block in report["methods"].items():
        assert set(block["tasks"]) == set(SETS), name
        assert {"mean", "ci95", "vs"} <= block.keys()
    assert set(report["transfer"]["math"]["methods"]["generated"]["tasks"]) == {"svamp"}
    assert report["settings"]["limit"] == 4 and report["settings"]["recipe"]["shared"]["steps"] == 4
    assert report["settings"]["held_out"]["svamp"] == ["mathqa_choice", "mawps"]
    assert report["notes"] == [note for note in report["notes"] if "not in" in note]
    assert "winogrande" in report["notes"][0] and "asdiv" in report["notes"][1] and "humaneval" in report["notes"][2]


def test_every_figure_is_that_of_its_adapter_asked_alone(root: Path, done: dict[str, Any]) -> None:
    own, task = trainer(root), read_tasks(root / "tasks", names=["boolq"])[0]
    own.load()
    made, parts, methods = root / "run" / "boolq" / "generator", own.parts(), done["report"]["methods"]
    rows = TaskJob.of(task, parts, EvalSettings(**EVAL)).rows

    def accuracy(flat: torch.Tensor) -> float:
        parts.engine.bank.load("alone", flat)
        scores = parts.engine.option_logprobs([task.messages(r) for r in rows], ["alone"] * len(rows), LABELS)
        parts.engine.bank.evict("alone")
        right = [LABELS[c] == r.response for c, r in zip(scores.argmax(-1).tolist(), rows, strict=True)]
        return sum(right) / len(right)

    store = AdapterStore(Home(made))
    loras = {a.name: store.load(a, own.layout, base_fingerprint=own.base.fingerprint) for a in store.ls()}
    assert sorted(loras) == ["arc_e", "piqa"]
    each = {name: accuracy(flat) for name, flat in loras.items()}
    assert {n: s["option_accuracy"] for n, s in done["report"]["training_loras"]["boolq"].items()} == each
    generator = Generator.from_pretrained(made / "generator")
    states = own.encoder.encode(conditioning_prompts(task, 0), state_tokens=generator.state_tokens).states
    assert states is not None
    expected = {
        "base": accuracy(torch.zeros(own.layout.n_parameters)),
        "mean": accuracy(torch.stack(list(loras.values())).mean(0)),
        "training-loras": sum(each.values()) / 2,
        "generated": accuracy(generator.generate(states)),
        "constant": max(Counter(r.response for r in rows).values()) / len(rows),
    }
    assert {m: methods[m]["tasks"]["boolq"]["option_accuracy"] for m in expected} == expected
    assert len(set(expected.values())) > 1


def test_full_shot_learns_the_whole_set_and_few_shot_a_part(root: Path, done: dict[str, Any]) -> None:
    own, task = trainer(root), read_tasks(root / "tasks", names=["arc_e"])[0]
    own.load()
    parts, held = own.parts(), make_plan(root / "tasks", root / "run", ["arc_e"])[0]["commonsense"][0]
    chat, right = [task.messages(r) for r in task.train], [LABELS.index(r.response) for r in task.train]

    def likelihood(flat: torch.Tensor) -> float:
        parts.engine.bank.load("alone", flat)
        scores = parts.engine.option_logprobs(chat, ["alone"] * len(chat), LABELS)
        parts.engine.bank.evict("alone")
        return scores[range(len(right)), right].mean().item()

    few, full = (own.own(held, name) for name in OWN)
    assert likelihood(full) > likelihood(initial_adapter(own.layout, 0)) + 0.5
    assert not torch.equal(few, full)
    rows = {name: own._own_parts(held, name)[0].curriculum.tasks["arc_e"].rows for name in OWN}
    assert len(rows["few-shot"]) == 3 and set(rows["few-shot"]) < set(rows["full-shot"])
    assert len(rows["full-shot"]) == len(task.train)


def test_the_two_scorers_differ_where_the_form_is_wrong(done: dict[str, Any]) -> None:
    methods = done["report"]["methods"]
    base = methods["base"]["mean"]
    assert base["exact_match"] == 0.0 < base["option_accuracy"]  # it holds a letter likeliest, but says something else
    constant = methods["constant"]["mean"]
    assert constant["exact_match"] == constant["option_accuracy"] > 0.4 and constant["valid_format"] == 1.0
    text = render_paper(done["report"])
    assert "commonsense, exact match" in text and "likeliest option" in text and "| constant |" in text
    assert "math, exact match" in text and "math, likeliest" not in text


def test_nothing_of_the_held_out_set_is_trained_on(root: Path, done: dict[str, Any]) -> None:
    rows = {t.name: {*t.train, *t.test} for t in read_tasks(root / "tasks")}
    tests = {t.name: {r.prompt for r in t.test} for t in read_tasks(root / "tasks")}
    given = done["given"]
    for held in (*SETS, "svamp"):
        others = {name for folder, name in given if folder == f"{held}/others"}
        assert others == ({*SETS} if held in SETS else {*MATH}) - {held}
        for name in others:
            assert (
                set(given[f"{held}/others", name]) < rows[name] and not set(given[f"{held}/others", name]) & rows[held]
            )
        assert not {r.prompt for r in given[f"{held}/own", held]} & tests[held]
    assert len({f for f, _ in given}) == 2 * 4


def test_rows_that_repeat_a_test_row_are_dropped() -> None:
    def task(train: list[str], test: list[str]) -> Task:
        rows = [tuple(Row(p, "1", split) for p in ps) for split, ps in (("train", train), ("test", test))]
        return Task("t", "f", "number", None, "exact_match", "train", "MIT", *rows)

    ask = "Solve the problem below and give only the number."
    held = task(["x"], [f"{ask} Ann has three red apples and {i} green pears. How many?" for i in range(4)])
    kept = [f"{ask} Bob has two cats.", "Ann has three red apples and 9 green pears. How many?"]
    gone = [held.test[1].prompt, "Maths! Ann has three red apples and 2 green pears."]
    assert [r.prompt for r in apart(task([*kept, *gone], ["y"]), held).train] == kept


def test_time_to_adapt_is_kept_and_counts_each_step_once(root: Path, done: dict[str, Any], tmp_path: Path) -> None:
    times = done["report"]["time_s"]
    for name in SETS:
        kept = Seconds(root / "run" / name / "seconds.jsonl")
        steps = {n: sum(s for k, s in kept.known.items() if k[0] == n) for n in OWN}
        assert {n: times[n]["tasks"][name] for n in OWN} == pytest.approx(steps)
        assert sum(k[0] == "full-shot" for k in kept.known) == 6
        assert times["generated"]["tasks"][name] == kept.known["make", "generated", 0] > 0
    full, generated = times["full-shot"], times["generated"]
    assert full["of_full_shot"] == 1.0
    expected = sum(generated["tasks"][n] for n in SETS) / sum(full["tasks"][n] for n in SETS)
    everything = sum(generated["tasks"].values()) / sum(full["tasks"].values())
    assert generated["of_full_shot"] == pytest.approx(everything) != expected
    log = Seconds(tmp_path / "s.jsonl")
    log.put("a", 1, seconds=1.0)
    with (tmp_path / "s.jsonl").open("a") as file:
        file.write('\n["a", 2, 3')  # killed here
    again = Seconds(tmp_path / "s.jsonl")
    again.put("a", 1, seconds=4.0)
    assert Seconds(tmp_path / "s.jsonl").known == {("a", 1): 4.0} and again.total("a") == 4.0


class Interrupt:
    """A progress that interrupts at its n-th call."""

    def __init__(self, n: int) -> None:
        self.left, self.seen = n, []

    def __call__(self, *args: Any) -> None:
        self.seen.append(args)
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt


def test_an_interrupted_run_goes_on_to_the_same_result(root: Path, done: dict[str, Any], tmp_path: Path) -> None:
    kept, whole = tmp_path / "run", Interrupt(10_000)
    once = timeless(run(root, tmp_path / "whole", ["boolq"], whole))
    assert once["methods"]["generated"]["tasks"]["boolq"] == done["report"]["methods"]["generated"]["tasks"]["boolq"]
    seen = []
    for cut in (3, 3, 8, 11):  # in the shared adapter, in a group of the zoo, end to end, in full-shot
        stop = Interrupt(cut)
        with pytest.raises(KeyboardInterrupt):
            run(root, kept, ["boolq"], stop)
        seen += stop.seen
    with pytest.raises(KeyboardInterrupt):
        run(root, kept, ["boolq"], told=Interrupt(7))
    last = Interrupt(10_000)
    result = run(root, kept, ["boolq"], last)
    assert timeless(result) == once
    steps = Counter((stage.removeprefix("boolq: "), done_, total) for stage, done_, total, _ in [*seen, *last.seen])
    again = [step for step, n in steps.items() if n > 1 and step[0] != "store zoo"]
    # only the steps whose checkpoint was not written yet; the rest went on
    assert again == [("shared", 3, 4), ("tasks 1/1", 1, 2), ("end-to-end", 2, 3), ("tasks 1/1", 4, 6)]
    assert run(root, kept, ["boolq"], pytest.fail) == result  # nothing is trained, and times are kept, too


def test_a_part_that_fails_loses_no_other(
    root: Path, done: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(root / "run", tmp_path / "run")
    good = {m: done["report"]["methods"][m]["tasks"]["piqa"] for m in METHODS}

    def broken(*_: Any) -> None:
        raise InputError("no row fits")

    with monkeypatch.context() as patch:
        patch.setattr(PaperTrainer, "own", broken)
        report = run(root, tmp_path / "run", ["piqa"])
    assert {f["method"] for f in report["failures"]} == set(OWN)
    found = {m: b["tasks"].get("piqa") for m, b in report["methods"].items()}
    assert found == {**good, **dict.fromkeys(OWN)} and report["time_s"]["full-shot"]["mean"] is None
    with monkeypatch.context() as patch:
        patch.setattr(PaperTrainer, "generator", broken)
        report = run(root, tmp_path / "run", ["piqa"])
    lost = {"mean", "training-loras", "generated"}
    assert {f["method"] for f in report["failures"]} == lost and "no row fits" in report["failures"][0]["error"]
    assert {m for m, b in report["methods"].items() if not b["tasks"]} == lost and render_paper(report)


def test_another_recipe_is_refused_in_the_same_folder(root: Path, done: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").write_text((root / "recipe.toml").read_text().replace("steps = 6", "steps = 7"))
    other = PaperTrainer(read_settings(tmp_path / "recipe.toml"), Home(root / "home"), silent)
    with pytest.raises(ConfigError, match="other settings"):
        compare(root / "tasks", other, EvalSettings(**EVAL, run_dir=root / "run"))
    started = read_settings(root / "recipe.toml").model_copy(update={"start": "somewhere"})
    with pytest.raises(ConfigError, match="may have seen the held-out"):
        PaperTrainer(started, Home(root / "home"), silent)


def test_validation_sets_are_held_out_but_never_trained_on(root: Path, tmp_path: Path) -> None:
    for name in SEVEN:
        write_set(tmp_path / "tasks", name)
    (tmp_path / "tasks" / "index.json").write_text(json.dumps([{"name": "obqa", "role": "validation"}]))
    plan, notes = make_plan(tmp_path / "tasks", tmp_path)
    others = {h.task.name: {t.name for t in h.others} for h in plan["commonsense"]}
    assert others == {n: {*SEVEN} - {n, "obqa"} for n in SEVEN}
    assert [n.split(":")[0] for n in notes] == ["math", "code"]


def test_bad_input_is_told_in_one_line_with_a_fix(root: Path, tmp_path: Path) -> None:
    def error(tasks: Path, *options: object) -> dict[str, Any]:
        return dnd_json("eval", "paper", tasks, "--run-dir", tmp_path / "run", *options, code=1)["error"]

    write_set(tmp_path / "two", "arc_e")
    write_set(tmp_path / "two", "boolq")
    few = error(tmp_path / "two")
    assert "has 2 of the paper's sets (arc_e, boolq), need 3" in few["message"] and "piqa" in few["fix"]
    unknown = error(root / "tasks", "--held-out", "piqa", "--held-out", "arc")
    assert "'arc'" in unknown["message"] and "arc_c" in unknown["fix"] and "asdiv" in unknown["fix"]
    absent = error(root / "tasks", "--held-out", "obqa")
    assert "no set 'obqa'" in absent["message"] and "obqa.jsonl" in absent["fix"]
    assert "does not exist" in error(tmp_path / "none")["message"]
    assert "does not exist" in error(root / "tasks", "--config", tmp_path / "no.toml")["message"]
    assert "at least 1" in error(root / "tasks", "--limit", 0)["message"]
    assert not (tmp_path / "run").exists()


def test_the_command_prints_one_object_or_tables(root: Path, done: dict[str, Any], tmp_path: Path) -> None:
    options = ["--run-dir", root / "run", "--config", root / "recipe.toml", "--home", root / "home", "--limit", 4]
    report = dnd_json("eval", "paper", root / "tasks", "--held-out", "piqa", *options)
    assert set(report["methods"]["base"]["tasks"]) == {"piqa"} and report["time_s"]["generated"]["mean"] > 0
    (tmp_path / "paper.json").write_text(json.dumps(report))
    assert dnd("plot", tmp_path / "paper.json", "--out", tmp_path / "plots").exit_code == 0
    shown = dnd("eval", "paper", root / "tasks", "--held-out", "piqa", *options)
    assert shown.exit_code == 0 and "| generated |" in shown.stdout and "piqa base" in shown.stderr


def test_paper_is_a_command_and_a_folder_of_that_name_still_a_folder(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(root / "tasks", tmp_path / "paper")
    model = [
        "--base",
        root / "base",
        "--encoder",
        root / "encoder",
        "--home",
        root / "home",
        "--methods",
        "base",
        "--set",
        "all",
        "--limit",
        1,
    ]
    as_folder = dnd_json("eval", "./paper", "--task", "piqa", *model)
    assert set(as_folder["methods"]["base"]["tasks"]) == {"piqa"}
    usage = dnd("eval", "paper")
    assert usage.exit_code == 2 and "TASKS" in usage.stderr and "dnd eval paper --help" in usage.stderr
    helped = {words: dnd("eval", *words, "--help").stdout for words in ((), ("paper",))}
    assert "--methods" in helped[()] and "--held-out" not in helped[()] and "dnd eval paper" in helped[()]
    assert "--held-out" in helped["paper",] and "dnd eval paper [OPTIONS]" in helped["paper",]
    assert "eval paper" in dnd("--help").stdout


@pytest.mark.parametrize(
    ("typed", "offered", "not_offered"),
    [
        ("dnd ev", "eval", "eval paper"),
        ("dnd eval pa", "paper", "--held-out"),
        ("dnd eval paper --hel", "--held-out", "--methods"),
        ("dnd eval x --meth", "--methods", "--held-out"),
    ],
)
def test_the_shell_completes_both(
    typed: str, offered: str, not_offered: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    from typer._click.shell_completion import get_completion_class
    from typer._completion_classes import completion_init
    from typer.main import get_command

    from dnd_sdk.cli.main import app

    completion_init()
    kind = get_completion_class("bash")
    assert kind is not None
    *words, last = typed.split()[1:]
    items = [i.value for i in kind(get_command(app), {}, "dnd", "_DND_COMPLETE").get_completions(words, last)]
    assert offered in items and not_offered not in items

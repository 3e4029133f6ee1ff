"""The example files are what they claim to be, and the example programs run."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

import dnd_sdk
from dnd_sdk.config import Home
from dnd_sdk.tasks.reading import read_tasks

EXAMPLES = Path(dnd_sdk.__file__).parents[1] / "examples"
JOBS = ("support_tickets", "meeting_deadlines")


def load(name: str) -> ModuleType:
    """An example program as a module."""
    spec = importlib.util.spec_from_file_location(f"example_{Path(name).stem}", EXAMPLES / name)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up there
    spec.loader.exec_module(module)
    return module


def rows(job: str, file: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in (EXAMPLES / job / file).open(encoding="utf-8")]


def body(prompt: str) -> str:
    """The prompt without its instruction, folded for comparison."""
    return " ".join(re.findall(r"\w+", prompt.split("\n\n", 1)[1].lower()))


@pytest.mark.parametrize("job", JOBS)
def test_prompts_are_many_distinct_and_unlabelled(job: str) -> None:
    prompts = rows(job, "prompts.jsonl")
    assert len(prompts) >= 80
    assert all(row.keys() == {"prompt"} for row in prompts)
    assert len({body(row["prompt"]) for row in prompts}) == len(prompts)


@pytest.mark.parametrize("job", JOBS)
def test_prompts_share_one_instruction_and_vary_in_length(job: str) -> None:
    prompts = [row["prompt"] for row in rows(job, "prompts.jsonl") + rows(job, "questions.jsonl")]
    assert len({p.split("\n\n", 1)[0] for p in prompts}) == 1
    words = sorted(len(body(p).split()) for p in prompts)
    assert words[-1] >= 3 * words[0]
    assert len({" ".join(body(p).split()[:3]) for p in prompts}) > 0.9 * len(prompts), "texts should not share a mould"


@pytest.mark.parametrize("job", JOBS)
def test_questions_are_labelled_and_kept_apart(job: str) -> None:
    questions = rows(job, "questions.jsonl")
    assert len(questions) == 20
    assert all(row.keys() == {"prompt", "response", "split"} and row["split"] == "test" for row in questions)
    unlabelled = {body(row["prompt"]) for row in rows(job, "prompts.jsonl")}
    assert not unlabelled & {body(row["prompt"]) for row in questions}


def test_every_ticket_goes_to_a_listed_queue() -> None:
    questions = rows("support_tickets", "questions.jsonl")
    listed = re.search(r"one queue: ([^.]+)\.", questions[0]["prompt"])
    assert listed
    counts = Counter(row["response"] for row in questions)
    assert set(counts) == set(listed[1].split(", "))
    assert max(counts.values()) <= 3, "a constant answer must not score well"


def test_every_deadline_stands_in_its_note_once() -> None:
    for row in rows("meeting_deadlines", "questions.jsonl"):
        assert row["prompt"].split("\n\n", 1)[1].count(row["response"]) == 1, row


def test_tiny_tasks_obey_the_contract(tmp_path: Path) -> None:
    assert load("tiny_tasks/make.py").main(["--out", str(tmp_path), "--rows", "25"]) == 0
    tasks = read_tasks(tmp_path)
    index = {entry["name"]: entry for entry in json.loads((tmp_path / "index.json").read_text())}
    assert [t.name for t in tasks] == sorted(index) and len(tasks) == 6
    assert Counter(t.role for t in tasks) == {"train": 4, "validation": 2}
    for task in tasks:
        every = [*task.train, *task.test]
        assert (len(task.train), len(task.test)) == (20, 5) == (index[task.name]["n_train"], index[task.name]["n_test"])
        assert len({row.prompt for row in every}) == 25
        assert task.labels is None or {row.response for row in every} == set(task.labels)


def test_tiny_tasks_answers_are_right(tmp_path: Path) -> None:
    make = load("tiny_tasks/make.py")
    by_task = {name: make.rows_of(name, 40, seed=3) for name in make.JOBS}
    answer = {
        "count_words": lambda p: str(len(p.split("\n\n")[1].split())),
        "even_number": lambda p: "yes" if re.findall(r"\d+", p)[0][-1] in "02468" else "no",
        "first_word": lambda p: p.split("\n\n")[1].split(",")[0],
        "longer_word": lambda p: ("right", "left")[len(p.split()[-3]) > len(p.split()[-1])],
        "reverse_letters": lambda p: "".join(reversed(p.split(": ")[1])),
        "upper_case": lambda p: p.split(": ")[1].upper(),
    }
    for name, made in by_task.items():
        assert [row["response"] for row in made] == [answer[name](row["prompt"]) for row in made], name


def test_tiny_tasks_in_the_repository_are_what_the_seed_gives(tmp_path: Path) -> None:
    make = load("tiny_tasks/make.py")
    make.main(["--out", str(tmp_path)])
    kept = EXAMPLES / "tiny_tasks" / "tasks"
    assert {p.name: p.read_bytes() for p in kept.iterdir()} == {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    other = make.rows_of("upper_case", 20, seed=1)
    assert other != make.rows_of("upper_case", 20, seed=2)


def test_tiny_tasks_refuses_a_silly_size(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        load("tiny_tasks/make.py").main(["--out", str(tmp_path), "--rows", "1"])
    assert "--rows must be within 2..2000" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_demo_counts_matches_and_cuts_text(capsys: pytest.CaptureFixture[str]) -> None:
    """The table says what the model said: each answer goes to its own row and side."""
    demo = load("demo.py")

    class Echo:
        def complete_batch(self, prompts: list[str], *, adapters: list[str | None], max_new_tokens: int) -> list:
            assert max_new_tokens == demo.ANSWER_TOKENS
            answers = {row["prompt"]: row["response"] for row in rows(JOBS[0], "questions.jsonl")}
            texts = {p: ("I am\n" + "sorry " * 20, answers[p].title() + ".") for p in prompts}
            return [SimpleNamespace(text=texts[p][a is not None]) for p, a in zip(prompts, adapters, strict=True)]

    demo.side_by_side(Echo(), JOBS[0], 5)
    out = capsys.readouterr().out
    assert "right: base 0 of 5, with the adapter 5 of 5" in out
    assert out.count("I am sorry sorry sorry sorry so...") == 5


def test_demo_complains_about_the_wrong_decision() -> None:
    result = {"decision": "base", "score": None, "adapter": None, "n_prompts": 3, "timings_s": {"total": 0.1}}
    demo = load("demo.py")
    demo.show_adaptation(result, "base")
    with pytest.raises(demo.DemoError, match="expected the decision 'generate', got 'base'"):
        demo.show_adaptation(result, "generate")


class FakeSession:
    """Decides and answers as told; only what the demo calls."""

    def __init__(self, decisions: list[str]) -> None:
        self.decisions = decisions

    def __enter__(self) -> FakeSession:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def to_dict(self, prompts: list[str], name: str) -> dict:
        adapter = {"name": name, "path": "-", "source": "generated"}
        timings = {"encode": 0.2, "route": 0.0, "total": 0.2}
        decision = self.decisions.pop(0)
        return {"decision": decision, "score": 0.5, "adapter": adapter, "n_prompts": len(prompts), "timings_s": timings}

    def adapt(self, prompts: list[str], name: str) -> SimpleNamespace:
        found = self.to_dict(prompts, name)
        return SimpleNamespace(to_dict=lambda: found)

    def complete_batch(self, prompts: list[str], adapters: list[str | None], max_new_tokens: int) -> list:
        return [SimpleNamespace(text="billing") for _ in prompts]


@pytest.mark.parametrize(
    ("decisions", "code"),
    [(["generate", "reuse"] * 2, 0), (["generate", "generate"], 1), (["generate", "reuse", "base"], 1)],
)
def test_demo_goes_through_its_steps_and_fails_on_a_wrong_decision(
    decisions: list[str],
    code: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    demo, session, ran = load("demo.py"), FakeSession(list(decisions)), []

    def command(*arguments: str) -> str:
        ran.append(arguments)
        if arguments[0] != "adapt":
            return "fetched\n"
        prompts = [row["prompt"] for row in map(json.loads, (EXAMPLES.parent / arguments[1]).open(encoding="utf-8"))]
        return json.dumps(session.to_dict(prompts, arguments[arguments.index("--name") + 1]))

    monkeypatch.setattr(demo, "dnd_command", command)
    monkeypatch.setattr("dnd_sdk.session.DnD.load", lambda: session)
    monkeypatch.setenv("DND_HOME", "replaced by the demo")
    assert demo.main(["--home", str(tmp_path / "new"), "--questions", "5"]) == code
    assert [r[0] for r in ran] == ["models", "adapt"]
    shown = capsys.readouterr()
    assert re.findall(r"decision  (\w+)", shown.out) == decisions
    assert ("demo failed: expected the decision" in shown.err) == bool(code)
    assert code or shown.out.count("5 unseen questions of") == 2


@pytest.mark.real
def test_quickstart_runs(warm_home: Home, capsys: pytest.CaptureFixture[str]) -> None:
    assert load("quickstart.py").main(["--home", str(warm_home.root), "--questions", "2"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("generate: ") and out.count("reference: ") == 2


@pytest.mark.real
def test_demo_runs_twice_with_the_same_decisions(
    warm_home: Home, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("DND_HOME", "replaced by the demo")  # so that the demo's own value is undone afterwards
    for _ in range(2):
        assert load("demo.py").main(["--home", str(warm_home.root), "--questions", "1"]) == 0
        out = capsys.readouterr().out
        assert re.findall(r"decision  (\w+)", out) == ["generate", "reuse"] * 2

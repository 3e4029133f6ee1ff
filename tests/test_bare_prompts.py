"""What prompts share is found and left out; nothing of their own is."""

from __future__ import annotations

from pathlib import Path

import pytest
from eval_fakes import make_task
from training_parts import make_world, silent

from dnd_sdk.bare_prompts import Frame, bare_task, partly_bare
from dnd_sdk.config import Home
from dnd_sdk.models import load_base
from dnd_sdk.tasks import Row, Task
from dnd_sdk.training.settings import read_settings
from dnd_sdk.training.workbench import prepare


@pytest.mark.parametrize(
    ("prompts", "own"),
    [
        (["Sort: b a", "Sort: d c e"], ["b a", "d c e"]),
        (['Is "x" a word? yes/no', 'Is "y z" a word? yes/no'], ['"x"', '"y z"']),
        (["Label it.\n\nText: one\nMood:", "Label it.\n\nText: two words\nMood:"], ["one", "two words"]),
        (["category", "catapult"], ["category", "catapult"]),  # letters in common are no words in common
        (["Say it: a", "Say\nit: b"], ["Say it: a", "Say\nit: b"]),  # not the same white space, not the same words
        (["same words", "same words"], ["same words", "same words"]),  # nothing of its own: kept whole
        (["a x a", "a y y a"], ["x", "y y"]),
        (["a a", "a a a"], ["a", "a"]),  # one word of the first is at both ends: it goes once
    ],
)
def test_shared_words_at_both_ends_are_left_out(prompts: list[str], own: list[str]) -> None:
    frame = Frame.of(prompts)
    assert [frame.own_part(p) for p in prompts] == own


def test_another_wording_is_left_as_it_is() -> None:
    frame = Frame.of(["Sort: b a\nAnswer:", "Sort: d c\nAnswer:"])
    assert frame.own_part("Please sort b a") == "Please sort b a"
    assert frame.own_part("Sort: only the head") == "only the head"


def a_task() -> Task:
    train = tuple(Row(f"Add up: {i} {i}", str(2 * i), "train", "Be brief.") for i in range(40))
    return make_task("sum", train=train, test=(Row("Add up: 7 8", "15", "test", "Be brief."),))


def test_a_bare_task_asks_the_same_without_instruction_or_system_prompt() -> None:
    task = a_task()
    bare = bare_task(task)
    assert bare.train[3] == Row("3 3", "6", "train") and bare.test == (Row("7 8", "15", "test"),)
    assert bare.labels == task.labels and bare.name == task.name
    alone = make_task("one", train=task.train[:1], test=task.test)
    assert [r.prompt for r in bare_task(alone).train] == ["Add up: 0 0"]  # one prompt shares nothing with others


def test_a_share_of_the_rows_is_bare() -> None:
    task = a_task()
    assert partly_bare(task, 0.0, 0) is task
    assert partly_bare(task, 1.0, 0).train == bare_task(task).train
    half = partly_bare(task, 0.5, 0)
    n = sum(r.system is None for r in half.train)
    assert 10 < n < 30 and half == partly_bare(task, 0.5, 0) != partly_bare(task, 0.5, 1)
    assert all(r in (whole, bare) for r, whole, bare in zip(half.train, task.train, bare_task(task).train, strict=True))
    assert half.test == task.test


def test_training_asks_bare_rows_and_conditions_on_whole_prompts(tmp_path: Path) -> None:
    world = make_world(tmp_path)
    settings = read_settings(world / "train.toml")
    data = settings.data.model_copy(update={"bare": 1.0})
    home = Home(world / "home")
    whole = prepare(world / "tasks", settings, home, silent)
    bare = prepare(world / "tasks", settings.model_copy(update={"data": data}), home, silent)
    assert bare.sources == whole.sources and bare.manifest != whole.manifest
    decode = load_base(settings.base, home).tokenizer.decode
    for name, task in bare.sources.items():
        own = {f"user\n{r.prompt}<|im_end|>" for r in bare_task(task).train}
        asked = {decode(row.ids) for row in bare.tasks[name].rows}
        assert all(any(prompt in text for prompt in own) for text in asked)
        assert not any(any(prompt in decode(row.ids) for prompt in own) for row in whole.tasks[name].rows)

"""What prompts share is found and left out; nothing of their own is."""

from __future__ import annotations

from pathlib import Path

import pytest
from eval_fakes import make_task
from training_parts import config_file, make_world, silent

from dnd_sdk.config import Home
from dnd_sdk.models.loading import load_base
from dnd_sdk.tasks.bare import Frame, bare_task
from dnd_sdk.tasks.reading import Row, Task
from dnd_sdk.training import run_generator, run_zoo
from dnd_sdk.training.batches import TokenRow
from dnd_sdk.training.parts import prepare
from dnd_sdk.training.run_dir import RunDir
from dnd_sdk.training.settings import read_settings


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


def test_training_asks_a_share_of_bare_rows_and_conditions_on_whole_prompts(tmp_path: Path) -> None:
    world = make_world(tmp_path)
    settings = read_settings(world / "train.toml")
    home = Home(world / "home")
    assert prepare(world / "tasks", settings, home, silent).curriculum.bare == {}
    stages = tuple(s.model_copy(update={"bare": 0.5}) for s in settings.stages)
    data = settings.data.model_copy(update={"held_out": 1})
    changed = settings.model_copy(update={"stages": stages, "data": data})
    curriculum = prepare(world / "tasks", changed, home, silent).curriculum
    decode = load_base(settings.base, home).tokenizer.decode
    for name, task in curriculum.sources.items():  # conditions are made from `sources`; the one held out counts, too
        own, whole = ({f"user\n{r.prompt}<|im_end|>" for r in t.train} for t in (bare_task(task), task))

        def kinds(rows: list[TokenRow], own: set[str] = own, whole: set[str] = whole) -> list[str]:
            texts = [decode(row.ids) for row in rows]
            return ["bare" if any(p in t for p in own) else "whole" for t in texts if any(p in t for p in own | whole)]

        assert kinds(curriculum.rows(name, 8, 0, 1.0)) == ["bare"] * 8
        assert kinds(curriculum.rows(name, 8, 0)) == ["whole"] * 8
        drawn = [k for step in range(10) for k in kinds(curriculum.rows(name, 8, step, 0.5))]
        assert len(drawn) == 80 and 25 < drawn.count("bare") < 55
        assert curriculum.rows(name, 8, 3, 0.5) == curriculum.rows(name, 8, 3, 0.5) != curriculum.rows(name, 8, 4, 0.5)


def test_an_end_to_end_stage_trains_on_bare_rows_and_is_checked_by_them(tmp_path: Path) -> None:
    curves = []
    for share in ("0", "1"):
        world = make_world(tmp_path / share)
        config_file(world, data="held_out = 1", check="[check]\nevery = 2\nrows = 3")
        recipe = (
            (world / "train.toml").read_text().replace("train_shared = true", f"train_shared = true\nbare = {share}")
        )
        (world / "train.toml").write_text(recipe)
        paths, home = (world / "tasks", world / "train.toml"), Home(world / "home")
        run_zoo(*paths, world / "zoo", home=home, progress=silent)
        run_generator(*paths, world / "out", zoo=world / "zoo", home=home, progress=silent)
        curves.append(RunDir.read_losses(world / "out" / "stage-1"))
    whole, bare = curves
    assert whole[0]["loss"] != bare[0]["loss"] and whole[1]["held"] != bare[1]["held"]

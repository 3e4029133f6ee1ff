"""`--set` of `dnd eval` and `dnd bench gate`, and the name it had before."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from cli_runner import dnd

from dnd_sdk.cli.output import Output
from dnd_sdk.cli.task_sets import TaskSet
from dnd_sdk.errors import ConfigError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("a", "b"):
        row = {"prompt": name, "response": "yes", "split": "train"}
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row))
    (tmp_path / "index.json").write_text(
        json.dumps([{"name": "a", "role": "train"}, {"name": "b", "role": "validation"}])
    )
    return tmp_path


@pytest.mark.parametrize(
    ("given", "names"),
    [
        (TaskSet(), ["b"]),
        (TaskSet(task_set="train"), ["a"]),
        (TaskSet(role="train"), ["a"]),
        (TaskSet(task_set="all", role="train"), ["a", "b"]),
    ],
)
def test_a_set_is_the_tasks_of_a_role(folder: Path, given: TaskSet, names: list[str]) -> None:
    assert [t.name for t in given.tasks(Output(), folder)] == names


def test_a_folder_without_roles_counts_whole(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "index.json").unlink()
    assert [t.name for t in TaskSet(task_set="train").tasks(Output(), folder)] == ["a", "b"]
    assert "names a role" in capsys.readouterr().err


def test_another_word_is_refused() -> None:
    with pytest.raises(ConfigError, match="--set takes train, validation, all, got 'boss'"):
        TaskSet(role="boss").checked()


@pytest.mark.parametrize("command", [("eval",), ("bench", "gate")])
def test_help_shows_the_new_name_alone(command: tuple[str, ...]) -> None:
    shown = dnd(*command, "--help").stdout
    assert "--set" in shown and "--role" not in shown

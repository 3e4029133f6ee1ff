from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dnd_sdk.errors import InputError
from dnd_sdk.tasks.reading import Row, data_hash, read_tasks


def row(i: int, response: str = "yes", split: str = "train", **extra: Any) -> dict[str, Any]:
    return {"prompt": f"question {i}?", "response": response, "split": split, **extra}


def write(folder: Path, name: str, rows: list[dict[str, Any]]) -> Path:
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows), encoding="utf-8")
    return path


def labelled(folder: Path, name: str = "polite") -> Path:
    return write(folder, name, [row(i, ("yes", "no")[i % 2]) for i in range(6)] + [row(9, "no", "test")])


def test_without_an_index_everything_is_inferred(tmp_path: Path) -> None:
    labelled(tmp_path)
    write(tmp_path, "free", [row(i, f"answer {i}") for i in range(4)])
    free, polite = read_tasks(tmp_path)
    assert (polite.name, polite.family, polite.answer_type, polite.labels) == (
        "polite",
        "polite",
        "label",
        ("no", "yes"),
    )
    assert (polite.metric, polite.role, polite.licence) == ("exact_match", "train", "not stated")
    assert (len(polite.train), len(polite.test)) == (6, 1)
    assert polite.test[0] == Row("question 9?", "no", "test", None)
    assert (free.answer_type, free.labels) == ("short-text", None)


def test_many_distinct_responses_are_not_labels(tmp_path: Path) -> None:
    write(tmp_path, "wide", [row(i, f"a{i % 21}") for i in range(63)])
    write(tmp_path, "narrow", [row(i, f"a{i % 20}") for i in range(63)])
    narrow, wide = read_tasks(tmp_path)
    assert len(narrow.labels or ()) == 20
    assert (wide.answer_type, wide.labels) == ("short-text", None)


def test_the_index_is_believed(tmp_path: Path) -> None:
    labelled(tmp_path, "a")
    labelled(tmp_path, "b")
    labelled(tmp_path, "unlisted")
    entry = {"name": "tone", "file": "a.jsonl", "family": "f", "answer_type": "label", "labels": ["yes", "no", "maybe"]}
    entries = [{**entry, "metric": "rouge_l", "role": "validation", "licence": "MIT", "else": 1}, {"name": "b"}]
    (tmp_path / "index.json").write_text(json.dumps(entries))
    assert [t.name for t in read_tasks(tmp_path)] == ["b", "tone", "unlisted"]
    (tone,) = read_tasks(tmp_path, role="validation")
    assert (tone.labels, tone.metric, tone.family, tone.licence) == (("yes", "no", "maybe"), "rouge_l", "f", "MIT")
    assert [t.name for t in read_tasks(tmp_path, names=["b", "tone"], role="train")] == ["b"]


def test_messages_carry_the_system_prompt_only_if_there_is_one(tmp_path: Path) -> None:
    write(tmp_path, "t", [row(0, system="be brief"), row(1)])
    (task,) = read_tasks(tmp_path)
    user = [{"role": "user", "content": "question 1?"}]
    assert task.messages(task.train[1]) == user
    assert task.messages(task.train[0])[0] == {"role": "system", "content": "be brief"}


def test_unicode_line_separators_do_not_end_a_line(tmp_path: Path) -> None:
    write(tmp_path, "t", [row(0, "one\u2028two"), row(1, "naïve \x85 é")])
    (task,) = read_tasks(tmp_path)
    assert [r.response for r in task.train] == ["one\u2028two", "naïve \x85 é"]


def test_data_hash_follows_the_content_and_not_the_name(tmp_path: Path) -> None:
    labelled(tmp_path)
    (task,) = read_tasks(tmp_path)
    assert data_hash(task) == data_hash(replace(task, name="other", role="validation"))
    assert data_hash(task) != data_hash(replace(task, train=task.train[1:]))
    assert data_hash(task) != data_hash(replace(task, labels=("yes",)))


@pytest.mark.parametrize(
    ("line", "match"),
    [
        ("{nope", r"t\.jsonl, line 2: not UTF-8 JSON"),
        ("[1]", "line 2: expected an object, got list"),
        ('{"prompt": "x", "split": "train"}', 'line 2: "response" must be a non-empty string, got None'),
        ('{"prompt": "", "response": "y", "split": "train"}', 'line 2: "prompt" must be'),
        ('{"prompt": "x", "response": "y", "split": "dev"}', 'line 2: "split" must be "train" or "test", got \'dev\''),
        ('{"prompt": "x", "response": "y", "split": "test", "system": 3}', 'line 2: "system" must be a string'),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: str, match: str) -> None:
    path = write(tmp_path, "t", [row(0)])
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(InputError, match=match):
        read_tasks(tmp_path)


def test_non_utf8_is_named(tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_bytes(b'{"prompt": "\xff", "response": "y", "split": "train"}\n')
    with pytest.raises(InputError, match="line 1: not UTF-8 JSON"):
        read_tasks(tmp_path)


@pytest.mark.parametrize(
    ("index", "match"),
    [
        ("{", "not readable JSON"),
        ("{}", "must hold a list"),
        ('[{"family": "f"}]', 'entry 0: expected an object with a "name"'),
        (
            '[{"name": "t"}, {"name": "u", "file": "../t.jsonl"}]',
            "entry 1: file '../t.jsonl' must be a plain file name",
        ),
        ('[{"name": "t", "metric": "bleu"}]', "metric is 'bleu', expected one of exact_match, rouge_l"),
        ('[{"name": "t", "labels": "ab"}]', "labels must be null or a list of strings"),
        ('[{"name": "gone"}]', "cannot read .*gone.jsonl"),
    ],
)
def test_a_bad_index_is_named(tmp_path: Path, index: str, match: str) -> None:
    labelled(tmp_path, "t")
    (tmp_path / "index.json").write_text(index)
    with pytest.raises(InputError, match=match):
        read_tasks(tmp_path)


def test_nothing_to_read_is_said(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist"):
        read_tasks(tmp_path / "none")
    with pytest.raises(InputError, match="no tasks in"):
        read_tasks(tmp_path)
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(InputError, match=r"empty\.jsonl holds no rows"):
        read_tasks(tmp_path)
    labelled(tmp_path, "empty")
    with pytest.raises(InputError, match="no tasks with role 'validation'"):
        read_tasks(tmp_path, role="validation")
    with pytest.raises(InputError, match=r"no task named \['ghost'\]"):
        read_tasks(tmp_path, names=["ghost"])


def test_reading_tasks_loads_no_torch() -> None:
    code = "import sys, dnd_sdk.tasks.reading; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

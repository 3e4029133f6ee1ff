"""Task folders: `NAME.jsonl` of labelled rows and an optional `index.json` that describes them.

* A line is `{"prompt", "response", "split": "train"|"test"}`, with an optional fourth key `"system"`.
* `index.json` is a list of objects with `name` and any of `family, answer_type, labels, metric, role, licence, file`;
  what it leaves out, and every file it does not list, gets the defaults of `_describe`.
* Every complaint names the file and the line.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from dnd_sdk.errors import InputError

MAX_INFERRED_LABELS = 20
"""Without an index, a task with at most this many distinct train responses counts as a label task."""

ANSWER_TYPES = ("label", "short-text", "number")
TASK_METRICS = ("exact_match", "rouge_l")


class Row(NamedTuple):
    """One labelled prompt."""

    prompt: str
    response: str
    split: str
    """`"train"` or `"test"`."""
    system: str | None = None
    """The system prompt the task comes with; None: the chat template's own default."""


@dataclass(frozen=True)
class Task:
    """One job with its rows, in file order."""

    name: str
    family: str
    answer_type: str
    """`"label"`, `"short-text"` or `"number"`."""
    labels: tuple[str, ...] | None
    """The allowed answers of a label task; None when answers are free."""
    metric: str
    """`"exact_match"` or `"rouge_l"`."""
    role: str
    """`"train"` or `"validation"` (never trained on)."""
    licence: str
    train: tuple[Row, ...]
    test: tuple[Row, ...]

    def messages(self, row: Row) -> list[dict[str, str]]:
        """The chat messages that ask `row`: its system prompt, if any, then the prompt."""
        system = [] if row.system is None else [{"role": "system", "content": row.system}]
        return [*system, {"role": "user", "content": row.prompt}]


def read_tasks(
    folder: str | os.PathLike[str], *, role: str | None = None, names: Collection[str] | None = None
) -> list[Task]:
    """Read every task of `folder`, sorted by name; `role` and `names` keep only those.

    Raises `InputError` naming file and line for anything that cannot be used, for an unknown name, and when no
    task is left.
    """
    root = Path(folder)
    entries = _entries(root)
    if unknown := sorted(set(names or ()) - entries.keys()):
        raise InputError(f"{root} has no task named {unknown}", fix="names are the .jsonl files without their ending")
    chosen = [n for n in sorted(entries) if names is None or n in names]
    tasks = [_read_task(root, n, entries[n]) for n in chosen if role is None or _role(entries[n]) == role]
    if not tasks:
        wanted = "" if role is None else f" with role {role!r}"
        raise InputError(f"no tasks{wanted} in {root}", fix="add NAME.jsonl files or choose another role")
    return tasks


def task_names(folder: str | os.PathLike[str]) -> list[str]:
    """Names of the tasks of `folder`, sorted, without reading their rows; raises `InputError`."""
    return sorted(_entries(Path(folder)))


def names_roles(folder: str | os.PathLike[str]) -> bool:
    """Whether any task of `folder` says its role; where none does, all count as train tasks. Raises `InputError`."""
    return any(entry.get("role") for entry in _entries(Path(folder)).values())


def data_hash(task: Task) -> str:
    """sha256 hex of what the task asks and expects: its rows in order, labels, answer type and metric."""
    digest = hashlib.sha256(json.dumps([task.answer_type, task.labels, task.metric]).encode())
    for row in (*task.train, *task.test):
        digest.update(json.dumps(row).encode())
    return digest.hexdigest()


def _entries(root: Path) -> dict[str, dict[str, Any]]:
    """Index entries by task name, with an empty one for each unlisted .jsonl file."""
    if not root.is_dir():
        raise InputError(f"tasks folder {root} does not exist", fix="pass a folder that holds NAME.jsonl files")
    listed: dict[str, dict[str, Any]] = {}
    for entry in _read_index(root / "index.json"):
        if entry["name"] in listed:
            raise InputError(f"{root / 'index.json'} lists task {entry['name']!r} twice")
        listed[entry["name"]] = entry
    files = {e.get("file", f"{name}.jsonl") for name, e in listed.items()}
    extra: dict[str, dict[str, Any]] = {p.stem: {} for p in sorted(root.glob("*.jsonl")) if p.name not in files}
    return {**extra, **listed}


def _read_index(path: Path) -> Iterator[dict[str, Any]]:
    if not path.exists():
        return
    try:
        index = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as e:
        raise InputError(f"{path} is not readable JSON: {e}") from e
    if not isinstance(index, list):
        raise InputError(f"{path} must hold a list of objects, got {type(index).__name__}")
    for i, entry in enumerate(index):
        _check_entry(f"{path}, entry {i}", entry)
        yield entry


def _check_entry(where: str, entry: Any) -> None:
    if not isinstance(entry, dict) or not isinstance(entry.get("name"), str) or not entry["name"]:
        raise InputError(f'{where}: expected an object with a "name"')
    file = entry.get("file", f"{entry['name']}.jsonl")
    if not isinstance(file, str) or Path(file).name != file:
        raise InputError(f"{where}: file {file!r} must be a plain file name inside the tasks folder")
    for key, allowed in (("answer_type", ANSWER_TYPES), ("metric", TASK_METRICS)):
        if entry.get(key) is not None and entry[key] not in allowed:
            raise InputError(f"{where}: {key} is {entry[key]!r}, expected one of {', '.join(allowed)}")
    labels = entry.get("labels")
    if labels is not None and not (isinstance(labels, list) and labels and all(isinstance(x, str) for x in labels)):
        raise InputError(f"{where}: labels must be null or a list of strings, got {labels!r}")


def _role(entry: dict[str, Any]) -> str:
    return str(entry.get("role") or "train")


def _read_task(root: Path, name: str, entry: dict[str, Any]) -> Task:
    rows = list(_read_rows(root / entry.get("file", f"{name}.jsonl")))
    train = tuple(r for r in rows if r.split == "train")
    test = tuple(r for r in rows if r.split == "test")
    return Task(name=name, train=train, test=test, **_describe(name, entry, train))


def _describe(name: str, entry: dict[str, Any], train: tuple[Row, ...]) -> dict[str, Any]:
    """The task's properties: the index's word, else defaults inferred from the train responses."""
    distinct = {r.response for r in train}
    few = 0 < len(distinct) <= MAX_INFERRED_LABELS and len(distinct) < len(train)
    answer_type = entry.get("answer_type") or ("label" if entry.get("labels") or few else "short-text")
    labels = entry.get("labels") or (sorted(distinct) if answer_type == "label" else None)
    return {
        "family": str(entry.get("family") or name),
        "answer_type": answer_type,
        "labels": tuple(labels) if labels else None,
        "metric": entry.get("metric") or "exact_match",
        "role": _role(entry),
        "licence": str(entry.get("licence") or "not stated"),
    }


def _read_rows(path: Path) -> Iterator[Row]:
    at_least_one = False
    try:
        with path.open("rb") as lines:  # bytes: only "\n" ends a line, whatever else the strings hold
            for number, line in enumerate(lines, 1):
                if line.strip():
                    at_least_one = True
                    yield _parse_row(line, path, number)
    except OSError as e:
        raise InputError(f"cannot read {path}: {e.strerror or e}") from e
    if not at_least_one:
        raise InputError(f"{path} holds no rows")


def _parse_row(line: bytes, path: Path, number: int) -> Row:
    where = f"{path}, line {number}"
    try:
        data = json.loads(line.decode("utf-8-sig"))
    except ValueError as e:  # UnicodeDecodeError and JSONDecodeError are both ValueErrors
        raise InputError(f"{where}: not UTF-8 JSON: {e}") from e
    if not isinstance(data, dict):
        raise InputError(f"{where}: expected an object, got {type(data).__name__}")
    for key in ("prompt", "response", "split"):
        if not isinstance(data.get(key), str) or not data[key]:
            raise InputError(f'{where}: "{key}" must be a non-empty string, got {data.get(key)!r}')
    if data["split"] not in ("train", "test"):
        raise InputError(f'{where}: "split" must be "train" or "test", got {data["split"]!r}')
    system = data.get("system")
    if system is not None and not isinstance(system, str):
        raise InputError(f'{where}: "system" must be a string, got {system!r}')
    return Row(data["prompt"], data["response"], data["split"], system)

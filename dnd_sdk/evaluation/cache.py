"""What an evaluation has answered so far, so that a killed run goes on where it was.

Raw outputs are kept, not scores: changing a scorer costs no new completions.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from dnd_sdk.errors import StorageError

if TYPE_CHECKING:
    from torch import Tensor


class Answer(NamedTuple):
    """What one treatment answered to one row."""

    output: str
    choice: int | None
    """Index of the likeliest label; None unless the task has labels."""


class AnswerCache:
    """Answers by content key and row: in memory, and as appended lines of a JSONL file when it has a path.

    Several processes may append to one file; each sees what was there when it began.
    """

    def __init__(self, path: Path | None) -> None:
        """Read what `path` holds; lines that are no record (a torn last one) are passed over."""
        self._path = path
        self._known: dict[str, dict[str, Answer]] = {}
        self.units: dict[tuple[str, str, int], dict[str, Any]] = {}
        """The last record of every (task, method, seed): its `key`, and what the writer had to say about it."""
        if path is not None:
            self._read(path)

    def get(self, key: str) -> dict[str, Answer]:
        """The answers known under `key`, by row id; empty when there are none."""
        return dict(self._known.get(key, {}))

    def put(self, key: str, answers: Mapping[str, Answer], *, task: str, method: str, seed: int, **about: Any) -> None:
        """Add `answers`, by row id, to what (task, method, seed) has under `key`. Durable on return.

        Without new answers it is noted whose answers those under `key` are, once.
        """
        self._known.setdefault(key, {}).update(answers)
        record = {"key": key, "task": task, "method": method, "seed": seed, **about}
        if answers or self.units.get((task, method, seed)) != record:
            self.units[task, method, seed] = dict(record)
            outputs, choices = [a.output for a in answers.values()], [a.choice for a in answers.values()]
            self._append(record | {"rows": list(answers), "outputs": outputs, "choices": choices})

    def _read(self, path: Path) -> None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            data = path.read_bytes() if path.exists() else b""
            if data and not data.endswith(b"\n"):  # a kill in mid-write: end that line, the next record gets its own
                self._write(b"\n")
        except OSError as e:
            raise StorageError(f"cannot use {path}: {e.strerror or e}", fix="choose another run folder") from e
        for line in data.split(b"\n"):
            try:
                record = json.loads(line)
                answers = map(Answer, record["outputs"], record["choices"])
                self._known.setdefault(record["key"], {}).update(zip(record.pop("rows"), answers, strict=True))
                del record["outputs"], record["choices"]
                self.units[record["task"], record["method"], record["seed"]] = record
            except (ValueError, KeyError, TypeError):
                continue

    def _append(self, record: dict[str, Any]) -> None:
        if self._path is None:
            return
        try:
            self._write(json.dumps(record).encode() + b"\n")
        except OSError as e:
            raise StorageError(f"cannot write {self._path}: {e.strerror or e}", fix="free some space") from e

    def _write(self, data: bytes) -> None:
        assert self._path is not None
        with self._path.open("ab") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())


def flat_hash(flat: Tensor | None) -> str | None:
    """sha256 hex of a flat LoRA vector's bytes; None for the base."""
    return None if flat is None else hashlib.sha256(flat.detach().cpu().contiguous().numpy().tobytes()).hexdigest()

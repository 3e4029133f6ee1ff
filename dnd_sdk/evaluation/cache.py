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

    Several processes of one machine may append to one file; each sees what was there when it began.
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

    def add(self, record: dict[str, Any]) -> None:
        """Add what another process noted (`CollectedAnswers.collect`). Durable on return."""
        self._take(record)
        self._append(record)

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
                self._take(json.loads(line))
            except (ValueError, KeyError, TypeError):
                continue

    def _take(self, record: dict[str, Any]) -> None:
        answers = map(Answer, record["outputs"], record["choices"])
        self._known.setdefault(record["key"], {}).update(zip(record["rows"], answers, strict=True))
        about = {k: v for k, v in record.items() if k not in ("rows", "outputs", "choices")}
        self.units[record["task"], record["method"], record["seed"]] = about

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


class CollectedAnswers(AnswerCache):
    """Answers of a worker: it knows what the file holds and writes nothing; what is new is for others to write.

    A disk that several machines share does not keep their lines apart when they append to one file.
    """

    def __init__(self, path: Path | None) -> None:
        self._new: list[dict[str, Any]] = []
        super().__init__(path)

    def collect(self) -> list[dict[str, Any]]:
        """What was noted since it was last asked, for `AnswerCache.add`."""
        new, self._new = self._new, []
        return new

    def _append(self, record: dict[str, Any]) -> None:
        self._new.append(record)

    def _write(self, data: bytes) -> None:
        """Nothing, also where the file's last line is torn: the one who writes may be in the middle of it."""


def flat_hash(flat: Tensor | None) -> str | None:
    """sha256 hex of a flat LoRA vector's bytes; None for the base."""
    return None if flat is None else hashlib.sha256(flat.detach().cpu().contiguous().numpy().tobytes()).hexdigest()

"""What an evaluation has answered so far, so that a killed run goes on where it was.

Raw outputs are kept, not scores: changing a scorer costs no new completions.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from dnd_sdk.errors import StorageError

if TYPE_CHECKING:
    from torch import Tensor


class Answers(NamedTuple):
    """What one treatment answered to the rows of one task, in row order."""

    outputs: list[str]
    choices: list[int] | None
    """Index of the likeliest label per row; None unless the task has labels."""


class AnswerCache:
    """Answers by content key: in memory, and as appended lines of a JSONL file when it has a path."""

    def __init__(self, path: Path | None) -> None:
        """Read what `path` holds; lines that are no record (a torn last one) are passed over."""
        self._path = path
        self._known: dict[str, Answers] = {}
        if path is not None:
            self._read(path)

    def get(self, key: str) -> Answers | None:
        """The answers under `key`, or None."""
        return self._known.get(key)

    def put(self, key: str, answers: Answers, **about: Any) -> None:
        """Keep `answers`; `about` (task, method, seed) is for whoever reads the file. Durable on return."""
        self._known[key] = answers
        if self._path is not None:
            self._append({"key": key, **about, **answers._asdict()})

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
                self._known[record["key"]] = Answers(list(record["outputs"]), record["choices"])
            except (ValueError, KeyError, TypeError):
                continue

    def _append(self, record: dict[str, Any]) -> None:
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

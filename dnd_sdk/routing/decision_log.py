"""`DecisionLog`: every decision as one JSON line in the home, so that people can read and programs can replay it.

* Prompts are not kept, only their hash; what is needed to decide again (scores, neighbours, thresholds) is.
* A line is one write to a file opened for appending: lines of several processes never mix.
* Two files at most: a full one is renamed, and what it replaces is forgotten.
* Logging never makes a call fail: trouble with the disk is warned of once.
"""

from __future__ import annotations

import json
import logging
import os
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, datetime
from math import isfinite
from pathlib import Path
from typing import Any

from dnd_sdk.files import locked

log = logging.getLogger(__name__)

FORMAT_VERSION = 1
LOG_FILE = "decisions.jsonl"
OLD_FILE = "decisions.1.jsonl"
ROTATION_WAIT_S = 1.0
"""How long an append that finds the log full waits for whoever rotates it: a log is not worth more."""
MAX_BYTES = 8 * 2**20
MAX_LINE_BYTES = 2**16
_LATER = ("probability", "in_distribution")
"""Fields that lines of earlier releases lack."""


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")


@dataclass(frozen=True)
class Decision:
    """One decision and what it was made from."""

    kind: str
    """`"adapt"`, `"auto"` (one prompt routed) or `"observe"`."""
    prompts: str
    """`prompt_set_hash` of the prompts."""
    n_prompts: int
    decision: str
    """`"reuse"`, `"generate"`, `"merge"` or `"base"`."""
    adapter: str | None
    """Name of the adapter that serves; None: the base."""
    score: float | None
    """Of the nearest adapter; None when nothing was compared."""
    neighbours: tuple[tuple[str, float], ...]
    """Nearest adapters and their scores, best first."""
    support: float | None
    """Nearness to the generator's training tasks; None when not asked."""
    thresholds: dict[str, float]
    """`reuse`, `reuse_single` and `support` at that time."""
    rule: str
    """`"set"` or `"single"`: which threshold counted."""
    mode: str
    """`"auto"`, `"reuse"`, `"generate"` or `"merge"`."""
    by: str
    """What settled it: `"scores"`, what needs none (`"exact"`, `"asked"`, `"cluster"`, `"tools"`) or overruled them."""
    reason: str
    cluster: int | None = None
    """Of the observed stream."""
    time: str = field(default_factory=_now)
    """ISO 8601, UTC."""
    probability: float | None = None
    """Of `score`: that the nearest adapter is the job's own; None without score or measured map, and in old lines."""
    in_distribution: float | None = None
    """Of `support`: that the prompts are a job and not noise; None likewise."""


class DecisionLog:
    """The log in one folder; safe to share between threads, and between processes."""

    def __init__(self, folder: Path, *, max_bytes: int = MAX_BYTES) -> None:
        """Nothing is written before the first decision; `max_bytes` is per file."""
        self.folder, self.max_bytes = folder, max_bytes
        self._warned = False

    def append(self, decision: Decision) -> None:
        """Add one decision; never raises for the disk's sake."""
        line = json.dumps({"v": FORMAT_VERSION, **asdict(decision)}).encode() + b"\n"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if self._write(line) >= self.max_bytes:
                self._rotate()
        except OSError as e:
            if not self._warned:
                self._warned = True
                log.warning("decisions are not logged in %s: %s", self.folder, e.strerror or e)

    def _write(self, line: bytes) -> int:
        """Append in one write; returns the size of the file."""
        file = os.open(self.folder / LOG_FILE, os.O_APPEND | os.O_CREAT | os.O_WRONLY, 0o600)
        try:
            if os.write(file, line) < len(line):
                raise OSError("the disk is full")
            return os.fstat(file).st_size
        finally:
            os.close(file)

    def _rotate(self) -> None:
        # waited for, not passed by: while a slow process rotates, others would write past the bound
        with suppress(TimeoutError), locked(self.folder, wait=ROTATION_WAIT_S):
            # another process may have done it since the write
            if (self.folder / LOG_FILE).stat().st_size >= self.max_bytes:
                os.replace(self.folder / LOG_FILE, self.folder / OLD_FILE)


def read_decisions(
    folder: Path, *, since: datetime | None = None, last: int | None = None
) -> tuple[list[Decision], int]:
    """The logged decisions, oldest first, and how many lines were no decision (torn, damaged, of another version).

    `since` must be aware of its time zone; of more lines than `last` the latest are read.
    """
    found, n_bad = [], 0
    for line in deque(_lines(folder), last):
        try:
            decision = _parsed(json.loads(line))
            if since is None or datetime.fromisoformat(decision.time) >= since:
                found.append(decision)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            n_bad += 1
    return found, n_bad


def _lines(folder: Path) -> Iterator[bytes]:
    for name in (OLD_FILE, LOG_FILE):
        try:
            with (folder / name).open("rb") as file:
                while line := file.readline(MAX_LINE_BYTES):
                    yield line
        except FileNotFoundError:
            continue


def _parsed(data: dict[str, Any]) -> Decision:
    if data.pop("v") != FORMAT_VERSION:
        raise ValueError("another version")
    values: dict[str, Any] = {f.name: data.get(f.name) if f.name in _LATER else data[f.name] for f in fields(Decision)}
    values["neighbours"] = tuple((str(name), _number(score)) for name, score in values["neighbours"])
    values["thresholds"] = {name: _number(values["thresholds"][name]) for name in ("reuse", "reuse_single", "support")}
    for name in ("score", "support", *_LATER):
        values[name] = None if values[name] is None else _number(values[name])
    texts = ("kind", "prompts", "decision", "rule", "mode", "by", "reason", "time")
    if not all(isinstance(values[name], str) for name in texts) or not isinstance(values["n_prompts"], int):
        raise ValueError("a field is of another type")
    if datetime.fromisoformat(values["time"]).tzinfo is None:
        raise ValueError("its time has no zone")
    return Decision(**values)


def _number(value: object) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or not isfinite(value):
        raise ValueError(f"{str(value)[:20]!r} is not a number")
    return float(value)

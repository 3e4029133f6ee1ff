"""`VectorFile`: the exemplars of indexed adapters on disk, added at the end, so that a change costs what it touches.

* `index.jsonl` says what there is. `vectors-*.f32` holds for each adapter the centre of its exemplars and then them:
  vectors are written first, and count once their line is there.
* Both are a cache of the store's folders: what does not read as expected is made again from them. A check sum in the
  line tells vectors of others, who wrote at the same time where locks hold nobody off.
"""

from __future__ import annotations

import json
import logging
import uuid
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np

from dnd_sdk.files import LineLog, is_left, locked, plain_only, storage_errors, sweep
from dnd_sdk.routing.row_file import RowFile, append_rows

log = logging.getLogger(__name__)

FORMAT_VERSION = 4
"""1 and 2 were FAISS files written whole; they are removed. 3 had no check sums."""
INDEX_FILE = "index.jsonl"
_EARLIER = ("index.faiss", "index.json")
_SPARE = 256
"""Lines of earlier states that may be there beyond twice the adapters, before all is written anew."""


@dataclass(frozen=True)
class Key:
    """What all vectors of one index share; vectors of another key cannot be compared with them."""

    width: int
    encoder: str
    encoder_fingerprint: str
    base_fingerprint: str


@dataclass(frozen=True)
class Vectors:
    """What an index holds of one adapter."""

    stamp: str
    """Changes when another adapter was stored under the name, or it got other exemplars."""
    coherence: float
    centre: np.ndarray = field(compare=False)
    """(C,), normalised."""
    exemplars: np.ndarray = field(compare=False)
    """(k, C), normalised."""


@dataclass(frozen=True)
class Kept:
    """The same on disk: the centre at row `start`, then `count` exemplars."""

    stamp: str
    coherence: float
    start: int
    count: int
    sums: tuple[int, int]
    """CRC-32 of the centre and of the exemplars."""
    rows: RowFile = field(compare=False)

    @property
    def end(self) -> int:
        """The row behind its last one."""
        return self.start + 1 + self.count

    @property
    def centre(self) -> np.ndarray:
        """(C,); raises `ValueError` when it is damaged, and `OSError`."""
        return self._checked(self.rows.read(self.start, 1), self.sums[0])[0]

    @property
    def exemplars(self) -> np.ndarray:
        """(count, C); raises `ValueError` when they are damaged, and `OSError`."""
        return self._checked(self.rows.read(self.start + 1, self.count), self.sums[1])

    def _checked(self, rows: np.ndarray, expected: int) -> np.ndarray:
        if zlib.crc32(rows.data) != expected:
            raise ValueError(f"{self.rows.path} holds other rows at {self.start} to {self.end}")
        return rows


class VectorFile:
    """The vectors of one key in one folder; whoever reads or writes holds `locked`."""

    def __init__(self, folder: Path, key: Key) -> None:
        self.kept: dict[str, Kept] = {}
        """By adapter name, as far as the file was read or written."""
        self.key, self._folder = key, folder
        self._alone = self._swept = False
        self._lines = self._log()

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other processes from writing; raises `StorageError` when there can be no such folder."""
        with storage_errors("write", self._folder):
            self._folder.mkdir(parents=True, exist_ok=True)
        with locked(self._folder) as self._alone:
            yield

    @classmethod
    def found_in(cls, folder: Path) -> VectorFile:
        """The file in a folder, of whatever key it is; raises `ValueError` and `OSError` when it cannot be used."""
        with open(folder / INDEX_FILE, "rb", opener=plain_only) as f:
            first = json.loads(f.readline(2**16))
        file = cls(folder, Key(**{field.name: first[field.name] for field in fields(Key)}))
        with locked(folder, shared=True):
            file._read()
        return file

    @property
    def is_unread(self) -> bool:
        """Whether there is a file that was not taken in."""
        return self._lines.is_new and self._lines.path.exists()

    def read(self) -> None:
        """Take in what others wrote."""
        try:
            self._read()
            if not self._swept:
                self._sweep()
        except (OSError, ValueError, KeyError, TypeError, OverflowError) as e:
            log.warning("the index in %s is not usable (%s), it is made again", self._folder, str(e)[:200])
            self.forget()

    def _read(self) -> None:
        lines, everything = self._lines.read()
        if everything:
            self._begin()
        elif not self._lines.is_new and not self._rows.has(self._n_rows):
            raise ValueError("its vectors are gone")
        if lines:
            self._take(lines)

    def _begin(self) -> None:
        self._rows, self.kept, self._n_rows = RowFile(self._path, self.key.width), {}, 0

    def forget(self) -> None:
        """Have all of it made again with the next `write`."""
        self.kept, self._lines = {}, self._log()

    def write(self, added: Mapping[str, Vectors], removed: Iterable[str] = ()) -> None:
        """Add adapters, replacing those of the same names, and take others out; raises `StorageError`."""
        gone = [name for name in removed if name not in added and name in self.kept]
        with storage_errors("write", self._folder):
            if self._lines.is_new or self._lines.n_lines + len(added) + len(gone) > 2 * len(self.kept) + _SPARE:
                self._fold({n: k for n, k in self.kept.items() if n not in gone} | dict(added))
            elif added or gone:
                lines = [*self._append(self._path, added), *({"name": name} for name in gone)]
                self._lines.append(lines)
                self._take(lines)

    def _fold(self, vectors: Mapping[str, Vectors | Kept]) -> None:
        name = f"vectors-{uuid.uuid4().hex}.f32"
        try:
            lines = self._append(self._folder / name, vectors)
            self._lines.fold(lines, vectors=name)
        except BaseException:
            (self._folder / name).unlink(missing_ok=True)
            raise
        self._begin()
        self._take(lines)
        self._sweep()

    def _append(self, path: Path, vectors: Mapping[str, Vectors | Kept]) -> list[dict[str, Any]]:
        """Add vectors to a file of rows; the lines that tell where they are."""
        sums: list[tuple[int, int]] = []

        def blocks() -> Iterator[np.ndarray]:
            for v in vectors.values():
                block = np.concatenate([v.centre[None], v.exemplars], dtype=np.float32)
                sums.append((zlib.crc32(block[:1].data), zlib.crc32(block[1:].data)))
                yield block

        places = append_rows(path, blocks(), self.key.width)
        return [
            {"name": n, "stamp": v.stamp, "coherence": v.coherence, "start": start, "count": n_rows - 1, "sums": both}
            for (n, v), (start, n_rows), both in zip(vectors.items(), places, sums, strict=True)
        ]

    def _take(self, lines: Iterable[Mapping[str, Any]]) -> None:
        n_there = len(self._rows)
        for line in lines:
            name = str(line["name"])
            self.kept.pop(name, None)
            if "stamp" not in line:
                continue
            centre, exemplars = map(int, line["sums"])
            start, count = int(line["start"]), int(line["count"])
            kept = Kept(str(line["stamp"]), float(line["coherence"]), start, count, (centre, exemplars), self._rows)
            if not kept.coherence > 0 or kept.start < 0 or kept.count < 1 or kept.end > n_there:
                raise ValueError(f"its line for {name[:80]!r} says what is not there")
            self._n_rows = max(self._n_rows, kept.end)
            self.kept[name] = kept

    @property
    def edition(self) -> object:
        """Another one after each time that all was written anew; None before there is a file."""
        return self._lines.first.get("id")

    @property
    def _path(self) -> Path:
        return self._folder / Path(str(self._lines.first["vectors"])).name

    def _log(self) -> LineLog:
        return LineLog(self._folder / INDEX_FILE, {"format_version": FORMAT_VERSION, **asdict(self.key)})

    def _sweep(self) -> None:
        """Remove what killed processes, earlier states and earlier versions left."""
        current = self._lines.first.get("vectors")
        others = [p for p in self._folder.glob("vectors-*.f32") if p.name != current and is_left(p, self._alone)]
        try:
            sweep(self._folder, self._alone)
            for path in (*others, *(self._folder / name for name in _EARLIER)):
                path.unlink(missing_ok=True)
        except OSError as e:  # a read-only disk can still be read
            log.warning("what a killed process left in %s cannot be cleared: %s", self._folder, e.strerror or e)
        self._swept = True

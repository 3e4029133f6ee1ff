"""The bytes of a prompt file as text: bounded, unpacked where they are gzipped, every complaint with its place.

* Size, encoding and binary content are judged before any text is kept; what gzip unpacks is held to the same limits,
  and to a ratio, so that a small file cannot cost the time of a large one.
"""

from __future__ import annotations

import codecs
import gzip
import os
import re
import sys
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, cast

from dnd_sdk.errors import InputError

MAX_LINE_BYTES = 16 * 2**20
MAX_FILE_BYTES = 2 * 2**30
MAX_GZIP_RATIO = 200
"""Unpacked over packed; logs of one template reach about 100, bombs 1,000."""
FREE_BYTES = 4 * 2**20
"""This much may be unpacked whatever the ratio."""
SUFFIXES = (".txt", ".jsonl", ".ndjson", ".json", ".csv", ".tsv")

_GZIP_START = b"\x1f\x8b"
_PIECE_BYTES = 2**20
_SHOWN = 300
_BOM = b"\xef\xbb\xbf"
_BLANK_LINES = re.compile(rb"[ \t\n\r\f\v]*\n")


class Source:
    """Bounded UTF-8 text of a byte stream, with the place of the current line."""

    def __init__(self, name: str, stream: IO[Any], suffix: str, *, packed: bool = False) -> None:
        self.name = name
        self.suffix = suffix
        """What the content is, in lower case; empty where nothing says it."""
        self.number = 0
        """Of the current line, from 1."""
        self._offset = 0
        self._packed = _Counted(stream) if packed else None
        self._stream: Any = stream
        if self._packed is not None:
            self._stream = gzip.GzipFile(fileobj=cast("IO[bytes]", self._packed), mode="rb")

    @property
    def here(self) -> str:
        """The current line, for a message."""
        return f"{self.name} line {self.number}"

    def lines(self, *, blank: bool = True) -> Iterator[str]:
        """Yield lines with their ends; raises `InputError` on NUL, bad UTF-8 and sizes above the bounds.

        `blank` False: no lines of ASCII space alone, which then cost next to nothing, however many they are.
        """
        while raw := self._stream.readline(MAX_LINE_BYTES + 1):
            # a stream replaced by a test or a caller may give text
            line = raw.encode("utf-8", "surrogatepass") if isinstance(raw, str) else raw
            self.number += 1
            if len(line) > MAX_LINE_BYTES:
                raise InputError(f"{self.here} is longer than {MAX_LINE_BYTES >> 20} MiB", fix="split the file")
            if blank or not line.isspace():
                yield self._decoded(line)
                self._count(len(line))
            else:
                self._count(len(line))
                self._pass_blank_lines()

    def pieces(self) -> Iterator[str]:
        """Yield the same text in pieces of about a MiB, wherever its lines end."""
        decode = codecs.getincrementaldecoder("utf-8")().decode
        raw = b""
        try:
            while raw := self._stream.read(_PIECE_BYTES):
                if 0 in raw:
                    raise self._nul(self.name, raw.index(0))
                yield decode(raw.removeprefix(_BOM) if self._offset == 0 else raw)
                self._count(len(raw))
            decode(b"", final=True)
        except UnicodeDecodeError as e:
            # the decoder may have kept bytes of the piece before; what it fails on ends where `raw` ends
            at = self._offset + len(raw) - len(e.object) + e.start
            raise _not_utf8(self.name, e.object[e.start], at) from e

    def _pass_blank_lines(self) -> None:
        """Pass over the blank lines that stand in the stream's buffer, without looking at each of them."""
        peek = getattr(self._stream, "peek", None)
        while peek is not None and (run := _BLANK_LINES.match(peek(_PIECE_BYTES))):
            self.number += run.group().count(b"\n")
            self._stream.read(run.end())
            self._count(run.end())

    def _count(self, n: int) -> None:
        self._offset += n
        if self._offset > MAX_FILE_BYTES:
            raise _too_large(self.name)
        if self._packed is not None and self._offset > max(FREE_BYTES, MAX_GZIP_RATIO * self._packed.n):
            raise InputError(
                f"{self.name} unpacks to more than {MAX_GZIP_RATIO} times its size, as a gzip bomb does",
                fix="unpack it with `gunzip` if you trust it, and give a sample of it",
            )

    def _decoded(self, line: bytes) -> str:
        if b"\0" in line:
            raise self._nul(self.here, line.index(0))
        start = len(_BOM) if self._offset == 0 and line.startswith(_BOM) else 0
        try:
            return line[start:].decode("utf-8")
        except UnicodeDecodeError as e:
            at = start + e.start
            raise _not_utf8(self.here, line[at], self._offset + at) from e

    def _nul(self, where: str, at: int) -> InputError:
        return InputError(
            f"{where} holds a NUL byte at offset {self._offset + at}: this is no UTF-8 text",
            fix="give a text file; convert UTF-16 with `iconv -f UTF-16 -t UTF-8`",
        )


class _Counted:
    """What gzip reads from: counts the packed bytes."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self.n = 0

    def read(self, size: int = -1) -> bytes:
        data = self._stream.read(size)
        self.n += len(data)
        return data


@contextmanager
def opened(source: str | os.PathLike[str], stdin: IO[Any] | None) -> Iterator[Source]:
    """The file, or standard input for `-`; raises `InputError` when it cannot be read, also while it is read."""
    name = "standard input" if str(source) == "-" else _shown(str(source))
    try:
        if str(source) == "-":
            stream = stdin if stdin is not None else sys.stdin
            stream = getattr(stream, "buffer", stream)
            yield Source(name, stream, "", packed=_is_packed(stream))
        else:
            suffix, packed = _checked_suffix(Path(source), name)
            with open(source, "rb") as f:
                yield Source(name, f, suffix, packed=packed or _is_packed(f))
    except (gzip.BadGzipFile, EOFError, zlib.error) as e:
        raise InputError(
            f"{name} is no whole gzip file: {_shown(str(e))}", fix="pack it again with `gzip`, or give it unpacked"
        ) from e
    except OSError as e:
        raise InputError(
            f"cannot read {name}: {_shown(e.strerror or str(e))}", fix="check the path and its permissions"
        ) from e


def _is_packed(stream: IO[Any]) -> bool:
    peek = getattr(stream, "peek", None)
    return peek is not None and peek(len(_GZIP_START))[: len(_GZIP_START)] == _GZIP_START


def _checked_suffix(path: Path, name: str) -> tuple[str, bool]:
    """What the content is by its name, and whether that says it is gzipped."""
    if path.is_dir():
        raise InputError(f"{name} is a folder, expected a file of prompts", fix="name a file in it")
    if not path.exists():
        raise InputError(f"no file {name}", fix="check the path; `-` reads standard input")
    packed = path.suffix.lower() == ".gz"
    suffix = Path(path.stem).suffix.lower() if packed else path.suffix.lower()
    if suffix and suffix not in SUFFIXES:
        raise InputError(
            f"{name}: unknown suffix {_shown(suffix)!r}", fix=f"use one of {', '.join(SUFFIXES)}, also with .gz, or `-`"
        )
    if path.stat().st_size > MAX_FILE_BYTES:
        raise _too_large(name)
    return suffix, packed


def _not_utf8(where: str, byte: int, at: int) -> InputError:
    return InputError(f"{where} is not UTF-8: byte 0x{byte:02x} at offset {at}", fix="convert the file to UTF-8")


def _too_large(name: str) -> InputError:
    return InputError(f"{name} is larger than {MAX_FILE_BYTES >> 30} GiB", fix="give a sample of it")


def _shown(text: str) -> str:
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."

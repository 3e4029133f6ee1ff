"""Reading prompts from files, standard input or lists: bounded, streamed, and with errors that name file and line.

* Files are read line by line in bytes: size, encoding and binary content are judged before any text is kept.
* More prompts than asked for: the sample is the prompts whose keyed hashes are smallest. It is uniform over the
  distinct prompts, needs memory for the sample only, and is the same whatever the order of the file.
"""

from __future__ import annotations

import csv
import hashlib
import heapq
import json
import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from dnd_sdk.errors import ConfigError, InputError

MAX_PROMPTS = 512
MAX_LINE_BYTES = 16 * 2**20
MAX_FILE_BYTES = 2 * 2**30

_SAMPLE_KEY = b"dnd prompt sample"
_BOM = b"\xef\xbb\xbf"
_SUFFIXES = (".txt", ".jsonl", ".csv")


@dataclass(frozen=True)
class PromptSet:
    """Distinct prompts in the order they were met."""

    prompts: tuple[str, ...]
    notes: tuple[str, ...]
    """What was left out and why, for people to read."""
    n_read: int
    """Prompts met, before duplicates were removed and a sample was taken."""


def read_prompts(
    source: str | os.PathLike[str], *, column: str = "prompt", limit: int = MAX_PROMPTS, stdin: IO[Any] | None = None
) -> PromptSet:
    """Read `.txt` (one prompt a line), `.jsonl`, `.csv`, or `-` for standard input (JSONL or one a line).

    Args:
        source: The file; one without a suffix is read like standard input.
        column: CSV column or JSONL field; a JSONL line without it may hold OpenAI `messages`, whose last user
            message is the prompt.
        limit: More distinct prompts than this are sampled, the same ones every time.
        stdin: Read for `-`; None is the process's own.

    Raises:
        InputError: A missing, empty, binary, too large or malformed file, naming file and line.
    """
    lines = _Lines("standard input" if str(source) == "-" else str(source))
    with _opened(source, stdin) as stream:
        prompts = _parse(lines, stream, Path(source).suffix.lower(), column)
        return _collect(prompts, limit, where=lines.name)


def clean_prompts(prompts: Iterable[str], *, limit: int = MAX_PROMPTS) -> PromptSet:
    """Apply the rules of `read_prompts` to prompts in memory; raises `InputError` naming the index of a bad one."""
    if isinstance(prompts, str | bytes | Mapping) or not isinstance(prompts, Iterable):
        raise InputError(f"prompts must be a list of strings, got {type(prompts).__name__}", fix="pass [prompt, ...]")
    try:
        found = iter(prompts)
    except TypeError as e:  # an array of no dimension only seems to be a list
        raise InputError(f"prompts must be a list of strings, got {type(prompts).__name__}") from e
    return _collect(_checked_items(found), limit, where="the list of prompts")


def prompt_set_hash(prompts: Iterable[str], role: str | None = None) -> str:
    """sha256 hex of a set of prompts: order, duplicates and surrounding whitespace do not matter.

    The same prompts under another `role` (or none) are another task, with another hash.
    """
    parts = sorted({hashlib.sha256(p.strip().encode()).digest() for p in prompts})
    if role is not None:  # after the sorted hashes and of another length: no set of prompts gives the same bytes
        parts.append(b"role" + hashlib.sha256(role.encode()).digest())
    return hashlib.sha256(b"".join(parts)).hexdigest()


class _Lines:
    """Bounded UTF-8 lines of a byte stream, with the place of the current one."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.number = 0
        self._offset = 0

    @property
    def here(self) -> str:
        return f"{self.name} line {self.number}"

    def read(self, stream: IO[Any]) -> Iterator[str]:
        """Yield lines with their ends; raises `InputError` on NUL, bad UTF-8 and sizes above the bounds."""
        while raw := stream.readline(MAX_LINE_BYTES + 1):
            # a stream replaced by a test or a caller may give text
            line = raw.encode("utf-8", "surrogatepass") if isinstance(raw, str) else raw
            self.number += 1
            if len(line) > MAX_LINE_BYTES:
                raise InputError(f"{self.here} is longer than {MAX_LINE_BYTES >> 20} MiB", fix="split the file")
            yield self._decode(line)
            self._offset += len(line)
            if self._offset > MAX_FILE_BYTES:
                raise _too_large(self.name)

    def _decode(self, line: bytes) -> str:
        if b"\0" in line:
            raise InputError(
                f"{self.here} holds a NUL byte at offset {self._offset + line.index(0)}: this is no UTF-8 text",
                fix="give a text file; convert UTF-16 with `iconv -f UTF-16 -t UTF-8`",
            )
        start = len(_BOM) if self._offset == 0 and line.startswith(_BOM) else 0
        try:
            return line[start:].decode("utf-8")
        except UnicodeDecodeError as e:
            at = start + e.start
            raise InputError(
                f"{self.here} is not UTF-8: byte 0x{line[at]:02x} at offset {self._offset + at}",
                fix="convert the file to UTF-8",
            ) from e


@contextmanager
def _opened(source: str | os.PathLike[str], stdin: IO[Any] | None) -> Iterator[IO[Any]]:
    if str(source) == "-":
        stream = stdin if stdin is not None else sys.stdin
        yield getattr(stream, "buffer", stream)
        return
    path = Path(source)
    _check_file(path)
    try:
        with open(path, "rb") as f:
            yield f
    except OSError as e:
        raise InputError(f"cannot read {path}: {e.strerror or e}") from e


def _check_file(path: Path) -> None:
    if path.is_dir():
        raise InputError(f"{path} is a folder, expected a file of prompts")
    if not path.exists():
        raise InputError(f"no file {path}", fix="check the path; `-` reads standard input")
    if path.suffix and path.suffix.lower() not in _SUFFIXES:
        raise InputError(f"{path}: unknown suffix {path.suffix!r}", fix=f"use one of {', '.join(_SUFFIXES)}, or `-`")
    if path.stat().st_size > MAX_FILE_BYTES:
        raise _too_large(str(path))


def _too_large(name: str) -> InputError:
    return InputError(f"{name} is larger than {MAX_FILE_BYTES >> 30} GiB", fix="give a sample of it")


def _parse(lines: _Lines, stream: IO[Any], suffix: str, column: str) -> Iterator[str]:
    texts = lines.read(stream)
    if suffix == ".csv":
        return _from_csv(lines, texts, column)
    if suffix == ".jsonl":
        return _from_jsonl(lines, texts, column)
    filled = (text for text in texts if text.strip())
    return filled if suffix == ".txt" else _sniffed(lines, filled, column)


def _sniffed(lines: _Lines, filled: Iterator[str], column: str) -> Iterator[str]:
    as_json: bool | None = None
    for text in filled:
        if as_json is None:
            as_json = text.lstrip().startswith("{")
        yield _from_json(lines, text, column) if as_json else text


def _from_jsonl(lines: _Lines, texts: Iterator[str], column: str) -> Iterator[str]:
    return (_from_json(lines, text, column) for text in texts if text.strip())


def _from_json(lines: _Lines, text: str, column: str) -> str:
    try:
        row = json.loads(text)
    except (ValueError, RecursionError) as e:
        raise InputError(f"{lines.here} is not JSON: {str(e)[:200]}", fix="one JSON object a line") from e
    if not isinstance(row, dict):
        raise InputError(f"{lines.here} holds a JSON {type(row).__name__}, expected an object")
    prompt = row.get(column)
    if not isinstance(prompt, str):
        prompt = _last_user_message(row.get("messages"))
    if prompt is None:
        raise InputError(
            f"{lines.here} has neither a text {column!r} nor `messages` with a user message, only {_fields(row)}",
            fix=f'write lines like {{"{column}": "..."}}',
        )
    return _no_surrogates(prompt, lines.here)


def _fields(row: dict[str, Any]) -> str:
    return ", ".join(f"{key[:40]} ({type(value).__name__})" for key, value in list(row.items())[:8]) or "no fields"


def _last_user_message(messages: object) -> str | None:
    if not isinstance(messages, list):
        return None
    for message in reversed(messages):
        if isinstance(message, dict) and message.get("role") == "user":
            content = message.get("content")
            if isinstance(content, list):
                texts = [p.get("text") for p in content if isinstance(p, dict) and p.get("type") == "text"]
                return "\n".join(t for t in texts if isinstance(t, str)) if texts else None
            return content if isinstance(content, str) else None
    return None


def _from_csv(lines: _Lines, texts: Iterator[str], column: str) -> Iterator[str]:
    rows = csv.reader(texts)
    try:
        header = [name.strip() for name in next(rows, [])]
        if column not in header:
            raise InputError(
                f"{lines.name} has no column {column!r}; its columns are {[h[:40] for h in header[:32]]}",
                fix="name one of them with --column",
            )
        at = header.index(column)
        for row in rows:
            if row:
                yield row[at] if at < len(row) else ""
    except csv.Error as e:
        raise InputError(f"{lines.here} is not CSV: {e}", fix="check its quotes, or write JSONL instead") from e


def _checked_items(prompts: Iterable[object]) -> Iterator[str]:
    for i, prompt in enumerate(prompts):
        if not isinstance(prompt, str):
            raise InputError(f"prompt {i} is a {type(prompt).__name__}, expected a string")
        yield _no_surrogates(prompt, f"prompt {i}")


def _no_surrogates(prompt: str, where: str) -> str:
    try:
        prompt.encode()
    except UnicodeEncodeError as e:
        raise InputError(f"{where} holds half of a surrogate pair, which is no text", fix="fix its encoding") from e
    return prompt


def _collect(prompts: Iterator[str], limit: int, where: str) -> PromptSet:
    if limit < 1:
        raise ConfigError(f"the number of prompts to keep must be at least 1, got {limit}")
    heap: list[tuple[bytes, int, str]] = []  # complemented key first: the largest key is on top and leaves first
    kept: set[bytes] = set()
    n_read = n_blank = 0
    sampled = False
    for prompt in prompts:
        text = prompt.strip()
        if not text:
            n_blank += 1
            continue
        n_read += 1
        key = _sample_key(text)
        if key in kept:
            continue
        kept.add(key)
        heapq.heappush(heap, (bytes(255 - b for b in key), n_read, text))
        if len(heap) > limit:
            gone = heapq.heappop(heap)[0]
            kept.discard(bytes(255 - b for b in gone))
            sampled = True
    if not heap:
        raise InputError(f"{where} holds no prompts", fix="give at least one")
    texts = tuple(text for _, _, text in sorted(heap, key=lambda item: item[1]))
    return PromptSet(texts, _notes(n_read, n_blank, len(texts), sampled), n_read)


def _sample_key(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=16, key=_SAMPLE_KEY).digest()


def _notes(n_read: int, n_blank: int, n_kept: int, sampled: bool) -> tuple[str, ...]:
    notes = []
    if n_blank:
        notes.append(f"skipped {n_blank} blank prompts")
    if sampled:
        notes.append(f"read {n_read} prompts, sampled {n_kept}")
    elif n_kept < n_read:
        notes.append(f"removed {n_read - n_kept} duplicate prompts")
    return tuple(notes)

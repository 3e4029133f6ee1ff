"""From the text of a file to its prompts: lines, JSON values, tables; by suffix, else by how the text begins."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import Any

from dnd_sdk.errors import InputError
from dnd_sdk.prompts.shapes import COLUMNS, DEFAULT_COLUMN, Taker, with_more
from dnd_sdk.prompts.sources import MAX_LINE_BYTES, Source

_ARRAY_OR_SPREAD = re.compile(r"\s*(\[\s*(\{\s*(\"|$)|$)|\{\s*$)")
"""How a JSON array of objects begins, or an object over several lines; a text may begin with a bracket, too."""
_SPACE = re.compile(r"[ \t\n\r]*")
_DELIMITERS = {",": "commas", ";": "semicolons", "\t": "tabs"}


def parsed(source: Source, taker: Taker) -> Iterator[str]:
    """The prompts of a source, blank ones included; raises `InputError` where it is malformed."""
    if source.suffix in (".csv", ".tsv"):
        return _from_table(source, taker, _DELIMITERS if source.suffix == ".csv" else ("\t",))
    if source.suffix in (".jsonl", ".ndjson"):
        return _from_lines(source, source.lines(blank=False), taker)
    if source.suffix == ".json":
        return _from_values(source, source.pieces(), taker)
    filled = (text for text in source.lines(blank=False) if text.strip())
    return filled if source.suffix == ".txt" else _sniffed(source, filled, taker)


def _sniffed(source: Source, filled: Iterator[str], taker: Taker) -> Iterator[str]:
    first = next(filled, "")
    texts = chain([first] if first else [], filled)
    if _ARRAY_OR_SPREAD.match(first):
        yield from _from_values(source, texts, taker)
    elif first.lstrip().startswith("{"):
        yield from _from_lines(source, texts, taker)
    else:
        yield from texts


def _from_lines(source: Source, texts: Iterator[str], taker: Taker) -> Iterator[str]:
    for text in texts:
        if text.strip():
            try:
                row = json.loads(text)
            except (ValueError, RecursionError) as e:
                raise InputError(
                    f"{source.here} is not JSON: {str(e)[:200]}", fix="one JSON object a line, or an array in a .json"
                ) from e
            yield from taker.row(row, source.here)


def _from_values(source: Source, pieces: Iterator[str], taker: Taker) -> Iterator[str]:
    for n, value in enumerate(_Values(source.name, pieces), 1):
        yield from taker.row(value, f"{source.name} item {n}")


class _Values:
    """The items of one JSON array, or JSON values one after the other, without holding more than one of them."""

    def __init__(self, name: str, pieces: Iterator[str]) -> None:
        self._name = name
        self._pieces = pieces
        self._text = ""
        self._at = 0
        self._decode = json.JSONDecoder().raw_decode

    def __iter__(self) -> Iterator[Any]:
        n = 1
        if self._next() != "[":
            while self._next():
                yield self._value(n)
                n += 1
            return
        self._at += 1
        while not (n == 1 and self._next() == "]"):
            yield self._value(n)
            after = self._next()
            if after not in (",", "]") or not after:
                raise self._refusal(n, f"it is followed by {after!r}, not by a comma or the end of the array")
            if after == "]":
                break
            self._at += 1
            n += 1
        self._at += 1
        if self._next():
            raise self._refusal(n, "more text follows the end of the array")

    def _next(self) -> str:
        """The next character that is no space, empty at the end."""
        while True:
            space = _SPACE.match(self._text, self._at)
            self._at = space.end() if space else self._at
            if self._at < len(self._text) or not self._grow():
                return self._text[self._at : self._at + 1]

    def _value(self, n: int) -> Any:
        self._next()
        while True:
            try:
                value, self._at = self._decode(self._text, self._at)
                return value
            except json.JSONDecodeError as e:  # may only be cut off
                if len(self._text) - self._at > MAX_LINE_BYTES:
                    raise self._refusal(n, f"longer than {MAX_LINE_BYTES >> 20} MiB, or {e.msg}") from e
                if not self._grow():
                    raise self._refusal(n, e.msg) from e
            except (ValueError, RecursionError) as e:
                raise self._refusal(n, str(e)[:200]) from e

    def _grow(self) -> bool:
        """Read on; at least as much as is there, so that a long value is not tried again for every piece of it."""
        parts = [self._text[self._at :]]
        wanted = max(1, len(parts[0]))
        while wanted > 0 and (piece := next(self._pieces, None)) is not None:
            parts.append(piece)
            wanted -= len(piece)
        self._text, self._at = "".join(parts), 0
        return len(parts) > 1

    def _refusal(self, n: int, why: str) -> InputError:
        return InputError(
            f"{self._name} item {n} is not JSON: {why}",
            fix="check it with `python -m json.tool`; one JSON object a line may be called .jsonl",
        )


def _from_table(source: Source, taker: Taker, delimiters: Iterable[str]) -> Iterator[str]:
    first = next((text for text in source.lines(blank=False) if text.strip()), "")
    texts = source.lines()
    try:
        delimiter = max(delimiters, key=lambda d: _fit(first, d, taker))
        rows = csv.reader(chain([first], texts), delimiter=delimiter)
        header = [name.strip() for name in next(rows, [])]
        places = _places(header, taker)
        if places is None:
            raise InputError(
                f"{source.name} has no column {taker.field or taker.column!r}; its columns are "
                f"{[h[:40] for h in header[:32]]}",
                fix="name one of them with --column",
            )
        if delimiter != "," and source.suffix == ".csv":
            taker.remark(f"read a table whose columns are parted by {_DELIMITERS[delimiter]}")
        at, more, label = places
        for row in rows:
            if row:
                if taker.field is None:
                    taker.took(label)
                text = row[at] if at < len(row) else ""
                yield text if more is None or more >= len(row) else with_more(text, row[more])
    except csv.Error as e:
        raise InputError(f"{source.here} is not CSV: {e}", fix="check its quotes, or write JSONL instead") from e


def _fit(first: str, delimiter: str, taker: Taker) -> tuple[bool, int]:
    """How well a header reads with a delimiter: whether it has the prompt's column, then how many columns it has."""
    header = [name.strip() for name in next(csv.reader([first], delimiter=delimiter), [])]
    return _places(header, taker) is not None, len(header)


def _places(header: list[str], taker: Taker) -> tuple[int, int | None, str] | None:
    """Where a row's prompt stands, where what goes below it does, and how notes call it; None: nowhere."""
    named = taker.field or taker.column
    if named in header:
        return header.index(named), None, f"`{named}`"
    if taker.field is not None or taker.column != DEFAULT_COLUMN:
        return None
    known = {name.casefold(): i for i, name in reversed(list(enumerate(header)))}
    if DEFAULT_COLUMN in known:
        return known[DEFAULT_COLUMN], None, f"`{DEFAULT_COLUMN}`"
    for shape in COLUMNS:
        if shape.path in known:
            more = known.get(shape.more) if shape.more else None
            return known[shape.path], more, shape.label if more is not None else f"`{shape.path}`"
    return None

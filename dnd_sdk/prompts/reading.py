"""Reading prompts from files, standard input or lists: bounded, streamed, and with errors that name file and line.

* What files may be, `sources.py` says (bytes), `parsing.py` (formats) and `shapes.py` (which text of a row it is).
* More prompts than asked for: the sample is the prompts whose keyed hashes are smallest. It is uniform over the
  distinct prompts, needs memory for the sample only, and is the same whatever the order of the file.
"""

from __future__ import annotations

import hashlib
import heapq
import os
from collections.abc import Iterable, Iterator, Mapping, Sized
from dataclasses import dataclass, replace
from itertools import count
from typing import IO, Any

from dnd_sdk.errors import ConfigError, InputError
from dnd_sdk.prompts.parsing import parsed
from dnd_sdk.prompts.shapes import DEFAULT_COLUMN, Taker, checked_text
from dnd_sdk.prompts.sources import opened

MAX_PROMPTS = 512
MAX_ITEMS = 2**18
"""Prompts in memory: more are taken only of what has a length, as a list does. An iterator may never end."""

_SAMPLE_KEY = b"dnd prompt sample"


@dataclass(frozen=True)
class PromptSet:
    """Distinct prompts in the order they were met."""

    prompts: tuple[str, ...]
    notes: tuple[str, ...]
    """What was left out and why, for people to read."""
    n_read: int
    """Prompts met, before duplicates were removed and a sample was taken."""


def read_prompts(
    source: str | os.PathLike[str],
    *,
    column: str = DEFAULT_COLUMN,
    field: str | None = None,
    limit: int = MAX_PROMPTS,
    stdin: IO[Any] | None = None,
) -> PromptSet:
    """Read a file of prompts, gzipped or not, or `-` for standard input (JSON or one prompt a line).

    `.txt` has one prompt a line; `.jsonl` and `.ndjson` have a JSON value a line, `.json` an array of them or one after
    the other; `.csv` (`,`, `;` or tab) and `.tsv` are tables with a header.

    Args:
        source: The file; one without a suffix is read like standard input.
        column: Column of a table or field of a JSON object. An object without it may hold `messages`, whose last user
            message is the prompt; unless a column is named, it may have any shape of `prompts/shapes.py`.
        field: The field to take and no other, with dots into what is nested (`body.question`, `messages.0.content`); a
            list on the way is entered item by item. For a table it is the column.
        limit: More distinct prompts than this are sampled, the same ones every time.
        stdin: Read for `-`; None is the process's own.

    Raises:
        InputError: A missing, empty, binary, too large or malformed file, naming file and line.
        ConfigError: A column and a field at once, or a name that is none.
    """
    taker = Taker(column, field)
    with opened(source, stdin) as opened_source:
        found = _collect(parsed(opened_source, taker), limit, where=opened_source.name)
    return replace(found, notes=taker.notes + found.notes)


def clean_prompts(prompts: Iterable[str], *, limit: int = MAX_PROMPTS) -> PromptSet:
    """Apply the rules of `read_prompts` to prompts in memory.

    Raises `InputError` naming the index of a bad one, also of one that an iterator fails to make, or `MAX_ITEMS` for an
    iterator that goes on beyond them.
    """
    if isinstance(prompts, str | bytes | Mapping) or not isinstance(prompts, Iterable):
        raise InputError(f"prompts must be a list of strings, got {type(prompts).__name__}", fix="pass [prompt, ...]")
    try:
        found = iter(prompts)
    except TypeError as e:  # an array of no dimension only seems to be a list
        raise InputError(f"prompts must be a list of strings, got {type(prompts).__name__}") from e
    size = len(prompts) if isinstance(prompts, Sized) else 0
    return _collect(_checked(_items(found, max(size, MAX_ITEMS))), limit, where="the list of prompts")


def prompt_set_hash(prompts: Iterable[str], role: str | None = None) -> str:
    """sha256 hex of a set of prompts: order, duplicates and surrounding whitespace do not matter.

    The same prompts under another `role` (or none) are another task, with another hash.
    """
    parts = sorted({hashlib.sha256(p.strip().encode()).digest() for p in prompts})
    if role is not None:  # after the sorted hashes and of another length: no set of prompts gives the same bytes
        parts.append(b"role" + hashlib.sha256(role.encode()).digest())
    return hashlib.sha256(b"".join(parts)).hexdigest()


def _items(prompts: Iterator[object], most: int) -> Iterator[object]:
    for i in count():
        try:
            prompt = next(prompts)
        except StopIteration:
            return
        except Exception as e:
            raise InputError(f"prompt {i} could not be had: {type(e).__name__}: {str(e)[:200]}") from e
        if i >= most:
            raise InputError(
                f"prompts go on after MAX_ITEMS = {MAX_ITEMS} of them, perhaps without end",
                fix="pass a list, or a part: itertools.islice(prompts, 10_000)",
            )
        yield prompt


def _checked(prompts: Iterator[object]) -> Iterator[str]:
    for i, prompt in enumerate(prompts):
        if not isinstance(prompt, str):
            raise InputError(f"prompt {i} is a {type(prompt).__name__}, expected a string")
        yield checked_text(prompt, f"prompt {i}")


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

"""Which text of a row is its prompt: the shapes that logs and data sets come in, as a table.

* The first row that is no plain `prompt` decides what is taken from all rows, so that one file never gives answers of
  one row and questions of the next; `messages` may stand in for `prompt` in any row.
* Whatever is not `prompt` by that name is said in a note, and so are parts of a message that are no text.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from dnd_sdk.errors import ConfigError, InputError

DEFAULT_COLUMN = "prompt"
MAX_FIELD_CHARS = 256


class Shape(NamedTuple):
    """Where a kind of file keeps its prompt."""

    path: str
    """As `--field` takes it; it leads to a text, or to messages whose last one of the user is the prompt."""
    more: str | None = None
    """A field whose text, if there is any, goes below."""

    @property
    def label(self) -> str:
        """As notes call it."""
        return f"`{self.path}`" if self.more is None else f"`{self.path}` with `{self.more}`"


MESSAGES = Shape("messages")
COLUMNS = (
    Shape("instruction", more="input"),  # alpaca; before `text`, which there holds the answer, too
    Shape("question"),
    Shape("query"),
    Shape("input"),
    Shape("text"),
)
"""Those that a table may have, too."""
SHAPES = (
    MESSAGES,  # OpenAI chat and fine-tuning files, trl
    Shape("body.messages"),  # OpenAI batch requests: chat, responses, completions
    Shape("body.input"),
    Shape("body.prompt"),
    Shape("params.messages"),  # Anthropic batch requests
    Shape("request.messages"),
    Shape("conversations"),  # ShareGPT
    Shape("conversation"),
    *COLUMNS,
)

_USER = frozenset({"user", "human"})
_INDEX = re.compile(r"-?[0-9]{1,9}")


class Found(NamedTuple):
    """The prompts of one row."""

    texts: list[str]
    n_dropped: int = 0
    """Parts of the message that are no text."""


class Taker:
    """Takes the prompt out of rows, and tells in the end what it took."""

    def __init__(self, column: str = DEFAULT_COLUMN, field: str | None = None) -> None:
        if field is not None and column != DEFAULT_COLUMN:
            raise ConfigError("both a column and a field are named", fix="name one of them: --field or --column")
        for name, value in (("column", column), ("field", field)):
            if value is not None and (not isinstance(value, str) or not 0 < len(value) <= MAX_FIELD_CHARS):
                got = f"{len(value)} characters" if isinstance(value, str) else type(value).__name__
                raise ConfigError(
                    f"the {name} must be a name of 1 to {MAX_FIELD_CHARS} characters, got {got}",
                    fix="name the field that holds the prompt, as in `question` or `body.question`",
                )
        self.column = column
        self.field = field
        self._decided: Shape | type[str] | type[list] | None = None
        self._counts: Counter[str] = Counter()
        self._remarks: list[str] = []
        self._n_dropped = 0

    def row(self, row: object, where: str) -> list[str]:
        """The prompts of one JSON value; raises `InputError` naming `where` when there is none."""
        found = self._named(row, where) if self.field is not None else self._shaped(row, where)
        self._n_dropped += found.n_dropped
        return [checked_text(text, where) for text in found.texts]

    def took(self, label: str) -> None:
        """Count a row whose prompt stood under `label`."""
        self._counts[label] += 1

    def remark(self, note: str) -> None:
        """Add a note."""
        self._remarks.append(note)

    @property
    def notes(self) -> tuple[str, ...]:
        """What was taken, where that goes without saying no more, and what was left out."""
        notes = list(self._remarks)
        if self._counts.keys() - {f"`{self.column}`"}:
            rows = ", ".join(f"{label} of {n} {'row' if n == 1 else 'rows'}" for label, n in self._counts.items())
            notes.append(f"took {rows}")
        if self._n_dropped:
            notes.append(f"left out {self._n_dropped} parts of messages that are no text (images or the like)")
        return tuple(notes)

    def _named(self, row: object, where: str) -> Found:
        assert self.field is not None
        leaves = [_texts(leaf) for leaf in _reach(row, self.field)] if isinstance(row, dict | list) else []
        found = [leaf for leaf in leaves if leaf is not None]
        if not found or len(found) < len(leaves):
            raise InputError(
                f"{where} has no text at the field {self.field!r}, only {described(row)}",
                fix="name a field that every row has, with dots from the outermost: --field body.question",
            )
        return Found([text for leaf in found for text in leaf.texts], sum(leaf.n_dropped for leaf in found))

    def _shaped(self, row: object, where: str) -> Found:
        if not isinstance(row, dict):
            return self._bare(row, where)
        for shape in self._candidates():
            found = _taken(row, shape)
            if found is not None:
                if self._decided is None:
                    self._decided = MESSAGES if shape.path == self.column else shape
                self.took(shape.label)
                return found
        first = self._decided in (None, MESSAGES)
        other = "" if first else " nor what the rows before it have"
        raise InputError(
            f"{where} has neither a text {self.column!r} nor `messages` with a user message{other}, "
            f"only {described(row)}",
            fix="name the field that holds the prompt with --field, as in --field question or --field body.question",
        )

    def _candidates(self) -> Iterator[Shape]:
        yield Shape(self.column)
        if isinstance(self._decided, Shape):
            yield from dict.fromkeys((MESSAGES, self._decided))
        elif self._decided is None:
            yield from SHAPES if self.column == DEFAULT_COLUMN else (MESSAGES,)

    def _bare(self, row: object, where: str) -> Found:
        """A row that is no object: a text, or a list of messages, if the rows before were so, too."""
        found = _texts(row) if isinstance(row, str) else _last_user(row)
        kind = str if isinstance(row, str) else list
        if found is None or self._decided not in (None, kind) or self.column != DEFAULT_COLUMN:
            raise InputError(
                f"{where} holds a JSON {type(row).__name__}, expected an object",
                fix=f'write objects like {{"{DEFAULT_COLUMN}": "..."}}, or name a file with one array .json',
            )
        self._decided = kind
        self.took("the text itself" if kind is str else "the list of messages")
        return found


def with_more(text: str, more: object) -> str:
    """An instruction with its input below, as LLaMA-Factory and others put them together."""
    return f"{text}\n{more}" if isinstance(more, str) and more.strip() else text


def described(row: object) -> str:
    """The fields of a row with their types, cut, printable whatever the file holds."""
    if not isinstance(row, dict):
        return f"a JSON {type(row).__name__}"
    parts = (f"{key[:40]} ({type(value).__name__})" for key, value in list(row.items())[:8])
    return ", ".join(parts).encode("utf-8", "backslashreplace").decode() or "no fields"


def checked_text(text: str, where: str) -> str:
    """The text; raises `InputError` naming `where` when it cannot be encoded, which no tokenizer and no file takes."""
    try:
        text.encode()
    except UnicodeEncodeError as e:
        raise InputError(
            f"{where} holds half of a surrogate pair, which is no text",
            fix='fix its encoding, or clean it with text.encode("utf-8", "replace").decode()',
        ) from e
    return text


def _taken(row: dict[str, Any], shape: Shape) -> Found | None:
    value: object = row.get(shape.path)
    if value is None and "." in shape.path:
        outer, _, inner = shape.path.partition(".")
        box = row.get(outer)
        value = box.get(inner) if isinstance(box, dict) else None
    found = Found([value]) if isinstance(value, str) else _last_user(value)
    if found is not None and shape.more is not None:
        return found._replace(texts=[with_more(text, row.get(shape.more)) for text in found.texts])
    return found


def _reach(value: object, path: str | None) -> Iterator[object]:
    """What stands at the end of a dotted path; a list on the way is entered by a number, else item by item.

    None stands for what is not there.
    """
    if path is None:
        yield value
        return
    head, dot, tail = path.partition(".")
    rest = tail if dot else None
    if isinstance(value, dict):
        yield from _reach(value[path], None) if path in value else _reach(value.get(head), rest)
    elif isinstance(value, list) and _INDEX.fullmatch(head):
        yield from _reach(value[int(head)], rest) if -len(value) <= int(head) < len(value) else (None,)
    elif isinstance(value, list) and value:
        for item in value:
            # a name enters one list, not lists in lists: what it leads to stays below the size of the row
            yield from _reach(item, path) if isinstance(item, dict) else (None,)
    else:
        yield None


def _texts(value: object) -> Found | None:
    """The prompts that a value holds: a text, messages, parts of one message, or a list of texts."""
    if isinstance(value, str):
        return Found([value])
    if not isinstance(value, list) or not value:
        return None
    if all(isinstance(item, str) for item in value):
        return Found(list(value))
    return _last_user(value) or _content(value)


def user_text(messages: object) -> str | None:
    """What a chat is about: the text of the user's last message that holds any; None: no messages, or none of theirs.

    Messages may come as OpenAI's (`role`, `content`, also in parts) or as ShareGPT's (`from`, `value`).
    """
    found = _last_user(messages)
    return None if found is None else found.texts[0]


def _last_user(messages: object) -> Found | None:
    """The user's last message that holds text, and how many parts of later ones and of itself are none."""
    n_dropped = 0
    for message in reversed(messages) if isinstance(messages, Sequence) and not isinstance(messages, str) else ():
        if not isinstance(message, Mapping):
            continue
        speaker = message.get("role", message.get("from"))
        if isinstance(speaker, str) and speaker in _USER:
            content = message.get("content", message.get("value"))
            found = Found([content]) if isinstance(content, str) else _content(content)
            if found is not None:
                return found._replace(n_dropped=found.n_dropped + n_dropped)
            n_dropped += len(content) if isinstance(content, list) else 0
    return None


def _content(parts: object) -> Found | None:
    """The text of a message that comes in parts; None without any."""
    if not isinstance(parts, list):
        return None
    texts = [text for part in parts if (text := _part_text(part)) is not None]
    return Found(["\n".join(texts)], len(parts) - len(texts)) if texts else None


def _part_text(part: object) -> str | None:
    if isinstance(part, dict) and part.get("type") in ("text", "input_text"):
        part = part.get("text")
    return part if isinstance(part, str) else None

"""Every exception the SDK raises on purpose.

DndError
├── ConfigError(ValueError)            settings or arguments that contradict each other
├── InputError(ValueError)             prompts, task files or request text that cannot be used
│   └── ContextLengthError             a prompt that leaves its answer too little room in the context
├── LayoutMismatchError(ValueError)    weights that do not fit this base model
├── AdapterNotFoundError(LookupError)  no adapter of that name
├── AdapterCorruptError(ValueError)    an adapter folder that is damaged, hostile or incomplete
├── GeneratorError(ValueError)         a generator that is missing, damaged or gave unusable weights
├── WeightsUnavailableError(OSError)   a base or encoder that can be neither found nor fetched
├── StorageError(OSError)              the home folder cannot be read or written
├── BankFullError(RuntimeError)        every adapter slot is pinned or in use
├── BusyError(RuntimeError)            too many requests wait
├── ServerError(ConnectionError)       a running server that has ended, or answers as none of ours does
├── BackendError(OSError)              an engine elsewhere that cannot be reached, or fails
├── WorkerError(RuntimeError)          work that other processes were given and could not do
└── MissingExtraError(ImportError)     an optional package is not installed

Catch `DndError` for all of them; each also is the built-in named in brackets.

Messages name things that strangers chose (tensors, paths, settings): they are cut and made printable here, for all.
"""

from __future__ import annotations

import re
import reprlib
from typing import ClassVar

MAX_MESSAGE_BYTES, MAX_FIX_BYTES = 1400, 500
"""Together under 2 kB: what a person reads, and what a log line holds."""
_MAX_WORD = 160
_UNPRINTABLE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")


def brief(text: str, max_bytes: int = MAX_MESSAGE_BYTES) -> str:
    """`text` printable and of at most `max_bytes` UTF-8 bytes; what is cut is said, beginning and end stay.

    Long words go first: the words between two endless names are what matters.
    """
    short = _printable(text)
    if len(short.encode()) <= max_bytes:
        return short
    short = _printable(_cut_words(text))
    if len(short.encode()) <= max_bytes:
        return short
    left_out = f" ... ({len(text)} characters, most left out) ... "
    # half of them for the beginning, which says where; the end says what was expected
    half = (max_bytes - len(left_out)) // 2
    head = short[:half].encode()[:half].decode(errors="ignore")
    tail = short[-half:].encode()[-half:].decode(errors="ignore")
    return head + left_out + tail


def _cut_words(text: str) -> str:
    keep = _MAX_WORD // 2

    def cut(match: re.Match[str]) -> str:
        word = match[0]
        return f"{word[:keep]}...({len(word) - 2 * keep} characters left out)...{word[-keep:]}"

    return re.sub(rf"\S{{{_MAX_WORD},}}", cut, text)


def _printable(text: str) -> str:
    # a lone surrogate cannot be written anywhere, an escape sequence would command the terminal
    return _UNPRINTABLE.sub(lambda match: ascii(match[0])[1:-1], text)


class DndError(Exception):
    """Base class: `message` says what went wrong and where, `fix` what to do (None if nothing helps)."""

    code: ClassVar[str] = "failed"
    """What a server's answer calls this kind of error, and its client knows it by."""

    def __init__(self, message: str, *, fix: str | None = None) -> None:
        self.message = brief(message)
        self.fix = None if fix is None else brief(fix, MAX_FIX_BYTES)
        super().__init__(self.message)

    def __str__(self) -> str:
        return self.message if self.fix is None else f"{self.message}\n  fix: {self.fix}"


class ConfigError(DndError, ValueError):
    """Settings or arguments that contradict each other or are out of range."""

    code = "invalid_value"


class InputError(DndError, ValueError):
    """Prompts, task files or request text that cannot be used."""

    code = "invalid_input"


class ContextLengthError(InputError):
    """A prompt that leaves the base's context too little room for its answer."""

    code = "context_length_exceeded"


class LayoutMismatchError(DndError, ValueError):
    """Weights (adapter or generator) that do not fit this base model."""

    code = "layout_mismatch"


class AdapterNotFoundError(DndError, LookupError):
    """No adapter of that name or id in the store."""

    code = "adapter_not_found"


class AdapterCorruptError(DndError, ValueError):
    """An adapter folder that is damaged, hostile or incomplete."""

    code = "adapter_corrupt"


class GeneratorError(DndError, ValueError):
    """A generator that is missing or damaged, or that produced unusable weights."""

    code = "no_generator"


class WeightsUnavailableError(DndError, OSError):
    """A base model or encoder that can be neither found nor fetched."""


class StorageError(DndError, OSError):
    """The home folder cannot be read or written (full disk, read-only, no permission)."""

    code = "storage"


class BankFullError(DndError, RuntimeError):
    """Every adapter slot is pinned or leased by a running request."""

    code = "slots_full"


class BusyError(DndError, RuntimeError):
    """More requests wait already than may."""

    code = "busy"


class ServerError(DndError, ConnectionError):
    """A running server that has ended, refuses whoever asks, or answers as none of ours does."""


class BackendError(DndError, OSError):
    """An engine in another process (vLLM) that cannot be reached, has ended, refuses whoever asks, or fails."""

    code = "backend"


class WorkerError(DndError, RuntimeError):
    """Units of work that other processes were given: their worker ended or cannot be used, or they failed there."""


class MissingExtraError(DndError, ImportError):
    """An optional package is needed and not installed."""


def shown(value: object) -> str:
    """A value as a message names it: 80 characters at most, and without running much of its own code."""
    if not isinstance(value, str | bytes | bool | int | float | list | tuple | dict | None):
        return type(value).__name__[:80]
    try:
        text = _SHORT.repr(value)
    except ValueError:  # Python writes out no integer of thousands of digits
        return f"{type(value).__name__[:60]} too large to show"
    return text if len(text) <= 80 else f"{text[:50]}...{text[-27:]}"


_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 80

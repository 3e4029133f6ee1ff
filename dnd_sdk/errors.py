"""Every exception the SDK raises on purpose.

DndError
├── ConfigError(ValueError)            settings or arguments that contradict each other
├── InputError(ValueError)             prompts, task files or request text that cannot be used
├── LayoutMismatchError(ValueError)    weights that do not fit this base model
├── AdapterNotFoundError(LookupError)  no adapter of that name
├── AdapterCorruptError(ValueError)    an adapter folder that is damaged, hostile or incomplete
├── GeneratorError(ValueError)         a generator that is missing, damaged or gave unusable weights
├── WeightsUnavailableError(OSError)   a base or encoder that can be neither found nor fetched
├── StorageError(OSError)              the home folder cannot be read or written
├── BankFullError(RuntimeError)        every adapter slot is pinned or in use
└── MissingExtraError(ImportError)     an optional package is not installed

Catch `DndError` for all of them; each also is the built-in named in brackets.
"""

from __future__ import annotations

import reprlib

MAX_CHARS = 1_200
"""Of a message, of its fix half as many; a longer one loses its middle."""


class DndError(Exception):
    """Base class: `message` says what went wrong and where, `fix` what to do (None if nothing helps)."""

    def __init__(self, message: str, *, fix: str | None = None) -> None:
        self.message = _readable(message, MAX_CHARS)
        self.fix = None if fix is None else _readable(fix, MAX_CHARS // 2)
        super().__init__(self.message)

    def __str__(self) -> str:
        return self.message if self.fix is None else f"{self.message}\n  fix: {self.fix}"


class ConfigError(DndError, ValueError):
    """Settings or arguments that contradict each other or are out of range."""


class InputError(DndError, ValueError):
    """Prompts, task files or request text that cannot be used."""


class LayoutMismatchError(DndError, ValueError):
    """Weights (adapter or generator) that do not fit this base model."""


class AdapterNotFoundError(DndError, LookupError):
    """No adapter of that name or id in the store."""


class AdapterCorruptError(DndError, ValueError):
    """An adapter folder that is damaged, hostile or incomplete."""


class GeneratorError(DndError, ValueError):
    """A generator that is missing or damaged, or that produced unusable weights."""


class WeightsUnavailableError(DndError, OSError):
    """A base model or encoder that can be neither found nor fetched."""


class StorageError(DndError, OSError):
    """The home folder cannot be read or written (full disk, read-only, no permission)."""


class BankFullError(DndError, RuntimeError):
    """Every adapter slot is pinned or leased by a running request."""


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


def _readable(text: str, most: int) -> str:
    """Bounded, and such that any terminal and log can write it: names and values in it come from anywhere."""
    whole = text.encode("utf-8", "backslashreplace").decode()
    return whole if len(whole) <= most else f"{whole[: most * 3 // 4]} ... {whole[-most // 5 :]}"

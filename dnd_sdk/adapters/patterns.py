"""Regular expressions from files of strangers: valid for `re`, bounded in length and number, and stopped in time.

peft runs what a config holds through `re`, which nothing can stop: a pattern of 30 characters takes it hours. The same
expressions run here through `regex`, which takes a time limit; what the two read differently is refused.
"""

from __future__ import annotations

import re
import time
from typing import Any

from dnd_sdk.errors import AdapterCorruptError

MAX_LENGTH = 4096
BUDGET_S = 1.0
"""CPU time for all matching of one config; honest ones take milliseconds, hundreds of patterns a quarter of it."""
FIX = "name the modules in plain words in adapter_config.json, or save the adapter again with peft"
_DIFFERENT = re.compile(r"\{(?!\d*,?\d*\})|\[\[?[:.=]")
"""Braces that count nothing (errors allowed, to `regex`) and POSIX classes: `re` takes both for plain characters."""


class Budget:
    """The seconds of CPU time left for the patterns of one config."""

    def __init__(self, seconds: float = BUDGET_S) -> None:
        self.left_s = seconds


class Pattern:
    """One expression; `where` names it in errors (file and key)."""

    def __init__(self, text: str, where: str, budget: Budget, *, around: str = "%s") -> None:
        """Compile `text` put into `around`; raises `AdapterCorruptError` unless both readers take it."""
        import regex

        if len(text) > MAX_LENGTH:
            raise AdapterCorruptError(f"{where} is a pattern of {len(text)} characters, at most {MAX_LENGTH}", fix=FIX)
        if _DIFFERENT.search(text):
            raise AdapterCorruptError(f"{where} is no pattern that peft reads as others do: {text!r}", fix=FIX)
        self._where = where
        self._budget = budget
        whole = around % text
        try:
            re.compile(whole)
            self._compiled = regex.compile(whole)
        except (re.error, regex.error, RecursionError, OverflowError, MemoryError) as e:
            raise AdapterCorruptError(f"{where} is no pattern: {text!r} ({e})", fix=FIX) from e

    def match(self, name: str, *, whole: bool = False) -> Any:
        """The match at the beginning of `name`, or of `whole` of it, as `re` gives it; None without one."""
        started = time.process_time()
        find = self._compiled.fullmatch if whole else self._compiled.match
        try:
            return find(name, timeout=max(self._budget.left_s, 1e-3))
        except (TimeoutError, RecursionError, MemoryError) as e:
            raise AdapterCorruptError(f"{self._where} takes too long to match", fix=FIX) from e
        finally:
            self._budget.left_s -= time.process_time() - started

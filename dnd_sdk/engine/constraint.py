"""Completion held to a JSON schema: which tokens a row may continue with, from llguidance.

White space is what a model is used to and nothing more: at most one space after a comma or a colon, none elsewhere, so
that no row can go on with white space for ever. An object's properties come in the schema's order. A row that runs out
of tokens first ends in the middle: its text is no JSON then, and its finish reason is `length`.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from dnd_sdk.chat import checked_schema, schema_places
from dnd_sdk.errors import ConfigError, MissingExtraError

MAX_COMPILED = 32
"""Compiled schemas kept, the least recently used left out first."""

_WRITING = {
    "whitespace_flexible": False,
    "item_separator": ", ?",
    "key_separator": ": ?",
    "lenient": False,
    "coerce_one_of": False,
}
"""All of the schema holds or it is refused: nothing is left out, `oneOf` is no `anyOf`."""

_LIMITS = {
    "initial_lexer_fuel": 500_000,
    "step_lexer_fuel": 100_000,
    "max_lexer_states": 50_000,
    "max_grammar_size": 200_000,
    "verbose_errors": False,
}
"""Half the library's own or less: a hostile pattern costs under two seconds and 200 MB, then an error."""


class Constraints:
    """The schemas of one base; the library and its tables of the vocabulary are loaded on first use and kept.

    Safe to share between threads.
    """

    def __init__(self, tokenizer: Any, vocab_size: int, ends: Iterable[int]) -> None:
        """`vocab_size` is the width V of the model's logits, `ends` the tokens that end a turn."""
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._ends = sorted(ends)
        self._lock = threading.Lock()
        self._tables: Any = None
        self._compiled = lru_cache(maxsize=MAX_COMPILED)(self._compile)

    def start(self, schema: Mapping[str, Any] | str) -> Constraint:
        """A row's constraint, before its first token.

        Raises `ConfigError` for what is no schema within limits or cannot be enforced, and for a base whose tokenizer
        the library does not take; `MissingExtraError` where the library is not installed.
        """
        return Constraint(self._compiled(checked_schema(schema)).deep_copy(), frozenset(self._ends))

    def _compile(self, schema: str) -> Any:
        """The library's matcher at the beginning; it is only ever copied."""
        library, tables = _library(), self._vocabulary()
        try:
            grammar = library.LLMatcher.grammar_from_json_schema(schema, overrides=_WRITING)
            limits = library.LLParserLimits(**_LIMITS)
            matcher = library.LLMatcher(tables, grammar, log_level=0, limits=limits)
            error = matcher.get_error() or " ".join(matcher.get_grammar_warnings())
        except ValueError as e:  # a number that the library cannot hold
            error = str(e)
        if error:
            raise _refused(schema, error)
        first = matcher.deep_copy()
        if not any(first.compute_logit_bias()) or first.is_stopped():
            raise _refused(schema, first.get_error() or "no text fits it")
        return matcher

    def _vocabulary(self) -> Any:
        with self._lock:
            if self._tables is None:
                self._tables = self._read_vocabulary()
            return self._tables

    def _read_vocabulary(self) -> Any:
        _library()
        from llguidance.hf import from_tokenizer

        try:
            return from_tokenizer(self._tokenizer, n_vocab=self._vocab_size, eos_token=self._ends)
        except Exception as e:  # slow tokenizers, decoders without bytes, more tokens than logits, no end token
            raise ConfigError(
                f"this base cannot be held to a schema: llguidance does not take its {type(self._tokenizer).__name__} "
                f"({len(self._ends)} end tokens, {self._vocab_size} logits): {_first_line(e)}",
                fix="use a base with a byte-level tokenizer.json, or leave schema out",
            ) from e


class Constraint:
    """Where one row is in its text; for one thread at a time."""

    def __init__(self, matcher: Any, ends: frozenset[int]) -> None:
        self._matcher = matcher
        self._ends = ends

    @property
    def over(self) -> bool:
        """Whether the text is complete and nothing but an end token can follow, or one has."""
        return bool(self._matcher.is_stopped()) and not self._matcher.is_error()

    def mask(self, logits: Tensor) -> None:
        """Set to -inf, in place, what must not come next; end tokens stay exactly where the text is complete.

        `logits` `(V,)`, floats on any device. Raises `ConfigError` where the schema takes more work than is allowed;
        the row cannot go on then.
        """
        bias = self._matcher.compute_logit_bias()
        self._check()
        refused = torch.frombuffer(bytearray(bias), dtype=torch.uint8) == 0  # (V,)
        logits.masked_fill_(refused.to(logits.device), float("-inf"))

    def accept(self, token: int) -> None:
        """Go on after `token`; raises `ConfigError` for one that the mask leaves out, and as `mask` does."""
        if self.over and token in self._ends:
            return
        if not self._matcher.consume_token(token):
            self._check()

    def _check(self) -> None:
        if self._matcher.is_error():
            raise ConfigError(
                f"the text cannot be held to its schema any further: {_first_line(self._matcher.get_error())}",
                fix="make the schema simpler: shorter patterns, fewer alternatives",
            )


def _library() -> Any:
    try:
        import llguidance
    except ImportError as e:
        raise MissingExtraError("completing to a schema needs llguidance", fix="pip install llguidance") from e
    return llguidance


def _refused(schema: str, error: str) -> ConfigError:
    reason = _first_line(error)
    return ConfigError(
        f"schema cannot be enforced{_where(json.loads(schema), reason)}: {reason}",
        fix="leave out what is named, or say it with type, properties, items, enum, const, anyOf, pattern or $ref",
    )


def _where(schema: Any, reason: str) -> str:
    """The first place of what the library names after a colon, one word or a list of keys; nothing if it is nowhere."""
    _, _, named = reason.partition(": ")
    try:
        words = set(json.loads(named)) if named.startswith("[") else {named}
    except (ValueError, TypeError):
        words = {named}
    for place, value in schema_places(schema):
        if place.rpartition("/")[2] in words or (isinstance(value, str) and value in words):
            return f" at {place}"
    return ""


def _first_line(error: object) -> str:
    return (str(error).strip().splitlines() or ["no reason given"])[0]

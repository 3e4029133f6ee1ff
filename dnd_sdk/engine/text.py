"""Tokens to text as they come: whole characters only, cut before a stop string, never taking back what was emitted."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol

FinishReason = Literal["stop", "length", "cancelled"]

_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"
"""What decoders show for bytes that are no character, or not yet one; a model may also write it."""

_BYTE_TOKENS = (("<0x8F>", "<0xA0>", "<0x80>"), ("ı", "ł", "Ģ"))
"""Tokens of the bytes 8F, A0 and 80, as vocabularies with a byte fallback and byte-level ones spell them."""


class TokenLogprob(NamedTuple):
    """How likely the model found a token that it wrote."""

    text: str
    logprob: float
    """Natural logarithm, before temperature and other options of sampling."""
    likeliest: tuple[tuple[str, float], ...] = ()
    """The likeliest tokens at its place, as many as asked for, in falling order."""


@dataclass(frozen=True)
class Generation:
    """One completion."""

    text: str
    prompt_tokens: int
    """Tokens of the templated prompt."""
    completion_tokens: int
    """Tokens generated, the end-of-turn token or stop string included."""
    finish_reason: FinishReason
    """`"stop"`: end of turn or stop string; `"length"`: `max_new_tokens` reached; `"cancelled"`, also by a deadline."""
    reused_tokens: int = field(default=0, compare=False)
    """Of the prompt's, those that had been read for another request."""
    logprobs: tuple[TokenLogprob, ...] | None = None
    """Of all generated tokens, if `SamplingOptions.logprobs` asks for them."""


class Detokenizer(Protocol):
    """What is needed here of a tokenizer."""

    def decode(
        self, token_ids: list[int], /, *, skip_special_tokens: bool, clean_up_tokenization_spaces: bool
    ) -> str | list[str]:
        """The text of these tokens."""

    def convert_tokens_to_ids(self, tokens: str) -> int | list[int] | None:
        """The id of this token; None or that of the unknown token where it is not in the vocabulary."""


class RowText:
    """The growing text of one row of a batch: at most `max_new_tokens` tokens, the end token included."""

    def __init__(
        self,
        tokenizer: Detokenizer,
        ends: frozenset[int],
        stop: Sequence[str] = (),
        emit: Callable[[str], None] | None = None,
        *,
        max_new_tokens: int = sys.maxsize,
    ) -> None:
        self.text = ""
        self.stopped = False
        self.n_tokens = 0
        """Tokens taken."""
        self.is_read = emit is not None or bool(stop)
        """Whether anybody needs the text before the row is finished."""
        self._ids: list[int] = []  # without the end token, which has no text
        self._limit, self._cancelled = max_new_tokens, False
        self._tokenizer, self._ends, self._stop, self._emit = tokenizer, ends, stop, emit
        # _ids[:_shown] are in `text`; decoding starts at `_context` because some tokenizers join tokens by their left
        self._context = self._shown = 0
        self._emitted = 0

    def feed(self, tokens: Sequence[int]) -> bool:
        """Take new tokens; True once the row is finished. Tokens after the end, and beyond the limit, are ignored."""
        if self.is_over(self.n_tokens):
            return True
        tokens = tokens[: self._limit - self.n_tokens]
        end = next((i for i, t in enumerate(tokens) if t in self._ends), None)
        self.stopped = end is not None
        self._ids += tokens[:end]
        self.n_tokens += len(tokens) if end is None else end + 1
        self._decode(flush=self.stopped)
        self._send(len(self.text) if self.stopped else len(self.text) - self._held_back())
        return self.is_over(self.n_tokens)

    def cancel(self, n_tokens: int) -> None:
        """End the row after its first `n_tokens`, unless it ends before or there."""
        if n_tokens < self._limit:
            self._limit, self._cancelled = n_tokens, True

    def is_over(self, n_tokens: int) -> bool:
        """Whether a row of which the model made `n_tokens` needs no more of them, as far as its tokens were taken."""
        return self.stopped or n_tokens >= self._limit

    def finish(self) -> None:
        """No more tokens come: show what was held back, but for a last character that is not whole."""
        if not self.stopped:
            self._decode(flush=True, cut=True)
        self._send(len(self.text))

    def result(self, prompt_tokens: int) -> Generation:
        """Finish and sum up."""
        self.finish()
        reason: FinishReason = "stop" if self.stopped else "cancelled" if self._cancelled else "length"
        return Generation(self.text, prompt_tokens, self.n_tokens, reason)

    def _decode(self, flush: bool, cut: bool = False) -> None:
        old = self._plain(self._ids[self._context : self._shown])
        new = self._plain(self._ids[self._context :])
        if cut and new.endswith(_INCOMPLETE):
            new = self._without_half(self._ids[self._context :], new)
        if len(new) <= len(old) or (new.endswith(_INCOMPLETE) and not flush):
            return
        self._context, self._shown = self._shown, len(self._ids)
        seen = len(self.text)
        self.text += new[len(old) :]
        self._cut_at_stop(seen)

    def _without_half(self, ids: list[int], text: str) -> str:
        """The text of the tokens, without a last character of which only the first bytes are there.

        Such bytes become another character with the right ones after them; a sign that the model wrote, and bytes that
        begin no character, stay what they are. Bytes differ in what may come second: one of 8F and A0 always may.
        """
        for names in _BYTE_TOKENS:
            known: list[Any] = [self._tokenizer.convert_tokens_to_ids(name) for name in names]
            for end in ([b, *known[2:] * n] for b in known[:2] for n in range(3)):
                whole = "" if None in end else self._plain([*ids, *end])
                if whole and whole[-1] != _INCOMPLETE and len(whole) <= len(text) and text.startswith(whole[:-1]):
                    return whole[:-1]
        return text

    def _plain(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def _cut_at_stop(self, seen: int) -> None:
        found = (self.text.find(s, max(0, seen - len(s) + 1)) for s in self._stop)
        at = min((i for i in found if i >= 0), default=None)
        if at is not None:
            self.text, self.stopped = self.text[:at], True

    def _held_back(self) -> int:
        """Characters at the end that may turn out to begin a stop string."""
        longest = max((len(s) for s in self._stop), default=1) - 1
        sizes = range(min(longest, len(self.text)), 0, -1)
        return next((n for n in sizes if any(s.startswith(self.text[-n:]) for s in self._stop)), 0)

    def _send(self, until: int) -> None:
        if self._emit is not None and until > self._emitted:
            self._emit(self.text[self._emitted : until])
            self._emitted = until

"""One request on its way: from its prompt's tokens to its text."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from dnd_sdk.engine.constraint import Constraint
from dnd_sdk.engine.forward import ModelRow
from dnd_sdk.engine.request import CompletionRequest
from dnd_sdk.engine.sampling import Sampler, Scored
from dnd_sdk.engine.stream import Emit, Ended
from dnd_sdk.engine.text import Detokenizer, RowText, TokenLogprob


class Row:
    """A request, waiting or running; after it was handed in, only the scheduler's thread touches it."""

    def __init__(
        self,
        request: CompletionRequest,
        prompt: list[int],
        tokenizer: Detokenizer,
        ends: frozenset[int],
        device: torch.device,
        ended: Ended,
        *,
        constraint: Constraint | None = None,
        emit: Emit | None = None,
        closed: threading.Event | None = None,
    ) -> None:
        """`emit` gets the text as it comes; `closed` ends the request as its own `cancel` does."""
        options = request.options
        self.request, self.prompt = request, prompt
        self.model: ModelRow | None = None
        """None while it waits."""
        self.n_passed = 0
        """How many were let in while it was the first of its adapter to wait."""
        self._text = RowText(tokenizer, ends, options.stop, emit, max_new_tokens=options.max_new_tokens)
        self._tokenizer, self._ends, self._ended = tokenizer, ends, ended
        self._sampler, self._constraint = Sampler(options, device), constraint
        self._closed = closed
        self._tokens: list[int] = []
        self._scores: list[Scored] | None = None if options.logprobs is None else []
        self._dropped = False
        self.since = time.monotonic()
        """When it was handed in."""

    def drop(self) -> None:
        """Nobody wants the answer any more; from any thread."""
        self._dropped = True

    @property
    def takes_the_likeliest(self) -> bool:
        """Whether its next token is the one with the largest logit."""
        return self._sampler.takes_the_likeliest and self._constraint is None

    @property
    def is_over(self) -> bool:
        """Whether it needs no more tokens, also because of a cancel, which this notes."""
        closed = self._closed is not None and self._closed.is_set()
        deadline_s = self.request.deadline_s
        late = deadline_s is not None and time.monotonic() >= self.since + deadline_s
        if self._dropped or closed or late or self.request.cancelled:
            self._text.cancel(len(self._tokens))
        return self._text.is_over(len(self._tokens))

    def draw(self, logits: Tensor) -> int:
        """The next token from logits `(V,)`."""
        forbid = None if self._constraint is None else self._constraint.mask
        seen = [*self.prompt, *self._tokens] if self._sampler.looks_back else []
        scored = self._sampler.draw(logits, seen, forbid)
        if self._scores is not None:
            self._scores.append(scored)
        return scored.token

    def take(self, token: int) -> None:
        """Add a token to the answer."""
        self._tokens.append(token)
        if self._constraint is not None:
            self._constraint.accept(token)
        # text that nobody needs yet is made at the end, at once
        if self._text.is_read or token in self._ends:
            self._text.feed(self._tokens[self._text.n_tokens :])

    def finish(self) -> None:
        """Say what came of it."""
        self._text.feed(self._tokens[self._text.n_tokens :])
        generation = self._text.result(len(self.prompt))
        reused = 0 if self.model is None else self.model.n_reused
        told = None if self._scores is None else self._told(self._scores[: generation.completion_tokens])
        self._ended(replace(generation, reused_tokens=reused, logprobs=told))

    def fail(self, error: BaseException) -> None:
        """Say what went wrong."""
        self._ended(error)

    def _told(self, scores: Sequence[Scored]) -> tuple[TokenLogprob, ...]:
        return tuple(
            TokenLogprob(self._shown(s.token), s.logprob, tuple((self._shown(t), p) for t, p in s.likeliest))
            for s in scores
        )

    def _shown(self, token: int) -> str:
        return str(self._tokenizer.decode([token], skip_special_tokens=False, clean_up_tokenization_spaces=False))

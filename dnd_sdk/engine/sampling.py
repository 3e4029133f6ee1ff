"""The next token of one row from its logits, by the row's own options and from a random stream of its own.

Sampling is exact and private: logits plus Gumbel noise, then argmax. The global random state is neither read nor
changed, and what a row draws does not depend on who shares its batch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from dnd_sdk.config import SamplingOptions

_NO_IDS: Any = torch.empty(1, 0, dtype=torch.long)
"""No warper of these looks at the tokens."""


class Scored(NamedTuple):
    """A token and how likely the model found it."""

    token: int
    logprob: float
    """Natural logarithm, of the model's own distribution: before temperature and the rest."""
    likeliest: tuple[tuple[int, float], ...] = ()
    """The likeliest tokens with theirs, as many as asked for, in falling order."""


class Sampler:
    """Draws for one row."""

    def __init__(self, options: SamplingOptions, device: torch.device) -> None:
        self._options = options
        self._penalty = _penalty(options)
        self._warpers = _warpers(options)
        self._rng = _rng(options.seed, device) if options.temperature > 0.0 else None

    @property
    def takes_the_likeliest(self) -> bool:
        """Whether the token is the largest logit and nothing else is asked for."""
        return self._rng is None and self._penalty is None and self._options.logprobs is None

    @property
    def looks_back(self) -> bool:
        """Whether it matters what was seen before."""
        return self._penalty is not None

    def draw(self, logits: Tensor, seen: list[int], forbid: Callable[[Tensor], None] | None = None) -> Scored:
        """A token from logits `(V,)`; `seen`: the prompt's and the answer's tokens, read where it `looks_back`.

        `forbid` sets logits `(V,)` to -inf, in place, of tokens that must not be drawn; None: all may.
        """
        scored = self._options.logprobs is not None
        logprobs = logits.float().log_softmax(-1) if scored else None
        scores = logits.float()[None]  # (V,) -> (1, V)
        if forbid is not None:
            scores = scores.clone()
            forbid(scores[0])
        if self._penalty is not None:
            scores = self._penalty(torch.tensor([seen], device=logits.device), scores)
        if self._rng is not None:
            scores = self._warpers(_NO_IDS, scores)
            scores = scores - torch.empty_like(scores).exponential_(generator=self._rng).log_()
        token = int(scores.argmax(-1).item())
        if logprobs is None:
            return Scored(token, 0.0)
        best = logprobs.topk(min(self._options.logprobs or 0, len(logprobs)))
        likeliest = tuple(zip(best.indices.tolist(), best.values.tolist(), strict=True))
        return Scored(token, logprobs[token].item(), likeliest)


def _penalty(options: SamplingOptions) -> LogitsProcessor | None:
    penalty = options.repetition_penalty
    return None if penalty == 1.0 else RepetitionPenaltyLogitsProcessor(penalty)  # type: ignore[no-untyped-call]


def _warpers(options: SamplingOptions) -> LogitsProcessorList:
    warpers: list[LogitsProcessor] = [TemperatureLogitsWarper(options.temperature)] if options.temperature > 0.0 else []
    if options.top_k:
        warpers.append(TopKLogitsWarper(options.top_k))
    if options.top_p < 1.0:
        warpers.append(TopPLogitsWarper(options.top_p))
    if options.min_p > 0.0:
        warpers.append(MinPLogitsWarper(options.min_p))
    return LogitsProcessorList(warpers)


def _rng(seed: int | None, device: torch.device) -> torch.Generator:
    rng = torch.Generator(device)
    if seed is None:
        rng.seed()
    else:
        rng.manual_seed(seed % 2**63)
    return rng

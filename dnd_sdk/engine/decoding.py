"""One batch of completions through transformers' `generate`, steered from its two per-token hooks.

* Every row has its own options and comes out as it would alone: how long, how sampled, where stopped, when cancelled.
* Sampling is exact and private: logits plus Gumbel noise from a generator per row, then argmax. The global random state
  is neither read nor changed, and a seeded row's text does not depend on who shares its batch.
* The stopping hook is where other requests get their turn, a cancel is seen, and text is read for stop strings.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from dnd_sdk.config import SamplingOptions
from dnd_sdk.engine.prefix import Prefix
from dnd_sdk.engine.request import CompletionRequest
from dnd_sdk.engine.text import Generation, RowText
from dnd_sdk.engine.turns import Turn
from dnd_sdk.models import Base


class Decoder:
    """Generates for one base; knows nothing of adapters."""

    def __init__(self, base: Base) -> None:
        self._model: Any = base.model
        self._tokenizer = base.tokenizer
        self._ends = _end_tokens(base)
        pad = base.tokenizer.pad_token_id
        self._pad = int(pad) if pad is not None else min(self._ends, default=0)
        # every knob is set: the base's own generation_config must not add a penalty or sampling behind our options
        self._config = GenerationConfig(  # type: ignore[no-untyped-call]
            do_sample=False,
            num_beams=1,
            temperature=1.0,
            top_p=1.0,
            top_k=50,
            repetition_penalty=1.0,
            no_repeat_ngram_size=0,
            min_length=0,
            use_cache=True,
            pad_token_id=self._pad,
            eos_token_id=sorted(self._ends) or None,
        )

    def decode(
        self,
        requests: Sequence[CompletionRequest],
        prompts: Sequence[Sequence[int]],
        turn: Turn,
        prefix: Prefix | None = None,
    ) -> list[Generation]:
        """Complete a batch; `prompts` are the token ids of the requests' chats.

        The caller holds the model's turn and has set the adapters. All prompts begin with `prefix`; None reads each
        prompt whole.
        """
        rows = [_Row(request, self._text(request)) for request in requests]
        self._run(rows, prompts, turn, prefix)
        return [row.text.result(len(p)) for row, p in zip(rows, prompts, strict=True)]

    def stream(
        self,
        request: CompletionRequest,
        prompt: Sequence[int],
        turn: Turn,
        emit: Callable[[str], None],
        closed: threading.Event,
    ) -> Generation:
        """Complete one request; `emit` gets its text as it comes, and `closed` ends it as its own `cancel` does."""
        row = _Row(request, self._text(request, emit), closed)
        self._run([row], [prompt], turn, None)
        return row.text.result(len(prompt))

    def _text(self, request: CompletionRequest, emit: Callable[[str], None] | None = None) -> RowText:
        options = request.options
        return RowText(self._tokenizer, self._ends, options.stop, emit, max_new_tokens=options.max_new_tokens)

    def _run(self, rows: list[_Row], prompts: Sequence[Sequence[int]], turn: Turn, prefix: Prefix | None) -> None:
        watch = _Watch(rows, turn)
        if all([row.ends_at(0) for row in rows]):  # cancelled while it waited
            return
        ids, mask = left_padded(prompts, self._pad, self._model.device, len(prefix or ()))
        config = copy.copy(self._config)
        config.max_new_tokens = max(row.request.options.max_new_tokens for row in rows)
        out = self._model.generate(
            input_ids=ids,
            attention_mask=mask,
            generation_config=config,
            logits_processor=_sampling([row.request.options for row in rows], self._model.device),
            stopping_criteria=StoppingCriteriaList([watch]),
            **({} if prefix is None else {"past_key_values": prefix.cache(len(prompts))}),
        )
        watch.read(out[:, ids.shape[1] :])  # (B, T + new) -> (B, new)


def left_padded(
    prompts: Sequence[Sequence[int]], pad: int, device: torch.device, n_shared: int = 0
) -> tuple[Tensor, Tensor]:
    """Ids and attention mask `(B, T)`, every prompt ending in the last column, padded after its first `n_shared`."""
    width = max(map(len, prompts))
    ids = [[*p[:n_shared], *[pad] * (width - len(p)), *p[n_shared:]] for p in prompts]
    mask = [[1] * n_shared + [0] * (width - len(p)) + [1] * (len(p) - n_shared) for p in prompts]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


def _end_tokens(base: Base) -> frozenset[int]:
    configured = getattr(base.model.generation_config, "eos_token_id", None)
    several = configured if isinstance(configured, list | tuple) else [configured]
    return frozenset(int(t) for t in [*several, base.tokenizer.eos_token_id] if t is not None)


@dataclass(frozen=True)
class _Row:
    """One row of the running batch."""

    request: CompletionRequest
    text: RowText
    closed: threading.Event | None = None

    def ends_at(self, n_tokens: int) -> bool:
        """Whether the `n_tokens` that were made are all that is wanted, also because of a cancel that this notes."""
        if self.request.cancelled or (self.closed is not None and self.closed.is_set()):
            self.text.cancel(n_tokens)
        return self.text.is_over(n_tokens)


class _Watch(StoppingCriteria):
    """Called after every token of the batch."""

    def __init__(self, rows: Sequence[_Row], turn: Turn) -> None:
        self._rows, self._turn = rows, turn
        self._reads_text = any(row.text.is_read for row in rows)
        self._n_made = 0
        self._over: tuple[list[bool], Tensor] | None = None

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:  # type: ignore[override]
        """Which rows are finished."""
        self._turn.step()
        self._n_made += 1
        if self._reads_text:
            self._feed(input_ids[:, -1].tolist())
        over = [row.ends_at(self._n_made) for row in self._rows]
        if self._over is None or self._over[0] != over:  # on a GPU the tensor is a copy, and few tokens end a row
            self._over = over, torch.tensor(over, device=input_ids.device)
        return self._over[1]

    def read(self, generated: Tensor) -> None:
        """Take what was not read as it came; `generated` `(B, T)`."""
        for row, tokens in zip(self._rows, generated.tolist(), strict=True):
            row.text.feed(tokens[row.text.n_tokens :])

    def _feed(self, last: list[int]) -> None:
        for row, token in zip(self._rows, last, strict=True):
            if row.text.is_read:
                row.text.feed([token])


def _sampling(options: Sequence[SamplingOptions], device: torch.device) -> LogitsProcessorList:
    sampling = _Sampling(options, device)
    return LogitsProcessorList([sampling] if sampling.draws else [])


class _Sampling(LogitsProcessor):
    """Makes argmax an exact draw from each row's own distribution; the scores of greedy rows stay as they are."""

    def __init__(self, options: Sequence[SamplingOptions], device: torch.device) -> None:
        alike: dict[tuple[float, int, float], list[int]] = {}
        for row, o in enumerate(options):
            if o.temperature > 0.0:
                alike.setdefault((o.temperature, o.top_k, o.top_p), []).append(row)
        self.draws = [
            (torch.tensor(rows, device=device), _warpers(*how), [_rng(options[row].seed, device) for row in rows])
            for how, rows in alike.items()
        ]
        """Rows that are sampled in the same way, how, and the generator of each."""

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        """`scores` `(B, V)`, those of sampled rows with standard Gumbel noise."""
        for rows, warpers, rngs in self.draws:
            likely = warpers(input_ids[rows], scores[rows])  # (rows, V)
            waits = torch.empty_like(likely)
            for row, rng in zip(waits, rngs, strict=True):
                row.exponential_(generator=rng)
            scores = scores.index_copy(0, rows, likely - waits.log_())
        return scores


def _warpers(temperature: float, top_k: int, top_p: float) -> LogitsProcessorList:
    warpers: list[LogitsProcessor] = [TemperatureLogitsWarper(temperature)]
    if top_k:
        warpers.append(TopKLogitsWarper(top_k))
    if top_p < 1.0:
        warpers.append(TopPLogitsWarper(top_p))
    return LogitsProcessorList(warpers)


def _rng(seed: int | None, device: torch.device) -> torch.Generator:
    rng = torch.Generator(device)
    if seed is None:
        rng.seed()
    else:
        rng.manual_seed(seed % 2**63)
    return rng

"""One batch of completions through transformers' `generate`, steered from its two per-token hooks.

* Sampling is exact and private: logits plus Gumbel noise from a generator per row, then argmax. The global random state
  is neither read nor changed, and a seeded row's text does not depend on who shares its batch.
* The stopping hook is where other requests get their turn, a cancel is seen, and text is read for stop strings.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
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
        prompts: Sequence[Sequence[int]],
        rows: Sequence[int],
        options: SamplingOptions,
        turn: Turn,
        *,
        cancelled: Callable[[], bool],
        emit: Callable[[str], None] | None = None,
        prefix: Prefix | None = None,
    ) -> list[Generation]:
        """Complete a batch; `rows` number the prompts within their request (they seed the sampling).

        The caller holds the model's turn and has set the adapters. `emit` gets the text of the first row as it comes.
        All prompts begin with `prefix`; None reads each prompt whole.
        """
        texts = [RowText(self._tokenizer, self._ends, options.stop, emit if i == 0 else None) for i in range(len(rows))]
        watch = _Watch(texts, turn, cancelled, reads_text=emit is not None or bool(options.stop))
        watch.cancelled = cancelled()
        if not watch.cancelled:
            self._generate(prompts, rows, options, watch, prefix)
        return [t.result(len(p), watch.cancelled) for t, p in zip(texts, prompts, strict=True)]

    def _generate(
        self,
        prompts: Sequence[Sequence[int]],
        rows: Sequence[int],
        options: SamplingOptions,
        watch: _Watch,
        prefix: Prefix | None,
    ) -> None:
        ids, mask = left_padded(prompts, self._pad, self._model.device, len(prefix or ()))
        config = copy.copy(self._config)
        config.max_new_tokens = options.max_new_tokens
        out = self._model.generate(
            input_ids=ids,
            attention_mask=mask,
            generation_config=config,
            logits_processor=_sampling(options, rows, self._model.device),
            stopping_criteria=StoppingCriteriaList([watch]),
            **({} if prefix is None else {"past_key_values": prefix.cache(len(prompts))}),
        )
        watch.read(out[:, ids.shape[1] :])


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


class _Watch(StoppingCriteria):
    """Called after every token of the batch."""

    def __init__(
        self, texts: Sequence[RowText], turn: Turn, cancelled: Callable[[], bool], *, reads_text: bool
    ) -> None:
        self.cancelled = False
        self._texts, self._turn, self._is_cancelled, self._reads_text = texts, turn, cancelled, reads_text
        self._n_read = 0
        self._none_done: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:  # type: ignore[override]
        """Which rows are finished."""
        self._turn.step()
        if self._none_done is None:
            self._none_done = torch.zeros(len(self._texts), dtype=torch.bool, device=input_ids.device)
        if self._is_cancelled():
            self.cancelled = True
            return ~self._none_done
        if not self._reads_text:
            return self._none_done
        self._n_read += 1
        done = [text.feed([token]) for text, token in zip(self._texts, input_ids[:, -1].tolist(), strict=True)]
        return torch.tensor(done, device=input_ids.device)

    def read(self, generated: Tensor) -> None:
        """Feed what the hook has not read."""
        for text, tokens in zip(self._texts, generated[:, self._n_read :].tolist(), strict=True):
            text.feed(tokens)


def _sampling(options: SamplingOptions, rows: Sequence[int], device: torch.device) -> LogitsProcessorList:
    if options.temperature == 0.0:
        return LogitsProcessorList()
    warpers: list[LogitsProcessor] = [TemperatureLogitsWarper(options.temperature)]
    if options.top_k:
        warpers.append(TopKLogitsWarper(options.top_k))
    if options.top_p < 1.0:
        warpers.append(TopPLogitsWarper(options.top_p))
    return LogitsProcessorList([*warpers, _GumbelNoise(options.seed, rows, device)])


class _GumbelNoise(LogitsProcessor):
    """Makes argmax an exact draw from softmax(scores); row i of a request has its own stream, seeded `seed + i`."""

    def __init__(self, seed: int | None, rows: Sequence[int], device: torch.device) -> None:
        self._rngs = [torch.Generator(device) for _ in rows]
        for rng, row in zip(self._rngs, rows, strict=True):
            if seed is None:
                rng.seed()
            else:
                rng.manual_seed((seed + row) % 2**63)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # type: ignore[override]
        """`scores` `(B, V)` plus standard Gumbel noise."""
        waits = torch.empty_like(scores)
        for row, rng in zip(waits, self._rngs, strict=True):
            row.exponential_(generator=rng)
        return scores - waits.log_()

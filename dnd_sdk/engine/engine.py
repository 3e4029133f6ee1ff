"""The resident base answers: complete, stream, score.

* Requests take turns on the model, token by token; long lists are cut into batches of similar length, and what all
  prompts of a list begin with is read once.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from contextlib import ExitStack

import torch
from torch import Tensor

from dnd_sdk.chat import Messages, Tools
from dnd_sdk.config import SamplingOptions
from dnd_sdk.engine.batching import grouped
from dnd_sdk.engine.decoding import Decoder
from dnd_sdk.engine.prefix import shared_prefix
from dnd_sdk.engine.resident import Resident
from dnd_sdk.engine.scoring import option_logprobs
from dnd_sdk.engine.stream import Emit, TextStream
from dnd_sdk.engine.text import Generation
from dnd_sdk.errors import ConfigError, InputError
from dnd_sdk.lora import LoraLayout
from dnd_sdk.models import Base


class Engine(Resident):
    """One base model that answers with any of its adapters; thread-safe."""

    def __init__(
        self, base: Base, layout: LoraLayout, *, n_slots: int = 8, max_batch: int = 16, max_batch_tokens: int = 4096
    ) -> None:
        """`max_batch` and `max_batch_tokens` bound the rows and the padded prompt tokens that run together."""
        if max_batch < 1 or max_batch_tokens < 1:
            raise ConfigError(f"max_batch and max_batch_tokens must be at least 1, got {max_batch}, {max_batch_tokens}")
        super().__init__(base, layout, n_slots=n_slots)
        self.max_batch, self.max_batch_tokens = max_batch, max_batch_tokens
        self._decoder = Decoder(base)

    def complete(
        self, messages: Messages, adapter_id: str | None = None, options: SamplingOptions | None = None
    ) -> Generation:
        """Complete one chat; None is the base."""
        return self.complete_batch([messages], [adapter_id], options)[0]

    def complete_batch(
        self,
        messages_list: Sequence[Messages],
        adapter_ids: Sequence[str | None],
        options: SamplingOptions | None = None,
        *,
        tools: Tools | None = None,
        cancel: threading.Event | None = None,
    ) -> list[Generation]:
        """Complete many chats, each with its own adapter (None: the base), in the given order.

        `tools` are offered to all of them; see `chat.prompt_ids`.
        Raises `InputError` when a prompt does not fit the base's context together with `max_new_tokens`, and what
        `SlotBank.lease` raises; before anything is generated for prompts, during the work for leases.
        """
        options = options or SamplingOptions()
        check_paired(messages_list, adapter_ids)
        prompts = [self.prompt_ids(m, options.max_new_tokens, tools) for m in messages_list]
        rounds = self.rounds(adapter_ids)
        order = sorted(range(len(prompts)), key=lambda i: (rounds[i], len(prompts[i])))
        prefix = shared_prefix(self.base.model, prompts, adapter_ids)
        done: dict[int, Generation] = {}
        for rows in grouped(order, lambda some: self._fits(some, prompts, adapter_ids)):
            with self.running([adapter_ids[i] for i in rows]) as turn:
                some = self._decoder.decode(
                    [prompts[i] for i in rows], rows, options, turn, cancelled=lambda: _is_set(cancel), prefix=prefix
                )
            done |= zip(rows, some, strict=True)
        return [done[i] for i in range(len(prompts))]

    def stream(
        self,
        messages: Messages,
        adapter_id: str | None = None,
        options: SamplingOptions | None = None,
        cancel: threading.Event | None = None,
        *,
        tools: Tools | None = None,
    ) -> TextStream:
        """Complete one chat piece by piece.

        Bad input and missing adapters raise here, errors of the model while iterating. Setting `cancel`, closing or
        dropping the stream ends the work within a token; the adapter stays leased until then.
        """
        options = options or SamplingOptions()
        prompt = self.prompt_ids(messages, options.max_new_tokens, tools)
        with ExitStack() as stack:
            rows = stack.enter_context(self.bank.lease([adapter_id]))
            held = stack.pop_all()

        def work(emit: Emit, closed: threading.Event) -> Generation:
            with held, self.forwarding(rows) as turn:
                return self._decoder.decode(
                    [prompt], [0], options, turn, cancelled=lambda: closed.is_set() or _is_set(cancel), emit=emit
                )[0]

        try:
            return TextStream(work)
        except BaseException:
            held.close()
            raise

    def option_logprobs(
        self, messages_list: Sequence[Messages], adapter_ids: Sequence[str | None], options: Sequence[str]
    ) -> Tensor:
        """Log-probability of each of the same options as the answer to each chat, `(n_rows, n_options)`.

        Sums over an option's tokens and the end of turn; `engine.scoring.option_logprobs` also gives token counts.
        """
        scores = option_logprobs(self, messages_list, [options] * len(messages_list), adapter_ids)
        return torch.tensor(scores.logprobs)

    def _fits(self, rows: Sequence[int], prompts: Sequence[list[int]], adapter_ids: Sequence[str | None]) -> bool:
        padded = len(rows) * max(len(prompts[i]) for i in rows)  # activations and cache grow with it
        small = len(rows) <= self.max_batch and padded <= self.max_batch_tokens
        return small and self.fits_slots([adapter_ids[i] for i in rows])


def check_paired(messages_list: Sequence[Messages], adapter_ids: Sequence[str | None]) -> None:
    """Raise `InputError` unless every chat has its adapter id."""
    if len(messages_list) != len(adapter_ids):
        raise InputError(f"{len(messages_list)} chats but {len(adapter_ids)} adapter ids", fix="pass one per chat")


def _is_set(event: threading.Event | None) -> bool:
    return event is not None and event.is_set()

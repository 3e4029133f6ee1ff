"""The resident base answers: complete, stream, score.

* Requests take turns on the model, token by token; long lists are cut into batches of similar length, and what all
  prompts of a list begin with is read once.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dnd_sdk.chat import Messages, renders_tools
from dnd_sdk.engine.bank import Fetch, Loader
from dnd_sdk.engine.decoding import Decoder
from dnd_sdk.engine.prefix import shared_prefix
from dnd_sdk.engine.request import CompletionRequest
from dnd_sdk.engine.resident import Resident
from dnd_sdk.engine.scoring import option_logprobs
from dnd_sdk.engine.stream import Emit, TextStream
from dnd_sdk.engine.text import Generation
from dnd_sdk.errors import BankFullError, ConfigError
from dnd_sdk.lora import LoraLayout
from dnd_sdk.models import Base, grouped

if TYPE_CHECKING:
    from dnd_sdk.adapters import Adapter


class Engine(Resident):
    """One base model that answers with any of its adapters; thread-safe."""

    def __init__(
        self,
        base: Base,
        layout: LoraLayout,
        *,
        n_slots: int = 8,
        fetch: Fetch | None = None,
        max_batch: int = 16,
        max_batch_tokens: int = 4096,
    ) -> None:
        """`max_batch` and `max_batch_tokens` bound the rows and the padded prompt tokens that run together.

        `fetch` brings an adapter's flat vector by its id when a request finds that others took its slot.
        """
        if max_batch < 1 or max_batch_tokens < 1:
            raise ConfigError(f"max_batch and max_batch_tokens must be at least 1, got {max_batch}, {max_batch_tokens}")
        super().__init__(base, layout, n_slots=n_slots, fetch=fetch)
        self.max_batch, self.max_batch_tokens = max_batch, max_batch_tokens
        self._decoder = Decoder(base)

    @property
    def local(self) -> Engine:
        """Itself: its base can be looked into."""
        return self

    @property
    def shows_tools(self) -> bool:
        """Whether the base's chat template shows the model tools, calls and results."""
        return renders_tools(self.base.tokenizer)

    @property
    def has_chat_template(self) -> bool:
        """Whether the base was made for chats."""
        return self.base.tokenizer.chat_template is not None

    def hold(self, adapter: Adapter, load: Loader) -> None:
        """Bring an adapter into a slot unless it is in one; raises what `load` and `SlotBank.load` raise.

        Others may take its slot later: a request that names it then needs `fetch`.
        """
        self.bank.ensure(adapter.id, load)

    def forget(self, adapter_id: str) -> None:
        """Free its slot, if it has one; raises `BankFullError` while a request uses it."""
        self.bank.evict(adapter_id)

    def close(self) -> None:
        """Free every slot but those that running requests use; whatever is held again is brought in again."""
        for adapter_id in self.bank.resident():
            with suppress(BankFullError):  # a running request, or one that is just ending, still has it
                self.bank.evict(adapter_id)

    def complete(self, requests: Sequence[CompletionRequest]) -> list[Generation]:
        """Answer requests together; each comes out as it would alone, in the given order.

        Raises `InputError` when a prompt does not fit the base's context together with its `max_new_tokens`, and what
        `SlotBank.lease` raises; before anything is generated for prompts, during the work for leases.
        """
        # 1. every request is checked, before anything is generated
        prompts = [self._prompt(r) for r in requests]
        adapter_ids = [r.adapter_id for r in requests]
        # 2. in rounds of the slots, alike in length, what all begin with read once
        rounds = self.rounds(adapter_ids)
        order = sorted(range(len(prompts)), key=lambda i: (rounds[i], len(prompts[i])))
        prefix = shared_prefix(self.base.model, prompts, adapter_ids)
        # 3. batch by batch, each in its turn
        done: dict[int, Generation] = {}
        for rows in grouped(order, lambda some: self._fits([requests[i] for i in some], [prompts[i] for i in some])):
            with self.running([adapter_ids[i] for i in rows]) as turn:
                some = self._decoder.decode([requests[i] for i in rows], [prompts[i] for i in rows], turn, prefix)
            done |= zip(rows, some, strict=True)
        return [done[i] for i in range(len(prompts))]

    def stream(self, request: CompletionRequest) -> TextStream:
        """Answer one request piece by piece.

        Bad input and missing adapters raise here, errors of the model while iterating. Setting the request's `cancel`,
        closing or dropping the stream ends the work within a token; the adapter stays leased until then.
        """
        prompt = self._prompt(request)
        with ExitStack() as stack:
            rows = stack.enter_context(self.bank.lease([request.adapter_id]))
            held = stack.pop_all()

        def work(emit: Emit, closed: threading.Event) -> Generation:
            with held, self.forwarding(rows) as turn:
                return self._decoder.stream(request, prompt, turn, emit, closed)

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

    def _prompt(self, request: CompletionRequest) -> list[int]:
        return self.prompt_ids(request.chat, request.options.max_new_tokens, request.tools)

    def _fits(self, requests: Sequence[CompletionRequest], prompts: Sequence[list[int]]) -> bool:
        longest = max(map(len, prompts))
        padded = len(prompts) * longest  # activations and cache grow with it
        small = len(prompts) <= self.max_batch and padded <= self.max_batch_tokens
        # rows that are over go on, unseen, until the last one is: none may leave the context
        bounded = longest + max(r.options.max_new_tokens for r in requests) <= self.context_tokens
        return small and bounded and self.fits_slots([r.adapter_id for r in requests])

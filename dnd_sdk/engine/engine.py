"""The resident base answers: complete, stream, score.

* All requests, from whatever thread, share one running batch (`scheduler.py`); each comes out as it would alone.
* What prompts of one adapter begin with is read once.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import replace
from itertools import islice
from queue import SimpleQueue
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dnd_sdk.chat import Messages, renders_tools
from dnd_sdk.config import whole_number
from dnd_sdk.engine.bank import Fetch, IsStored, Loader
from dnd_sdk.engine.choosing import forward_for
from dnd_sdk.engine.constraint import Constraints
from dnd_sdk.engine.forward import FlatForward
from dnd_sdk.engine.request import CompletionRequest
from dnd_sdk.engine.resident import Resident, free_bytes
from dnd_sdk.engine.row import Row
from dnd_sdk.engine.scheduler import Scheduler
from dnd_sdk.engine.scoring import option_logprobs
from dnd_sdk.engine.stream import Emit, Ended, TextFeed, TextStream, resolving
from dnd_sdk.engine.text import Generation
from dnd_sdk.lora import LoraLayout
from dnd_sdk.models import Base

if TYPE_CHECKING:
    from dnd_sdk.adapters import Adapter

_PIECES = {"cpu": (128, 256)}
_LARGE_PIECES = (2048, 8192)
"""Prompt tokens of a step beside rows that write, and alone: as few as a step of the device is worth."""


class Engine(Resident):
    """One base model that answers with any of its adapters; thread-safe."""

    def __init__(
        self,
        base: Base,
        layout: LoraLayout,
        *,
        n_slots: int | None = None,
        kept_bytes: int | None = None,
        fetch: Fetch | None = None,
        is_stored: IsStored | None = None,
        max_batch: int = 16,
        max_waiting: int = 4096,
        deterministic: bool = False,
    ) -> None:
        """`max_batch` bounds the requests that run together, `max_waiting` those that wait to.

        `deterministic`: every request is computed in shapes that do not depend on the others, so its text does not,
        even where two tokens are equally likely but for a rounding; slower, and nothing is shared between prompts.
        `n_slots` and `kept_bytes` as for `Resident`; `fetch` brings an adapter's flat vector by its id when a request
        finds that others took its slot and it is not kept, or is no longer what `is_stored` knows (None: whatever is
        kept may be used).
        Raises `ConfigError` for sizes that are out of range.
        """
        self.max_batch = whole_number("max_batch", max_batch, 1, 4096)
        max_waiting = whole_number("max_waiting", max_waiting, 1)
        super().__init__(base, layout, n_slots=n_slots, kept_bytes=kept_bytes, fetch=fetch, is_stored=is_stored)
        memory = free_bytes(base.model.device)
        store_bytes = 0 if deterministic else memory // 16
        forward, self.slow_because = forward_for(base.model, self.bank, store_bytes=store_bytes)
        """Why requests run one after the other on this base; None: they run together."""
        if isinstance(forward, FlatForward) and (deterministic or base.model.device.type == "cuda"):
            forward.fix_shapes(capture=base.model.device.type == "cuda", n_rows=self.max_batch if deterministic else 1)
        piece, large = _PIECES.get(base.model.device.type, _LARGE_PIECES)
        self._scheduler = Scheduler(
            forward,
            self.bank,
            self.turns,
            max_rows=self.max_batch,
            piece=piece,
            large_piece=piece if deterministic else large,
            one_prompt_a_step=deterministic,
            kv_bytes=memory // 4,
            max_waiting=max_waiting,
        )
        self._ends = _end_tokens(base)
        width = base.model.get_output_embeddings().weight.shape[0]
        self._constraints = Constraints(base.tokenizer, width, self._ends)

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

    @property
    def n_running(self) -> int:
        """Requests that are being answered."""
        return self._scheduler.n_running

    @property
    def n_waiting(self) -> int:
        """Requests that wait for others to end."""
        return self._scheduler.n_waiting

    def resident(self) -> list[str]:
        """Ids of the adapters in slots, least recently used first."""
        return self.bank.resident()

    def hold(self, adapter: Adapter, load: Loader) -> None:
        """Bring an adapter into a slot unless it is in one; raises what `load` and `SlotBank.load` raise.

        Others may take its slot later, or all may be in use now: a request that names it then needs `fetch`, without
        which this waits for a slot.
        """
        if self.bank.can_fetch:
            self.bank.look_up(adapter.id, load)
        else:
            self.bank.ensure(adapter.id, load)

    def pin(self, adapter_id: str, pinned: bool) -> None:
        """Keep an adapter in its slot, or do so no longer; see `SlotBank.pin`."""
        if pinned:
            self.bank.pin(adapter_id)
        else:
            self.bank.unpin(adapter_id)

    def forget(self, adapter_id: str) -> None:
        """Free its slot, if it has one, and what is kept of it; raises `BankFullError` while a request uses it."""
        self.bank.evict(adapter_id)

    def close(self) -> None:
        """Free every slot but those that running requests use, and what is kept of other adapters and past prompts.

        Whatever is held again is brought in again.
        """
        self._scheduler.forget()
        self.bank.clear()

    def complete(self, requests: Sequence[CompletionRequest]) -> list[Generation]:
        """Answer requests together; each comes out as it would alone, in the given order.

        Raises `InputError` when a prompt does not fit the base's context together with its `max_new_tokens`, before
        anything is generated; `BusyError` when too many requests wait; what `SlotBank.lease` raises, when it is found.
        """
        futures = [Future[Generation]() for _ in requests]
        rows = [self._row(r, resolving(f)) for r, f in zip(requests, futures, strict=True)]
        rounds = self.rounds([r.adapter_id for r in requests])
        order = sorted(range(len(rows)), key=lambda i: rounds[i])
        done = SimpleQueue[Future[Generation]]()
        for future in futures:
            future.add_done_callback(done.put)
        ahead = 2 * self.max_batch  # a long list must not fill the queue that others wait in
        further = iter(order[ahead:])
        try:
            self._scheduler.submit(*[rows[i] for i in order[:ahead]])
            for _ in order:
                done.get().result()
                for i in islice(further, 1):
                    self._scheduler.submit(rows[i], may_wait=True)
        except BaseException:
            for row in rows:
                row.drop()
            raise
        return [future.result() for future in futures]

    def submit(self, request: CompletionRequest, emit: Emit | None = None) -> Future[Generation]:
        """Hand one request in and return at once, for `asyncio.wrap_future` or a callback.

        `emit` is told each new piece of text. Bad requests raise here, as in `complete`. Cancelling the future lets the
        request end within a token. `emit` and the future's callbacks run in the thread that runs the base: they must be
        quick, and asking the engine there waits for ever.
        """
        future = Future[Generation]()
        row = self._row(request, resolving(future), emit)
        future.add_done_callback(lambda done: row.drop() if done.cancelled() else None)
        self._scheduler.submit(row)
        return future

    def stream(self, request: CompletionRequest) -> TextStream:
        """Answer one request piece by piece.

        Bad input and missing adapters raise here, errors of the model while iterating. Setting the request's `cancel`,
        closing or dropping the stream ends the work within a token.
        """
        feed = TextFeed()
        row = self._row(request, feed.end, feed.emit, feed.closed)
        if request.adapter_id is not None:
            self.bank.look_up(request.adapter_id)  # one that is missing is the caller's error, not the reader's
        self._scheduler.submit(row)
        return TextStream(feed)

    def option_logprobs(
        self, messages_list: Sequence[Messages], adapter_ids: Sequence[str | None], options: Sequence[str]
    ) -> Tensor:
        """Log-probability of each of the same options as the answer to each chat, `(n_rows, n_options)`.

        Sums over an option's tokens and the end of turn; `engine.scoring.option_logprobs` also gives token counts.
        """
        scores = option_logprobs(self, messages_list, [options] * len(messages_list), adapter_ids)
        return torch.tensor(scores.logprobs)

    def _row(
        self,
        request: CompletionRequest,
        ended: Ended,
        emit: Emit | None = None,
        closed: threading.Event | None = None,
    ) -> Row:
        prompt = self.prompt_ids(request.chat, 1 if request.may_clip else request.options.max_new_tokens, request.tools)
        if request.may_clip:
            n_new = min(request.options.max_new_tokens, self.context_tokens - len(prompt))
            request = replace(request, options=replace(request.options, max_new_tokens=n_new))
        schema = request.options.schema
        return Row(
            request,
            prompt,
            self.base.tokenizer,
            self._ends,
            self.base.model.device,
            ended,
            constraint=None if schema is None else self._constraints.start(schema),
            emit=emit,
            closed=closed,
        )


def _end_tokens(base: Base) -> frozenset[int]:
    configured = getattr(base.model.generation_config, "eos_token_id", None)
    several = configured if isinstance(configured, list | tuple) else [configured]
    return frozenset(int(t) for t in [*several, base.tokenizer.eos_token_id] if t is not None)

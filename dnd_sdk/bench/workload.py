"""What the engine is asked in its bench: how much of everything, made-up adapters, prompts that nobody asked before.

* Adapters are scaled to next to nothing: they cost what any adapter costs and write the base's tokens, so whoever is
  compared does the same work, and the end of an answer comes where the base's comes.
* Every prompt is new from its first word on: an engine that keeps what it has read finds nothing of it, except where
  that is what is measured.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import count
from threading import Event
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dnd_sdk.bench.adapting import NEXT_TO_NOTHING
from dnd_sdk.config import SamplingOptions
from dnd_sdk.engine import CompletionRequest, local_engine
from dnd_sdk.errors import ConfigError

if TYPE_CHECKING:
    from dnd_sdk.session import DnD

N_ADAPTERS = 8
"""Different adapters that requests use, all resident."""
_WEIGHTS_STD = 0.02
_WORDS = ("the", "old", "small", "grey", "tower", "lamp", "map", "sea", "boat", "gull", "storm", "key", "door", "rope")


@dataclass(frozen=True)
class Sizes:
    """How much of everything is measured."""

    registered: int = 5000
    """Adapters in the larger store."""
    swap_rounds: int = 15
    rounds: int = 3
    """Of everything else, after one that warms up."""
    decode_tokens: int = 32
    batches: tuple[int, ...] = (1, 8, 16)
    answer_tokens: int = 24
    """Length of the answers that clients get."""
    clients: tuple[int, ...] = (1, 4, 8, 16)
    rival_requests: int = 3
    """That the rivals answer in a round; they take one at a time, so that their rate is that of more."""
    sharing: int = 8
    """Prompts with one head."""
    head_tokens: int = 300
    long_tokens: int = 2000
    """Length of the prompt that another thread has read."""

    def within(self, context_tokens: int) -> Sizes:
        """The same with prompts that fit a base of a short context."""
        return replace(
            self,
            head_tokens=min(self.head_tokens, context_tokens // 3),
            long_tokens=min(self.long_tokens, context_tokens // 2),
        )


FULL = Sizes()
QUICK = Sizes(
    registered=1000,
    rounds=2,
    decode_tokens=8,
    batches=(1, 8),
    answer_tokens=8,
    clients=(1, 8),
    rival_requests=2,
    sharing=3,
    long_tokens=600,
)
"""For two cores: fewer and shorter."""


class Workload:
    """Requests to one session's engine; the made-up adapters are resident inside `resident`."""

    def __init__(self, dnd: DnD, sizes: Sizes, clock: Callable[[], float]) -> None:
        """Raises `ConfigError` when the base is not in this process."""
        self.dnd, self.clock = dnd, clock
        self.engine = local_engine(dnd.engine, "a measurement")
        self.sizes = sizes.within(self.engine.context_tokens)
        self.device: torch.device = self.engine.base.model.device
        self.adapters = tuple(f"bench-engine-{i}" for i in range(N_ADAPTERS))
        self._asked, self._rng = count(10_000), torch.Generator().manual_seed(0)

    @contextmanager
    def resident(self) -> Iterator[None]:
        """Have the adapters in their slots; they are gone after it. Raises `ConfigError` when there are not enough."""
        bank = self.engine.bank
        try:
            for adapter in self.adapters:
                bank.load(adapter, NEXT_TO_NOTHING * self.weights())
            if not set(self.adapters) <= set(bank.resident()):
                raise ConfigError(f"{N_ADAPTERS} adapters do not fit the slots", fix="use more: --n-slots 8")
            yield
        finally:
            for adapter in self.adapters:
                bank.evict(adapter)

    def weights(self) -> Tensor:
        """A made-up adapter's flat vector `(P,)`, float32, in host memory."""
        return torch.randn(self.engine.layout.n_parameters, generator=self._rng) * _WEIGHTS_STD

    def story(self) -> str:
        """A short prompt for a long answer, new from its first word on."""
        return f"{next(self._asked)}: write a long story about a lighthouse keeper who finds a map."

    def head(self, n_tokens: int) -> str:
        """A text of about `n_tokens` tokens, new from its first word on."""
        text = f"{next(self._asked)}:"
        while (missing := n_tokens - self._length(text)) > 0:
            picked = torch.randint(len(_WORDS), (max(1, missing // 4),), generator=self._rng).tolist()
            text += "".join(f" {_WORDS[i]}" for i in picked)
        return text

    def request(self, chat: str, adapter: str | None, n_tokens: int, cancel: Event | None = None) -> CompletionRequest:
        """Greedy, at most `n_tokens`."""
        return CompletionRequest(chat, adapter, SamplingOptions(max_new_tokens=n_tokens), cancel=cancel)

    def answer(self, requests: Sequence[CompletionRequest]) -> int:
        """Have them answered together; how many tokens were made."""
        return sum(done.completion_tokens for done in self.engine.complete(requests))

    def synchronize(self) -> None:
        """Wait for what the device still has to do."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _length(self, text: str) -> int:
        return len(self.engine.base.tokenizer(text, add_special_tokens=False)["input_ids"])

"""What prompts begin with is read once: keys and values of shared heads, kept across requests.

Chats of one job share the head of their template, often a system message, an instruction or examples: half of their
tokens, or nearly all. Two prompts of one adapter that begin alike leave what they share here, and whoever begins so,
too, copies it instead of reading it. Answers are the same up to rounding.

Keys and values depend on the adapter: what one left is never another's. Least recently used heads go first.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Hashable, Iterable, Sequence

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

MIN_SHARED = 16
"""Tokens; for fewer the copies cost what reading them once saves."""

_N_RECENT = 256
"""Prompts that are remembered, without what they made, for others to share a head with."""

Tokens = NDArray[np.int64]


class PromptStore:
    """Heads of prompts, by adapter; not thread-safe."""

    def __init__(self, max_bytes: int, token_bytes: int) -> None:
        """`max_bytes` bounds what is kept, of which one token takes `token_bytes`."""
        self._max_bytes, self._n_bytes = max_bytes, 0
        self._max_tokens = max_bytes // token_bytes
        self._heads: OrderedDict[int, tuple[Hashable, Tokens, Tensor]] = OrderedDict()
        self._recent: deque[tuple[Hashable, Tokens]] = deque(maxlen=_N_RECENT)
        self._last = 0

    @property
    def n_bytes(self) -> int:
        """What the kept heads take."""
        return self._n_bytes

    def known(self, adapter: Hashable, prompt: Sequence[int]) -> Tensor | None:
        """Keys and values `(layers, 2, n, heads, width)` of the longest known head, shorter than the prompt, if any."""
        tokens, best, found = _tokens(prompt), MIN_SHARED - 1, None
        for number, (owner, head, _) in self._heads.items():
            if owner == adapter and (n := alike(head, tokens)) > best:
                best, found = n, number
        if found is None:
            return None
        self._heads.move_to_end(found)
        return self._heads[found][2][:, :, : min(best, len(tokens) - 1)]

    def worth(self, adapter: Hashable, prompt: Sequence[int], others: Iterable[Sequence[int]], n_known: int) -> int:
        """How many of the prompt's first tokens are worth keeping, given `others` that wait; 0: not more than is known.

        The prompt is remembered for those that come later.
        """
        tokens = _tokens(prompt)
        rivals = [*map(_tokens, others), *(known for owner, known in self._recent if owner == adapter)]
        self._recent.append((adapter, tokens))
        shared = min(max((alike(tokens, rival) for rival in rivals), default=0), len(tokens) - 1, self._max_tokens)
        return shared if shared >= n_known + MIN_SHARED else 0

    def keep(self, adapter: Hashable, prompt: Sequence[int], kv: Tensor) -> None:
        """Keep `kv` `(layers, 2, n, heads, width)`, a copy of which is made, of the prompt's first n tokens."""
        if kv.nbytes > self._max_bytes:
            return
        head = _tokens(prompt[: kv.shape[2]])
        shorter = [
            i for i, (owner, known, _) in self._heads.items() if owner == adapter and alike(known, head) == len(known)
        ]
        for number in shorter:  # the new one holds all of them
            self._drop(number)
        while self._n_bytes + kv.nbytes > self._max_bytes:
            self._drop(next(iter(self._heads)))
        self._last += 1
        self._heads[self._last] = adapter, head, kv.clone()
        self._n_bytes += kv.nbytes

    def clear(self) -> None:
        """Keep nothing."""
        self._heads.clear()
        self._recent.clear()
        self._n_bytes = 0

    def _drop(self, number: int) -> None:
        self._n_bytes -= self._heads.pop(number)[2].nbytes


def alike(some: Sequence[int] | Tokens, others: Sequence[int] | Tokens) -> int:
    """How many tokens both begin with."""
    n = min(len(some), len(others))
    differ = np.asarray(some[:n]) != np.asarray(others[:n])
    return int(differ.argmax()) if differ.any() else n


def _tokens(prompt: Sequence[int]) -> Tokens:
    return np.asarray(prompt, dtype=np.int64)

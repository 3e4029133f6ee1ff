"""`DnD.observe`: an agent's mixed stream of prompts, each task adapted to once it has shown enough of itself.

* Before that, and for tasks that never get there, a prompt is routed by itself, as `"auto"` does.
* An adaptation that fails is tried again with the next prompt of its task; one that decides for the base is final.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from dnd_sdk.errors import AdapterNotFoundError
from dnd_sdk.observe import PromptStream
from dnd_sdk.session.results import AdaptResult, ObserveResult

if TYPE_CHECKING:
    from dnd_sdk.adapters import Adapter
    from dnd_sdk.session.session import DnD


class Observer:
    """The tasks one session has met; every method may be called from any thread."""

    def __init__(self, dnd: DnD, stream: PromptStream) -> None:
        self._dnd, self._stream = dnd, stream
        self._adapters: dict[int, Adapter | None] = {}
        """Per cluster that was adapted to; None: the base was chosen."""
        self._due: set[int] = set()
        self._lock = threading.Lock()

    def observe(self, prompt: str) -> ObserveResult:
        """See `DnD.observe`."""
        pooled = self._dnd.encoder.encode([prompt], with_states=False).pooled
        seen = self._stream.add(prompt, pooled)
        if seen.ready:
            with self._lock:
                self._due.add(seen.cluster_id)
        adapted = self._adapt_if_due(seen.cluster_id)
        with self._lock:
            decided, adapter = seen.cluster_id in self._adapters, self._adapters.get(seen.cluster_id)
        if not decided:
            adapter = self._dnd.router.route_one(pooled).adapter
        return ObserveResult(adapter, seen.cluster_id, adapted)

    def _adapt_if_due(self, cluster: int) -> AdaptResult | None:
        with self._lock:
            if cluster not in self._due:
                return None
            self._due.discard(cluster)  # this thread does it, the others go on
        try:
            prompts = self._stream.prompts(cluster)
        except AdapterNotFoundError:  # merged into another task in the meantime
            return None
        try:
            result = self._dnd.adapt(prompts)
        except BaseException:
            with self._lock:
                self._due.add(cluster)
            raise
        with self._lock:
            alive = self._stream.sizes()
            kept = {c: a for c, a in self._adapters.items() if c in alive}
            self._adapters = {**kept, cluster: result.adapter}
        return result

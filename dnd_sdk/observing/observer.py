"""`DnD.observe`: an agent's mixed stream of prompts, each task adapted to once it has shown enough of itself.

* Before that a task is looked for among the stored adapters, by a handful of its prompts and then by each prompt alone.
* An adaptation that fails is tried again with the next prompt of its task; one that decides for the base is final.
* A task whose adapter was made here goes on teaching the router what its prompts look like, each time it has doubled.
* The stream is read from the home with the first prompt, and kept there every so many prompts and after every choice.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

from dnd_sdk.errors import AdapterNotFoundError, DndError
from dnd_sdk.observing.prompt_stream import Choice, Observation, PromptStream, StreamSettings
from dnd_sdk.observing.saved import load_stream, save_stream
from dnd_sdk.routing import RouteDecision, choose_exemplars, log_decision

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from dnd_sdk.adaptation import AdaptResult, Parts
    from dnd_sdk.adapters import Adapter

log = logging.getLogger(__name__)

SAVE_EVERY = 64
"""Prompts between two saves, so many at most are forgotten by a crash."""
LOOK_EVERY = 8
"""A task that has no adapter yet is looked for each time it has grown by so many prompts."""


@dataclass(frozen=True)
class ObserveResult:
    """What `DnD.observe` made of one prompt of a stream."""

    adapter: Adapter | None
    """The adapter of this prompt's task; None: complete it with the base model."""
    cluster: int
    """Which task of the stream the prompt was counted to."""
    adapted: AdaptResult | None
    """The adaptation this prompt set off; None for nearly all prompts."""


class _Chosen(NamedTuple):
    adapter: Adapter | None
    final: bool


class Observer:
    """The tasks one session has met; every method may be called from any thread."""

    def __init__(
        self, parts: Parts, adapt: Callable[[Sequence[str]], AdaptResult], settings: StreamSettings | None
    ) -> None:
        """`adapt` makes the prompts of a task an adapter, or decides for the base; `settings` None: the defaults."""
        self._parts, self._adapt_to, self._settings = parts, adapt, settings or StreamSettings()
        self._folder = parts.home.streams / f"{parts.base.fingerprint[:16]}-{parts.encoder.fingerprint[:16]}"
        self._opened: PromptStream | None = None
        self._busy: set[int] = set()
        """Clusters some thread is adapting to."""
        self._unsaved = 0
        """Prompts since the last save."""
        self._warned = False
        self._lock, self._saving = threading.Lock(), threading.Lock()

    @property
    def stream(self) -> PromptStream:
        """What was seen, read from the home the first time."""
        with self._lock:
            if self._opened is None:
                self._opened = load_stream(self._folder, self._settings, encoder=self._parts.encoder.fingerprint)
            return self._opened

    def observe(self, prompt: str) -> ObserveResult:
        """See `DnD.observe`."""
        pooled = self._parts.encoder.embed([prompt])
        prompt = prompt.encode("utf-8", "replace").decode()  # `adapt` refuses lone surrogates, and would each time
        seen = self.stream.add(prompt, pooled)
        with self._lock:
            self._unsaved += 1
        chosen = self._chosen(seen)
        due = seen.size >= self._settings.min_prompts and not (chosen and chosen.final)
        adapted = self._adapt(seen) if due else None
        if adapted is not None:
            adapter = self._by_cluster(prompt, seen, adapted.adapter)
        elif chosen is not None:
            adapter = self._by_cluster(prompt, seen, chosen.adapter)
            self._refine(seen, chosen.adapter)
        else:
            adapter = self._look(seen) or self._alone(prompt, pooled, seen)
        self._save_if_due(at_once=adapted is not None)
        return ObserveResult(adapter, seen.cluster_id, adapted)

    def save(self) -> None:
        """Keep what was seen since the last save; a disk that refuses is warned of once."""
        with self._saving:
            with self._lock:
                stream, unsaved, self._unsaved = self._opened, self._unsaved, 0
            if stream is None or unsaved == 0:
                return
            try:
                save_stream(stream, self._folder, encoder=self._parts.encoder.fingerprint)
            except DndError as e:
                if not self._warned:
                    self._warned = True
                    log.warning("the prompt stream is not kept: %s", e.message)

    def _save_if_due(self, *, at_once: bool) -> None:
        if at_once or self._unsaved >= SAVE_EVERY:
            self.save()

    def _chosen(self, seen: Observation) -> _Chosen | None:
        """What was chosen for the prompt's cluster, if it still stands: an adapter may have been removed."""
        if seen.choice is None:
            return None
        wanted, final = seen.choice.adapter_id, seen.choice.final
        if wanted is None:
            return _Chosen(None, final)
        adapter = self._parts.router.with_id(wanted)
        return None if adapter is None else _Chosen(adapter, final)

    def _adapt(self, seen: Observation) -> AdaptResult | None:
        """Adapt to a cluster; None when another thread does or just did, or the cluster was merged away."""
        with self._claimed(seen.cluster_id) as claimed:
            try:
                if not claimed or self.stream.choice(seen.cluster_id) != seen.choice:
                    return None
                prompts = self.stream.prompts(seen.cluster_id)
            except AdapterNotFoundError:
                return None
            result = self._adapt_to(prompts)
            assert result.decision != "merge"  # only on request
            adapter_id = None if result.adapter is None else result.adapter.id
            self.stream.choose(seen.cluster_id, Choice(result.decision, adapter_id))
            return result

    def _by_cluster(self, prompt: str, seen: Observation, adapter: Adapter | None) -> Adapter | None:
        decision: Literal["reuse", "base"] = "base" if adapter is None else "reuse"
        route = RouteDecision(decision, None, adapter, [], "decided for its task before", by="cluster")
        self._log([prompt], route, seen.cluster_id)
        return adapter

    def _alone(self, prompt: str, pooled: Tensor, seen: Observation) -> Adapter | None:
        route = self._parts.router.route_one(pooled)
        self._log([prompt], route, seen.cluster_id)
        return route.adapter

    def _look(self, seen: Observation) -> Adapter | None:
        """An adapter that fits the prompts of a cluster still too small to adapt to; None if none does."""
        cluster = seen.cluster_id
        if seen.size % LOOK_EVERY:
            return None
        try:
            prompts, vectors = self.stream.prompts(cluster), self.stream.vectors(cluster)
        except AdapterNotFoundError:
            return None
        route = self._parts.router.route(vectors, mode="reuse")
        if route.adapter is not None:
            self.stream.choose(cluster, Choice("reuse", route.adapter.id, final=False))
            self._log(prompts, route, cluster, mode="reuse", rule="set")
        return route.adapter

    def _refine(self, seen: Observation, adapter: Adapter | None) -> None:
        """Once a cluster has doubled, replace the exemplars of the adapter made for it by a sample of all it saw."""
        choice = seen.choice
        if adapter is None or choice is None or choice.decision != "generate" or seen.size < 2 * seen.chosen_at:
            return
        self.stream.choose(seen.cluster_id, choice)  # also when what follows fails: not again with every prompt
        try:
            self._parts.store.set_exemplars(adapter, choose_exemplars(self.stream.vectors(seen.cluster_id)))
        except DndError as e:
            log.warning("the exemplars of %r stay as they are: %s", adapter.name, e.message)

    def _log(self, prompts: Sequence[str], route: RouteDecision, cluster: int, **how: str) -> None:
        log_decision(self._parts.log, self._parts.router.thresholds, "observe", prompts, route, cluster=cluster, **how)

    @contextmanager
    def _claimed(self, cluster: int) -> Iterator[bool]:
        with self._lock:
            mine = cluster not in self._busy
            self._busy.add(cluster)
        try:
            yield mine
        finally:
            if mine:
                with self._lock:
                    self._busy.discard(cluster)

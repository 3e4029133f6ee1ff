"""Prompts become an adapter: clean, look up, encode, route, generate, vet, store, swap in.

* An identical prompt set is answered from the store without encoding anything.
* Nothing is kept of an adaptation that does not finish: an error or Ctrl-C after the store was written removes the new
  adapter again, so store, index and engine are as they were.
* One adaptation at a time: threads by a lock, processes by a lock file while an adapter is being made.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, get_args

from filelock import FileLock

from dnd_sdk.adapters.adapter import check_name
from dnd_sdk.errors import BankFullError, ConfigError, GeneratorError, StorageError
from dnd_sdk.prompts import PromptSet, clean_prompts, prompt_set_hash
from dnd_sdk.routing import RouteDecision, choose_exemplars
from dnd_sdk.session.logged import log_decision
from dnd_sdk.session.results import AdaptResult, Mode, Stopwatch
from dnd_sdk.session.vetting import Limits, complaint

if TYPE_CHECKING:
    from torch import Tensor

    from dnd_sdk.adapters import Adapter
    from dnd_sdk.encoder import Encoded
    from dnd_sdk.session.session import DnD

LOCK_FILE = "adapt.lock"


class Adaptation:
    """How one session adapts."""

    def __init__(self, dnd: DnD, limits: Limits) -> None:
        self._dnd, self._limits = dnd, limits
        self._one_at_a_time = threading.Lock()

    def run(self, prompts: Sequence[str] | PromptSet, mode: Mode, name: str | None) -> AdaptResult:
        """See `DnD.adapt`."""
        if mode not in get_args(Mode):
            raise ConfigError(f"mode must be one of {', '.join(get_args(Mode))}, got {mode!r}")
        if name is not None:
            check_name(name)
        watch = Stopwatch()
        kept = prompts if isinstance(prompts, PromptSet) else clean_prompts(prompts)
        with self._one_at_a_time:
            route, notes = self._route(kept, mode, name, watch)
        log_decision(self._dnd, "adapt", kept.prompts, route, rule="set", mode=mode)
        return AdaptResult(
            adapter=route.adapter,
            decision=route.decision,
            score=route.score,
            neighbours=tuple(route.neighbours),
            reason=route.reason,
            n_prompts=len(kept.prompts),
            notes=(*kept.notes, *notes),
            timings_s=watch.stop(),
        )

    def _route(
        self, kept: PromptSet, mode: Mode, name: str | None, watch: Stopwatch
    ) -> tuple[RouteDecision, tuple[str, ...]]:
        digest = prompt_set_hash(kept.prompts)
        if mode != "generate":
            with watch.step("route"):
                known = self._dnd.router.exact(digest)
            if known is not None:
                return self._reuse(known, watch), ()
        with watch.step("encode"):
            encoded = self._encode(kept.prompts)
        notes = (f"{encoded.n_truncated} prompts were longer than the encoder reads",) if encoded.n_truncated else ()
        with watch.step("route"):
            route = self._decide(encoded.pooled, digest, mode)
        if route.decision == "generate":
            return self._generate(kept, digest, encoded, route, mode, name, watch), notes
        return (self._reuse(route, watch) if route.adapter is not None else route), notes

    def _encode(self, prompts: Sequence[str]) -> Encoded:
        generator, encoder = self._dnd.generator, self._dnd.encoder
        if generator is None:
            return encoder.encode(prompts, with_states=False)
        return encoder.encode(prompts, state_tokens=generator.state_tokens)

    def _decide(self, pooled: Tensor, digest: str, mode: Mode) -> RouteDecision:
        route = self._dnd.router.route(pooled, prompt_hash=digest, mode=mode)
        if route.decision != "generate" or self._dnd.generator is not None:
            return route
        reason = f"there is no generator for {self._dnd.base.name}; {route.reason}"
        if mode == "generate":
            raise GeneratorError(reason, fix="pass a generator made for this base")
        return replace(route, decision="base", reason=reason, by="no generator")

    def _reuse(self, route: RouteDecision, watch: Stopwatch) -> RouteDecision:
        assert route.adapter is not None
        with watch.step("swap"):
            self._dnd.make_resident(route.adapter)
        return route

    def _generate(
        self,
        kept: PromptSet,
        digest: str,
        encoded: Encoded,
        route: RouteDecision,
        mode: Mode,
        name: str | None,
        watch: Stopwatch,
    ) -> RouteDecision:
        dnd, generator = self._dnd, self._dnd.generator
        assert generator is not None and encoded.states is not None
        with watch.step("generate"):
            flat = generator.generate(encoded.states)
        with watch.step("validate"):
            problem = complaint(flat, self._mean, dnd.base, dnd.layout, kept.prompts, self._limits)
        if problem is not None:
            return replace(route, decision="base", adapter=None, reason=problem, by="vetting")
        with self._no_other_process():
            faster = dnd.router.exact(digest) if mode == "auto" else None
            if faster is not None:  # another process made it while this one waited
                return self._reuse(faster, watch)
            return replace(route, adapter=self._keep(flat, kept, digest, encoded.pooled, name, watch))

    def _keep(
        self, flat: Tensor, kept: PromptSet, digest: str, pooled: Tensor, name: str | None, watch: Stopwatch
    ) -> Adapter:
        dnd = self._dnd
        before = {a.name for a in dnd.store.ls()}
        try:
            with watch.step("store"):
                adapter = dnd.store.put(
                    flat,
                    dnd.layout,
                    base_name=dnd.base.name,
                    base_fingerprint=dnd.base.fingerprint,
                    source="generated",
                    name=name,
                    prompt_hash=digest,
                    n_prompts=len(kept.prompts),
                    exemplars=choose_exemplars(pooled),
                    generator=None if dnd.generator is None else dnd.generator.id,
                    encoder=dnd.encoder.name,
                    encoder_fingerprint=dnd.encoder.fingerprint,
                )
            with watch.step("swap"):
                dnd.engine.load(adapter.id, flat)
        except BaseException:
            self._undo(before, digest)
            raise
        return adapter

    def _undo(self, before: set[str], digest: str) -> None:
        """Remove what an unfinished `_keep` may have left, known by its prompts: put's result may be lost to Ctrl-C."""
        for adapter in self._dnd.store.ls():
            if adapter.name not in before and adapter.prompt_hash == digest:
                self._dnd.store.rm(adapter.name)
                with suppress(BankFullError):  # another thread answers with it already
                    self._dnd.engine.evict(adapter.id)

    @cached_property
    def _mean(self) -> Tensor:
        assert self._dnd.generator is not None
        return self._dnd.generator.mean()

    @contextmanager
    def _no_other_process(self) -> Iterator[None]:
        root = self._dnd.store.root.parent
        lock = FileLock(root / LOCK_FILE)
        try:
            root.mkdir(parents=True, exist_ok=True)
            lock.acquire()
        except OSError as e:
            raise StorageError(f"cannot write {root}: {e.strerror or e}", fix="choose another home folder") from e
        try:
            yield
        finally:
            lock.release()

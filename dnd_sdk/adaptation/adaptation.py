"""Prompts become an adapter: clean, look up, encode, route, generate or merge, vet, store, swap in.

* An identical prompt set is answered from the store without encoding anything.
* Nothing is kept of an adaptation that does not finish: an error or Ctrl-C after the store was written removes the new
  adapter again, so store, index and engine are as they were.
* One adaptation at a time: threads by a lock, processes by one on the home while an adapter is being made.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, get_args

from dnd_sdk.adaptation.bases import check_name_free
from dnd_sdk.adaptation.label_calibration import LabelCalibration
from dnd_sdk.adaptation.parts import Parts
from dnd_sdk.adaptation.results import AdaptResult, Mode, Stopwatch
from dnd_sdk.adaptation.vetting import Limits, Vetting
from dnd_sdk.adapters import check_name
from dnd_sdk.chat import with_role
from dnd_sdk.config import callable_of, flag, one_of, whole_number
from dnd_sdk.errors import BankFullError, GeneratorError
from dnd_sdk.files import locked, storage_errors
from dnd_sdk.generator import without_generator
from dnd_sdk.lora import merge_flats, narrowed
from dnd_sdk.prompts import PromptSet, clean_prompts, prompt_set_hash, role_text
from dnd_sdk.routing import RouteDecision, choose_exemplars, log_decision

if TYPE_CHECKING:
    from torch import Tensor

    from dnd_sdk.adapters import Adapter
    from dnd_sdk.models import Encoded
    from dnd_sdk.prompts import Role

MAX_MERGED = 16
"""Adapters in one merge."""
_ELSEWHERE = "the base does not run in this process"
_NO_GENERATOR = "no generator"


@dataclass(frozen=True)
class Request:
    """What one adaptation was asked for."""

    prompts: PromptSet
    mode: Mode
    name: str | None
    role: Role | None
    top_k: int
    calibrate: bool | None
    """None: as the session does."""

    @cached_property
    def role_text(self) -> str | None:
        """The role as the router and the store know it."""
        return role_text(self.role)

    @cached_property
    def digest(self) -> str:
        """Of the prompts and their role."""
        return prompt_set_hash(self.prompts.prompts, self.role_text)

    @property
    def conditions(self) -> Sequence[str]:
        """The prompts as the encoder is to read them."""
        prompts = self.prompts.prompts
        return prompts if self.role is None else [self.role.condition(p) for p in prompts]


@dataclass(frozen=True)
class _Made:
    """New weights, not vetted yet."""

    flat: Tensor
    usual: Tensor
    """Weights of a usual size for such an adapter."""
    source: str
    generator: str | None = None
    parents: dict[str, float] = field(default_factory=dict)
    scores: dict[str, float] = field(default_factory=dict)


class Adaptation:
    """How one session adapts."""

    def __init__(self, parts: Parts, limits: Limits, *, calibrate: bool) -> None:
        """`calibrate`: whether generated adapters are, unless a request says otherwise."""
        self._parts, self._calibrating = parts, calibrate
        base = parts.engine.local
        self._vetting = Vetting(parts.layout, limits, base)
        self._label_calibration = None if base is None else LabelCalibration(base)
        self._one_at_a_time = threading.Lock()

    def run(
        self,
        prompts: Sequence[str] | PromptSet,
        mode: Mode,
        name: str | None,
        role: Role | None,
        top_k: int,
        calibrate: bool | None,
        progress: Callable[[str], None] | None = None,
    ) -> AdaptResult:
        """See `DnD.adapt`."""
        one_of("mode", mode, get_args(Mode))
        top_k = whole_number("top_k", top_k, 1, MAX_MERGED)
        if calibrate is not None:
            flag("calibrate", calibrate)
        if name is not None:
            check_name(name)
        watch = Stopwatch(callable_of("progress", progress))
        kept = prompts if isinstance(prompts, PromptSet) else clean_prompts(prompts)
        with self._one_at_a_time:
            route, notes = self._route(Request(kept, mode, name, role, top_k, calibrate), watch)
        if route.decision in ("generate", "merge") and not self._vetting.probes:
            notes = (*notes, f"not tried on the base: {_ELSEWHERE}")
        thresholds = self._parts.router.thresholds
        log_decision(self._parts.log, thresholds, "adapt", kept.prompts, route, rule="set", mode=mode)
        return AdaptResult(
            adapter=route.adapter,
            decision=route.decision,
            score=route.score,
            neighbours=tuple(route.neighbours),
            reason=route.reason,
            n_prompts=len(kept.prompts),
            notes=(*kept.notes, *notes),
            timings_s=watch.stop(),
            probability=route.probability,
            in_distribution=route.in_distribution,
        )

    def _route(self, request: Request, watch: Stopwatch) -> tuple[RouteDecision, tuple[str, ...]]:
        # 1. the very same prompts
        if request.mode in ("auto", "reuse"):
            with watch.step("route"):
                known = self._parts.router.exact(request.digest, request.role_text)
            if known is not None:
                return self._reuse(known, watch), ()
        # 2. what they are like
        with watch.step("encode"):
            encoded = self._encode(request)
        notes = (f"{encoded.n_truncated} prompts were longer than the encoder reads",) if encoded.n_truncated else ()
        if request.mode == "merge":
            return self._merge(request, encoded.pooled, watch), notes
        # 3. an adapter made for such prompts, a new one, or the base
        with watch.step("route"):
            route = self._decide(encoded.pooled, request)
        if route.by == _NO_GENERATOR:
            notes = (*notes, f"to have an adapter: {without_generator()}")
        if route.decision == "generate":
            route, more = self._generate(request, encoded, route, watch)
            return route, (*notes, *more)
        return (self._reuse(route, watch) if route.adapter is not None else route), notes

    def _encode(self, request: Request) -> Encoded:
        generator, encoder = self._parts.generator, self._parts.encoder
        if generator is None or request.mode == "merge":
            return encoder.encode(request.conditions, with_states=False)
        return encoder.encode(request.conditions, state_tokens=generator.state_tokens)

    def _decide(self, pooled: Tensor, request: Request) -> RouteDecision:
        mode = request.mode
        assert mode != "merge"
        route = self._parts.router.route(pooled, prompt_hash=request.digest, mode=mode, role=request.role_text)
        if route.decision != "generate" or self._parts.generator is not None:
            return route
        reason = f"there is no generator for {self._parts.base.name}; {route.reason}"
        if mode == "generate":
            raise GeneratorError(reason, fix=without_generator())
        return replace(route, decision="base", reason=reason, by=_NO_GENERATOR)

    def _reuse(self, route: RouteDecision, watch: Stopwatch) -> RouteDecision:
        assert route.adapter is not None
        with watch.step("swap"):
            self._parts.make_resident(route.adapter)
        return route

    def _generate(
        self, request: Request, encoded: Encoded, route: RouteDecision, watch: Stopwatch
    ) -> tuple[RouteDecision, tuple[str, ...]]:
        generator = self._parts.generator
        assert generator is not None and encoded.states is not None
        self._check_name(request)
        notes: tuple[str, ...] = ()
        with watch.step("generate"):
            made = _Made(generator.generate(encoded.states), self._mean, "generated", generator.id)
            if self._calibrating if request.calibrate is None else request.calibrate:
                made, notes = self._calibrate(made, request)
        return self._finish(made, request, encoded.pooled, route, watch), notes

    def _check_name(self, request: Request) -> None:
        if request.name is not None:
            check_name_free(self._parts.store, request.name, self._parts.base)

    def _calibrate(self, made: _Made, request: Request) -> tuple[_Made, tuple[str, ...]]:
        if self._label_calibration is None:
            return made, (f"not calibrated: {_ELSEWHERE}",)
        prompts = request.prompts.prompts
        done = self._label_calibration.calibrate(
            made.flat, prompts, [with_role(p, request.role, None) for p in prompts]
        )
        if not done.shares:
            return made, ((f"not calibrated: {done.reason}",) if request.calibrate else ())
        told = ", ".join(f"{label} {share:.2f}" for label, share in done.shares.items())
        scores = {f"label_share.{label}": share for label, share in done.shares.items()}
        return replace(made, flat=done.flat, scores=scores), (f"calibrated; the labels were said: {told}",)

    def _merge(self, request: Request, pooled: Tensor, watch: Stopwatch) -> RouteDecision:
        """The similarity-weighted mean of the nearest adapters; one that was merged itself is no parent again."""
        parts = self._parts
        with watch.step("route"):
            ranked = parts.router.nearest(pooled, request.role_text)
        by_id: dict[str, tuple[Adapter, float]] = {}
        for a, score in ranked:
            if a.source != "merged" and score > 0.0:
                by_id.setdefault(a.id, (a, score))  # the same weights under other names are no other parent
        near = list(by_id.values())[: request.top_k]
        names = [(a.name, s) for a, s in near]
        route = RouteDecision("base", None, None, names, "no stored adapter is near enough", by="asked")
        if not near:
            return route
        best = near[0][1]
        route = replace(route, score=best, probability=parts.router.thresholds.probability.own(best, "set"))
        if len(near) == 1:
            only = near[0][0]
            reason = f"{only.name} is the only adapter to merge"
            return self._reuse(replace(route, decision="reuse", adapter=only, reason=reason), watch)
        self._check_name(request)
        with watch.step("generate"):
            total = sum(score for _, score in near)
            weights = {a.id: score / total for a, score in near}
            flats = [parts.store.load(a, parts.layout, base_fingerprint=parts.base.fingerprint) for a, _ in near]
            flat, kept = merge_flats(flats, list(weights.values()), parts.layout)
        shares = ", ".join(f"{a.name} x {weights[a.id]:.2f}" for a, _ in near)
        reason = f"merged {shares}; rank {parts.layout.r} keeps {kept:.0%} of it"
        route = replace(route, decision="merge", reason=reason)
        made = _Made(flat, flats[0], "merged", parents=weights)
        return self._finish(made, request, pooled, route, watch)

    def _finish(
        self, made: _Made, request: Request, pooled: Tensor, route: RouteDecision, watch: Stopwatch
    ) -> RouteDecision:
        """Vet and keep new weights, unless another process was faster."""
        parts = self._parts
        with watch.step("validate"):
            problem = self._vetting.complaint(made.flat, made.usual)
        if problem is not None:
            return replace(route, decision="base", adapter=None, reason=problem, by="vetting")
        with self._no_other_process():
            faster = parts.router.exact(request.digest, request.role_text) if request.mode == "auto" else None
            if faster is not None:  # another process made it while this one waited
                return self._reuse(faster, watch)
            return replace(route, adapter=self._keep(made, request, pooled, watch))

    def _keep(self, made: _Made, request: Request, pooled: Tensor, watch: Stopwatch) -> Adapter:
        parts = self._parts
        before = {a.name for a in parts.store.made_for(request.digest)}
        # at the generator's own rank: the same weights are the same adapter, whatever rank a session's slots have
        layout = parts.layout if parts.generator is None or made.source == "merged" else parts.generator.layout
        try:
            with watch.step("store"):
                adapter = parts.store.put(
                    narrowed(made.flat, parts.layout, layout),
                    layout,
                    base_name=parts.base.name,
                    base_fingerprint=parts.base.fingerprint,
                    source=made.source,
                    name=request.name,
                    prompt_hash=request.digest,
                    n_prompts=len(request.prompts.prompts),
                    exemplars=choose_exemplars(pooled),
                    generator=made.generator,
                    encoder=parts.encoder.name,
                    encoder_fingerprint=parts.encoder.fingerprint,
                    parents=made.parents,
                    scores=made.scores,
                    role=request.role_text,
                )
            with watch.step("swap"):
                parts.engine.hold(adapter, lambda: made.flat)
        except BaseException:
            self._undo(before, request.digest)
            raise
        return adapter

    def _undo(self, before: set[str], digest: str) -> None:
        """Remove what an unfinished `_keep` may have left, known by its prompts: put's result may be lost to Ctrl-C."""
        for adapter in self._parts.store.made_for(digest):
            if adapter.name not in before:
                self._parts.store.rm(adapter.name)
                with suppress(BankFullError):  # another thread answers with it already
                    self._parts.engine.forget(adapter.id)

    @cached_property
    def _mean(self) -> Tensor:
        assert self._parts.generator is not None
        return self._parts.generator.mean()

    @contextmanager
    def _no_other_process(self) -> Iterator[None]:
        root = self._parts.home.root
        with storage_errors("write", root):
            root.mkdir(parents=True, exist_ok=True)
        with locked(root):
            yield

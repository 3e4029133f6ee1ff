"""`Router`: reuse an adapter made before, generate a new one, or stay on the base model; the decision is a value.

* The same prompts again are recognised by their hash, before anything is encoded.
* Thresholds come from a `RouterData` measured on real tasks; nothing is guessed here.
* An adapter made under a role serves that role alone, and one made without serves prompts without: roles are compared
  to the letter, so a prompt never gets a system message it did not come with.
* Adapters that another process adds or removes are noticed at the next question, which costs what changed.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

from torch import Tensor

from dnd_sdk.adapters import Adapter
from dnd_sdk.errors import ConfigError
from dnd_sdk.routing.index import AdapterIndex, DamagedIndex
from dnd_sdk.routing.index import Store as IndexedStore
from dnd_sdk.routing.support import Support
from dnd_sdk.routing.thresholds import Thresholds
from dnd_sdk.routing.vector_file import Key

log = logging.getLogger(__name__)

RouteMode = Literal["auto", "reuse", "generate"]
_NEIGHBOURS = 5


class Store(IndexedStore, Protocol):
    """What routing needs of an `AdapterStore`."""

    def made_for(self, prompt_hash: str) -> list[Adapter]: ...  # noqa: D102
    def with_id(self, adapter_id: str) -> list[Adapter]: ...  # noqa: D102


@dataclass(frozen=True)
class RouteDecision:
    """What to do with a set of prompts, and why."""

    decision: Literal["reuse", "generate", "merge", "base"]
    score: float | None
    """Of the nearest adapter: about 1 for prompts of the same task; None if there is none."""
    adapter: Adapter | None
    """The adapter to reuse; None for the other decisions."""
    neighbours: list[tuple[str, float]] = field(default_factory=list)
    """Names and scores of the nearest adapters, best first."""
    reason: str = ""
    """One sentence for people."""
    support: float | None = None
    """How near the prompts are to the generator's training tasks; None if not asked or not known."""
    by: str = "scores"
    """What settled it: `"scores"`, `"exact"` (the same prompt set), `"asked"` (the mode), or what overruled them."""
    probability: float | None = None
    """That the nearest adapter is the job's own, at even odds that it is stored; None without score or measured map."""
    in_distribution: float | None = None
    """That the prompts are a job and not noise, at even odds; None without support or measured map."""

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form."""
        a = self.adapter
        return {
            "decision": self.decision,
            "score": self.score,
            "adapter": None if a is None else {"name": a.name, "path": str(a.path), "source": a.source},
            "neighbours": [{"adapter": name, "score": score} for name, score in self.neighbours],
            "support": self.support,
            "reason": self.reason,
            "probability": self.probability,
            "in_distribution": self.in_distribution,
        }


def verdict(
    thresholds: Thresholds, rule: str, mode: str, score: float | None, support: float | None
) -> Literal["reuse", "generate", "base"]:
    """The whole rule: from the best score (None: no adapter to compare with) and the support (None: not known).

    `rule` `"single"` is that of one prompt, which never generates; `"set"` is that of several.
    """
    if mode == "generate":
        return "generate"
    if score is not None and score >= (thresholds.reuse_single if rule == "single" else thresholds.reuse):
        return "reuse"
    if rule == "single" or mode == "reuse":
        return "base"
    return "base" if support is not None and support < thresholds.support else "generate"


class Router:
    """Routes for one base and encoder; safe to share between threads."""

    def __init__(
        self,
        store: Store,
        encoder_name: str,
        encoder_fp: str,
        base_fp: str,
        thresholds: Thresholds,
        *,
        support: Support | None = None,
        folder: Path | None = None,
        usable: Callable[[Adapter], bool] | None = None,
    ) -> None:
        """Nothing is read before the first question.

        Args:
            store: Where adapters are found; only those of this base and encoder count.
            encoder_name: Name of the encoder, for the saved index.
            encoder_fp: Its fingerprint.
            base_fp: Fingerprint of the base model.
            thresholds: See `Thresholds`.
            support: Where the generator was trained; None: every prompt set may be generated for.
            folder: Where the index is kept between runs; None keeps it in memory.
            usable: Whether an adapter may be chosen at all; None: any.
        """
        self.thresholds = thresholds
        self._store, self._encoder, self._fingerprints = store, encoder_name, (base_fp, encoder_fp)
        self._support = support
        self._folder = None if folder is None else folder / f"{base_fp[:16]}-{encoder_fp[:16]}"
        self._usable = usable or (lambda adapter: True)
        self._lock = threading.Lock()
        self._index: AdapterIndex | None = None

    def exact(self, prompt_hash: str, role: str | None = None) -> RouteDecision | None:
        """Reuse of the newest adapter made for exactly these prompts, None without one; needs no embeddings."""
        same = [a for a in self._store.made_for(prompt_hash) if a.role == role and self._fits(a)]
        if not same:
            return None
        found = max(same, key=lambda a: (a.created, a.name))
        return RouteDecision("reuse", 1.0, found, [(found.name, 1.0)], "exact prompt set", by="exact", probability=1.0)

    def route(
        self, pooled: Tensor, *, prompt_hash: str | None = None, mode: RouteMode = "auto", role: str | None = None
    ) -> RouteDecision:
        """Decide for a set of prompts.

        Args:
            pooled: `(n, C)` normalised prompt embeddings.
            prompt_hash: Of the prompt set; None skips the exact match.
            mode: `"reuse"` never generates, `"generate"` always does.
            role: Text of the role the prompts come under, None for none.

        Raises:
            InputError: The embeddings are not finite, not normalised or of another width.
        """
        if mode not in get_args(RouteMode):
            raise ConfigError(f"mode must be one of {', '.join(get_args(RouteMode))}, got {mode!r}")
        if prompt_hash is not None and mode != "generate" and (exact := self.exact(prompt_hash, role)) is not None:
            return exact
        return self._weighed(self._judge(pooled, self.nearest(pooled, role), mode), "set")

    def _judge(self, pooled: Tensor, ranked: list[tuple[Adapter, float]], mode: RouteMode) -> RouteDecision:
        if mode == "generate":
            return _decision("generate", ranked, "generation was asked for", by="asked")
        # also when an adapter is reused: other thresholds can then be tried on what was logged
        support = None if self._support is None or mode == "reuse" else self._support.score(pooled)
        decision = verdict(self.thresholds, "set", mode, ranked[0][1] if ranked else None, support)
        if decision == "reuse":
            return _reuse(ranked, self.thresholds.reuse, support)
        reason = _why_not(ranked, self.thresholds.reuse)
        if mode == "reuse":
            reason = f"{reason}, and generating was ruled out"
        elif decision == "base":
            limit = self.thresholds.support
            reason = f"{reason}, and the prompts are unlike any training task: {support:.2f} is below {limit:.2f}"
        return _decision(decision, ranked, reason, support)

    def route_one(self, pooled: Tensor, role: str | None = None) -> RouteDecision:
        """Decide for a single prompt `(1, C)`: reuse or base, by the stricter rule that one prompt calls for."""
        if len(pooled) != 1:
            raise ConfigError(f"route_one takes one prompt, got {len(pooled)}", fix="use route() for a set")
        ranked = self.nearest(pooled, role)
        limit = self.thresholds.reuse_single
        if verdict(self.thresholds, "single", "auto", ranked[0][1] if ranked else None, None) == "reuse":
            return self._weighed(_reuse(ranked, limit), "single")
        return self._weighed(_decision("base", ranked, _why_not(ranked, limit)), "single")

    def _weighed(self, decision: RouteDecision, rule: str) -> RouteDecision:
        maps = self.thresholds.probability
        return replace(
            decision,
            probability=maps.own(decision.score, rule),
            in_distribution=maps.in_distribution(decision.support),
        )

    def with_id(self, adapter_id: str) -> Adapter | None:
        """The adapter of these weights that may be chosen, the first by name; None: there is none."""
        return next((a for a in self._store.with_id(adapter_id) if self._fits(a)), None)

    def nearest(self, pooled: Tensor, role: str | None = None) -> list[tuple[Adapter, float]]:
        """Adapters of this role near the prompt set `(n, C)` and their scores, best first."""
        index = self._current_index(pooled.shape[-1])
        try:
            hits = index.score(pooled, role)
        except DamagedIndex as e:
            log.warning("the adapter index is damaged (%s), it is made again", e)
            index.forget()
            index.sync(self._store)
            hits = index.score(pooled, role)
        return [(h.adapter, h.score) for h in hits if h.adapter is not None]

    def _fits(self, adapter: Adapter) -> bool:
        mine = (adapter.base_fingerprint, adapter.encoder_fingerprint) == self._fingerprints
        return mine and self._usable(adapter)

    def _current_index(self, width: int) -> AdapterIndex:
        with self._lock:
            if self._index is None:
                base_fp, encoder_fp = self._fingerprints
                key = Key(width, self._encoder, encoder_fp, base_fp)
                self._index = AdapterIndex(key, self._folder, usable=self._usable)
            self._index.sync(self._store)
            return self._index


def _decision(
    decision: Literal["reuse", "generate", "base"],
    ranked: list[tuple[Adapter, float]],
    reason: str,
    support: float | None = None,
    by: str = "scores",
) -> RouteDecision:
    score = ranked[0][1] if ranked else None
    return RouteDecision(decision, score, None, _neighbours(ranked), reason, support, by)


def _reuse(ranked: list[tuple[Adapter, float]], threshold: float, support: float | None = None) -> RouteDecision:
    adapter, score = ranked[0]
    reason = f"{adapter.name} was made for such prompts: {score:.2f} reaches {threshold:.2f}"
    return RouteDecision("reuse", score, adapter, _neighbours(ranked), reason, support)


def _neighbours(ranked: list[tuple[Adapter, float]]) -> list[tuple[str, float]]:
    return [(a.name, s) for a, s in ranked[:_NEIGHBOURS]]


def _why_not(ranked: list[tuple[Adapter, float]], threshold: float) -> str:
    if not ranked:
        return "no stored adapter to compare with"
    adapter, score = ranked[0]
    return f"the nearest adapter {adapter.name} is not near enough: {score:.2f} is below {threshold:.2f}"

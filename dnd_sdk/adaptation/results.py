"""What an adaptation comes to, and the time it took."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

if TYPE_CHECKING:
    from dnd_sdk.adapters import Adapter

STEPS = ("encode", "route", "generate", "validate", "store", "swap", "total")

Mode = Literal["auto", "reuse", "generate", "merge"]
Decision = Literal["reuse", "generate", "merge", "base"]


@dataclass(frozen=True)
class AdaptResult:
    """What `DnD.adapt` decided and did."""

    adapter: Adapter | None
    """The adapter to complete with; None: the base model."""
    decision: Decision
    score: float | None
    """Similarity to the nearest stored adapter, 1.0 for the same prompt set; None when nothing was compared."""
    neighbours: tuple[tuple[str, float], ...]
    """Nearest adapters and their scores, best first."""
    reason: str
    n_prompts: int
    """Prompts used, after cleaning and sampling."""
    notes: tuple[str, ...]
    """What was left out of the prompts, in words."""
    timings_s: dict[str, float]
    """Seconds per step and in total; steps that were not needed are 0."""
    probability: float | None = None
    """That the nearest adapter is the job's own, as `RouteDecision.probability`; 1.0 for the same prompt set."""
    in_distribution: float | None = None
    """That the prompts are a job and not noise; None when that was not asked."""

    def to_dict(self) -> dict[str, Any]:
        """The object `dnd adapt --json` prints."""
        return adapted_fields(self)


class Adapted(Protocol):
    """What an adaptation comes to, here or as a server told it; see `AdaptResult`."""

    @property
    def adapter(self) -> Any:
        """With `name`, `path` and `source`; None: the base."""

    @property
    def decision(self) -> str:
        """What was done."""

    @property
    def score(self) -> float | None:
        """Similarity to the nearest adapter."""

    @property
    def n_prompts(self) -> int:
        """Prompts used."""

    @property
    def timings_s(self) -> Mapping[str, float]:
        """Seconds per step."""


def adapted_fields(result: Adapted) -> dict[str, Any]:
    """An adaptation as it is told to machines; the reason and the like are in `routing.decision_fields`."""
    found = result.adapter
    return {
        "decision": result.decision,
        "score": result.score,
        "adapter": found and {"name": found.name, "path": str(found.path), "source": found.source},
        "n_prompts": result.n_prompts,
        "timings_s": dict(result.timings_s),
    }


@dataclass
class Stopwatch:
    """Seconds spent per step of one adaptation; those of `STEPS` that were not needed stay 0, others are left out."""

    told: Callable[[str], None] | None = None
    """Told the name of each step as it begins."""
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(STEPS, 0.0))
    started: float = field(default_factory=time.perf_counter)

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Add the time spent inside to `name`."""
        if self.told is not None:
            self.told(name)
        at = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - at

    def stop(self) -> dict[str, float]:
        """All steps and the total."""
        steps = {k: v for k, v in self.seconds.items() if k != "total"}
        return {**steps, "total": time.perf_counter() - self.started}

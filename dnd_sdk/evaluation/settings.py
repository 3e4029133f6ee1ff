"""How much is evaluated, and how far an evaluation is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dnd_sdk.errors import ConfigError
from dnd_sdk.tasks import Task

MAX_PROMPTS = 64
"""`generated` sees at most this many prompts of a task."""


@dataclass(frozen=True)
class EvalSettings:
    """How much is evaluated, and where its answers are kept."""

    limit: int = 30
    """Test rows per task (all of them if a task has fewer); the same rows for every method and seed."""
    seeds: int = 1
    """Seeds per method whose prompts are drawn; their scores are averaged."""
    n_prompts: int = MAX_PROMPTS
    """Prompts of a task that condition the generator or the router, at most."""
    max_new_tokens: int = 64
    """Upper bound; a task whose train responses are shorter gets less."""
    bare: bool = False
    """Ask the test rows without what all prompts of their task share (`dnd_sdk.tasks.bare`); methods are made from
    whole prompts all the same."""
    unrelated: int = 0
    """Tasks of other families that every adapter is asked as well, to measure what it spoils; `limit` rows each."""
    against: str | None = None
    """Method that all others are compared with, besides `base`; None: `base` alone."""
    part: tuple[int, int] = (1, 1)
    """(K, N): ask only every N-th task, from the K-th on. Prompts of other tasks are still drawn from all of them, so
    processes that share a `run_dir` can answer a part each, and a run of all then finds their answers."""
    run_dir: Path | None = None
    """Folder of `results.jsonl`; None keeps nothing."""

    def __post_init__(self) -> None:
        if self.unrelated < 0:
            raise ConfigError(f"unrelated must be 0 or more, got {self.unrelated}")
        for name in ("limit", "seeds", "n_prompts", "max_new_tokens"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 1 <= self.part[0] <= self.part[1]:
            raise ConfigError(
                f"part must be K of N with K from 1 to N, got {self.part}", fix="such as 1 of 2, and 2 of 2"
            )
        if self.n_prompts > MAX_PROMPTS:
            raise ConfigError(f"n_prompts must be at most {MAX_PROMPTS}, got {self.n_prompts}")

    @property
    def results(self) -> Path | None:
        """The file of `run_dir` that answers are kept in."""
        return self.run_dir / "results.jsonl" if self.run_dir else None

    def own_tasks(self, tasks: Sequence[Task]) -> Sequence[Task]:
        """The tasks of this `part`."""
        first, every = self.part
        return tasks[first - 1 :: every]


@dataclass(frozen=True)
class Standing:
    """Where an evaluation stands after one unit."""

    done: int
    total: int
    task: str
    method: str
    seed: int
    cached: bool
    eta_s: float | None
    """Seconds left at the pace of the units that were not cached; None before the first of those."""

"""The zoo as units of work: the shared adapter, and then groups of tasks, by any process that sees the run folder.

What a unit makes is in `out`, whole or not at all; the run folders there hold what made it, data hashes first of all,
so that a process with other data, settings or weights is refused.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from dnd_sdk.config import Home
from dnd_sdk.errors import ConfigError, WorkerError
from dnd_sdk.protocols import Job, Progress, Work, Workers
from dnd_sdk.training.parts import prepare
from dnd_sdk.training.settings import TrainSettings
from dnd_sdk.training.zoo import finish_zoo, task_groups, train_group, train_shared

SHARED = "the shared adapter"


def train_zoo(
    tasks_dir: Path, settings: TrainSettings, out: Path, *, home: Home, progress: Progress, workers: Workers
) -> None:
    """Have `workers` train (or continue) a zoo in `out`.

    Raises what the shared adapter raises; then `WorkerError` when groups failed, after all others were trained.
    """
    job = Job(open_zoo, {"tasks_dir": tasks_dir, "settings": settings, "out": out, "home": home})
    [first] = workers.run(job, [SHARED], progress)
    if first.error is not None:
        raise first.error
    groups: list[list[str]] = first.value
    failed = {d.unit: d.error for d in workers.run(job, [*map(_named, groups)], progress) if d.error is not None}
    if failed:
        told = "; ".join(f"{unit}: {error}" for unit, error in failed.items())
        raise WorkerError(
            f"{len(failed)} of {len(groups)} groups of tasks failed: {told}",
            fix="run the same command again: what is finished is kept",
        )
    finish_zoo(out, [name for group in groups for name in group])


def open_zoo(tasks_dir: Path, settings: TrainSettings, out: Path, home: Home) -> Work:
    """Load the base for the units of a zoo: `SHARED`, which gives the groups of tasks, and each group."""
    parts = prepare(tasks_dir, settings, home, lambda *_: None)
    groups = task_groups(parts, settings.per_task)
    by_name = {_named(group): i for i, group in enumerate(groups)}

    def work(unit: str, progress: Progress) -> list[list[str]]:
        telling = replace(parts, progress=progress)
        shared = train_shared(telling, settings.shared, out)
        if unit != SHARED:
            if unit not in by_name:
                raise ConfigError(f"{tasks_dir} has no group of tasks {unit}", fix="let all workers see the same tasks")
            i = by_name[unit]
            train_group(telling, settings.per_task, shared, out, groups[i], f"tasks {i + 1}/{len(groups)}")
        return groups

    return work


def _named(group: list[str]) -> str:
    return "tasks " + ", ".join(group)

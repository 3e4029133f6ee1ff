"""Runs methods over tasks: answers cached by content, one bad task loses no other.

* The unit of work is (task, method, seed). Its answers are kept by row, under a key made of what else decides them: the
  labels, the base, the LoRA's own bytes, the system text, the example turns, the token limit; not the method's name.
  So a run with more rows asks only the new ones.
* An adapter may also be asked the rows of tasks it was not made for, beside the base: what it spoils elsewhere.
* All methods of a task run before the next task, so a partial run compares methods on the same tasks.
"""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from dnd_sdk.errors import ConfigError, DndError
from dnd_sdk.evaluation.cache import Answer, AnswerCache
from dnd_sdk.evaluation.job import TaskJob, row_id
from dnd_sdk.evaluation.methods import METHODS, build_methods, check_names
from dnd_sdk.evaluation.parts import AdapterZoo, LoraTrainer, Parts
from dnd_sdk.evaluation.report import build_report
from dnd_sdk.evaluation.scoring import mean_change, row_means, row_scores
from dnd_sdk.evaluation.settings import EvalSettings, Standing
from dnd_sdk.evaluation.treatment import Method, Treatment
from dnd_sdk.evaluation.units import RowScores, Scores, Unit
from dnd_sdk.tasks import Row, Task

log = logging.getLogger(__name__)

FAILURES = (DndError, RuntimeError, ValueError)
"""What a task's rows or adapter may bring about: it fails that unit alone."""


def evaluate(
    dnd_or_parts: Any,
    tasks: Sequence[Task],
    methods: Sequence[str] = METHODS,
    settings: EvalSettings | None = None,
    progress: Callable[[Standing], None] | None = None,
    *,
    zoo: AdapterZoo | None = None,
    trainer: LoraTrainer | None = None,
) -> dict[str, Any]:
    """Judge `methods` on `tasks`; the report is the object that `dnd eval --json` prints.

    Args:
        dnd_or_parts: a `DnD` session or `Parts`.
        tasks: what to evaluate; conditioned on their train prompts, scored on their test rows.
        methods: names as in `dnd_sdk.evaluation.methods`.
        settings: None: the defaults.
        progress: called after every (task, method, seed).
        zoo: the trained adapters behind `nearest`, `mean`, `merge-K`, `multitask` and `oracle`.
        trainer: what `oracle`, `polish-K` and `scratch-K` train with, see `TaskTrainer`.

    Raises `ConfigError` before any work if a method cannot run at all. A task that fails is listed under `failures`.
    """
    parts = dnd_or_parts if isinstance(dnd_or_parts, Parts) else Parts.of(dnd_or_parts)
    settings = settings or EvalSettings()
    check_plan(tasks, methods, settings)
    built = build_methods(methods, parts, tasks, zoo=zoo, trainer=trainer, n_prompts=settings.n_prompts)
    return build_report(parts.made, methods, settings, run_methods(parts, tasks, built, settings, progress))


def run_methods(
    parts: Parts,
    tasks: Sequence[Task],
    methods: Sequence[Method],
    settings: EvalSettings,
    progress: Callable[[Standing], None] | None = None,
) -> list[Unit]:
    """What every (task, method, seed) comes to; a unit that fails carries its error."""
    cache = AnswerCache(settings.run_dir / "results.jsonl" if settings.run_dir else None)
    return list(_Run(parts, settings, cache, tasks, methods, progress).units())


def check_plan(tasks: Sequence[Task], methods: Sequence[str], settings: EvalSettings) -> None:
    """Raise `ConfigError` unless these tasks and methods can be reported together."""
    check_names(methods)
    if len({t.name for t in tasks}) != len(tasks) or not tasks:
        raise ConfigError("an evaluation needs one or more tasks of different names")
    if settings.against is not None and settings.against not in methods:
        raise ConfigError(f"method {settings.against!r} to compare against is not run", fix="name it in methods too")
    if settings.unrelated and len({t.family for t in tasks}) < 2:
        raise ConfigError("unrelated tasks need two families at least", fix="evaluate more tasks, or 0 unrelated ones")


def unrelated_tasks(task: Task, tasks: Sequence[Task], n: int, seed: int) -> list[Task]:
    """At most `n` tasks of other families than `task`'s, drawn by `seed`."""
    others = sorted((t for t in tasks if t.family != task.family), key=lambda t: t.name)
    return random.Random(f"{seed}/unrelated/{task.name}").sample(others, min(n, len(others)))


def scores_of(task: Task, rows: Sequence[Row], known: Mapping[str, Answer]) -> RowScores:
    """What the answers to `rows`, found in `known` by row id, come to, row by row."""
    answers = [known[row_id(row)] for row in rows]
    choices = [a.choice for a in answers if a.choice is not None]  # all of a label task, none of another
    return row_scores(task, rows, [a.output for a in answers], choices or None)


class _Run:
    """One evaluation under way."""

    def __init__(
        self,
        parts: Parts,
        settings: EvalSettings,
        cache: AnswerCache,
        tasks: Sequence[Task],
        methods: Sequence[Method],
        progress: Callable[[Standing], None] | None,
    ) -> None:
        self.parts, self.settings, self.cache, self.tasks = parts, settings, cache, tasks
        self.methods, self.report = methods, progress
        self.fresh, self.spent_s = 0, 0.0
        self.jobs: dict[str, TaskJob] = {}

    def units(self) -> Iterator[Unit]:
        plan = [(m, s) for m in self.methods for s in range(self.settings.seeds if m.seeded else 1)]
        asked = self.settings.own_tasks(self.tasks)
        total, done = len(asked) * len(plan), 0
        for task in asked:
            for method, seed in plan:
                start = time.monotonic()
                unit, cached = self._unit(task, method, seed)
                done += 1
                if not cached:
                    self.fresh, self.spent_s = self.fresh + 1, self.spent_s + time.monotonic() - start
                self._tell(done, total, unit, cached)
                yield unit

    def _unit(self, task: Task, method: Method, seed: int) -> tuple[Unit, bool]:
        """What one (task, method, seed) comes to, and whether nothing had to be asked for it."""
        try:
            n = len(self._job(task).rows)  # before making anything for a task without rows
            treatment = method.make(task, seed)
            scores, cached = self._scores(task, treatment, method.name, seed)
            unrelated, also_cached = self._unrelated(task, treatment, method.name, seed)
            unit = Unit(task.name, method.name, seed, n, row_means(scores), unrelated=unrelated, rows=scores)
            return unit, cached and also_cached
        except FAILURES as e:
            log.warning("task %s, method %s, seed %d failed: %s", task.name, method.name, seed, e)
            return Unit(task.name, method.name, seed, 0, None, f"{type(e).__name__}: {e}"), False

    def _scores(self, task: Task, treatment: Treatment, method: str, seed: int) -> tuple[RowScores, bool]:
        job = self._job(task)
        key = job.key(treatment, self.parts)
        known = self.cache.get(key)
        missing = {i: row for row in job.rows if (i := row_id(row)) not in known}
        asked = job.run(treatment, self.parts, list(missing.values())) if missing else []
        fresh = dict(zip(missing, asked, strict=True))
        self.cache.put(key, fresh, task=task.name, method=method, seed=seed, **self.parts.made._asdict())
        return scores_of(task, job.rows, known | fresh), not missing

    def _unrelated(self, task: Task, treatment: Treatment, method: str, seed: int) -> tuple[Scores | None, bool]:
        """Mean change of scores, from the base's, on tasks that the adapter was not made for; None without adapter."""
        if treatment.flat is None:
            return None, True
        changes, all_cached = [], True
        for other in unrelated_tasks(task, self.tasks, self.settings.unrelated, seed):
            try:
                before, known = self._scores(other, Treatment(), "base", 0)
                after, cached = self._scores(other, Treatment(treatment.flat), f"{method} of {task.name}", seed)
            except FAILURES as e:  # the other task's trouble is no fault of this one
                log.warning("unrelated task %s is left out: %s", other.name, e)
                continue
            changes.append((row_means(before), row_means(after)))
            all_cached = all_cached and known and cached
        return mean_change(changes), all_cached

    def _job(self, task: Task) -> TaskJob:
        if task.name not in self.jobs:
            self.jobs[task.name] = TaskJob.of(task, self.parts, self.settings)
        return self.jobs[task.name]

    def _tell(self, done: int, total: int, unit: Unit, cached: bool) -> None:
        if self.report is not None:
            eta = self.spent_s / self.fresh * (total - done) if self.fresh else None
            self.report(Standing(done, total, unit.task, unit.method, unit.seed, cached, eta))

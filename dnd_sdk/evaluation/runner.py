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
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

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
    asked = UnitRun(parts, tasks, methods, settings, AnswerCache(settings.results))
    plan = plan_units(tasks, {m.name: m.seeded for m in methods}, settings)
    teller, units = Teller(len(plan), progress), []
    for ask in plan:
        unit, cached = asked.ask(ask)
        teller.tell(unit, cached)
        units.append(unit)
    return units


class Ask(NamedTuple):
    """One unit to ask."""

    task: Task
    method: str
    seed: int

    def __str__(self) -> str:
        return f"task {self.task.name}, method {self.method}, seed {self.seed}"

    def failed(self, error: Exception) -> Unit:
        """What the unit comes to then; says so in the log."""
        log.warning("%s failed: %s", self, error)
        return Unit(self.task.name, self.method, self.seed, 0, None, f"{type(error).__name__}: {error}")


def plan_units(tasks: Sequence[Task], seeded: Mapping[str, bool], settings: EvalSettings) -> list[Ask]:
    """Every unit of the `settings`' part: all methods of a task, each with its seeds, before the next task.

    `seeded` says of every method, in order, whether its seed changes anything.
    """
    each = [(m, s) for m, is_seeded in seeded.items() for s in range(settings.seeds if is_seeded else 1)]
    return [Ask(task, m, s) for task in settings.own_tasks(tasks) for m, s in each]


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


class Teller:
    """Tells how far an evaluation is."""

    def __init__(self, total: int, progress: Callable[[Standing], None] | None) -> None:
        self._total, self._progress = total, progress
        self._done, self._fresh, self._spent_s = 0, 0, 0.0
        self._last = time.monotonic()

    def tell(self, unit: Unit, cached: bool) -> None:
        """A unit has ended; `cached`: nothing had to be asked for it."""
        now = time.monotonic()
        self._done += 1
        if not cached:
            self._fresh, self._spent_s = self._fresh + 1, self._spent_s + now - self._last
        self._last = now
        if self._progress is not None:
            eta = self._spent_s / self._fresh * (self._total - self._done) if self._fresh else None
            self._progress(Standing(self._done, self._total, unit.task, unit.method, unit.seed, cached, eta))


class UnitRun:
    """Asks units, in any order."""

    def __init__(
        self,
        parts: Parts,
        tasks: Sequence[Task],
        methods: Sequence[Method],
        settings: EvalSettings,
        cache: AnswerCache,
    ) -> None:
        """`tasks` are all of them, also those of other parts: unrelated ones are drawn from these."""
        self.parts, self.tasks, self.settings, self.cache = parts, tasks, settings, cache
        self.methods = {m.name: m for m in methods}
        self.jobs: dict[str, TaskJob] = {}

    def ask(self, ask: Ask) -> tuple[Unit, bool]:
        """What one unit comes to, and whether nothing had to be asked for it."""
        task, method, seed = ask
        try:
            n = len(self._job(task).rows)  # before making anything for a task without rows
            treatment = self.methods[method].make(task, seed)
            scores, cached = self._scores(task, treatment, method, seed)
            unrelated, also_cached = self._unrelated(task, treatment, method, seed)
            unit = Unit(task.name, method, seed, n, row_means(scores), unrelated=unrelated, rows=scores)
            return unit, cached and also_cached
        except FAILURES as e:
            return ask.failed(e), False

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

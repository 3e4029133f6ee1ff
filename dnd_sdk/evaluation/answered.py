"""The report of what a run folder holds, without a model: all that was answered so far, by any of its processes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from dnd_sdk.errors import ConfigError, InputError
from dnd_sdk.evaluation.cache import AnswerCache
from dnd_sdk.evaluation.job import asked_rows, row_id
from dnd_sdk.evaluation.methods import parse
from dnd_sdk.evaluation.report import build_report
from dnd_sdk.evaluation.runner import check_plan, scores_of
from dnd_sdk.evaluation.scoring import row_means
from dnd_sdk.evaluation.settings import EvalSettings
from dnd_sdk.evaluation.units import Made, Unit
from dnd_sdk.tasks import Row, Task


def report_answered(tasks: Sequence[Task], methods: Sequence[str], settings: EvalSettings) -> dict[str, Any]:
    """The report that `evaluate` gave, or would give, of the answers in `settings.run_dir`.

    `methods` empty: all that the folder names for these tasks. A unit with rows that were not answered is a failure.
    Raises `ConfigError` without a run folder, for methods that cannot be, and for `unrelated` (not kept as units);
    `InputError` when nothing was answered.
    """
    file = settings.results
    if file is None or settings.unrelated:
        raise ConfigError(
            "a report of what was answered needs the run folder that holds it, and has no unrelated tasks",
            fix="pass --run-dir, without --unrelated",
        )
    tasks = settings.own_tasks(tasks)
    cache = AnswerCache(file if file.exists() else None)
    named = {t.name for t in tasks}
    records = [record for (task, _, _), record in cache.units.items() if task in named and parse(record["method"])]
    if not records:
        raise InputError(f"{settings.run_dir} holds no answers to these tasks", fix="run dnd eval with that --run-dir")
    methods = tuple(methods) or tuple(dict.fromkeys(record["method"] for record in records))
    check_plan(tasks, methods, settings)
    last: dict[str, Any] = next((record for record in reversed(records) if "base" in record), {})
    made = Made(last.get("base", ""), last.get("generator"))
    units = [unit for task in tasks for unit in _units(cache, task, methods, settings)]
    return build_report(made, methods, settings, units)


def _units(cache: AnswerCache, task: Task, methods: Sequence[str], settings: EvalSettings) -> Iterator[Unit]:
    plan = [(m, s) for m in methods for s in _seeds(cache, task, m, settings)]
    try:
        rows = asked_rows(task, settings)
    except InputError as e:
        yield from (Unit(task.name, m, s, 0, None, f"{type(e).__name__}: {e}") for m, s in plan)
        return
    for method, seed in plan:
        yield _unit(cache, task, rows, method, seed)


def _seeds(cache: AnswerCache, task: Task, method: str, settings: EvalSettings) -> list[int]:
    """The seeds answered; the first one in any case, so that what is missing is told."""
    return [s for s in range(settings.seeds) if s == 0 or (task.name, method, s) in cache.units]


def _unit(cache: AnswerCache, task: Task, rows: Sequence[Row], method: str, seed: int) -> Unit:
    record = cache.units.get((task.name, method, seed))
    known = cache.get(record["key"]) if record else {}
    missing = sum(row_id(r) not in known for r in rows)
    if missing:
        return Unit(task.name, method, seed, 0, None, f"{missing} of {len(rows)} rows are not answered yet")
    scores = scores_of(task, rows, known)
    return Unit(task.name, method, seed, len(rows), row_means(scores), rows=scores)

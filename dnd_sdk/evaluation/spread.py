"""An evaluation over workers: each loads the models and asks units, (task, method, seed); answers are written here.

* What a unit comes to depends on what is asked alone, so whoever asks it finds the same: bit by bit where the session
  is `deterministic`, else up to the rounding of what a base has read before.
* Workers read what the run folder holds when they begin and write nothing there but LoRAs that they train.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dnd_sdk.evaluation.cache import AnswerCache, CollectedAnswers
from dnd_sdk.evaluation.methods import build_methods, default_methods, needs_training
from dnd_sdk.evaluation.parts import Parts
from dnd_sdk.evaluation.report import build_report
from dnd_sdk.evaluation.runner import Ask, Teller, UnitRun, check_plan, evaluate, plan_units
from dnd_sdk.evaluation.settings import EvalSettings, Standing
from dnd_sdk.evaluation.trained import TaskTrainer
from dnd_sdk.evaluation.units import Made, Unit
from dnd_sdk.evaluation.zoo import Zoo
from dnd_sdk.protocols import Done, Job, Progress, Work, Workers
from dnd_sdk.tasks import Task

if TYPE_CHECKING:
    from dnd_sdk.session import DnD

PLAN = "the plan"


def evaluate_session(
    dnd: DnD,
    tasks: Sequence[Task],
    methods: Sequence[str],
    settings: EvalSettings,
    progress: Callable[[Standing], None] | None = None,
    *,
    zoo: Path | None = None,
) -> dict[str, Any]:
    """What `dnd eval` does here: `evaluate` with the zoo in a folder, and a trainer where a method needs one.

    `methods` empty: the defaults. Raises as `evaluate` and `Zoo` do.
    """
    methods, stored, trainer = _means(dnd, methods, settings, zoo)
    return evaluate(dnd, tasks, methods, settings, progress, zoo=stored, trainer=trainer)


def evaluate_on(
    workers: Workers,
    load: Mapping[str, Any],
    tasks: Sequence[Task],
    methods: Sequence[str],
    settings: EvalSettings,
    progress: Callable[[Standing], None] | None = None,
    *,
    zoo: Path | None = None,
) -> dict[str, Any]:
    """The report of `evaluate_session`, asked by `workers` that load a session each, with these arguments.

    Raises as `evaluate_session` does. A unit that fails, or whose worker ends again and again, is among the failures.
    """
    if methods:
        check_plan(tasks, methods, settings)  # before anybody loads models
    arguments = {"load": load, "tasks": tasks, "methods": methods, "settings": settings, "zoo": zoo}
    job = Job(open_evaluation, arguments)
    [first] = workers.run(job, [PLAN], _silent)
    if first.error is not None:
        raise first.error
    made, seeded = first.value
    asks = {str(ask): ask for ask in plan_units(tasks, seeded, settings)}
    cache, teller = AnswerCache(settings.results), Teller(len(asks), progress)
    units = {}
    for done in workers.run(job, list(asks), _silent):
        units[done.unit], cached = _settled(done, asks[done.unit], cache)
        teller.tell(units[done.unit], cached)
    return build_report(made, list(seeded), settings, [units[name] for name in asks])


def open_evaluation(
    load: Mapping[str, Any],
    tasks: Sequence[Task],
    methods: Sequence[str],
    settings: EvalSettings,
    zoo: Path | None,
) -> Work:
    """Load a session for the units of an evaluation.

    `PLAN` gives what answers are made with, and of every method whether its seed changes anything; every other unit
    what it comes to, whether it was known, and what is to be noted of it.
    """
    from dnd_sdk.session import DnD

    dnd = DnD.load(**load)
    methods, stored, trainer = _means(dnd, methods, settings, zoo)
    check_plan(tasks, methods, settings)
    parts, cache = Parts.of(dnd), CollectedAnswers(settings.results)
    built = build_methods(methods, parts, tasks, zoo=stored, trainer=trainer, n_prompts=settings.n_prompts)
    seeded = {m.name: m.seeded for m in built}
    asks = {str(ask): ask for ask in plan_units(tasks, seeded, settings)}
    asked = UnitRun(parts, tasks, built, settings, cache)

    def work(unit: str, progress: Progress) -> tuple[Made, dict[str, bool]] | tuple[Unit, bool, list[dict[str, Any]]]:
        if unit == PLAN:
            return parts.made, seeded
        return *asked.ask(asks[unit]), cache.collect()

    return work


def _settled(done: Done, ask: Ask, cache: AnswerCache) -> tuple[Unit, bool]:
    """What the unit came to, and whether it was known; its answers are kept."""
    if done.error is not None:
        return ask.failed(done.error), False
    unit, cached, records = done.value
    for record in records:
        cache.add(record)
    return unit, cached


def _means(
    dnd: DnD, methods: Sequence[str], settings: EvalSettings, zoo: Path | None
) -> tuple[Sequence[str], Zoo | None, TaskTrainer | None]:
    """The methods to run, the zoo in the folder, and what trains; trained LoRAs are kept beside the answers."""
    stored = Zoo(zoo, dnd.layout, dnd.base.fingerprint, dnd.encoder.fingerprint) if zoo else None
    methods = methods or default_methods(stored)
    if not needs_training(methods):
        return methods, stored, None
    kept = settings.run_dir / "trained" if settings.run_dir else None
    return methods, stored, TaskTrainer(dnd, stored.training_settings() if stored else None, kept)


def _silent(*_: object) -> None:
    """Units of an evaluation are told when they end."""

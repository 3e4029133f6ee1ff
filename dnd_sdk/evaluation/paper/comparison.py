"""The comparisons of the paper (arXiv 2506.16406) as one run: leave one data set out, train on the others, score on it.

* `base`; `icl-K`: K answered rows as earlier turns; `constant`: the most frequent answer of the rows asked, always.
* `mean`: the mean of the other sets' LoRAs; `training-loras`: each of them asked, and their scores averaged (the
  paper's row of training LoRAs). Ours start from one shared adapter of the other sets, since the generator needs that.
* `few-shot`, `full-shot`: a LoRA from scratch on a few, or on all, labelled rows of the held-out set.
* `generated`: by a generator that saw the other sets alone, from unlabeled train prompts of the held-out set.
* Two scorers: exact match of the reply in the asked form (the paper's, too, credits one form only), and which label the
  model holds likeliest. A gain in the first alone is form, not knowledge.
* Time to adapt is what comes before the first answer: training, or encoding and generating. What is made once, before
  anybody asks, is 0; `icl-K` pays with every answer instead.
* Mathematics as in the paper: a generator of other word-problem sets, not of the seven. Code likewise, as text.
* Controls (`shuffled`, `zero`, `nearest`, `multitask`) run with `dnd eval` on what a set's folder keeps.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from dnd_sdk.errors import ConfigError, InputError
from dnd_sdk.evaluation.job import TaskJob
from dnd_sdk.evaluation.methods import build_methods
from dnd_sdk.evaluation.paper.training import GENERATOR, OWN, HeldOut, PaperTrainer, Seconds
from dnd_sdk.evaluation.parts import Parts
from dnd_sdk.evaluation.report import build_report
from dnd_sdk.evaluation.runner import FAILURES, run_methods
from dnd_sdk.evaluation.scoring import METRICS, score_answers
from dnd_sdk.evaluation.settings import EvalSettings, Standing
from dnd_sdk.evaluation.treatment import Method, Treatment
from dnd_sdk.evaluation.units import Scores, Unit
from dnd_sdk.tasks import Task, read_tasks, task_names


class Domain(NamedTuple):
    """Data sets that belong together."""

    name: str
    held_out: tuple[str, ...]
    """Left out in turn."""
    trained_on: tuple[str, ...]
    """What the others are taken from; sets with role validation never are."""
    note: str = ""
    """What a reader of its figures must know."""


SEVEN = ("arc_e", "arc_c", "boolq", "obqa", "piqa", "winogrande", "hellaswag")
COMMONSENSE = Domain("commonsense", SEVEN, SEVEN)
TRANSFER = (
    Domain("math", ("svamp", "asdiv"), ("mathqa_choice", "mawps", "svamp", "svamp_operation")),
    Domain(
        "code",
        ("humaneval", "mbpp"),
        ("apps", "conala", "humaneval", "mbpp"),
        "programs are compared as text, none is run: not the paper's pass@k",
    ),
)
DOMAINS = (COMMONSENSE, *TRANSFER)
"""The one table of names, as TASKS has them."""
MIN_SETS = 3
"""Of the seven; with fewer the generator has one other set to learn from."""
MIN_OTHERS = 2

SHOTS = ("icl-3", "icl-16")
FROM_OTHERS = ("mean", "training-loras", "generated")
METHODS = ("constant", "base", "mean", "training-loras", *SHOTS, *OWN, "generated")
UNTIMED = ("constant", "training-loras")
"""No adapter of one set."""
_LORA = "lora "
"""Before the name of a training LoRA that is asked alone."""


def compare(
    tasks_dir: Path,
    trainer: PaperTrainer,
    settings: EvalSettings,
    held_out: Collection[str] | None = None,
    progress: Callable[[Standing], None] | None = None,
) -> dict[str, Any]:
    """Train and score all that the paper compares; the report is what `dnd eval paper --json` prints.

    Args:
        tasks_dir: Tasks folder; the sets are found by their names in `DOMAINS`.
        trainer: With the recipe; its models are loaded here.
        settings: How much is asked; `run_dir` keeps everything, the same call goes on in it.
        held_out: Only these sets are left out; None: all that are there.
        progress: Told about every answered unit; the trainer tells about training.

    Raises before any work `InputError` for sets that are missing and `ConfigError` for a run folder of another run.
    A part that fails is listed under `failures`.
    """
    if settings.run_dir is None:
        raise ConfigError("the paper's comparisons need a run folder", fix="pass --run-dir DIR")
    plan, notes = make_plan(tasks_dir, settings.run_dir, held_out)
    trainer.load()
    for held in (h for sets in plan.values() for h in sets):
        trainer.claim(held)
    run = _Comparison(trainer, settings, progress)
    units = {domain: [u for held in sets for u in run.units(held)] for domain, sets in plan.items()}
    return {**run.report(plan, units), "notes": notes}


def make_plan(
    tasks_dir: Path, run_dir: Path, held_out: Collection[str] | None = None
) -> tuple[dict[str, list[HeldOut]], list[str]]:
    """Per domain the sets to leave out, each with its others, and notes on what is missing; raises `InputError`."""
    present = set(task_names(tasks_dir))
    _check_names(held_out, present, tasks_dir)
    plan: dict[str, list[HeldOut]] = {}
    notes: list[str] = []
    for domain in DOMAINS:
        wanted = [n for n in domain.held_out if held_out is None or n in held_out]
        if not wanted:
            continue
        if domain is COMMONSENSE:
            _check_seven(present, tasks_dir)
        if missing := [n for n in domain.held_out if n not in present]:
            notes.append(f"{domain.name}: not in {tasks_dir}: {', '.join(missing)}")
        sets, few = _leave_out(domain, [n for n in wanted if n in present], present, tasks_dir, run_dir)
        notes += few + ([f"{domain.name}: {domain.note}"] if sets and domain.note else [])
        if sets:
            plan[domain.name] = sets
    if not plan:
        raise InputError(f"no set can be left out: {'; '.join(notes)}", fix="add the sets it names to the tasks folder")
    return plan, notes


def _leave_out(
    domain: Domain, names: Sequence[str], present: Collection[str], tasks_dir: Path, run_dir: Path
) -> tuple[list[HeldOut], list[str]]:
    """Each set with its others, and a note on each that has too few."""
    read = {n for n in domain.trained_on if n in present} | set(names)
    tasks = {t.name: t for t in read_tasks(tasks_dir, names=read)} if names else {}
    sets, notes = [], []
    for name in names:
        sources = [tasks[n] for n in domain.trained_on if n in tasks and n != name]
        others = tuple(t for t in sources if t.role != "validation")
        if len(others) < MIN_OTHERS:
            notes.append(f"{domain.name}: {name} is skipped: {len(others)} other sets to train on, need {MIN_OTHERS}")
        else:
            sets.append(HeldOut(tasks[name], others, run_dir / name))
    return sets, notes


def _check_names(held_out: Collection[str] | None, present: Collection[str], tasks_dir: Path) -> None:
    known = [n for domain in DOMAINS for n in domain.held_out]
    for name in held_out or ():
        if name not in known:
            raise InputError(f"no set named {name!r} to hold out", fix=f"choose from {', '.join(known)}")
        if name not in present:
            raise InputError(f"{tasks_dir} has no set {name!r}", fix=f"add {name}.jsonl or hold out another set")


def _check_seven(present: Collection[str], tasks_dir: Path) -> None:
    found = [n for n in SEVEN if n in present]
    if len(found) < MIN_SETS:
        raise InputError(
            f"{tasks_dir} has {len(found)} of the paper's sets ({', '.join(found) or 'none'}), need {MIN_SETS}",
            fix=f"add NAME.jsonl files for some of {', '.join(n for n in SEVEN if n not in found)}",
        )


class _Comparison:
    """A run under way."""

    def __init__(
        self, trainer: PaperTrainer, settings: EvalSettings, progress: Callable[[Standing], None] | None
    ) -> None:
        self.trainer, self.settings, self.progress = trainer, settings, progress
        self.generators: dict[str, str] = {}
        self.seconds: dict[str, Seconds] = {}
        self.answered: list[tuple[str, str]] = []
        self.loras: dict[str, dict[str, Scores | None]] = {}

    def units(self, held: HeldOut) -> list[Unit]:
        """What every method comes to on one held-out set."""
        name, plain = held.task.name, self.trainer.parts()
        try:
            parts, made = self._from_others(held)
        except FAILURES as e:  # the rest of the set can still be asked
            parts, made = plain, [_broken(n, e) for n in FROM_OTHERS]
        methods = [*build_methods(("base", *SHOTS), plain, [held.task]), *made]
        methods += [Method(n, False, partial(self._own, held, n)) for n in OWN]
        timed = [self._timed(m, held) for m in methods]
        units = run_methods(parts, [held.task], timed, self.settings, self.progress)
        alone = [u for u in units if u.method.startswith(_LORA)]
        self.loras[name] = {u.method.removeprefix(_LORA): u.scores for u in alone}
        self.seconds[name] = Seconds(held.file)
        self.answered += dict.fromkeys((u.method, name) for u in units if u.scores is not None)
        units = [u for u in units if u not in alone] + ([_averaged(alone)] if alone else [])
        return [*self._constant(held.task), *units]

    def _from_others(self, held: HeldOut) -> tuple[Parts, list[Method]]:
        """Parts with the generator of the other sets, and the methods that come from those sets."""
        run = self.trainer.generator(held)
        parts, zoo = self.trainer.parts(run), self.trainer.zoo(run)
        assert parts.generator is not None
        self.generators[held.task.name] = parts.generator.id
        made = build_methods(("mean", "generated"), parts, [held.task], zoo=zoo, n_prompts=self.settings.n_prompts)
        alone = [_fixed(_LORA + t.name, Treatment(zoo.load(t.name))) for t in held.others]
        return parts, [*made, *alone]

    def _own(self, held: HeldOut, name: str, _task: Task, _seed: int) -> Treatment:
        return Treatment(self.trainer.own(held, name))

    def _timed(self, method: Method, held: HeldOut) -> Method:
        """The method, which keeps how long making its adapter took the first time; what trains is timed by the step."""
        if method.name in OWN or method.name.startswith(_LORA):
            return method

        def make(task: Task, seed: int) -> Treatment:
            start = time.monotonic()
            treatment = method.make(task, seed)
            if treatment.flat is not None:
                treatment.flat.cpu()  # waits for an accelerator
            seconds, key = Seconds(held.file), ("make", method.name, seed)
            if key not in seconds.known:
                seconds.put(*key, seconds=time.monotonic() - start)
            return treatment

        return replace(method, make=make)

    def _constant(self, task: Task) -> Iterator[Unit]:
        """The best that one answer to all rows can do, by both scorers; nothing for a task that cannot be asked."""
        try:
            rows = TaskJob.of(task, self.trainer.parts(), self.settings).rows
        except FAILURES:  # told by every method already
            return
        labels = task.labels if task.answer_type == "label" else None
        answer = Counter(r.response for r in rows).most_common(1)[0][0]
        known = labels is not None and answer in labels
        choices = [labels.index(answer)] * len(rows) if labels is not None and known else None
        scores = score_answers(task, rows, [answer] * len(rows), choices)
        yield Unit(task.name, "constant", 0, len(rows), scores)

    def report(self, plan: dict[str, list[HeldOut]], units: dict[str, list[Unit]]) -> dict[str, Any]:
        """The whole result; the seven are its `methods`, other domains stand under `transfer`."""
        parts = self.trainer.parts()
        blocks = {d: build_report(parts.made, METHODS, self.settings, answered) for d, answered in units.items()}
        main = blocks.pop(COMMONSENSE.name, None) or build_report(parts.made, METHODS, self.settings, [])
        others = {h.task.name: [t.name for t in h.others] for sets in plan.values() for h in sets}
        recipe = self.trainer.settings.model_dump(mode="json")
        return {
            **{k: v for k, v in main.items() if k != "failures"},
            "transfer": {d: {"methods": b["methods"], "n_tasks": b["settings"]["n_tasks"]} for d, b in blocks.items()},
            "training_loras": self.loras,
            "generators": {
                n: {"id": made, "training_s": self.seconds[n].total(GENERATOR)} for n, made in self.generators.items()
            },
            "time_s": self._times(),
            "settings": {**main["settings"], "held_out": others, "recipe": recipe},
            "failures": [f for b in (main, *blocks.values()) for f in b["failures"]],
        }

    def _times(self) -> dict[str, Any]:
        """Per method the seconds to adapt by set, their mean, and the share of full-shot's on the same sets."""
        by_set = {m: self._adapt_s(m) for m in METHODS if m not in UNTIMED}
        full = by_set["full-shot"]
        return {m: {"tasks": t, **_time_summary(t, full, list(t))} for m, t in by_set.items()}

    def _adapt_s(self, method: str) -> dict[str, float]:
        """Seconds to adapt to each set, seeds averaged; sets where it failed are absent."""
        times = {}
        for name in (n for m, n in self.answered if m == method):
            kept = self.seconds[name]
            made = [s for key, s in kept.known.items() if key[:2] == ("make", method)]
            times[name] = kept.total(method) if method in OWN else sum(made) / len(made)
        return times


def _fixed(name: str, treatment: Treatment) -> Method:
    return Method(name, False, lambda _task, _seed: treatment)


def _broken(name: str, error: Exception) -> Method:
    """A method that fails with an error met before it could be made."""

    def make(_task: Task, _seed: int) -> Treatment:
        raise error

    return Method(name, False, make)


def _averaged(units: Sequence[Unit]) -> Unit:
    """`training-loras` of one set: the mean of the scores of all its LoRAs, or the first error."""
    first = units[0]
    error = next((f"{u.method}: {u.error}" for u in units if u.error is not None), None)
    if error is not None:  # a mean over some of them would be another figure
        return Unit(first.task, "training-loras", 0, 0, None, error)
    scores: Scores = {}
    for metric in METRICS:
        values = [s for u in units if u.scores is not None and (s := u.scores[metric]) is not None]
        scores[metric] = sum(values) / len(values) if values else None
    return Unit(first.task, "training-loras", 0, first.n, scores)


def render_paper(result: dict[str, Any]) -> str:
    """Markdown: per domain and scorer a table of methods by held-out set in points, with the time to adapt."""
    blocks = {COMMONSENSE.name: result, **result["transfer"]}
    scorers = {"exact_match": "exact match in the asked form", "option_accuracy": "likeliest option"}
    tables = [
        f"{domain}, {title}\n\n{_table(block['methods'], metric, result['time_s'])}"
        for domain, block in blocks.items()
        for metric, title in scorers.items()
        if any(b["mean"][metric] is not None for b in block["methods"].values())
    ]
    trained = [f"{n} {g['training_s']:.0f}" for n, g in result["generators"].items()]
    once = [f"training the generator, once, in seconds: {', '.join(trained)}"] if trained else []
    return "\n\n".join([*tables, *once, *result["notes"]])


def _table(methods: dict[str, Any], metric: str, times: dict[str, Any]) -> str:
    sets = list(dict.fromkeys(name for block in methods.values() for name in block["tasks"]))
    head = ["method", *sets, "mean", "adapt s", "of full-shot"]
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    for method, block in methods.items():
        scores = [block["tasks"].get(name, {}).get(metric) for name in sets]
        cells = ["" if s is None else f"{100 * s:.1f}" for s in (*scores, block["mean"][metric])]
        lines.append(f"| {' | '.join([method, *cells, *_time_cells(method, times, sets)])} |")
    return "\n".join(lines)


def _time_cells(method: str, times: dict[str, Any], sets: Sequence[str]) -> tuple[str, str]:
    if method not in times:
        return "", ""
    summary = _time_summary(times[method]["tasks"], times["full-shot"]["tasks"], sets)
    mean, share = summary["mean"], summary["of_full_shot"]
    return "" if mean is None else f"{mean:.2f}", "" if share is None else f"{share:.2g}"


def _time_summary(times: dict[str, float], full: dict[str, float], sets: Sequence[str]) -> dict[str, float | None]:
    """The mean over `sets`, and the share of full-shot's seconds over those that both have."""
    own, both = [times[n] for n in sets if n in times], [n for n in sets if n in times and full.get(n)]
    return {
        "mean": sum(own) / len(own) if own else None,
        "of_full_shot": sum(times[n] for n in both) / sum(full[n] for n in both) if both else None,
    }

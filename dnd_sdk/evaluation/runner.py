"""Runs methods over tasks: answers cached by content, one bad task loses no other.

* The unit of work is (task, method, seed). Its cache key is made of what decides the answer: the rows, the labels, the
  base, the LoRA's own bytes, the system text, the token limit; not of the method's name.
* All methods of a task run before the next task, so a partial run compares methods on the same tasks.
"""

from __future__ import annotations

import hashlib
import json
import logging
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dnd_sdk.config import SamplingOptions
from dnd_sdk.errors import ConfigError, DndError, InputError
from dnd_sdk.evaluation.cache import AnswerCache, Answers
from dnd_sdk.evaluation.methods import MAX_PROMPTS, Method, Treatment, build_methods
from dnd_sdk.evaluation.parts import AdapterZoo, Messages, Parts
from dnd_sdk.evaluation.report import Unit, build_report
from dnd_sdk.evaluation.scoring import score_answers
from dnd_sdk.tasks import Row, Task, data_hash

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger(__name__)

METHODS = ("base", "instruction", "generated", "shuffled", "zero", "nearest")
SPARE_TOKENS = 4
"""Tokens an answer may have beyond the longest train response: its end mark and a little slack."""


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
    run_dir: Path | None = None
    """Folder of `results.jsonl`; None keeps nothing."""

    def __post_init__(self) -> None:
        for name in ("limit", "seeds", "n_prompts", "max_new_tokens"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.n_prompts > MAX_PROMPTS:
            raise ConfigError(f"n_prompts must be at most {MAX_PROMPTS}, got {self.n_prompts}")


@dataclass(frozen=True)
class Progress:
    """Where an evaluation stands after one unit."""

    done: int
    total: int
    task: str
    method: str
    seed: int
    cached: bool
    eta_s: float | None
    """Seconds left at the pace of the units that were not cached; None before the first of those."""


def evaluate(
    dnd_or_parts: Any,
    tasks: Sequence[Task],
    methods: Sequence[str] = METHODS,
    settings: EvalSettings | None = None,
    progress: Callable[[Progress], None] | None = None,
    *,
    zoo: AdapterZoo | None = None,
) -> dict[str, Any]:
    """Judge `methods` on `tasks`; the report is the object that `dnd eval --json` prints.

    Args:
        dnd_or_parts: a `DnD` session or `Parts`.
        tasks: what to evaluate; conditioned on their train prompts, scored on their test rows.
        methods: names out of `METHODS`.
        settings: None: the defaults.
        progress: called after every (task, method, seed).
        zoo: the trained adapters `nearest` chooses from.

    Raises `ConfigError` before any work if a method cannot run at all. A task that fails is listed under `failures`.
    """
    parts = dnd_or_parts if isinstance(dnd_or_parts, Parts) else Parts.of(dnd_or_parts)
    settings = settings or EvalSettings()
    if len({t.name for t in tasks}) != len(tasks) or not tasks:
        raise ConfigError("an evaluation needs one or more tasks of different names")
    built = build_methods(methods, parts, tasks, zoo=zoo, n_prompts=settings.n_prompts)
    cache = AnswerCache(settings.run_dir / "results.jsonl" if settings.run_dir else None)
    units = list(_Run(parts, settings, cache, built, progress).units(tasks))
    return build_report(parts, methods, settings, units)


class _Run:
    """One evaluation under way."""

    def __init__(
        self,
        parts: Parts,
        settings: EvalSettings,
        cache: AnswerCache,
        methods: Sequence[Method],
        progress: Callable[[Progress], None] | None,
    ) -> None:
        self.parts, self.settings, self.cache, self.methods, self.report = parts, settings, cache, methods, progress
        self.fresh, self.spent_s = 0, 0.0
        self.job: TaskJob | None = None

    def units(self, tasks: Sequence[Task]) -> Iterator[Unit]:
        plan = [(m, s) for m in self.methods for s in range(self.settings.seeds if m.seeded else 1)]
        total, done = len(tasks) * len(plan), 0
        for task in tasks:
            for method, seed in plan:
                start = time.monotonic()
                unit, cached = self._unit(task, method, seed)
                done += 1
                if not cached:
                    self.fresh, self.spent_s = self.fresh + 1, self.spent_s + time.monotonic() - start
                self._tell(done, total, unit, cached)
                yield unit

    def _unit(self, task: Task, method: Method, seed: int) -> tuple[Unit, bool]:
        try:
            job = self._job(task)
            treatment = method.make(task, seed)
            key = job.key(treatment, self.parts)
            answers = self.cache.get(key)
            cached = answers is not None
            if answers is None:
                answers = job.run(treatment, self.parts)
                self.cache.put(key, answers, task=task.name, method=method.name, seed=seed)
            return Unit(task.name, method.name, seed, len(job.rows), score_answers(task, job.rows, *answers)), cached
        except (DndError, RuntimeError, ValueError) as e:  # whatever this task's rows or adapter bring about
            log.warning("task %s, method %s, seed %d failed: %s", task.name, method.name, seed, e)
            return Unit(task.name, method.name, seed, 0, None, f"{type(e).__name__}: {e}"), False

    def _job(self, task: Task) -> TaskJob:
        if self.job is None or self.job.task is not task:
            self.job = TaskJob.of(task, self.parts, self.settings)
        return self.job

    def _tell(self, done: int, total: int, unit: Unit, cached: bool) -> None:
        if self.report is not None:
            eta = self.spent_s / self.fresh * (total - done) if self.fresh else None
            self.report(Progress(done, total, unit.task, unit.method, unit.seed, cached, eta))


@dataclass(frozen=True)
class TaskJob:
    """The rows of one task that are asked, and how long an answer may be."""

    task: Task
    rows: tuple[Row, ...]
    max_new_tokens: int
    data: str
    """The task's data hash."""

    @classmethod
    def of(cls, task: Task, parts: Parts, settings: EvalSettings) -> TaskJob:
        """Draw the task's rows; the draw depends on the task alone. Raises `InputError` without test rows."""
        if not task.test:
            raise InputError(f"task {task.name!r} has no test rows", fix='add lines with "split": "test"')
        n = min(settings.limit, len(task.test))
        rows = tuple(random.Random(f"rows/{task.name}").sample(task.test, n))
        limit = _longest_response(task, parts.tokenizer, settings.max_new_tokens) + SPARE_TOKENS
        return cls(task, rows, min(settings.max_new_tokens, limit), data_hash(task))

    @property
    def labels(self) -> tuple[str, ...] | None:
        """The options of a label task."""
        return self.task.labels if self.task.answer_type == "label" else None

    def key(self, treatment: Treatment, parts: Parts) -> str:
        """sha256 hex of everything that decides the answers."""
        identity = [
            self.data,
            [[r.prompt, r.system] for r in self.rows],
            self.labels,
            self.max_new_tokens,
            parts.base_fingerprint,
            parts.numerics,
            treatment.system,
            flat_hash(treatment.flat),
        ]
        return hashlib.sha256(json.dumps(identity).encode()).hexdigest()

    def run(self, treatment: Treatment, parts: Parts) -> Answers:
        """Ask every row; the adapter is in the engine only while this runs."""
        if treatment.flat is None:
            return self._ask(None, treatment.system, parts)
        adapter_id = f"eval-{flat_hash(treatment.flat)}"
        parts.engine.load(adapter_id, treatment.flat)
        try:
            return self._ask(adapter_id, treatment.system, parts)
        finally:
            parts.engine.evict(adapter_id)

    def _ask(self, adapter_id: str | None, system: str | None, parts: Parts) -> Answers:
        asked = [_messages(self.task, row, system) for row in self.rows]
        ids = [adapter_id] * len(asked)
        # the engine sorts by length and cuts into batches
        done = parts.engine.complete_batch(asked, ids, SamplingOptions(max_new_tokens=self.max_new_tokens))
        choices = None
        if self.labels is not None:
            choices = parts.engine.option_logprobs(asked, ids, self.labels).argmax(dim=-1).tolist()
        return Answers([d.text for d in done], choices)


def _messages(task: Task, row: Row, system: str | None) -> Messages:
    whole = "\n".join(part for part in (row.system, system) if part)
    return task.messages(row._replace(system=whole or None))


def _longest_response(task: Task, tokenizer: Any, default: int) -> int:
    responses = sorted({r.response for r in task.train})
    if not responses:
        return default
    return max(len(ids) for ids in tokenizer(responses, add_special_tokens=False)["input_ids"])


def flat_hash(flat: Tensor | None) -> str | None:
    """sha256 hex of a flat LoRA vector's bytes; None for the base."""
    return None if flat is None else hashlib.sha256(flat.detach().cpu().contiguous().numpy().tobytes()).hexdigest()

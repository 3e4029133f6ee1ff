"""One task as it is asked: which rows, in which words, with how long an answer."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dnd_sdk.config import SamplingOptions
from dnd_sdk.engine import CompletionRequest
from dnd_sdk.errors import InputError
from dnd_sdk.evaluation.cache import Answer, flat_hash
from dnd_sdk.evaluation.parts import Messages, Parts
from dnd_sdk.evaluation.treatment import Treatment
from dnd_sdk.tasks import Row, Task, bare_task, data_hash

if TYPE_CHECKING:
    from dnd_sdk.evaluation.settings import EvalSettings

SPARE_TOKENS = 4
"""Tokens an answer may have beyond the longest train response: its end mark and a little slack."""
MAX_SHOT_TOKENS = 2048
"""Example turns are added while the whole prompt stays within this, and within the base's context."""


@dataclass(frozen=True)
class TaskJob:
    """The rows of one task that are asked, and how long an answer may be."""

    task: Task
    rows: tuple[Row, ...]
    max_new_tokens: int
    reserved: int
    """Tokens of the context kept for an answer or for the longest label."""
    data: str
    """The task's data hash."""

    @classmethod
    def of(cls, task: Task, parts: Parts, settings: EvalSettings) -> TaskJob:
        """Draw the task's rows; the draw depends on the task alone. Raises `InputError` without test rows."""
        rows = asked_rows(task, settings)
        longest = _longest([r.response for r in task.train], parts.tokenizer, settings.max_new_tokens)
        limit = min(settings.max_new_tokens, longest + SPARE_TOKENS)
        return cls(task, rows, limit, max(limit, _longest(task.labels or (), parts.tokenizer, 0) + 1), data_hash(task))

    @property
    def labels(self) -> tuple[str, ...] | None:
        """The options of a label task."""
        return self.task.labels if self.task.answer_type == "label" else None

    def key(self, treatment: Treatment, parts: Parts) -> str:
        """sha256 hex of everything that decides the answers but the rows: more of them can be asked later."""
        identity: list[Any] = [
            self.data,
            self.labels,
            self.max_new_tokens,
            parts.base_fingerprint,
            parts.numerics,
            treatment.system,
            flat_hash(treatment.flat),
        ]
        if treatment.shots:
            identity.append([[[r.prompt, r.response] for r in treatment.shots], MAX_SHOT_TOKENS])
        return hashlib.sha256(json.dumps(identity).encode()).hexdigest()

    def run(self, treatment: Treatment, parts: Parts, rows: Sequence[Row]) -> list[Answer]:
        """Ask `rows`; the adapter is in the engine only while this runs."""
        if treatment.flat is None:
            return self._ask(None, treatment, parts, rows)
        adapter_id = f"eval-{flat_hash(treatment.flat)}"
        parts.engine.bank.load(adapter_id, treatment.flat)
        try:
            return self._ask(adapter_id, treatment, parts, rows)
        finally:
            parts.engine.bank.evict(adapter_id)

    def _ask(self, adapter_id: str | None, treatment: Treatment, parts: Parts, rows: Sequence[Row]) -> list[Answer]:
        asked = [self._messages(row, treatment, parts) for row in rows]
        options = SamplingOptions(max_new_tokens=self.max_new_tokens)
        # the engine sorts by length and cuts into batches
        done = parts.engine.complete([CompletionRequest(chat, adapter_id, options) for chat in asked])
        choices: list[int | None] = [None] * len(asked)
        if self.labels is not None:
            scores = parts.engine.option_logprobs(asked, [adapter_id] * len(asked), self.labels)
            choices = scores.argmax(dim=-1).tolist()
        return [Answer(d.text, c) for d, c in zip(done, choices, strict=True)]

    def _messages(self, row: Row, treatment: Treatment, parts: Parts) -> Messages:
        """The chat that asks `row`, with as many of the example turns, from the first on, as fit."""
        whole = "\n".join(part for part in (row.system, treatment.system) if part)
        *system, question = self.task.messages(row._replace(system=whole or None))
        for n in range(len(treatment.shots), 0, -1):
            turns = [turn for shot in treatment.shots[:n] for turn in _turns(shot)]
            if self._fits(chat := [*system, *turns, question], parts):
                return chat
        return [*system, question]

    def _fits(self, chat: Messages, parts: Parts) -> bool:
        try:
            return len(parts.engine.prompt_ids(chat, self.reserved)) <= MAX_SHOT_TOKENS
        except InputError:
            return False


def asked_rows(task: Task, settings: EvalSettings) -> tuple[Row, ...]:
    """The test rows that are asked, drawn by the task alone; raises `InputError` without any."""
    test = bare_task(task).test if settings.bare else task.test
    if not test:
        raise InputError(f"task {task.name!r} has no test rows", fix='add lines with "split": "test"')
    return tuple(random.Random(f"rows/{task.name}").sample(test, min(settings.limit, len(test))))


def row_id(row: Row) -> str:
    """Hex digest of what is asked; rows that ask the same have one answer."""
    return hashlib.sha256(json.dumps([row.prompt, row.system]).encode()).hexdigest()[:16]


def _turns(shot: Row) -> Messages:
    return [{"role": "user", "content": shot.prompt}, {"role": "assistant", "content": shot.response}]


def _longest(texts: Any, tokenizer: Any, default: int) -> int:
    """Tokens of the longest text; `default` when there is none."""
    different = sorted(set(texts))
    if not different:
        return default
    return max(len(ids) for ids in tokenizer(different, add_special_tokens=False)["input_ids"])

"""Small stand-ins for engine, encoder and generator: answers depend on the adapter alone, calls are written down."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from dnd_sdk.config import SamplingOptions
from dnd_sdk.engine import CompletionRequest
from dnd_sdk.errors import ConfigError, InputError
from dnd_sdk.evaluation import EvalSettings, Parts, evaluate
from dnd_sdk.tasks.reading import Row, Task

LABELS = ("yes", "no")


def make_task(name: str, *, n: int = 6, answer_type: str = "label", **changes: Any) -> Task:
    """A task whose right answer is always "yes" (or some words) and whose prompts carry its name."""
    said = "yes" if answer_type == "label" else "42" if answer_type == "number" else "some words"
    train = tuple(Row(f"{name} train {i}", said if i else "no", "train") for i in range(n))
    test = tuple(Row(f"{name} test {i} " + "x" * (7 * i % 5), said, "test") for i in range(n))
    fields = {"labels": LABELS if answer_type == "label" else None, "metric": "exact_match", "role": "validation"}
    return Task(
        **{"name": name, "family": "f", "answer_type": answer_type, "licence": "MIT", "train": train}
        | {"test": test}
        | fields
        | changes
    )


@dataclass
class FakeEngine:
    """Says "yes" with a positive adapter, "no" with a negative one, chats on the base; fails on request."""

    resident: dict[str, Tensor] = field(default_factory=dict)
    asked: list[list[dict[str, str]]] = field(default_factory=list)
    batches: list[int] = field(default_factory=list)
    options: list[SamplingOptions] = field(default_factory=list)
    fail_on: str | None = None
    interrupt_after: int | None = None
    context: int = 10_000

    def prompt_ids(self, messages: Sequence[dict[str, str]], n_new: int) -> list[int]:
        """One token per word; the context counts them."""
        words = [0 for m in messages for _ in m["content"].split()]
        if len(words) + n_new > self.context:
            raise InputError("too long")
        return words

    @property
    def bank(self) -> FakeEngine:
        return self

    def load(self, adapter_id: str, flat: Tensor) -> None:
        self.resident[adapter_id] = flat

    def evict(self, adapter_id: str) -> None:
        del self.resident[adapter_id]

    def complete(self, requests: Sequence[CompletionRequest]) -> list[SimpleNamespace]:
        self.batches.append(len(requests))
        self.options.append(requests[0].options)
        if self.interrupt_after is not None and len(self.batches) > self.interrupt_after:
            raise KeyboardInterrupt
        for request in requests:
            self.asked.append(request.chat)
            if self.fail_on and self.fail_on in request.chat[-1]["content"]:
                raise RuntimeError("this row cannot be answered")
        return [SimpleNamespace(text=self._say(r.adapter_id)) for r in requests]

    def _say(self, adapter_id: str | None) -> str:
        if adapter_id is None:
            return "Well, let me think about that."
        return "Yes." if float(self.resident[adapter_id].sum()) > 0 else "no"

    def option_logprobs(
        self, messages_list: Sequence[Any], adapter_ids: Sequence[str | None], options: Sequence[str]
    ) -> Tensor:
        assert tuple(options) == LABELS
        return torch.tensor([[-1.0, -2.0] if len(m[-1]["content"]) % 2 else [-2.0, -1.0] for m in messages_list])


@dataclass
class FakeEncoder:
    """Encodes a prompt as its length; keeps what it saw."""

    seen: list[list[str]] = field(default_factory=list)

    def encode(self, prompts: Sequence[str], *, state_tokens: int = 64, with_states: bool = True) -> SimpleNamespace:
        self.seen.append(list(prompts))
        values = torch.tensor([float(sum(map(ord, p))) for p in prompts])
        return SimpleNamespace(states=values[:, None, None] if with_states else None, pooled=values[:, None])


@dataclass
class FakeGenerator:
    """Sums its states; its mean is negative."""

    id: str = "gen0"
    state_tokens: int = 8

    def generate(self, states: Tensor) -> Tensor:
        return states.flatten().sum().repeat(4)

    def mean(self) -> Tensor:
        return -torch.ones(4)


@dataclass
class FakeCalibration:
    """Calibrates by adding one half; writes down what on."""

    seen: list[tuple[list[str], list[str]]] = field(default_factory=list)

    def calibrate(self, flat: Tensor, prompts: Sequence[str], chats: Sequence[Any]) -> SimpleNamespace:
        self.seen.append((list(prompts), list(chats)))
        return SimpleNamespace(flat=flat + 0.5)


@dataclass
class FakeZoo:
    """Adapters whose weights say which method asked for them."""

    shared: Tensor | None = field(default_factory=lambda: torch.full((4,), 7.0))
    mixable: bool = True

    def nearest(self, pooled: Tensor) -> Tensor:
        return pooled.sum().repeat(4)

    def merge(self, pooled: Tensor, k: int) -> Tensor:
        return pooled.sum().repeat(4) + k

    def mean(self) -> Tensor:
        if not self.mixable:
            raise ConfigError("different A", fix="another zoo")
        return torch.full((4,), 5.0)

    def multitask(self) -> Tensor | None:
        return self.shared


@dataclass
class FakeTrainer:
    """Writes down what it was to train."""

    asked: list[tuple[str, int, Tensor | None, int | None]] = field(default_factory=list)

    def train(self, task: Task, seed: int, start: Tensor | None = None, steps: int | None = None) -> Tensor:
        self.asked.append((task.name, seed, start, steps))
        return torch.full((4,), float(len(self.asked)))


class WordTokenizer:
    """One token per word."""

    def __call__(self, texts: Sequence[str], *, add_special_tokens: bool) -> dict[str, list[list[int]]]:
        assert not add_special_tokens
        return {"input_ids": [[0] * len(t.split()) for t in texts]}


def make_parts(**changes: Any) -> Parts:
    """Parts made of the fakes."""
    fakes = {
        "engine": FakeEngine(),
        "encoder": FakeEncoder(),
        "generator": FakeGenerator(),
        "label_calibration": FakeCalibration(),
    }
    return Parts(**{"tokenizer": WordTokenizer(), "base_name": "tiny", "base_fingerprint": "f" * 64} | fakes | changes)


TASKS = [make_task("alpha"), make_task("beta", answer_type="short-text", metric="rouge_l"), make_task("gamma")]
FIVE = ["base", "instruction", "generated", "shuffled", "zero"]


def run(parts: Parts, methods: list[str] = FIVE, **changes: Any) -> dict[str, Any]:
    """Evaluate `methods` on `TASKS` (or `tasks`), four rows each unless told otherwise."""
    tasks = changes.pop("tasks", TASKS)
    return evaluate(parts, tasks, methods, EvalSettings(**{"limit": 4} | changes))

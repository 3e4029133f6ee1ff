"""The methods an evaluation compares: each turns (task, seed) into LoRA weights and extra system text.

* Nothing here sees a test row: prompts come from the train split, minus any prompt the test split repeats, and
  responses are used only by `instruction`, which is told the task's label set.
* `shuffled` and `zero` are controls: what survives when the generator is shown another task's prompts, or none.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from dnd_sdk.errors import ConfigError, InputError
from dnd_sdk.evaluation.parts import AdapterZoo, Parts
from dnd_sdk.tasks import Task

if TYPE_CHECKING:
    from torch import Tensor

MAX_PROMPTS = 64
"""`generated` sees at most this many prompts of a task."""


class Treatment(NamedTuple):
    """What a method does to the base for one task."""

    flat: Tensor | None
    """Flat LoRA vector; None: the plain base."""
    system: str | None
    """Extra system text; None: none."""


@dataclass(frozen=True)
class Method:
    """A named way to treat a task."""

    name: str
    seeded: bool
    """False: the seed changes nothing, so one run is enough."""
    make: Callable[[Task, int], Treatment]


def build_methods(
    names: Sequence[str],
    parts: Parts,
    tasks: Sequence[Task],
    *,
    zoo: AdapterZoo | None = None,
    n_prompts: int = MAX_PROMPTS,
) -> list[Method]:
    """The named methods over these tasks and parts, in the order given.

    Raises `ConfigError` for an unknown or repeated name and for a method whose parts are missing.
    """
    known: dict[str, Callable[[], Method]] = {
        "base": lambda: Method("base", False, lambda task, seed: Treatment(None, None)),
        "instruction": lambda: Method("instruction", False, lambda task, seed: Treatment(None, instruction(task))),
        "generated": lambda: _generated(parts, n_prompts),
        "shuffled": lambda: _shuffled(parts, tasks, n_prompts),
        "zero": lambda: _zero(parts),
        "nearest": lambda: _nearest(parts, zoo, n_prompts),
    }
    if unknown := [n for n in names if n not in known]:
        raise ConfigError(f"unknown evaluation methods {unknown}", fix=f"choose from {', '.join(known)}")
    if not names or len(set(names)) != len(names):
        raise ConfigError(f"evaluation methods must be one or more different names, got {list(names)}")
    return [known[n]() for n in names]


def instruction(task: Task) -> str:
    """One line that states the answer format, made from the train split alone."""
    if task.answer_type == "label" and task.labels:
        seen = {r.response for r in task.train}
        labels = [x for x in task.labels if x in seen] or list(task.labels)
        return f"Answer with exactly one of: {', '.join(labels)}. Answer only."
    if task.answer_type == "number":
        return "Answer with the number only, no explanation."
    return "Answer with the answer only, no explanation."


def conditioning_prompts(task: Task, seed: int, n: int = MAX_PROMPTS) -> list[str]:
    """At most `n` different train prompts of `task`, drawn by `seed`; never one that is also a test prompt."""
    asked = {r.prompt for r in task.test}
    pool = [p for p in dict.fromkeys(r.prompt for r in task.train) if p not in asked]
    if not pool:
        raise InputError(f"task {task.name!r} has no train prompt outside its test split to condition on")
    return random.Random(f"{seed}/{task.name}").sample(pool, min(n, len(pool)))


def donors(tasks: Sequence[Task], seed: int) -> dict[str, Task]:
    """For each task another one: a seeded derangement (Sattolo's single cycle, which has no fixed point)."""
    rng, cycle = random.Random(seed), sorted(tasks, key=lambda t: t.name)
    order = list(range(len(cycle)))
    for i in range(len(order) - 1, 0, -1):
        j = rng.randrange(i)
        order[i], order[j] = order[j], order[i]
    return {task.name: cycle[order[i]] for i, task in enumerate(cycle)}


def _generated(parts: Parts, n_prompts: int) -> Method:
    generate = _generate_from(parts, "generated")
    make = lambda task, seed: Treatment(generate(conditioning_prompts(task, seed, n_prompts)), None)  # noqa: E731
    return Method("generated", True, make)


def _shuffled(parts: Parts, tasks: Sequence[Task], n_prompts: int) -> Method:
    generate = _generate_from(parts, "shuffled")
    if len(tasks) < 2:
        raise ConfigError("method 'shuffled' needs at least 2 tasks", fix="evaluate more tasks or drop 'shuffled'")

    def make(task: Task, seed: int) -> Treatment:
        donor = donors(tasks, seed)[task.name]
        return Treatment(generate(conditioning_prompts(donor, seed, n_prompts)), None)

    return Method("shuffled", True, make)


def _zero(parts: Parts) -> Method:
    if parts.generator is None:
        raise _no_generator("zero")
    flat = parts.generator.mean()
    return Method("zero", False, lambda task, seed: Treatment(flat, None))


def _nearest(parts: Parts, zoo: AdapterZoo | None, n_prompts: int) -> Method:
    if zoo is None:
        raise ConfigError("method 'nearest' needs a zoo of trained adapters", fix="pass --zoo DIR (see dnd train zoo)")
    if parts.encoder is None:
        raise ConfigError("method 'nearest' needs a text encoder", fix="load a session with its encoder")
    encoder = parts.encoder

    def make(task: Task, seed: int) -> Treatment:
        pooled = encoder.encode(conditioning_prompts(task, seed, n_prompts), with_states=False).pooled
        return Treatment(zoo.nearest(pooled), None)

    return Method("nearest", True, make)


def _generate_from(parts: Parts, method: str) -> Callable[[list[str]], Tensor]:
    generator, encoder = parts.generator, parts.encoder
    if generator is None or encoder is None:
        raise _no_generator(method)

    def generate(prompts: list[str]) -> Tensor:
        states = encoder.encode(prompts, state_tokens=generator.state_tokens).states
        assert states is not None  # with_states is on
        return generator.generate(states)

    return generate


def _no_generator(method: str) -> ConfigError:
    return ConfigError(f"method {method!r} needs a generator", fix="load a session with one, or drop this method")

"""The methods an evaluation compares: each turns (task, seed) into LoRA weights, extra system text or example turns.

* Nothing here sees a test row: prompts and examples come from the train split, minus whatever the test split repeats.
* Responses are seen by `icl-K` (as example turns) and by the trained ones (`oracle`, `polish-K`, `scratch-K`);
  `instruction` is told the task's label set; everything else sees prompts alone.
* `shuffled` and `zero` are controls: what survives when the generator is shown another task's prompts, or none.
* `generated` is what `adapt` makes: the network's adapter, calibrated on the same prompts. `uncalibrated` and
  `uncalibrated-shuffled` are the network alone, `calibrated-zero` is calibration alone, on the adapter made from none.
* `nearest`, `merge-K`, `mean` and `multitask` are what the zoo gives without any generator.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dnd_sdk.errors import ConfigError, InputError
from dnd_sdk.evaluation.parts import AdapterZoo, LoraTrainer, Parts
from dnd_sdk.evaluation.settings import MAX_PROMPTS
from dnd_sdk.evaluation.treatment import Method, Treatment
from dnd_sdk.tasks import Row, Task

if TYPE_CHECKING:
    from torch import Tensor

METHODS = ("base", "instruction", "generated", "shuffled", "zero")
"""What a session alone can run without seeing a response, but for what tells the network and calibration apart."""
TRAINED = ("oracle", "polish", "scratch")
"""Kinds of method that train on the task's own labelled rows."""

_SPELLINGS = (
    "base, instruction, icl-K, generated, shuffled, zero, uncalibrated, uncalibrated-shuffled, calibrated-zero, "
    "nearest, mean, merge-K, multitask, oracle, oracle-STEPS, polish-STEPS, scratch-STEPS"
)
_APART = ("uncalibrated", "uncalibrated-shuffled", "calibrated-zero")
"""The network alone, and calibration alone."""
_PLAIN = (*METHODS, *_APART, "nearest", "mean", "multitask", "oracle")
_NUMBERED = re.compile(r"(icl|merge|oracle|polish|scratch)-([1-9][0-9]{0,5})")


def build_methods(
    names: Sequence[str],
    parts: Parts,
    tasks: Sequence[Task],
    *,
    zoo: AdapterZoo | None = None,
    trainer: LoraTrainer | None = None,
    n_prompts: int = MAX_PROMPTS,
) -> list[Method]:
    """The named methods over these tasks and parts, in the order given.

    Raises `ConfigError` for an unknown or repeated name and for a method whose parts are missing.
    """
    check_names(names)
    return [_Builder(name, parts, tasks, zoo, trainer, n_prompts).build() for name in names]


def check_names(names: Sequence[str]) -> None:
    """Raise `ConfigError` for an unknown or repeated method, and for none at all."""
    if unknown := [n for n in names if parse(n) is None]:
        raise ConfigError(f"unknown evaluation methods {unknown}", fix=f"choose from {_SPELLINGS}")
    if not names or len(set(names)) != len(names):
        raise ConfigError(f"evaluation methods must be one or more different names, got {list(names)}")


def parse(name: str) -> tuple[str, int | None] | None:
    """A method's kind and number: `icl-3` is ("icl", 3), `base` is ("base", None); None if there is no such method."""
    if name in _PLAIN:
        return name, None
    match = _NUMBERED.fullmatch(name)
    return None if match is None else (match[1], int(match[2]))


def default_methods(zoo: AdapterZoo | None) -> tuple[str, ...]:
    """What is run unless methods are named: every kind but `icl-K` and the trained ones, as far as there is a zoo."""
    if zoo is None:
        return METHODS
    shared = () if zoo.multitask() is None else ("multitask",)
    return (*METHODS, "nearest", "mean", "merge-3", *shared)


def needs_training(names: Sequence[str]) -> bool:
    """Whether any of the named methods trains."""
    return any(found is not None and found[0] in TRAINED for found in map(parse, names))


def instruction(task: Task) -> str:
    """One line that states the answer format, made from the train split alone."""
    if task.answer_type == "label" and task.labels:
        seen = {r.response for r in task.train}
        labels = [x for x in task.labels if x in seen] or list(task.labels)
        return f"Answer with exactly one of: {', '.join(labels)}. Answer only."
    if task.answer_type == "number":
        return "Answer with the number only, no explanation."
    return "Answer with the answer only, no explanation."


def unseen_rows(task: Task) -> tuple[Row, ...]:
    """The train rows whose prompt is not also a test prompt; raises `InputError` when there is none."""
    asked = {r.prompt for r in task.test}
    rows = tuple(r for r in task.train if r.prompt not in asked)
    if not rows:
        raise InputError(f"task {task.name!r} has no train prompt outside its test split to condition on")
    return rows


def conditioning_prompts(task: Task, seed: int, n: int = MAX_PROMPTS) -> list[str]:
    """At most `n` different train prompts of `task`, drawn by `seed`; never one that is also a test prompt."""
    pool = list(dict.fromkeys(r.prompt for r in unseen_rows(task)))
    return random.Random(f"{seed}/{task.name}").sample(pool, min(n, len(pool)))


def example_rows(task: Task, seed: int, k: int) -> tuple[Row, ...]:
    """At most `k` train rows of different prompts, drawn by `seed`; a smaller `k` gives the first of them."""
    rows = list({r.prompt: r for r in unseen_rows(task)}.values())
    random.Random(f"{seed}/shots/{task.name}").shuffle(rows)
    return tuple(rows[:k])


def donors(tasks: Sequence[Task], seed: int) -> dict[str, Task]:
    """For each task another one: a seeded derangement (Sattolo's single cycle, which has no fixed point)."""
    rng, cycle = random.Random(seed), sorted(tasks, key=lambda t: t.name)
    order = list(range(len(cycle)))
    for i in range(len(order) - 1, 0, -1):
        j = rng.randrange(i)
        order[i], order[j] = order[j], order[i]
    return {task.name: cycle[order[i]] for i, task in enumerate(cycle)}


@dataclass(frozen=True)
class _Builder:
    """Makes one method; whatever it needs is looked for at once, so that nothing is missed half-way."""

    name: str
    parts: Parts
    tasks: Sequence[Task]
    zoo: AdapterZoo | None
    trainer: LoraTrainer | None
    n_prompts: int

    def build(self) -> Method:
        kind, number = parse(self.name) or ("", None)
        make: Callable[..., Method] = getattr(self, f"_{kind.replace('-', '_')}")
        return make() if number is None else make(number)

    def _base(self) -> Method:
        return self._fixed(Treatment())

    def _instruction(self) -> Method:
        return Method(self.name, False, lambda task, seed: Treatment(system=instruction(task)))

    def _icl(self, k: int) -> Method:
        return Method(self.name, True, lambda task, seed: Treatment(shots=example_rows(task, seed, k)))

    def _generated(self) -> Method:
        adapt = self._adapting()
        return self._flat(lambda task, seed: adapt(self._prompts(task, seed)))

    def _shuffled(self) -> Method:
        adapt, other = self._adapting(), self._other()
        return self._flat(lambda task, seed: adapt(other(task, seed)))

    def _zero(self) -> Method:
        return self._fixed(Treatment(self._unconditioned()))

    def _uncalibrated(self) -> Method:
        generate = self._generator()
        return self._flat(lambda task, seed: generate(self._prompts(task, seed)))

    def _uncalibrated_shuffled(self) -> Method:
        generate, other = self._generator(), self._other()
        return self._flat(lambda task, seed: generate(other(task, seed)))

    def _calibrated_zero(self) -> Method:
        start, calibrate = self._unconditioned(), self._calibration()
        return self._flat(lambda task, seed: calibrate(start, self._prompts(task, seed)))

    def _nearest(self) -> Method:
        zoo, pooled = self._zoo(), self._encoder()
        return self._flat(lambda task, seed: zoo.nearest(pooled(task, seed)))

    def _merge(self, k: int) -> Method:
        zoo, pooled = self._zoo(), self._encoder()
        zoo.mean()  # raises unless the zoo can be averaged
        return self._flat(lambda task, seed: zoo.merge(pooled(task, seed), k))

    def _mean(self) -> Method:
        return self._fixed(Treatment(self._zoo().mean()))

    def _multitask(self) -> Method:
        return self._fixed(Treatment(self._shared()))

    def _oracle(self, steps: int | None = None) -> Method:
        train, start = self._training(), self._shared()
        return self._flat(lambda task, seed: train(task, seed, start, steps))

    def _polish(self, steps: int) -> Method:
        train, adapt = self._training(), self._adapting()
        return self._flat(lambda task, seed: train(task, seed, adapt(self._prompts(task, seed)), steps))

    def _scratch(self, steps: int) -> Method:
        train = self._training()
        return self._flat(lambda task, seed: train(task, seed, None, steps))

    def _fixed(self, treatment: Treatment) -> Method:
        return Method(self.name, False, lambda task, seed: treatment)

    def _flat(self, make: Callable[[Task, int], Tensor]) -> Method:
        return Method(self.name, True, lambda task, seed: Treatment(make(task, seed)))

    def _prompts(self, task: Task, seed: int) -> list[str]:
        return conditioning_prompts(task, seed, self.n_prompts)

    def _generator(self) -> Callable[[list[str]], Tensor]:
        generator, encoder = self.parts.generator, self.parts.encoder
        if generator is None or encoder is None:
            raise self._missing("a generator", "load a session with one, or drop this method")

        def generate(prompts: list[str]) -> Tensor:
            states = encoder.encode(prompts, state_tokens=generator.state_tokens).states
            assert states is not None  # with_states is on
            return generator.generate(states)

        return generate

    def _adapting(self) -> Callable[[list[str]], Tensor]:
        """Prompts to what `adapt` makes of them."""
        generate, calibrate = self._generator(), self._calibration()
        return lambda prompts: calibrate(generate(prompts), prompts)

    def _other(self) -> Callable[[Task, int], list[str]]:
        """Another task's prompts."""
        if len(self.tasks) < 2:
            raise self._missing("at least 2 tasks", f"evaluate more tasks or drop {self.name!r}")
        return lambda task, seed: self._prompts(donors(self.tasks, seed)[task.name], seed)

    def _unconditioned(self) -> Tensor:
        if self.parts.generator is None:
            raise self._missing("a generator", "load a session with one, or drop this method")
        return self.parts.generator.mean()

    def _calibration(self) -> Callable[[Tensor, list[str]], Tensor]:
        calibration = self.parts.label_calibration
        if calibration is None:
            raise self._missing("a base to calibrate on", "load a session")
        return lambda flat, prompts: calibration.calibrate(flat, prompts, prompts).flat

    def _encoder(self) -> Callable[[Task, int], Tensor]:
        encoder = self.parts.encoder
        if encoder is None:
            raise self._missing("a text encoder", "load a session with its encoder")
        return lambda task, seed: encoder.encode(self._prompts(task, seed), with_states=False).pooled

    def _zoo(self) -> AdapterZoo:
        if self.zoo is None:
            raise self._missing("a zoo of trained adapters", "pass --zoo RUN, the folder of dnd train generator")
        return self.zoo

    def _shared(self) -> Tensor:
        shared = self._zoo().multitask()
        if shared is None:
            raise self._missing(
                "the zoo's multi-task LoRA", "copy shared.safetensors from the run folder of dnd train zoo into --zoo"
            )
        return shared

    def _training(self) -> Callable[[Task, int, Tensor | None, int | None], Tensor]:
        if self.trainer is None:
            raise self._missing("a trainer", "pass trainer=TaskTrainer(dnd)")
        return self.trainer.train

    def _missing(self, what: str, fix: str) -> ConfigError:
        return ConfigError(f"method {self.name!r} needs {what}", fix=fix)

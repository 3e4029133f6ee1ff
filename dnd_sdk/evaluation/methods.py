"""The methods an evaluation compares: each turns (task, seed) into LoRA weights, extra system text or example turns.

* `KINDS` is the one table: how each is spelled, what it needs, how it is made. Names, help and checks come from it.
* Nothing here sees a test row: prompts and examples come from the train split, minus whatever the test split repeats.
* Responses are seen by `icl-K` (as example turns) and by the trained ones (`oracle`, `polish-K`, `scratch-K`);
  `instruction` is told the task's label set; everything else sees prompts alone.
* `shuffled` and `zero` are controls: what survives when the generator is shown another task's prompts, or none.
* `generated` is what `adapt` makes: the network's adapter, calibrated on the same prompts. `uncalibrated` and
  `uncalibrated-shuffled` are the network alone, `calibrated-zero` is calibration alone, on the adapter made from none.
* `nearest`, `merge-K`, `mean` and `multitask` are what the zoo gives without any generator.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from dnd_sdk.errors import ConfigError
from dnd_sdk.evaluation.drawing import conditioning_prompts, donors, example_rows, instruction
from dnd_sdk.evaluation.parts import AdapterZoo, LoraTrainer, Parts
from dnd_sdk.evaluation.settings import MAX_PROMPTS
from dnd_sdk.evaluation.treatment import Method, Treatment
from dnd_sdk.tasks import Task

if TYPE_CHECKING:
    from torch import Tensor

_T = TypeVar("_T")
_NAME = re.compile(r"([a-z]+)-([1-9][0-9]{0,5})")


@dataclass(frozen=True)
class Means:
    """What methods are made with. A kind's needs say what of it must be there; the rest is not looked at."""

    parts: Parts
    tasks: Sequence[Task]
    zoo: AdapterZoo | None
    trainer: LoraTrainer | None
    n_prompts: int

    def prompts(self, task: Task, seed: int) -> list[str]:
        """The task's own."""
        return conditioning_prompts(task, seed, self.n_prompts)

    def other_prompts(self, task: Task, seed: int) -> list[str]:
        """Another task's."""
        return self.prompts(donors(self.tasks, seed)[task.name], seed)

    def pooled(self, task: Task, seed: int) -> Tensor:
        """The vectors (n, C) of the task's own prompts."""
        pooled: Tensor = _there(self.parts.encoder).encode(self.prompts(task, seed), with_states=False).pooled
        return pooled

    def generate(self, prompts: list[str]) -> Tensor:
        """The network's adapter (P,)."""
        generator, encoder = _there(self.parts.generator), _there(self.parts.encoder)
        return generator.generate(encoder.encode(prompts, state_tokens=generator.state_tokens).states)

    def unconditioned(self) -> Tensor:
        """The network's adapter (P,) for no prompts."""
        return _there(self.parts.generator).mean()

    def calibrate(self, flat: Tensor, prompts: list[str]) -> Tensor:
        """The adapter (P,) calibrated on these prompts."""
        calibrated: Tensor = _there(self.parts.label_calibration).calibrate(flat, prompts, prompts).flat
        return calibrated

    def adapt(self, prompts: list[str]) -> Tensor:
        """What `adapt` makes (P,) of prompts."""
        return self.calibrate(self.generate(prompts), prompts)

    def shared(self) -> Tensor:
        """The zoo's multi-task LoRA (P,)."""
        return _there(_there(self.zoo).multitask())

    def train(self, task: Task, seed: int, start: Tensor | None, steps: int | None) -> Tensor:
        """Trained on the task's own rows (P,)."""
        return _there(self.trainer).train(task, seed, start, steps)


class Need(NamedTuple):
    """Something a kind of method cannot be made without."""

    what: str
    fix: str
    is_met: Callable[[Means], bool]


OTHER_TASKS = Need("at least 2 tasks", "evaluate more tasks, or drop this method", lambda m: len(m.tasks) > 1)
GENERATOR = Need("a generator", "load a session with one, or drop this method", lambda m: m.parts.generator is not None)
ENCODER = Need("a text encoder", "load a session with its encoder", lambda m: m.parts.encoder is not None)
CALIBRATION = Need("a base to calibrate on", "load a session", lambda m: m.parts.label_calibration is not None)
ZOO = Need(
    "a zoo of trained adapters", "pass --zoo RUN, the folder of dnd train generator", lambda m: m.zoo is not None
)
SHARED = Need(
    "the zoo's multi-task LoRA",
    "copy shared.safetensors from the run folder of dnd train zoo into --zoo",
    lambda m: _there(m.zoo).multitask() is not None,
)
TRAINER = Need("a trainer", "pass trainer=TaskTrainer(dnd)", lambda m: m.trainer is not None)

_NETWORK = (GENERATOR, ENCODER)
_ADAPTING = (*_NETWORK, CALIBRATION)

Make = Callable[[Task, int], Treatment]


@dataclass(frozen=True)
class Kind:
    """A row of the table: one method, or one for every number."""

    make: Callable[[Means, int | None], Make]
    """Looks for whatever the methods need at once, so that nothing is missed half-way."""
    needs: tuple[Need, ...] = ()
    """In the order they are asked for."""
    seeded: bool = True
    """False: the seed changes nothing."""
    number: str | None = None
    """What the number behind the name means; None: there is none."""
    plain: bool = True
    """Whether the name stands without a number."""
    default: str | None = None
    """The method that is run unless methods are named; None: none of this kind."""

    def spellings(self, name: str) -> list[str]:
        """As help shows them."""
        return [*([name] if self.plain else []), *([f"{name}-{self.number}"] if self.number else [])]


def _fixed(treatment: Treatment) -> Make:
    return lambda task, seed: treatment


def _flat(make: Callable[[Task, int], Tensor]) -> Make:
    return lambda task, seed: Treatment(make(task, seed))


def _calibrated_zero(means: Means, _: int | None) -> Make:
    start = means.unconditioned()
    return _flat(lambda task, seed: means.calibrate(start, means.prompts(task, seed)))


def _merge(means: Means, k: int | None) -> Make:
    zoo = _there(means.zoo)
    zoo.mean()  # raises unless the zoo can be averaged
    return _flat(lambda task, seed: zoo.merge(means.pooled(task, seed), _there(k)))


def _oracle(means: Means, steps: int | None) -> Make:
    start = means.shared()
    return _flat(lambda task, seed: means.train(task, seed, start, steps))


KINDS: dict[str, Kind] = {
    "base": Kind(lambda m, _: _fixed(Treatment()), seeded=False, default="base"),
    "instruction": Kind(
        lambda m, _: lambda task, seed: Treatment(system=instruction(task)), seeded=False, default="instruction"
    ),
    "icl": Kind(
        lambda m, k: lambda task, seed: Treatment(shots=example_rows(task, seed, _there(k))), number="K", plain=False
    ),
    "generated": Kind(
        lambda m, _: _flat(lambda task, seed: m.adapt(m.prompts(task, seed))), _ADAPTING, default="generated"
    ),
    "shuffled": Kind(
        lambda m, _: _flat(lambda task, seed: m.adapt(m.other_prompts(task, seed))),
        (*_ADAPTING, OTHER_TASKS),
        default="shuffled",
    ),
    "zero": Kind(lambda m, _: _fixed(Treatment(m.unconditioned())), (GENERATOR,), seeded=False, default="zero"),
    "uncalibrated": Kind(lambda m, _: _flat(lambda task, seed: m.generate(m.prompts(task, seed))), _NETWORK),
    "uncalibrated-shuffled": Kind(
        lambda m, _: _flat(lambda task, seed: m.generate(m.other_prompts(task, seed))), (*_NETWORK, OTHER_TASKS)
    ),
    "calibrated-zero": Kind(_calibrated_zero, (GENERATOR, CALIBRATION)),
    "nearest": Kind(
        lambda m, _: _flat(lambda task, seed: _there(m.zoo).nearest(m.pooled(task, seed))),
        (ZOO, ENCODER),
        default="nearest",
    ),
    "mean": Kind(lambda m, _: _fixed(Treatment(_there(m.zoo).mean())), (ZOO,), seeded=False, default="mean"),
    "merge": Kind(_merge, (ZOO, ENCODER), number="K", plain=False, default="merge-3"),
    "multitask": Kind(lambda m, _: _fixed(Treatment(m.shared())), (ZOO, SHARED), seeded=False, default="multitask"),
    "oracle": Kind(_oracle, (TRAINER, ZOO, SHARED), number="STEPS"),
    "polish": Kind(
        lambda m, steps: _flat(lambda task, seed: m.train(task, seed, m.adapt(m.prompts(task, seed)), steps)),
        (TRAINER, *_ADAPTING),
        number="STEPS",
        plain=False,
    ),
    "scratch": Kind(
        lambda m, steps: _flat(lambda task, seed: m.train(task, seed, None, steps)),
        (TRAINER,),
        number="STEPS",
        plain=False,
    ),
}
"""Every kind of method, by its name."""


def _spelled(*, zoo: bool = False, trained: bool = False) -> str:
    """The kinds that a session alone can run, those that a zoo gives, or those that are trained here."""
    rows = (
        (name, kind)
        for name, kind in KINDS.items()
        if (TRAINER in kind.needs) == trained and (trained or (ZOO in kind.needs) == zoo)
    )
    return ", ".join(spelling for name, kind in rows for spelling in kind.spellings(name))


METHODS = tuple(k.default for k in KINDS.values() if k.default and ZOO not in k.needs)
"""What a session alone runs unless methods are named."""
_OF_ZOO = tuple(k.default for k in KINDS.values() if k.default and ZOO in k.needs)
"""What is run beside them where there is a zoo."""
METHODS_HELP = (
    f"Comma separated: {_spelled()}; with --zoo also {_spelled(zoo=True)}; trained here: {_spelled(trained=True)}. "
    f"Without it {', '.join(METHODS)}; with --zoo also {', '.join(_OF_ZOO)}."
)


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
    means = Means(parts, tasks, zoo, trainer, n_prompts)
    return [_build(name, means) for name in names]


def _build(name: str, means: Means) -> Method:
    kind_name, number = _there(parse(name))
    kind = KINDS[kind_name]
    for need in kind.needs:
        if not need.is_met(means):
            raise ConfigError(f"method {name!r} needs {need.what}", fix=need.fix)
    return Method(name, kind.seeded, kind.make(means, number))


def check_names(names: Sequence[str]) -> None:
    """Raise `ConfigError` for an unknown or repeated method, and for none at all."""
    if unknown := [n for n in names if parse(n) is None]:
        spellings = ", ".join(spelling for name, kind in KINDS.items() for spelling in kind.spellings(name))
        raise ConfigError(f"unknown evaluation methods {unknown}", fix=f"choose from {spellings}")
    if not names or len(set(names)) != len(names):
        raise ConfigError(f"evaluation methods must be one or more different names, got {list(names)}")


def parse(name: str) -> tuple[str, int | None] | None:
    """A method's kind and number: `icl-3` is ("icl", 3), `base` is ("base", None); None if there is no such method."""
    if name in KINDS and KINDS[name].plain:
        return name, None
    match = _NAME.fullmatch(name)
    numbered = match is not None and match[1] in KINDS and KINDS[match[1]].number is not None
    return (match[1], int(match[2])) if match is not None and numbered else None


def default_methods(zoo: AdapterZoo | None) -> tuple[str, ...]:
    """What is run unless methods are named: the defaults of a session, and of the zoo as far as there is one."""
    if zoo is None:
        return METHODS
    has_shared = zoo.multitask() is not None
    return (*METHODS, *(n for n in _OF_ZOO if has_shared or SHARED not in KINDS[_there(parse(n))[0]].needs))


def needs_training(names: Sequence[str]) -> bool:
    """Whether any of the named methods trains."""
    return any(kind is not None and TRAINER in KINDS[kind[0]].needs for kind in map(parse, names))


def _there(thing: _T | None) -> _T:
    """What a kind's needs have found there."""
    assert thing is not None
    return thing

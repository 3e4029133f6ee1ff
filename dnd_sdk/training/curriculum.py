"""Which tasks are trained on, which are kept out, and what of them a step sees.

Every draw comes from the seed, the step and the names alone, so that a resumed run sees what a straight one does.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from transformers import PreTrainedTokenizerBase

from dnd_sdk.errors import ConfigError
from dnd_sdk.tasks import Task
from dnd_sdk.training.augment import VIEWS, with_views
from dnd_sdk.training.batches import TokenRow, TokenTask, tokenise_task
from dnd_sdk.training.settings import TrainSettings


@dataclass(frozen=True)
class Curriculum:
    """Tasks and their rows as tokens, each under its name."""

    sources: dict[str, Task]
    """All of them: prompts for conditions are drawn from these."""
    tasks: dict[str, TokenTask]
    """Those trained on."""
    seed: int
    held: dict[str, TokenTask] = field(default_factory=dict)
    """Those kept out of training."""
    bare: dict[str, TokenTask] = field(default_factory=dict)
    """All of them, asked without what their prompts share; empty where no stage asks so."""
    families: dict[str, str] | None = None
    """Family of every task where a pass goes over families; None where it goes over tasks."""

    @classmethod
    def of(cls, tasks: dict[str, Task], tokenizer: PreTrainedTokenizerBase, settings: TrainSettings) -> Curriculum:
        """Hold out, add views and tokenise as `settings` say; `ConfigError` when nothing is left to train on."""
        data, seed = settings.data, settings.run.seed
        if data.held_out >= len(tasks):
            raise ConfigError(
                f"data.held_out is {data.held_out}, and there are only {len(tasks)} tasks",
                fix="hold out fewer, or bring more tasks",
            )
        held = held_out(_families(tasks), data.held_out, seed)
        sources = with_views(tasks, data.views, but=held)  # a view of a task held out would give it away

        def tokenise(task: Task) -> TokenTask:
            return tokenise_task(task, tokenizer, max_tokens=data.max_tokens, max_rows=data.max_rows, seed=seed)

        tokens = {name: tokenise(task) for name, task in sources.items()}
        asks_bare = any(stage.bare for stage in settings.stages)
        return cls(
            sources=sources,
            tasks={name: task for name, task in tokens.items() if name not in held},
            seed=seed,
            held={name: tokens[name] for name in held},
            bare={name: tokenise(VIEWS["bare"](task)) for name, task in sources.items() if asks_bare},
            families=_families(sources) if data.balance == "family" else None,
        )

    def sample(self, names: Sequence[str], n: int, step: int) -> list[str]:
        """At most `n` of `names` for a step, balanced as the settings say."""
        return sample_tasks(names, n, step, self.seed, self.families)

    def rows(self, name: str, n: int, step: int, bare: float = 0.0) -> list[TokenRow]:
        """`n` rows of a task for a step, about a share of `bare` of them without the task's shared wording."""
        rng = random.Random(f"{self.seed}/bare/{name}/{step}")
        n_bare = sum(rng.random() < bare for _ in range(n))
        whole = (self.tasks if name in self.tasks else self.held)[name]
        rows = sample_rows(whole, n - n_bare, step, self.seed)
        return rows + (sample_rows(self.bare[name], n_bare, step, self.seed) if n_bare else [])


def _families(tasks: Mapping[str, Task]) -> dict[str, str]:
    return {name: task.family for name, task in tasks.items()}


def sample_tasks(
    names: Sequence[str], n: int, step: int, seed: int, families: Mapping[str, str] | None = None
) -> list[str]:
    """At most `n` different tasks for a step, in passes over a fresh shuffle.

    Without `families` every task comes once per pass; with them (task to family) one task of every family does, the
    next one in the next pass.
    """
    size = len({families[name] for name in names}) if families else len(names)
    per_pass = max(1, size // n)
    number, at = divmod(step, per_pass)
    chosen = _one_per_family(names, families, number, seed) if families else list(names)
    random.Random(f"{seed}/pass/{number}").shuffle(chosen)
    return chosen[at * n : (at + 1) * n]


def _one_per_family(names: Sequence[str], families: Mapping[str, str], number: int, seed: int) -> list[str]:
    members: dict[str, list[str]] = {}
    for name in sorted(names):
        members.setdefault(families[name], []).append(name)
    for family, group in members.items():
        random.Random(f"{seed}/family/{family}").shuffle(group)
    return [group[number % len(group)] for group in members.values()]


def held_out(families: Mapping[str, str], n: int, seed: int) -> list[str]:
    """`n` tasks to keep out of training: random ones, each of another family as far as there are families."""
    order: list[str] = []
    for number in range(len(families)):
        one_each = _one_per_family([*families], families, number, seed)
        random.Random(f"{seed}/held out/{number}").shuffle(one_each)
        order += [name for name in one_each if name not in order]
    return order[:n]


def sample_rows(task: TokenTask, n: int, step: int, seed: int) -> list[TokenRow]:
    """`n` rows of a task for a step."""
    rng = random.Random(f"{seed}/rows/{task.name}/{step}")
    return rng.sample(task.rows, n) if n <= len(task.rows) else rng.choices(task.rows, k=n)

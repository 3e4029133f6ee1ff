"""What a stage of training brings a generator to do: one class an objective, found by its name in `OBJECTIVES`.

* Reconstruction (the paper's): masked MSE between the decoder's tokens and those of a random snapshot of the task,
  weighted per token by how much tasks differ there; pairs are random, conditions are drawn afresh every step.
* End-to-end: cross-entropy of the frozen base on task rows with the generated LoRA applied per row.
* The zeroed condition is trained as one more pair (the zero residual), because adapters are differences to it.
"""

from __future__ import annotations

import math
import random
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from dnd_sdk.generator import Generator, WeightTokenizer
from dnd_sdk.training.batches import TokenRow
from dnd_sdk.training.conditions import Pools
from dnd_sdk.training.parts import TrainingParts
from dnd_sdk.training.settings import ObjectiveName, Stage


@dataclass(frozen=True)
class Lesson:
    """What a step of any stage draws from."""

    parts: TrainingParts
    pools: Pools
    zoo: dict[str, Tensor]
    """Per task its snapshots (k, P)."""
    importance: Tensor
    """(P,) std over tasks of every weight."""

    @property
    def names(self) -> list[str]:
        """Tasks that have both rows and snapshots."""
        return sorted(self.zoo.keys() & self.parts.curriculum.tasks.keys())


class Objective(ABC):
    """One stage's way of teaching a generator."""

    is_checked: ClassVar[bool]
    """Whether its steps ask the base about rows: then those of held-out tasks can judge it, and a step is worth timing
    (`dnd bench train`)."""

    def __init__(self, generator: Generator, lesson: Lesson, stage: Stage) -> None:
        """Nothing of `generator` changes before its first step."""
        self.generator, self.lesson, self.stage = generator, lesson, stage
        self.base, self.curriculum = lesson.parts.base, lesson.parts.curriculum

    @property
    @abstractmethod
    def first_gain(self) -> float:
        """Where the learned scale of what the decoder adds begins, if no other stage has moved it from zero."""

    @abstractmethod
    def trainable(self) -> list[Tensor]:
        """The parameters that its steps move; the others are frozen here."""

    @abstractmethod
    def step(self, number: int) -> float:
        """Add up the gradient of the step of that number; returns its loss."""

    def _sample(self, step: int) -> list[str]:
        return self.curriculum.sample(self.lesson.names, self.stage.tasks, step)

    def _conditions(self, names: list[str], step: int) -> Tensor:
        """A fresh condition (len(names), N, L, C) of every task, on the generator's device."""
        seed, n = self.curriculum.seed, self.generator.config.n_prompts
        x = torch.stack([self.lesson.pools.draw(name, n, step, seed) for name in names])
        return _noisy(x.to(self.generator.shared.device), self.stage.condition_noise)


class Reconstruction(Objective):
    """The decoder's tokens become those of the zoo's snapshots; the base is not asked."""

    is_checked = False

    def __init__(self, generator: Generator, lesson: Lesson, stage: Stage) -> None:
        """Weigh the tokens by how much the tasks of `lesson` differ in them."""
        super().__init__(generator, lesson, stage)
        tokens = generator.weight_tokenizer
        self._weights = token_weights(tokens, lesson.importance).to(generator.shared.device)  # (T, 1, 1)

    @property
    def first_gain(self) -> float:
        """1: the decoder gives the whole of what a snapshot has beyond the shared adapter."""
        return 1.0

    def trainable(self) -> list[Tensor]:
        """The decoder alone."""
        return _unfrozen(self.generator, gain=False, shared=False)

    def step(self, number: int) -> float:
        """One random snapshot of every sampled task, and the zero residual under the zeroed condition."""
        names, tokens = self._sample(number), self.generator.weight_tokenizer
        shared, seed = self.generator.shared.detach(), self.curriculum.seed
        picks = [random.Random(f"{seed}/snapshot/{n}/{number}").choice(self.lesson.zoo[n]) for n in names]
        # (S + 1, P), the last one the zero residual
        residuals = torch.stack([*(p.to(shared.device) - shared for p in picks), torch.zeros_like(shared)])
        target = tokens.tokenise(residuals)  # (S + 1, T, H, W)
        x = self._conditions(names, number)
        made = self.generator.decoder(torch.cat([x, torch.zeros_like(x[:1])]))
        loss = masked_mse(made, _noisy(target, self.stage.target_noise), self._weights)
        loss.backward()
        return loss.item()


class EndToEnd(Objective):
    """The base answers task rows better under what is generated."""

    is_checked = True

    @property
    def first_gain(self) -> float:
        """What the stage says."""
        return self.stage.first_gain

    def trainable(self) -> list[Tensor]:
        """The decoder, its scale and, where the stage says so, the shared adapter."""
        return _unfrozen(self.generator, gain=True, shared=self.stage.train_shared)

    def step(self, number: int) -> float:
        """Some rows of every sampled task, under the adapter made from a condition of that task."""
        names = self._sample(number)
        with self.base.half():
            adapters = self.generator(self._conditions(names, number))  # (S, P)
        rows: list[tuple[TokenRow, int]] = []
        for i, name in enumerate(names):
            rows += [(row, i) for row in self.curriculum.rows(name, self.stage.rows, number, self.stage.bare)]
        return self.base.backward(adapters, rows)


OBJECTIVES: dict[ObjectiveName, type[Objective]] = {"reconstruction": Reconstruction, "end-to-end": EndToEnd}
"""By the name that a stage gives."""


def token_weights(tokenizer: WeightTokenizer, importance: Tensor) -> Tensor:
    """(T, 1, 1) weights of mean 1: how much tasks differ in each token's weights."""
    cells = torch.where(tokenizer.used, importance[tokenizer.cells.clamp(min=0)], 0.0)
    per_token = cells.sum((1, 2)) / tokenizer.used.sum((1, 2))
    mean = float(per_token.mean())
    per_token = per_token / mean if mean > 0 and math.isfinite(mean) else torch.ones_like(per_token)
    return per_token[:, None, None]


def masked_mse(tokens: Tensor, target: Tensor, weights: Tensor) -> Tensor:
    """Mean of `weights * (tokens - target)^2` over the cells whose target is not NaN."""
    used = ~target.isnan()
    error = torch.where(used, tokens - target, 0.0).square() * weights
    return error.sum() / used.sum()


def _unfrozen(generator: Generator, *, gain: bool, shared: bool) -> list[Tensor]:
    """The decoder's parameters, with the scale and the shared adapter as asked for; the rest is frozen."""
    generator.requires_grad_(True)
    generator.gain.requires_grad_(gain)
    generator.shared.requires_grad_(shared)
    return [p for p in generator.parameters() if p.requires_grad]


def _noisy(x: Tensor, scale: float) -> Tensor:
    return x + scale * torch.randn_like(x)

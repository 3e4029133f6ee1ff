"""Judges a generator on tasks kept out of training while it trains, and keeps the best one.

* The loss of the held-out tasks' rows under the adapter made from their own prompts, from another task's, and from
  none: `held` falls when training generalises; `held` below `held_shuffled` means that the condition is used.
* Rows and conditions are the same at every check, so that its figures differ by the generator alone.
* The best generator so far is a file of the stage's folder. A resumed stage reads its earlier checks from the curve.
"""

from __future__ import annotations

import torch
from safetensors.torch import load_file
from torch import Tensor

from dnd_sdk.generator import Generator
from dnd_sdk.training.batches import TokenRow
from dnd_sdk.training.conditions import Pools
from dnd_sdk.training.parts import TrainingParts
from dnd_sdk.training.run_dir import RunDir, write_tensors
from dnd_sdk.training.settings import CheckSettings

_BEST = "best.safetensors"
_STEP = 0
"""Conditions and rows are those of this step, at every check."""


class Check:
    """The held-out tasks of one stage; without any it does nothing."""

    def __init__(
        self, parts: TrainingParts, pools: Pools, settings: CheckSettings, run: RunDir, bare: float = 0.0
    ) -> None:
        """Read what earlier checks of a resumed stage found; `run` has been loaded (its curve cut) before.

        `bare` is the stage's share of rows without their task's shared wording: it is judged as it is trained.
        """
        self._base, self._curriculum = parts.base, parts.curriculum
        self._pools, self._settings, self._run, self._bare = pools, settings, run, bare
        self._names = sorted(self._curriculum.held)
        self._losses = [line["held"] for line in run.read_losses(run.path) if "held" in line]

    def after(self, step: int, generator: Generator) -> dict[str, float]:
        """What to log of `step`: nothing, or the held-out losses when a check is due; keeps the best generator."""
        if not self._names or (step + 1) % self._settings.every:
            return {}
        losses = self._measure(generator)
        if not self._losses or losses["held"] < min(self._losses):
            write_tensors(self._run.path / _BEST, dict(generator.state_dict()))
        self._losses.append(losses["held"])
        return losses

    @property
    def over(self) -> bool:
        """Whether the last `patience` checks all fell short of an earlier one."""
        patience = self._settings.patience
        if patience is None or not self._losses:
            return False
        best = min(range(len(self._losses)), key=self._losses.__getitem__)
        return len(self._losses) - 1 - best >= patience

    def restore_best(self, generator: Generator) -> None:
        """Put the best checked weights into `generator`; it stays as it is when nothing was checked."""
        if self._losses:
            generator.load_state_dict(load_file(self._run.path / _BEST))

    @torch.no_grad()
    def _measure(self, generator: Generator) -> dict[str, float]:
        seed, n = self._curriculum.seed, generator.config.n_prompts
        x = torch.stack([self._pools.draw(name, n, _STEP, seed) for name in self._names])
        adapters = generator(x.to(generator.shared.device))
        rows = [
            (row, i)
            for i, name in enumerate(self._names)
            for row in self._curriculum.rows(name, self._settings.rows, _STEP, self._bare)
        ]
        return {
            "held": self._loss(adapters, rows),
            "held_shuffled": self._loss(adapters.roll(1, 0), rows),
            "held_zero": self._loss(generator.mean().repeat(len(adapters), 1), rows),
        }

    def _loss(self, adapters: Tensor, rows: list[tuple[TokenRow, int]]) -> float:
        return round(self._base.loss(adapters, rows), 6)

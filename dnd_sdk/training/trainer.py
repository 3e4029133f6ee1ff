"""The one training loop of the generator: a recipe's stages in order, each resumable, whatever its objective."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from dnd_sdk.generator import Generator
from dnd_sdk.training.check import Check
from dnd_sdk.training.objectives import OBJECTIVES, Lesson, Objective
from dnd_sdk.training.run_dir import RunDir, optimizer_tensors, restore_optimizer
from dnd_sdk.training.settings import CheckSettings, Stage
from dnd_sdk.training.zoo import part_mask, schedule


def train_stages(
    generator: Generator, lesson: Lesson, stages: tuple[Stage, ...], check: CheckSettings, out: Path
) -> None:
    """Run every stage in order into `out/stage-i`; finished and half-done stages continue from their checkpoints."""
    parts = lesson.parts
    for i, stage in enumerate(stages):
        objective = OBJECTIVES[stage.objective](generator, lesson, stage)
        if not generator.gain.any():
            generator.gain.data.fill_(objective.first_gain)
        run = parts.open(out / f"stage-{i}", stage=stage.model_dump(), number=i, check=check.model_dump())
        _train_stage(objective, run, check, seed=parts.curriculum.seed * 1_000_003 + i * 100_003)


def _train_stage(objective: Objective, run: RunDir, check_settings: CheckSettings, *, seed: int) -> None:
    """`seed` plus its number seeds a step."""
    generator, stage, parts = objective.generator, objective.stage, objective.lesson.parts
    optimizer = torch.optim.AdamW(objective.trainable(), lr=stage.lr, weight_decay=0.0)
    start = _restore(run, generator, optimizer)
    check = Check(parts, objective.lesson.pools, check_settings, run, stage.bare)
    generator.train()
    mask = part_mask(parts.base.layout, generator.config.parts).to(generator.shared.device)
    for step in range(start, stage.steps):
        if check.over:
            break
        torch.manual_seed(seed + step)
        loss = _step(objective, optimizer, mask, step)
        held = check.after(step, generator) if objective.is_checked else {}
        run.log(step, loss=round(loss, 6), gain=round(generator.gain.detach().abs().mean().item(), 6), **held)
        parts.progress(stage.objective, step + 1, stage.steps, loss)
        if run.due() or check.over or step + 1 == stage.steps:
            state = {f"model.{k}": v for k, v in generator.state_dict().items()}
            run.save(step + 1, {**state, **optimizer_tensors(optimizer)})
    check.restore_best(generator)
    generator.eval()


def _restore(run: RunDir, generator: Generator, optimizer: torch.optim.Optimizer) -> int:
    """Put the run's checkpoint, if there is one, into `generator` and `optimizer`; the number of steps done."""
    start, saved = run.load()
    if saved:
        generator.load_state_dict({k.removeprefix("model."): v for k, v in saved.items() if k.startswith("model.")})
        restore_optimizer(optimizer, saved)
    return start


def _step(objective: Objective, optimizer: torch.optim.Optimizer, mask: Tensor, step: int) -> float:
    """Move the generator by one step; returns the step's loss."""
    generator, stage = objective.generator, objective.stage
    for group in optimizer.param_groups:
        group["lr"] = stage.lr * schedule(step, stage.steps)
    optimizer.zero_grad()
    loss = objective.step(step)
    if generator.shared.grad is not None:
        generator.shared.grad *= mask  # what is not generated stays as it is: every adapter of the zoo shares it
    torch.nn.utils.clip_grad_norm_(generator.parameters(), 1.0)
    optimizer.step()
    return loss

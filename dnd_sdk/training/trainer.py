"""The one training loop of the generator: stages of `reconstruction` and `end-to-end`, each resumable.

* Reconstruction (the paper's): masked MSE between the decoder's tokens and those of a random snapshot of the task,
  weighted per token by how much tasks differ there; pairs are random, conditions are drawn afresh every step.
* End-to-end: cross-entropy of the frozen base on task rows with the generated LoRA applied per row.
* The zeroed condition is trained as one more pair (the zero residual), because adapters are differences to it.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from dnd_sdk.generator import Generator, WeightTokenizer
from dnd_sdk.training.batches import TokenRow
from dnd_sdk.training.check import Check
from dnd_sdk.training.conditions import Pools
from dnd_sdk.training.run_dir import RunDir, optimizer_tensors, restore_optimizer
from dnd_sdk.training.settings import CheckSettings, Stage
from dnd_sdk.training.workbench import Workbench
from dnd_sdk.training.zoo import part_mask, schedule


@dataclass(frozen=True)
class Lesson:
    """What a step of any stage draws from."""

    bench: Workbench
    pools: Pools
    zoo: dict[str, Tensor]
    """Per task its snapshots (k, P)."""
    importance: Tensor
    """(P,) std over tasks of every weight."""
    check: CheckSettings

    @property
    def names(self) -> list[str]:
        """Tasks that have both rows and snapshots."""
        return sorted(self.zoo.keys() & self.bench.tasks.keys())


def train_stages(generator: Generator, lesson: Lesson, stages: tuple[Stage, ...], out: Path) -> None:
    """Run every stage in order into `out/stage-i`; finished and half-done stages continue from their checkpoints."""
    for i, stage in enumerate(stages):
        if not generator.gain.any():
            generator.gain.data.fill_(1.0 if stage.objective == "reconstruction" else stage.first_gain)
        _train_stage(generator, lesson, stage, i, out / f"stage-{i}")


def _train_stage(generator: Generator, lesson: Lesson, stage: Stage, number: int, path: Path) -> None:
    bench = lesson.bench
    manifest = {**bench.manifest, "stage": stage.model_dump(), "number": number, "check": lesson.check.model_dump()}
    run = RunDir(path, manifest, checkpoint_every_s=bench.run.checkpoint_every_s)
    optimizer = torch.optim.AdamW(_trainable(generator, stage), lr=stage.lr, weight_decay=0.0)
    start, saved = run.load()
    if saved:
        generator.load_state_dict({k.removeprefix("model."): v for k, v in saved.items() if k.startswith("model.")})
        restore_optimizer(optimizer, saved)
    check = Check(bench, lesson.pools, lesson.check, run, stage.bare)
    generator.train()
    step_loss = _STEPS[stage.objective](generator, lesson, stage)
    mask = part_mask(bench.layout, generator.config.parts).to(generator.shared.device)
    for step in range(start, stage.steps):
        if check.over:
            break
        for group in optimizer.param_groups:
            group["lr"] = stage.lr * schedule(step, stage.steps)
        optimizer.zero_grad()
        torch.manual_seed(bench.run.seed * 1_000_003 + number * 100_003 + step)
        loss = step_loss(step)
        if generator.shared.grad is not None:
            generator.shared.grad *= mask  # what is not generated stays as it is: every adapter of the zoo shares it
        torch.nn.utils.clip_grad_norm_(generator.parameters(), 1.0)
        optimizer.step()
        held = check.after(step, generator) if stage.objective == "end-to-end" else {}
        run.log(step, loss=round(loss, 6), gain=round(generator.gain.detach().abs().mean().item(), 6), **held)
        bench.progress(stage.objective, step + 1, stage.steps, loss)
        if run.due() or check.over or step + 1 == stage.steps:
            state = {f"model.{k}": v for k, v in generator.state_dict().items()}
            run.save(step + 1, {**state, **optimizer_tensors(optimizer)})
    check.restore_best(generator)
    generator.eval()


def _trainable(generator: Generator, stage: Stage) -> list[Tensor]:
    end_to_end = stage.objective == "end-to-end"
    generator.requires_grad_(True)
    generator.gain.requires_grad_(end_to_end)
    generator.shared.requires_grad_(end_to_end and stage.train_shared)
    return [p for p in generator.parameters() if p.requires_grad]


def _noisy(x: Tensor, scale: float) -> Tensor:
    return x + scale * torch.randn_like(x)


def _conditions(generator: Generator, lesson: Lesson, stage: Stage, step: int, names: list[str]) -> Tensor:
    seed = lesson.bench.run.seed
    x = torch.stack([lesson.pools.draw(n, generator.config.n_prompts, step, seed) for n in names])
    return _noisy(x.to(generator.shared.device), stage.condition_noise)


def end_to_end(generator: Generator, lesson: Lesson, stage: Stage) -> Callable[[int], float]:
    """The step of an end-to-end stage: adds up the gradient of the step of that number, returns its loss."""
    bench = lesson.bench

    def step_loss(step: int) -> float:
        names = bench.sample_tasks(lesson.names, stage.tasks, step)
        with bench.half():
            adapters = generator(_conditions(generator, lesson, stage, step, names))
        rows: list[tuple[TokenRow, int]] = []
        for i, name in enumerate(names):
            rows += [(row, i) for row in bench.rows(name, stage.rows, step, stage.bare)]
        return bench.backward(adapters, rows)

    return step_loss


def _reconstruction(generator: Generator, lesson: Lesson, stage: Stage) -> Callable[[int], float]:
    tokenizer, seed = generator.weight_tokenizer, lesson.bench.run.seed
    weights = token_weights(tokenizer, lesson.importance).to(generator.shared.device)
    shared = generator.shared.detach()

    def step_loss(step: int) -> float:
        names = lesson.bench.sample_tasks(lesson.names, stage.tasks, step)
        picks = [random.Random(f"{seed}/snapshot/{n}/{step}").choice(lesson.zoo[n]) for n in names]
        residuals = torch.stack([*(p.to(shared.device) - shared for p in picks), torch.zeros_like(shared)])
        target = tokenizer.tokenise(residuals)
        x = _conditions(generator, lesson, stage, step, names)
        tokens = generator.decoder(torch.cat([x, torch.zeros_like(x[:1])]))
        loss = masked_mse(tokens, _noisy(target, stage.target_noise), weights)
        loss.backward()
        return loss.item()

    return step_loss


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


_STEPS = {"end-to-end": end_to_end, "reconstruction": _reconstruction}


def read_importance(zoo_dir: Path) -> Tensor:
    """The (P,) std over tasks that `dnd train zoo` left."""
    return load_file(zoo_dir / "importance.safetensors")["std"]

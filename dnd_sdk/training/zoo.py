"""The zoo: a shared adapter on all tasks, then one adapter per task, all on one resident frozen base.

* Shared: plain multi-task LoRA (A and B), every row of a step from another task.
* Per task: B continues from the shared adapter while A stays frozen, so all adapters of a zoo share one A and
  differences of B are differences of the weight update (no gauge). Several tasks train side by side in one batch,
  each row with its own adapter.
* Kept: `shared.safetensors`, `tasks/NAME.safetensors` (the last snapshots and their mean), `importance.safetensors`
  (std over tasks of every weight: where tasks differ is what reconstruction must get right).
* The shared adapter and each group of tasks are units that any process may train: whoever trains one holds its run
  folder, whoever comes second finds it finished, and what other settings or data made is refused.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from dnd_sdk.errors import InputError
from dnd_sdk.files import locked, storage_errors
from dnd_sdk.lora import LoraLayout
from dnd_sdk.training.batches import TokenRow
from dnd_sdk.training.parts import TrainingParts
from dnd_sdk.training.run_dir import RunDir, optimizer_tensors, restore_optimizer, write_tensors
from dnd_sdk.training.settings import PerTaskSettings, SharedSettings

_WARMUP = 0.05
_IMPORTANCE = "importance.safetensors"
"""Written last: with it a zoo is finished."""


def initial_adapter(layout: LoraLayout, seed: int) -> Tensor:
    """A with orthonormal rows (orthonormal columns where r > in), B zero: the base model, (P,)."""
    rng = torch.Generator().manual_seed(seed)
    flat = torch.zeros(layout.n_parameters)
    for segment, view in layout.views(flat):
        if segment.part == "lora_A":
            q = torch.linalg.qr(torch.randn(max(segment.shape), min(segment.shape), generator=rng))[0]
            view.copy_(q if q.shape == segment.shape else q.T)
    return flat


def part_mask(layout: LoraLayout, parts: Sequence[str]) -> Tensor:
    """(P,) one where the flat vector holds a matrix of `parts`, else zero."""
    mask = torch.zeros(layout.n_parameters)
    for segment, view in layout.views(mask):
        if segment.part in parts:
            view.fill_(1.0)
    return mask


def schedule(step: int, steps: int) -> float:
    """Linear warm-up over the first twentieth, then cosine to zero."""
    warm = max(1, int(steps * _WARMUP))
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


def train_shared(parts: TrainingParts, settings: SharedSettings, out: Path) -> Tensor:
    """Train the shared adapter (P,), or return the one a finished run left in `out`.

    Raises `ConfigError` where other settings or data made what is there, `StorageError` for a folder that cannot be.
    """
    done = out / "shared.safetensors"
    with _held(parts, out / "shared", settings.model_dump()) as run:
        if not done.exists():
            write_tensors(done, {"shared": _fit_shared(parts, settings, run)})
    return load_file(done)["shared"]


def _fit_shared(parts: TrainingParts, settings: SharedSettings, run: RunDir) -> Tensor:
    base, curriculum = parts.base, parts.curriculum
    first = initial_adapter(base.layout, curriculum.seed) if parts.start is None else parts.start.mean()
    flat = first.to(base.device).requires_grad_()

    def rows(step: int) -> list[tuple[TokenRow, int]]:
        names = curriculum.sample(list(curriculum.tasks), settings.rows, step)
        return [(row, 0) for n in names for row in curriculum.rows(n, 1, step)]

    for _ in _fit(parts, run, "shared", flat, rows, settings.steps, settings.lr):
        pass
    return flat


def train_tasks(parts: TrainingParts, settings: PerTaskSettings, shared: Tensor, out: Path) -> None:
    """Train one adapter per task into `out/tasks`; finished tasks are kept. Raises as `train_shared` does."""
    groups = task_groups(parts, settings)
    for i, group in enumerate(groups):
        train_group(parts, settings, shared, out, group, f"tasks {i + 1}/{len(groups)}")
    finish_zoo(out, [name for group in groups for name in group])


def task_groups(parts: TrainingParts, settings: PerTaskSettings) -> list[list[str]]:
    """The names of the tasks, by who is trained side by side."""
    names = sorted(parts.curriculum.tasks)
    return [names[i : i + settings.tasks] for i in range(0, len(names), settings.tasks)]


def finish_zoo(out: Path, names: Sequence[str]) -> None:
    """Measure the importance of every weight once the adapters of all tasks are there."""
    means = torch.stack([load_file(out / "tasks" / f"{n}.safetensors")["mean"] for n in names])
    write_tensors(out / _IMPORTANCE, {"std": means.std(0, correction=0)})


def train_group(
    parts: TrainingParts, settings: PerTaskSettings, shared: Tensor, out: Path, group: list[str], title: str
) -> None:
    """Train the adapters of one group's tasks side by side, unless they are there. Raises as `train_shared` does."""
    files = [out / "tasks" / f"{name}.safetensors" for name in group]
    # several snapshots come from short runs: a killed group starts again (same rows, same curve), so that they need no
    # checkpoint; one snapshot is the last state, which a checkpoint holds
    every_s = None if settings.checkpoints == 1 else math.inf
    stage = {**settings.model_dump(), "group": group}
    with _held(parts, out / "groups" / group[0], stage, every_s) as run:
        if all(file.exists() for file in files):
            return
        snapshots = _fit_group(parts, settings, shared, run, group, title)
        files[0].parent.mkdir(exist_ok=True)
        for i, file in enumerate(files):
            kept = torch.stack([s[i] for s in snapshots])
            write_tensors(file, {"snapshots": kept, "mean": kept.mean(0)})


def _fit_group(
    parts: TrainingParts, settings: PerTaskSettings, shared: Tensor, run: RunDir, group: list[str], title: str
) -> list[Tensor]:
    """The last snapshots, each (tasks, P)."""
    base, curriculum = parts.base, parts.curriculum
    mask = part_mask(base.layout, ("lora_B",)).to(base.device)
    flat = shared.to(base.device).repeat(len(group), 1).requires_grad_()
    flat.register_hook(lambda grad: grad * mask)

    def rows(step: int) -> list[tuple[TokenRow, int]]:
        return [(row, i) for i, n in enumerate(group) for row in curriculum.rows(n, settings.rows, step)]

    snapshots = []
    for step in _fit(parts, run, title, flat, rows, settings.steps, settings.lr):
        if step >= settings.steps - settings.checkpoints:
            snapshots.append(flat.detach().cpu().clone())
    return snapshots or [flat.detach().cpu().clone()]  # killed after the last step's checkpoint


@contextmanager
def _held(parts: TrainingParts, folder: Path, stage: dict[str, Any], every_s: float | None = None) -> Iterator[RunDir]:
    """The run folder of a unit, held alone: its lock ends with the process, also one that is killed."""
    with storage_errors("create run folder", folder):
        folder.mkdir(parents=True, exist_ok=True)
    with locked(folder):
        yield parts.open(folder, checkpoint_every_s=every_s, stage=stage)


def _fit(
    parts: TrainingParts,
    run: RunDir,
    title: str,
    flat: Tensor,
    rows: Callable[[int], list[tuple[TokenRow, int]]],
    steps: int,
    lr: float,
) -> Iterator[int]:
    """AdamW on a flat parameter, resumable; yields each step just done."""
    optimizer = torch.optim.AdamW([flat], lr=lr, weight_decay=0.0)
    start, saved = run.load()
    if saved:
        flat.data.copy_(saved["flat"])
        restore_optimizer(optimizer, saved)
    for step in range(start, steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * schedule(step, steps)
        optimizer.zero_grad()
        loss = parts.base.backward(flat if flat.dim() == 2 else flat.unsqueeze(0), rows(step))
        torch.nn.utils.clip_grad_norm_([flat], 1.0)
        optimizer.step()
        run.log(step, loss=round(loss, 6))
        parts.progress(title, step + 1, steps, loss)
        if run.due():
            run.save(step + 1, {"flat": flat, **optimizer_tensors(optimizer)})
        yield step


def read_zoo(out: Path) -> tuple[Tensor, dict[str, Tensor]]:
    """The shared adapter (P,) and every task's snapshots (k, P); raises `InputError` on an unfinished zoo."""
    if not (out / _IMPORTANCE).exists():
        raise InputError(f"{out} holds no finished zoo", fix=f"run `dnd train zoo TASKS --out {out}` first")
    tasks = {p.stem: load_file(p)["snapshots"] for p in sorted((out / "tasks").glob("*.safetensors"))}
    return load_file(out / "shared.safetensors")["shared"], tasks


def read_importance(out: Path) -> Tensor:
    """The (P,) std over tasks of every weight, of a finished zoo."""
    return load_file(out / _IMPORTANCE)["std"]

"""Prepares what all stages share: settings, rows as tokens, the frozen base with LoRA attached, and the manifest."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from dnd_sdk.config import Home
from dnd_sdk.errors import ConfigError
from dnd_sdk.generator import Generator
from dnd_sdk.lora import LoraLayout, attach_lora, tables_from_flat, use_lora
from dnd_sdk.models import Base, load_base
from dnd_sdk.protocols import Progress
from dnd_sdk.tasks import Task, bare_task, data_hash, read_tasks
from dnd_sdk.training.batches import (
    TokenRow,
    TokenTask,
    answer_loss,
    held_out,
    micro_batches,
    sample_rows,
    sample_tasks,
    tokenise_task,
)
from dnd_sdk.training.int8_base import quantize_frozen_linears
from dnd_sdk.training.settings import RunSettings, TrainSettings


@dataclass(frozen=True)
class Workbench:
    """What every stage of training needs: the frozen base with LoRA attached, and the rows."""

    model: PreTrainedModel
    layout: LoraLayout
    base_name: str
    base_fingerprint: str
    sources: dict[str, Task]
    tasks: dict[str, TokenTask]
    run: RunSettings
    pad: int
    manifest: dict[str, Any]
    progress: Progress
    start: Generator | None = None
    """The generator that training goes on from; None starts from the base alone."""
    held: dict[str, TokenTask] = field(default_factory=dict)
    """Tasks kept out of training."""
    bare: dict[str, TokenTask] = field(default_factory=dict)
    """All tasks, asked without what their prompts share; empty where no stage asks so."""
    families: dict[str, str] | None = None
    """Family of every task where a pass goes over families; None where it goes over tasks."""

    @property
    def device(self) -> torch.device:
        """Where the base lives."""
        return next(self.model.parameters()).device

    def half(self) -> torch.autocast:
        """Where the decoder computes in bfloat16, too: on a CPU, where `run.base_precision` says so."""
        on = self.run.base_precision == "bfloat16" and self.device.type == "cpu"
        return torch.autocast("cpu", torch.bfloat16, enabled=on)

    def sample_tasks(self, names: Sequence[str], n: int, step: int) -> list[str]:
        """At most `n` of `names` for a step, balanced as the settings say."""
        return sample_tasks(names, n, step, self.run.seed, self.families)

    def rows(self, name: str, n: int, step: int, bare: float = 0.0) -> list[TokenRow]:
        """`n` rows of a task for a step, about a share of `bare` of them without the task's shared wording."""
        rng = random.Random(f"{self.run.seed}/bare/{name}/{step}")
        n_bare = sum(rng.random() < bare for _ in range(n))
        whole = (self.tasks if name in self.tasks else self.held)[name]
        rows = sample_rows(whole, n - n_bare, step, self.run.seed)
        return rows + (sample_rows(self.bare[name], n_bare, step, self.run.seed) if n_bare else [])

    def backward(self, adapters: Tensor, rows: list[tuple[TokenRow, int]]) -> float:
        """Add the gradient of one step's answer loss to what made `adapters` (S, P); return the loss.

        Micro-batches sum their gradient in a detached copy, so the graph behind `adapters` is walked once.
        """
        leaf = adapters.detach().requires_grad_()
        total = 0.0
        for loss in self._losses(leaf, rows):
            loss.backward()
            total += loss.item()
        adapters.backward(leaf.grad)
        return total

    @torch.no_grad()
    def loss(self, adapters: Tensor, rows: list[tuple[TokenRow, int]]) -> float:
        """The mean answer loss of `rows`, each under its adapter of `adapters` (S, P); no gradient."""
        return sum(loss.item() for loss in self._losses(adapters, rows))

    def _losses(self, adapters: Tensor, rows: list[tuple[TokenRow, int]]) -> Iterator[Tensor]:
        for batch in micro_batches(rows, max_padded=self.run.micro_tokens, pad=self.pad):
            one = adapters.shape[0] == 1
            tables = tables_from_flat(self.layout, adapters.to(self.model.dtype))  # of a base in bfloat16, too
            with use_lora(tables, 0 if one else batch.owner.to(self.device)):
                yield answer_loss(self.model, batch)


def prepare(tasks_dir: Path, settings: TrainSettings, home: Home, progress: Progress) -> Workbench:
    """Read the tasks, load the base, attach LoRA."""
    sources = {t.name: t for t in read_tasks(tasks_dir, role=settings.data.role)}
    base = _load_frozen(settings, home)
    layout = LoraLayout.from_model(base.model, **settings.lora.model_dump())
    start = Generator.from_pretrained(settings.start, layout) if settings.start else None
    if settings.run.base_precision == "int8":
        quantize_frozen_linears(base.model, layout)
    attach_lora(base.model, layout)
    limits = {"max_tokens": settings.data.max_tokens, "max_rows": settings.data.max_rows, "seed": settings.run.seed}
    tokens = {n: tokenise_task(t, base.tokenizer, **limits) for n, t in sources.items()}
    asks_bare = any(stage.bare for stage in settings.stages)
    bare = {n: tokenise_task(bare_task(t), base.tokenizer, **limits) for n, t in sources.items() if asks_bare}
    families = {n: t.family for n, t in sources.items()}
    held = _held_out(families, settings)
    pad = base.tokenizer.pad_token_id if base.tokenizer.pad_token_id is not None else base.tokenizer.eos_token_id
    return Workbench(
        model=base.model,
        layout=layout,
        base_name=settings.base,
        base_fingerprint=base.fingerprint,
        sources=sources,
        tasks={n: t for n, t in tokens.items() if n not in held},
        run=settings.run,
        pad=pad,
        manifest=_manifest(settings, sources, base.fingerprint, layout, start),
        progress=progress,
        start=start,
        held={n: tokens[n] for n in held},
        bare=bare,
        families=families if settings.data.balance == "family" else None,
    )


def _load_frozen(settings: TrainSettings, home: Home) -> Base:
    half = settings.run.base_precision == "bfloat16"
    base = load_base(settings.base, home, device=settings.run.device, dtype="bfloat16" if half else "auto")
    if half and base.model.device.type == "cpu":
        base.model.set_attn_implementation("eager")  # torch's fused attention walks back four times slower there
    return base


def _held_out(families: dict[str, str], settings: TrainSettings) -> list[str]:
    n = settings.data.held_out
    if n >= len(families):
        raise ConfigError(
            f"data.held_out is {n}, and there are only {len(families)} tasks", fix="hold out fewer, or bring more tasks"
        )
    return held_out(families, n, settings.run.seed)


def _manifest(
    settings: TrainSettings, sources: dict[str, Task], fingerprint: str, layout: LoraLayout, start: Generator | None
) -> dict[str, Any]:
    fixed = settings.model_dump(include={"base", "lora", "data"})
    return {
        "format_version": 1,
        "settings": json.loads(json.dumps(fixed)),
        "seed": settings.run.seed,
        "base_precision": settings.run.base_precision,
        "start": start.id if start else None,
        "base_fingerprint": fingerprint,
        "layout_digest": layout.digest,
        "data": {name: data_hash(task) for name, task in sources.items()},
        "versions": {p: version(p) for p in ("torch", "transformers")},
    }

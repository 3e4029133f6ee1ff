"""What all stages of a training share, made ready: the frozen base, the curriculum, and what made the run."""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from dnd_sdk.config import Home
from dnd_sdk.generator import Generator
from dnd_sdk.lora import LoraLayout
from dnd_sdk.protocols import Progress
from dnd_sdk.tasks import data_hash, read_tasks
from dnd_sdk.training.curriculum import Curriculum
from dnd_sdk.training.frozen_base import FrozenBase, load_for_training
from dnd_sdk.training.run_dir import RunDir
from dnd_sdk.training.settings import TrainSettings


@dataclass(frozen=True)
class TrainingParts:
    """The base and the curriculum of one training, and how its run folders are kept."""

    base: FrozenBase
    curriculum: Curriculum
    manifest: dict[str, Any]
    """What makes the run; one made by something else is not continued."""
    checkpoint_every_s: float
    progress: Progress
    start: Generator | None = None
    """The generator that training goes on from; None starts from the base alone."""

    def open(self, path: Path, *, checkpoint_every_s: float | None = None, **stage: Any) -> RunDir:
        """The run folder of a stage that is made by `stage`, too; `checkpoint_every_s` None: as often as all."""
        every_s = self.checkpoint_every_s if checkpoint_every_s is None else checkpoint_every_s
        return RunDir(path, {**self.manifest, **stage}, checkpoint_every_s=every_s)


def prepare(tasks_dir: Path, settings: TrainSettings, home: Home, progress: Progress) -> TrainingParts:
    """Read the tasks, load the base, attach LoRA.

    Raises `InputError` for tasks that cannot be used, `ConfigError` for settings that leave none to train on, and what
    loading a base and a generator raises.
    """
    tasks = {t.name: t for t in read_tasks(tasks_dir, role=settings.data.role)}
    base = load_for_training(settings.base, home, settings.run)
    layout = LoraLayout.from_model(base.model, **settings.lora.model_dump())
    start = Generator.from_pretrained(settings.start, layout) if settings.start else None
    frozen = FrozenBase.of(base, layout, settings.run)
    curriculum = Curriculum.of(tasks, base.tokenizer, settings)
    return TrainingParts(
        base=frozen,
        curriculum=curriculum,
        manifest=_manifest(settings, frozen, curriculum, start),
        checkpoint_every_s=settings.run.checkpoint_every_s,
        progress=progress,
        start=start,
    )


def _manifest(
    settings: TrainSettings, base: FrozenBase, curriculum: Curriculum, start: Generator | None
) -> dict[str, Any]:
    fixed = settings.model_dump(include={"base", "lora", "data"})
    return {
        "format_version": 1,
        "settings": json.loads(json.dumps(fixed)),
        "seed": settings.run.seed,
        "base_precision": settings.run.base_precision,
        "start": start.id if start else None,
        "base_fingerprint": base.fingerprint,
        "layout_digest": base.layout.digest,
        "data": {name: data_hash(task) for name, task in curriculum.sources.items()},
        "versions": {p: version(p) for p in ("torch", "transformers")},
    }

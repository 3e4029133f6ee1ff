"""LoRAs trained on a task's own labelled rows: what `oracle`, `polish-K` and `scratch-K` compare with.

* The zoo's own training code runs on the base that the session already holds: A stays as it starts, B is trained.
* The base is used exactly as it serves; a zoo trained with int8 products differs in that.
* This is the one module of the SDK outside `training` and the command line that trains, and it imports training only
  when a trainer is made.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from safetensors.torch import load_file

from dnd_sdk.engine import local_engine
from dnd_sdk.errors import ConfigError, StorageError
from dnd_sdk.evaluation.cache import flat_hash
from dnd_sdk.evaluation.drawing import unseen_rows
from dnd_sdk.evaluation.parts import Parts
from dnd_sdk.tasks import Task, data_hash

if TYPE_CHECKING:
    from torch import Tensor

    from dnd_sdk.session import DnD
    from dnd_sdk.training import PerTaskSettings, TrainingParts

_NAME = "task"
"""What the one task is called in its training folder: a task's own name need not be a file name."""


class TaskTrainer:
    """Trains on the base of a session; what was trained before is read back."""

    def __init__(self, dnd: DnD, settings: Mapping[str, Any] | None = None, cache: Path | None = None) -> None:
        """Check everything, train nothing.

        Args:
            dnd: Its base is trained on, in place, without changing it.
            settings: Of the zoo (`Zoo.training_settings`); sections `per_task` and `data` count. None: the defaults.
            cache: Folder of trained vectors; None trains again each time.

        Raises `ConfigError` for settings that `dnd train zoo` would refuse.
        """
        from pydantic import ValidationError

        from dnd_sdk.training import TrainSettings

        self._dnd, self._cache = dnd, cache
        try:
            used = {k: v for k, v in (settings or {}).items() if k in ("per_task", "data")}
            self._settings = TrainSettings.model_validate(used)
        except ValidationError as e:
            raise ConfigError(f"the zoo's settings cannot be used: {e}", fix="train the zoo again") from e

    def train(self, task: Task, seed: int, start: Tensor | None = None, steps: int | None = None) -> Tensor:
        """A LoRA `(P,)` trained on `task`'s train rows, those that the test split repeats left out.

        Args:
            task: Whose rows.
            seed: Of the draw of the rows, and of A where there is no `start`.
            start: Flat vector to go on from; None: the base, with B zero.
            steps: None: the zoo's number of steps and mean of snapshots; else so many, and the last step's weights.

        Raises `InputError` for a task without rows that fit.
        """
        from dnd_sdk.training import initial_adapter, train_tasks, write_tensors

        parts = self._parts(task, seed)
        stage = self._settings.per_task
        if steps is not None:
            stage = stage.model_copy(update={"steps": steps, "checkpoints": 1})
        begin = initial_adapter(parts.base.layout, seed) if start is None else start.detach().float().cpu()
        file = self._file(parts, stage, begin)
        if file is not None and file.exists():
            return load_file(file)["flat"]
        turns = local_engine(self._dnd.engine, "training").turns
        with TemporaryDirectory(prefix="dnd-eval-") as folder, turns.take():
            train_tasks(parts, stage, begin, Path(folder))
            flat = load_file(Path(folder) / "tasks" / f"{_NAME}.safetensors")["mean"]
        if file is not None:
            write_tensors(file, {"flat": flat})
        return flat

    def _parts(self, task: Task, seed: int) -> TrainingParts:
        from dnd_sdk.training import Curriculum, FrozenBase, TrainingParts, tokenise_task

        base, data, run = local_engine(self._dnd.engine, "training").base, self._settings.data, self._settings.run
        task = replace(task, train=unseen_rows(task))
        rows = tokenise_task(task, base.tokenizer, max_tokens=data.max_tokens, max_rows=data.max_rows, seed=seed)
        made_by = {
            "base_fingerprint": base.fingerprint,
            "numerics": Parts.of(self._dnd).numerics,
            "layout_digest": self._dnd.layout.digest,
            "task": task.name,
            "data": data_hash(task),
            "settings": data.model_dump(),
            "seed": seed,
        }
        return TrainingParts(
            base=FrozenBase.of(base, self._dnd.layout, run),
            curriculum=Curriculum(sources={_NAME: task}, tasks={_NAME: rows}, seed=seed),
            manifest=made_by,
            checkpoint_every_s=run.checkpoint_every_s,
            progress=lambda *_: None,
        )

    def _file(self, parts: TrainingParts, stage: PerTaskSettings, start: Tensor) -> Path | None:
        """Where the result is kept: named by all that makes it."""
        if self._cache is None:
            return None
        made_by = json.dumps([parts.manifest, stage.model_dump(), flat_hash(start)], sort_keys=True)
        try:
            self._cache.mkdir(parents=True, exist_ok=True)
        except OSError as e:
            raise StorageError(f"cannot use {self._cache}: {e.strerror or e}", fix="choose another run folder") from e
        return self._cache / f"{hashlib.sha256(made_by.encode()).hexdigest()}.safetensors"

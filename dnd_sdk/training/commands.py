"""What `dnd train` runs."""

from __future__ import annotations

from pathlib import Path

from dnd_sdk.config import Home
from dnd_sdk.protocols import Progress


def run_zoo(tasks_dir: Path, config: Path | None, out: Path, *, home: Home, progress: Progress) -> None:
    """`dnd train zoo`: train (or continue) the shared adapter and one adapter per task into `out`."""
    from dnd_sdk.training.parts import prepare
    from dnd_sdk.training.settings import read_settings
    from dnd_sdk.training.zoo import train_shared, train_tasks

    settings = read_settings(config)
    parts = prepare(tasks_dir, settings, home, progress)
    shared = train_shared(parts, settings.shared, out)
    train_tasks(parts, settings.per_task, shared, out)


def run_generator(
    tasks_dir: Path, config: Path | None, out: Path, *, zoo: Path, home: Home, progress: Progress
) -> Path:
    """`dnd train generator`: train (or continue) a generator on a finished zoo; returns its folder `out/generator`."""
    from dnd_sdk.training.recipe import train_generator
    from dnd_sdk.training.settings import read_settings

    return train_generator(tasks_dir, read_settings(config), out, zoo=zoo, home=home, progress=progress)

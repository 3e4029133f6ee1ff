"""What `dnd train` runs."""

from __future__ import annotations

from pathlib import Path

from dnd_sdk.config import Home
from dnd_sdk.protocols import Progress, ThisProcess, Workers


def run_zoo(
    tasks_dir: Path,
    config: Path | None,
    out: Path,
    *,
    home: Home,
    progress: Progress,
    workers: Workers | None = None,
) -> None:
    """`dnd train zoo`: train (or continue) the shared adapter and one adapter per task into `out`.

    `workers` None: all of it in this process.
    """
    from dnd_sdk.training.settings import read_settings
    from dnd_sdk.training.zoo_units import train_zoo

    train_zoo(tasks_dir, read_settings(config), out, home=home, progress=progress, workers=workers or ThisProcess())


def run_generator(
    tasks_dir: Path, config: Path | None, out: Path, *, zoo: Path, home: Home, progress: Progress
) -> Path:
    """`dnd train generator`: train (or continue) a generator on a finished zoo; returns its folder `out/generator`."""
    from dnd_sdk.training.recipe import train_generator
    from dnd_sdk.training.settings import read_settings

    return train_generator(tasks_dir, read_settings(config), out, zoo=zoo, home=home, progress=progress)

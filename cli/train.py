"""`dnd train zoo|generator`: make task LoRAs, then the generator that learns from them."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from dnd_sdk.cli.options import WorkerOptions
from dnd_sdk.cli.output import Output, Report
from dnd_sdk.errors import InputError
from dnd_sdk.protocols import Progress

Tasks = Annotated[Path, typer.Argument(metavar="TASKS", help="Folder of task files (NAME.jsonl).")]
Config = Annotated[Path | None, typer.Option("--config", help="TOML file with every setting.")]
RunDir = Annotated[Path, typer.Option("--out", help="Run folder; run again with the same one to resume.")]


def zoo(
    out: Output,
    worker_options: WorkerOptions,
    tasks: Tasks,
    run_dir: RunDir = Path("runs/zoo"),
    config: Config = None,
) -> None:
    """Train one LoRA per task, several tasks at once on one resident base."""
    check_config(config)
    with worker_options.start(out) as workers, out.progress("training the zoo") as report:
        from dnd_sdk.training import run_zoo

        run_zoo(tasks, config, run_dir, home=out.find_home(), progress=with_eta(report), workers=workers)
    out.emit({"run_dir": str(run_dir)}, str(run_dir) if out.quiet else f"done: {run_dir}")


def generator(
    out: Output,
    tasks: Tasks,
    zoo: Annotated[Path, typer.Option("--zoo", help="Run folder of dnd train zoo.")] = Path("runs/zoo"),
    run_dir: RunDir = Path("runs/generator"),
    config: Config = None,
) -> None:
    """Train a generator on a zoo: by reconstruction, end to end through the frozen base, or both in sequence."""
    check_config(config)
    if not zoo.is_dir():
        raise InputError(f"zoo folder {zoo} does not exist", fix="make one with dnd train zoo, then pass it as --zoo")
    from dnd_sdk.training import run_generator

    with out.progress("training the generator") as report:
        made = run_generator(tasks, config, run_dir, zoo=zoo, home=out.find_home(), progress=with_eta(report))
    out.emit(
        {"run_dir": str(run_dir), "generator": str(made)},
        str(made) if out.quiet else f"done: {made}\nuse it with: dnd adapt PROMPTS --generator {made}",
    )


def bench_train(
    out: Output,
    tasks: Tasks,
    config: Config = None,
    repeats: Annotated[int, typer.Option("--repeats", help="Timed rounds after one that warms up.")] = 3,
) -> None:
    """Time one training step and one generation of a recipe: any base, any sizes; nothing is kept."""
    check_config(config)
    from dnd_sdk.bench import bench_train as measure
    from dnd_sdk.bench import render_training as render
    from dnd_sdk.training import read_settings

    with out.progress("preparing") as report:
        result = measure(tasks, read_settings(config), out.find_home(), with_eta(report), repeats=repeats)
    out.emit(result, lambda: render(result))


def check_config(config: Path | None) -> None:
    """Raise `InputError` for a file that is not there, before anything slow is imported."""
    if config is not None and not config.is_file():
        raise InputError(f"config file {config} does not exist", fix="pass an existing TOML file to --config")


def with_eta(report: Report) -> Progress:
    """A training's progress, told with the time its stage has left."""
    eta = _Eta()
    return lambda stage, done, total, value: report(done, total, f"{stage} {value:.4f}", eta.left_s(stage, done, total))


class _Eta:
    """Seconds left in a stage, from the steps this process has seen of it (a resumed run starts in the middle)."""

    def __init__(self) -> None:
        self._stage: str | None = None
        self._first, self._since = 0, 0.0

    def left_s(self, stage: str, done: int, total: int) -> float | None:
        """None until two steps of the stage were seen."""
        now = time.monotonic()
        if stage != self._stage:
            self._stage, self._first, self._since = stage, done, now
        steps = done - self._first
        return (now - self._since) / steps * (total - done) if steps > 0 else None

"""`dnd eval` and `dnd bench`: how good the answers are, and how fast."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dnd_sdk.cli.completion import task_folders
from dnd_sdk.cli.options import Field, ModelOptions, WorkerOptions, quiet_libraries
from dnd_sdk.cli.output import EXIT_FAILURE, Output, Report
from dnd_sdk.cli.task_sets import TaskSet
from dnd_sdk.cli.train import check_config, with_eta
from dnd_sdk.errors import ConfigError
from dnd_sdk.evaluation import METHODS_HELP

if TYPE_CHECKING:
    from dnd_sdk.evaluation import EvalSettings, Standing
    from dnd_sdk.tasks import Task


def evaluate(
    out: Output,
    models: ModelOptions,
    worker_options: WorkerOptions,
    task_set: TaskSet,
    tasks: Annotated[
        Path,
        typer.Argument(metavar="TASKS", help="Folder of task files (NAME.jsonl).", autocompletion=task_folders),
    ],
    methods: Annotated[
        str,
        typer.Option("--methods", help=METHODS_HELP),
    ] = "",
    names: Annotated[list[str] | None, typer.Option("--task", help="Only this task; repeatable.")] = None,
    limit: Annotated[int, typer.Option("--limit", help="Test rows per task.")] = 30,
    seeds: Annotated[int, typer.Option("--seeds", help="Seeds per method whose prompts are drawn.")] = 1,
    zoo: Annotated[Path | None, typer.Option("--zoo", help="Run folder of dnd train generator.")] = None,
    against: Annotated[
        str | None, typer.Option("--against", help="Method to compare the others with, besides base.")
    ] = None,
    unrelated: Annotated[
        int, typer.Option("--unrelated", help="Ask each adapter the rows of so many other tasks, too.")
    ] = 0,
    run_dir: Annotated[Path | None, typer.Option("--run-dir", help="Keeps all results; run again to go on.")] = None,
    bare: Annotated[
        bool, typer.Option("--bare", help="Ask without what all prompts of a task share: its instruction.")
    ] = False,
    part: Annotated[
        str, typer.Option("--part", metavar="K/N", help="Ask every N-th task only, from the K-th: one process of N.")
    ] = "1/1",
    answered: Annotated[
        bool, typer.Option("--answered", help="Report what --run-dir holds; loads no model, asks nothing.")
    ] = False,
    card: Annotated[Path | None, typer.Option("--card", help="Generator folder whose card gets the figures.")] = None,
) -> None:
    """Compare methods on labelled tasks: exact match, option likelihood, valid format."""
    task_set.checked()  # before the slow part
    from dnd_sdk.evaluation import EvalSettings, render, report_answered
    from dnd_sdk.generator import record_evaluation

    chosen = tuple(m.strip() for m in methods.split(",") if m.strip())
    settings = EvalSettings(
        limit=limit,
        seeds=seeds,
        run_dir=run_dir,
        unrelated=unrelated,
        against=against,
        bare=bare,
        part=read_part(part),
    )
    asked = task_set.tasks(out, tasks, names or None)
    if answered:
        result = report_answered(asked, chosen, settings)
    else:
        result = _evaluated(out, models, worker_options, asked, chosen, settings, zoo)
    if card is not None:
        record_evaluation(card, result)
    out.emit(result, lambda: render(result))
    _fail_on_failures(out, result)


def _evaluated(
    out: Output,
    models: ModelOptions,
    worker_options: WorkerOptions,
    tasks: list[Task],
    methods: tuple[str, ...],
    settings: EvalSettings,
    zoo: Path | None,
) -> dict[str, Any]:
    from dnd_sdk.evaluation import evaluate_on, evaluate_session

    with worker_options.start(out) as workers:
        if workers is None:
            with models.load(out) as dnd, out.progress("evaluating") as report:
                return evaluate_session(dnd, tasks, methods, settings, _telling(report), zoo=zoo)
        load = models.settings(out).load_arguments()
        with out.progress("evaluating") as report:
            return evaluate_on(workers, load, tasks, methods, settings, _telling(report), zoo=zoo)


def paper(
    out: Output,
    tasks: Annotated[Path, typer.Argument(metavar="TASKS", help="Folder of task files with the paper's sets.")],
    run_dir: Annotated[Path, typer.Option("--run-dir", help="Keeps all parts and results; run again to go on.")],
    config: Annotated[Path | None, typer.Option("--config", help="TOML file with every setting of training.")] = None,
    limit: Annotated[int, typer.Option("--limit", help="Test rows per set.")] = 30,
    seeds: Annotated[int, typer.Option("--seeds", help="Seeds per method whose prompts are drawn.")] = 1,
    held_out: Annotated[
        list[str] | None, typer.Option("--held-out", help="Leave out only this set; repeatable. All without it.")
    ] = None,
) -> None:
    """Run the comparisons of the paper (arXiv 2506.16406): leave one data set out, train on the others, score on it.

    A tasks folder that is itself called paper is evaluated as dnd eval ./paper.
    """
    check_config(config)
    from dnd_sdk.evaluation import EvalSettings
    from dnd_sdk.evaluation.paper import PaperTrainer, compare, render_paper
    from dnd_sdk.training import read_settings

    settings = EvalSettings(limit=limit, seeds=seeds, run_dir=run_dir)
    quiet_libraries(out)
    with out.progress("paper") as report:
        trainer = PaperTrainer(read_settings(config), out.find_home(), with_eta(report))

        result = compare(tasks, trainer, settings, held_out or None, _telling(report))
    out.emit(result, lambda: render_paper(result))
    _fail_on_failures(out, result)


def read_part(text: str) -> tuple[int, int]:
    """K/N as two numbers; raises `ConfigError`."""
    match = re.fullmatch(r"([0-9]{1,4})/([0-9]{1,4})", text)
    if match is None:
        raise ConfigError(f"--part takes K/N, got {text!r}", fix="such as 1/2, and 2/2 in another process")
    return int(match[1]), int(match[2])


def _telling(report: Report) -> Callable[[Standing], None]:
    return lambda now: report(now.done, now.total, f"{now.task} {now.method}", now.eta_s)


def _fail_on_failures(out: Output, result: dict[str, Any]) -> None:
    """Name what failed, and exit with it."""
    for failure in result["failures"]:
        out.note(f"failed: {failure['task']} {failure['method']} seed {failure['seed']}: {failure['error']}")
    if result["failures"]:
        raise typer.Exit(EXIT_FAILURE)


def bench_adapt(
    out: Output,
    models: ModelOptions,
    prompts: Annotated[str | None, typer.Option("--prompts", help="Prompts to adapt to; made up without it.")] = None,
    n_prompts: Annotated[int, typer.Option("--n-prompts", help="How many to make up.")] = 64,
    field: Field = None,
) -> None:
    """Time adapting, reusing, swapping and decoding, against encoding alone and against the plain base."""
    from dnd_sdk.bench import bench_adapt as measure
    from dnd_sdk.bench import render_adapting as render
    from dnd_sdk.prompts import read_prompts

    read = read_prompts(prompts, field=field) if prompts else None
    for line in read.notes if read is not None else ():
        out.note(f"note: {line}")
    chosen = list(read.prompts) if read is not None else None
    with models.load(out) as dnd, out.step("measuring"):
        result = measure(dnd, chosen, n_prompts=n_prompts)
    out.emit(result, lambda: render(result))

"""`dnd plot`: the report of `dnd eval` or `dnd bench gate|store|engine` as Markdown and pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dnd_sdk.cli.output import Output


def plot(
    out: Output,
    report: Annotated[
        Path, typer.Argument(metavar="REPORT", help="What dnd eval or dnd bench gate|store|engine printed with --json.")
    ],
    folder: Annotated[Path, typer.Option("--out", help="Folder for report.md and its pictures (SVG).")] = Path("plots"),
) -> None:
    """Draw a report of dnd eval (methods, tasks) or dnd bench gate (reliability), store (growth), engine (ratios)."""
    from dnd_sdk.evaluation import read_report, write_plots

    written = write_plots(read_report(report), folder)
    out.emit({"files": [str(p) for p in written]}, "\n".join(map(str, written)))

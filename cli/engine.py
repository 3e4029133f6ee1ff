"""`dnd bench engine`: the engine beside plain transformers and peft."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated

import typer

from dnd_sdk.cli.options import ModelOptions
from dnd_sdk.cli.output import Output


def bench_engine(
    out: Output,
    models: ModelOptions,
    quick: Annotated[bool, typer.Option("--quick", help="Fewer and shorter measurements, for two cores.")] = False,
    registered: Annotated[
        int | None, typer.Option("--registered", min=1, max=100_000, help="Adapters in the larger store.")
    ] = None,
) -> None:
    """Time swaps, decoding, several clients, common heads and first tokens, beside peft and plain transformers."""
    from dnd_sdk.bench import FULL, QUICK, render_engine
    from dnd_sdk.bench import bench_engine as measure

    sizes = QUICK if quick else FULL
    if registered is not None:
        sizes = replace(sizes, registered=registered)
    with models.load(out) as dnd, out.progress("measuring") as report:
        result = measure(dnd, sizes, progress=lambda done, total, about: report(done, total, about, None))
    out.emit(result, lambda: render_engine(result))

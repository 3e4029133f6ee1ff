"""`dnd bench store`: what adapters already stored cost whoever adds, removes, routes, adapts or lists."""

from __future__ import annotations

from typing import Annotated

import typer

from dnd_sdk.cli.output import Output
from dnd_sdk.errors import ConfigError


def bench_store(
    out: Output,
    sizes: Annotated[str, typer.Option("--sizes", help="Adapters stored, with commas.")] = "10,100,1000,5000",
    repeats: Annotated[int, typer.Option("--repeats", min=1, help="Rounds per measurement.")] = 15,
) -> None:
    """Time routing, adding, removing, adapting and `dnd adapters` on stores of made-up adapters; no weights needed."""
    numbers = _numbers(sizes)
    from dnd_sdk.bench import bench_store as measure
    from dnd_sdk.bench import render_store

    with out.progress("measuring") as report:
        result = measure(numbers, repeats=repeats, progress=lambda done, total, about: report(done, total, about, None))
    out.emit(result, lambda: render_store(result))


def _numbers(sizes: str) -> list[int]:
    try:
        numbers = [int(part) for part in sizes.split(",")]
    except ValueError as e:
        raise ConfigError(f"--sizes must be whole numbers with commas, got {sizes[:80]!r}") from e
    if not all(0 < n <= 100_000 for n in numbers):
        raise ConfigError(f"--sizes must be 1 to 100,000 each, got {sizes[:80]!r}")
    return numbers

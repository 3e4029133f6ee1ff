"""`dnd bench tiers`: how many jobs would find their adapter in a slot, in host memory, on disk."""

from __future__ import annotations

from typing import Annotated

import typer

from dnd_sdk.cli.output import Output


def bench_tiers(
    out: Output,
    adapters: Annotated[int, typer.Option("--adapters", help="Stored adapters.")] = 1_000_000,
    jobs: Annotated[int, typer.Option("--jobs", help="Requests, one adapter each.")] = 1_000_000,
    warm_up: Annotated[int, typer.Option("--warm-up", help="Requests before them that are not counted.")] = 0,
    zipf: Annotated[
        float, typer.Option("--zipf", help="The k-th adapter is wanted as k ** -ZIPF; 0: all alike.")
    ] = 1.0,
    replicas: Annotated[int, typer.Option("--replicas", help="Processes with a base each.")] = 1,
    slots: Annotated[int, typer.Option("--slots", help="Adapters in the slots of each.")] = 64,
    host_gb: Annotated[float, typer.Option("--host-gb", help="GB of host memory of each, for adapters.")] = 8.0,
    adapter_mb: Annotated[float, typer.Option("--adapter-mb", help="MB of an adapter in memory.")] = 8.8,
    stored_mb: Annotated[float, typer.Option("--stored-mb", help="MB of an adapter on disk.")] = 17.7,
    rate: Annotated[float, typer.Option("--rate", help="Requests a second for each replica.")] = 10.0,
    host_ms: Annotated[float, typer.Option("--host-ms", help="From host memory into a slot.")] = 0.3,
    disk_ms: Annotated[float, typer.Option("--disk-ms", help="From disk into a slot.")] = 28.0,
    affinity: Annotated[
        bool, typer.Option("--affinity/--no-affinity", help="Each adapter on one replica, or jobs on any.")
    ] = True,
    seed: Annotated[int, typer.Option("--seed", help="Of the jobs drawn.")] = 0,
) -> None:
    """Replay made-up jobs against slots, host memory and disk: hit rates, waiting, bytes moved. Loads no model."""
    from dnd_sdk.bench import Deployment, render_tiers, simulate

    with out.step("replaying"):
        report = simulate(
            Deployment(
                adapters=adapters,
                jobs=jobs,
                warm_up=warm_up,
                zipf=zipf,
                replicas=replicas,
                slots=slots,
                host_bytes=_bytes("--host-gb", host_gb, 1e9),
                adapter_bytes=_bytes("--adapter-mb", adapter_mb, 1e6),
                stored_bytes=_bytes("--stored-mb", stored_mb, 1e6),
                jobs_s=rate,
                host_ms=host_ms,
                disk_ms=disk_ms,
                affinity=affinity,
                seed=seed,
            )
        )
    out.emit(report, lambda: render_tiers(report))


def _bytes(option: str, value: float, unit: float) -> int:
    from dnd_sdk.config import real_number

    return round(real_number(option, value, "from 0 to a million", lambda v: 0 <= v <= 1e6) * unit)

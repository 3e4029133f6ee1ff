"""`dnd adapt`: a file of prompts in, the adapter for them out (reused, generated, or the base as it is)."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dnd_sdk.cli.answering import answering
from dnd_sdk.cli.options import Field, ModelOptions, RoleFile, ServerOptions, read_role_option
from dnd_sdk.cli.output import Output, confidence
from dnd_sdk.config import Home

if TYPE_CHECKING:
    from dnd_sdk.cli.answering import AnyAdapted


class Mode(StrEnum):
    """What `adapt` may do."""

    auto = "auto"
    reuse = "reuse"
    generate = "generate"
    merge = "merge"


def adapt(
    out: Output,
    models: ModelOptions,
    server: ServerOptions,
    prompts: Annotated[
        str,
        typer.Argument(
            metavar="PROMPTS", help="Prompts: .txt (one a line), .jsonl, .json, .csv, .tsv, also with .gz; - for stdin."
        ),
    ],
    name: Annotated[str | None, typer.Option("--name", "-n", help="Name of a newly made adapter.")] = None,
    mode: Annotated[
        Mode, typer.Option("--mode", help="reuse: never make one; generate: always; merge: from the nearest stored.")
    ] = Mode.auto,
    top_k: Annotated[int, typer.Option("--top-k", help="How many adapters --mode merge takes at most.")] = 3,
    calibrate: Annotated[
        bool | None,
        typer.Option(
            "--calibrate/--no-calibrate", help="Calibrate a generated adapter of a label task (on unless set off)."
        ),
    ] = None,
    role: RoleFile = None,
    column: Annotated[str, typer.Option("--column", help="Column or JSON field that holds the prompt.")] = "prompt",
    field: Field = None,
    out_dir: Annotated[Path | None, typer.Option("--out", help="Also export the adapter as a PEFT folder.")] = None,
    explain: Annotated[bool, typer.Option("--explain", help="Show the nearest adapters and the reason.")] = False,
) -> None:
    """Decide how to serve the task behind these prompts, and make its adapter if needed."""
    from dnd_sdk.prompts import read_prompts

    prompt_set, under = read_prompts(prompts, column=column, field=field), read_role_option(role)
    result: AnyAdapted
    with answering(out, models, server) as dnd, out.step(f"adapting to {len(prompt_set.prompts)} prompts"):
        result = dnd.adapt(prompt_set, mode=mode.value, name=name, role=under, top_k=top_k, calibrate=calibrate)
    if out_dir is not None and result.adapter is not None:
        _export(out.find_home(), result.adapter.name, out_dir)
    for line in result.notes:
        out.note(f"note: {line}")
    if out_dir is not None and result.adapter is None:
        out.note("note: nothing exported, the base model serves these prompts")
    out.emit(_payload(result, explain), lambda: _text(result, explain, out, out_dir))


def _export(home: Home, name: str, folder: Path) -> None:
    from dnd_sdk.adapters import AdapterStore

    AdapterStore(home).export(name, folder)


def _payload(result: AnyAdapted, explain: bool) -> dict[str, Any]:
    from dnd_sdk.adaptation import adapted_fields
    from dnd_sdk.routing import decision_fields

    payload = adapted_fields(result)
    return {**payload, **decision_fields(result), "notes": list(result.notes)} if explain else payload


def _text(result: AnyAdapted, explain: bool, out: Output, out_dir: Path | None) -> str:
    if out.quiet:
        return result.adapter.name if result.adapter else "base"
    lines = [f"decision: {result.decision}"]
    if result.adapter is not None:
        lines += [f"adapter:  {result.adapter.name}", f"path:     {result.adapter.path}"]
        if out_dir is not None:
            lines.append(f"exported: {out_dir}")
    lines.append(f"prompts:  {result.n_prompts}")
    if explain or result.adapter is None:
        lines.append(f"reason:   {result.reason}")
    if explain:
        sure = confidence(result.probability, result.in_distribution)
        lines += [f"sure:     {sure}"] if sure else []
        lines += [f"  near:   {name}  {score:.3f}" for name, score in result.neighbours]
    timings = "  ".join(
        f"{step} {1000 * seconds:.0f} ms" for step, seconds in result.timings_s.items() if seconds >= 0.0005
    )
    return "\n".join([*lines, f"time:     {timings}"])

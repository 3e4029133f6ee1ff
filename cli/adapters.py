"""`dnd adapters ls|show|rm|import|export|verify`: the store, from the command line."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dnd_sdk.cli.completion import adapter_names
from dnd_sdk.cli.options import Field, ModelOptions
from dnd_sdk.cli.output import EXIT_PROBLEM, Output, sized, table
from dnd_sdk.prompts import Role

if TYPE_CHECKING:
    from dnd_sdk.adapters import Adapter, AdapterStore

Name = Annotated[str, typer.Argument(metavar="NAME", help="The adapter's name or id.", autocompletion=adapter_names)]


def _store(out: Output) -> AdapterStore:
    from dnd_sdk.adapters import AdapterStore

    return AdapterStore(out.find_home())


def _describe(adapter: Adapter) -> dict[str, Any]:
    from dnd_sdk.adaptation import base_name_of

    size = sum(f.stat().st_size for f in adapter.path.glob("*") if f.is_file())
    return {
        "name": adapter.name,
        "id": adapter.id,
        "path": str(adapter.path),
        "source": adapter.source,
        "origin": adapter.origin,
        "created": adapter.created,
        "n_prompts": adapter.n_prompts,
        "bytes": size,
        "base": base_name_of(adapter),
        "base_fingerprint": adapter.base_fingerprint,
        "layout_digest": adapter.layout_digest,
        "prompt_hash": adapter.prompt_hash,
        "generator": adapter.generator,
        "encoder": adapter.encoder,
        "scores": dict(adapter.scores),
        "parents": dict(adapter.parents),
        "role": adapter.role and Role.parse(adapter.role).brief,
    }


def ls(
    out: Output,
    base: Annotated[
        str | None, typer.Option("--base", help="Only adapters of this base: embedded name, folder or hub id.")
    ] = None,
) -> None:
    """List the stored adapters, of every base unless one is named."""
    from dnd_sdk.adaptation import of_base

    found = _store(out).ls()
    stored = [_describe(a) for a in (found if base is None else of_base(found, base))]
    columns = ("name", "base", "source", "created", "prompts", "size", "id")

    def text() -> str:
        if out.quiet:
            return "\n".join(str(a["name"]) for a in stored)
        if not stored:
            return _none(found, base)
        values = ("name", "base", "source", "created", "n_prompts")
        rows = [(*(a[v] for v in values), sized(a["bytes"]), a["id"][:12]) for a in stored]
        drawn: str = table(columns, rows)
        return drawn

    out.emit({"adapters": stored}, text)


def _none(found: list[Adapter], base: str | None) -> str:
    from dnd_sdk.adaptation import base_name_of

    if base is None:
        return "no adapters yet; make one with: dnd adapt PROMPTS"
    others = sorted({name for a in found if (name := base_name_of(a))})
    there = f"; there are adapters for {', '.join(others)}" if others else ""
    return f"no adapters for {base}{there}; make one with: dnd adapt PROMPTS --base {base}"


def show(out: Output, name: Name) -> None:
    """Show everything known about one adapter."""
    described = _describe(_store(out).get(name))
    width = max(map(len, described))
    lines = [f"{key:<{width}}  {'-' if value is None else value}" for key, value in described.items()]
    out.emit({"adapter": described}, str(described["name"]) if out.quiet else "\n".join(lines))


def rm(
    out: Output,
    names: Annotated[list[str], typer.Argument(metavar="NAME", help="Names or ids.", autocompletion=adapter_names)],
) -> None:
    """Remove adapters; nothing is removed unless every name is known."""
    store = _store(out)
    chosen = list(dict.fromkeys(store.find(n) for n in names))
    for name in chosen:
        store.rm(name)
    out.emit({"removed": chosen}, "\n".join(chosen if out.quiet else (f"removed {n}" for n in chosen)))


def import_(
    out: Output,
    models: ModelOptions,
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="A PEFT LoRA folder, also of XTuner, trl, ...")],
    name: Annotated[str | None, typer.Option("--name", "-n", help="Name in the store.")] = None,
    prompts: Annotated[str | None, typer.Option("--prompts", help="Prompts of its task, so that it is found.")] = None,
    field: Field = None,
) -> None:
    """Check a LoRA folder made for this base (peft, XTuner, LLaMA-Factory, trl, Axolotl) and take it into the store."""
    from dnd_sdk.adapters import find_adapter
    from dnd_sdk.prompts import read_prompts

    find_adapter(folder)  # before the slow part
    prompt_set = read_prompts(prompts, field=field) if prompts else None
    notes: list[str] = []
    with models.load(out) as dnd:
        adapter = dnd.import_adapter(folder, name=name, prompts=prompt_set, note=notes.append)
    if prompt_set is not None:
        notes.extend(prompt_set.notes)
    else:
        notes.append("without --prompts it is used by name only, never by routing")
    for line in notes:
        out.note(f"note: {line}")
    payload = {"adapter": _describe(adapter), "notes": notes}
    out.emit(payload, adapter.name if out.quiet else f"imported {adapter.name}")


def export(
    out: Output,
    name: Name,
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="A new or empty folder.")],
) -> None:
    """Write an adapter as a plain PEFT folder that peft and vLLM load."""
    store = _store(out)
    adapter = store.get(name)
    store.export(adapter.name, folder)
    out.emit({"name": adapter.name, "path": str(folder)}, str(folder) if out.quiet else f"exported to {folder}")


def verify(
    out: Output,
    name: Annotated[
        str | None,
        typer.Argument(metavar="NAME", help="Only this adapter; all without it.", autocompletion=adapter_names),
    ] = None,
) -> None:
    """Check that stored adapters are whole: hashes, shapes, finite values. Exit code 3 when one is not."""
    store = _store(out)
    checked = [store.find(name)] if name else [a.name for a in store.ls()]
    problems = [{"name": p.name, "what": p.what, "fix": p.fix} for p in store.verify(name)]
    lines = [f"{p['name']}: {p['what']}\n  fix: {p['fix']}" for p in problems]
    ok = [] if out.quiet or problems else [f"{len(checked)} adapters are whole"]
    out.emit({"ok": not problems, "checked": len(checked), "problems": problems}, "\n".join(lines + ok))
    if problems:
        raise typer.Exit(EXIT_PROBLEM)

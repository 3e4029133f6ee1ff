"""`dnd models ls|pull`: the embedded weights."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from dnd_sdk.cli.output import Output, sized, table


def ls(out: Output) -> None:
    """List the embedded models and where they are."""
    from dnd_sdk.models import list_models

    models: list[dict[str, Any]] = [
        {
            "name": m.name,
            "kind": m.kind,
            "licence": m.licence,
            "wheel": m.wheel,
            "path": str(m.path) if m.path else None,
            "bytes": m.n_bytes,
        }
        for m in list_models(out.find_home())
    ]

    def text() -> str:
        if out.quiet:
            return "\n".join(str(m["name"]) for m in models)
        rows = [(m["name"], m["kind"], m["licence"], sized(m["bytes"]), m["path"] or "not fetched") for m in models]
        drawn: str = table(("name", "kind", "licence", "size", "path"), rows)
        return drawn

    out.emit({"models": models}, text)


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

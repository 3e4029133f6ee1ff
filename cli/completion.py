"""Names that the shell completes; looking never fails and loads no torch."""

from __future__ import annotations

import os
from pathlib import Path

import typer


def adapter_names(ctx: typer.Context, incomplete: str) -> list[str]:
    """Stored adapters whose name starts so."""
    try:
        from dnd_sdk.config import Home
        from dnd_sdk.settings import load_settings

        home = Home.find(load_settings(home=ctx.params.get("home")).home)
        names = sorted(path.parent.name for path in home.adapters.glob("[!.]*/dnd.json"))
    except Exception:  # a message in the middle of somebody's typing helps nobody
        return []
    return [name for name in names if name.startswith(incomplete)]


def adapter_choices(ctx: typer.Context, incomplete: str) -> list[str]:
    """What `-a` takes: a stored adapter, `auto` or `base`."""
    fixed = [word for word in ("auto", "base") if word.startswith(incomplete)]
    return fixed + adapter_names(ctx, incomplete)


def task_folders(incomplete: str) -> list[str]:
    """What follows `dnd eval`: a folder, or the word `paper`, which is a command of its own."""
    head, tail = os.path.split(incomplete)
    try:
        found = sorted(p.name for p in Path(head).expanduser().iterdir() if p.is_dir() and p.name.startswith(tail))
    except OSError:
        found = []
    words = [word for word in ("paper",) if word.startswith(incomplete)]
    return words + [folder for name in found if (folder := os.path.join(head, name)) not in words]

"""`dnd doctor`: is this machine ready, and if not, what to do. `dnd env`: what to paste into a report."""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer

from dnd_sdk.cli.options import ModelOptions
from dnd_sdk.cli.output import EXIT_PROBLEM, Output
from dnd_sdk.config import Home
from dnd_sdk.errors import ConfigError

if TYPE_CHECKING:
    from dnd_sdk.doctor import Check


def doctor(out: Output, models: ModelOptions) -> None:
    """Check versions, settings, device, models, adapters and disk. Exit code 3 when something is broken."""
    checks = _checks(out, models)
    ok = all(c.status != "fail" for c in checks)
    shown = [c for c in checks if not out.quiet or c.status != "ok"]
    lines = [f"{c.status:<4}  {c.name}: {c.detail}" + (f"\n      fix: {c.fix}" if c.fix else "") for c in shown]
    out.emit({"ok": ok, "checks": [c.to_dict() for c in checks]}, "\n".join(lines))
    if not ok:
        raise typer.Exit(EXIT_PROBLEM)


def env(out: Output) -> None:
    """Print versions, machine and folders, to paste into a bug report; holds no secrets."""
    from dnd_sdk.doctor import describe

    try:
        home = out.find_home()
    except ConfigError:  # `dnd doctor` tells; a report must be possible all the same
        home = Home.find(out.home)
    found = describe(home)
    out.emit({"environment": found}, "\n".join(f"- {name}: {value}" for name, value in found.items()))


def _checks(out: Output, models: ModelOptions) -> list[Check]:
    from dnd_sdk.doctor import examine

    try:
        s = models.settings(out)
    except ConfigError:  # one of the checks tells; the others look at what the flags name
        return examine(Home.find(out.home), models.base, models.generator, models.encoder, models.device or "auto")
    return examine(Home.find(s.home), s.base, s.generator, s.encoder, s.device)

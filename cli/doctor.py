"""`dnd doctor`: is this machine ready, and if not, what to do."""

from __future__ import annotations

import typer

from dnd_sdk.cli.options import ModelOptions
from dnd_sdk.cli.output import EXIT_PROBLEM, Output


def doctor(out: Output, models: ModelOptions) -> None:
    """Check versions, device, models, adapters and disk. Exit code 3 when something is broken."""
    from dnd_sdk.doctor import examine

    checks = examine(out.find_home(), models.base, models.generator, models.encoder, models.device)
    ok = all(c.status != "fail" for c in checks)
    shown = [c for c in checks if not out.quiet or c.status != "ok"]
    lines = [f"{c.status:<4}  {c.name}: {c.detail}" + (f"\n      fix: {c.fix}" if c.fix else "") for c in shown]
    out.emit({"ok": ok, "checks": [c.to_dict() for c in checks]}, "\n".join(lines))
    if not ok:
        raise typer.Exit(EXIT_PROBLEM)

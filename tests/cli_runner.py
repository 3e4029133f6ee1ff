"""Runs `dnd` in this process, as a user would."""

from __future__ import annotations

import json
from typing import Any

from typer.testing import CliRunner, Result

from dnd_sdk.cli.main import app


def dnd(*args: object, stdin: str | bytes | None = None) -> Result:
    """One command line."""
    return CliRunner().invoke(app, [str(a) for a in args], input=stdin)


def dnd_json(*args: object, stdin: str | None = None, code: int = 0) -> dict[str, Any]:
    """One command line with `--json`; stdout must be exactly one object of the current schema."""
    result = dnd(*args, "--json", stdin=stdin)
    assert result.exit_code == code, (result.exit_code, result.stdout, result.stderr)
    payload = json.loads(result.stdout)
    assert payload["schema_version"] == 1
    return payload

"""Reports that say in `kind` what they are: how each is checked and drawn."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from dnd_sdk.errors import InputError


class DrawnReport(NamedTuple):
    """One kind of report."""

    kind: str
    schema_version: int
    command: str
    """What prints it with `--json`."""
    texts: Callable[[dict[str, Any]], dict[str, str]]
    """The files that it is drawn as, by name."""

    def is_kind_of(self, report: Any) -> bool:
        """Whether this is what the command prints."""
        return isinstance(report, dict) and report.get("kind") == self.kind

    def checked(self, report: dict[str, Any]) -> dict[str, Any]:
        """The report itself if it can be drawn, else `InputError`."""
        fix = f"make one: {self.command} --json > FILE"
        if report.get("schema_version") != self.schema_version:
            raise InputError(f"the {self.kind} report's schema_version is not {self.schema_version}", fix=fix)
        try:
            self.texts(report)
        except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as e:
            problem = f"{type(e).__name__}: {str(e)[:100]}"
            raise InputError(f"the {self.kind} report cannot be drawn: {problem}", fix=fix) from e
        return report

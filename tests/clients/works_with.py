"""docs/works-with.md: its table is what the runner saw last, a line each."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from environments import Client, read_clients

PAGE = Path(__file__).parents[2] / "docs" / "works-with.md"
_HEAD = "| client | version | passed on | what |\n|---|---|---|---|\n"
_ROW = re.compile(r"^\| \[?([\w-]+)\]?(?:\([^)]*\))? \| (\S+) \| (\S+) \| .* \|$", re.MULTILINE)


class Passed(NamedTuple):
    """When a client last passed, and which version of it."""

    version: str
    date: str


def read_passed(page: str) -> dict[str, Passed]:
    """The table's rows by name."""
    return {name: Passed(version, date) for name, version, date in _ROW.findall(page)}


def note_passed(versions: Mapping[str, str], date: str) -> None:
    """Give these clients this date and their versions; what else the page says of clients stays."""
    page = PAGE.read_text("utf-8")
    passed = read_passed(page) | {name: Passed(version, date) for name, version in versions.items()}
    before, _, after = page.partition(_HEAD)
    rest = after[len(re.match(r"(?:\|.*\n)*", after)[0]) :]  # type: ignore[index] # matches nothing, too
    rows = [_row(client, passed[name]) for name, client in read_clients().items() if name in passed]
    PAGE.write_text(before + _HEAD + "".join(rows) + rest, "utf-8")


def _row(client: Client, passed: Passed) -> str:
    link = f"../examples/clients/{client.check or client.name}"
    return f"| [{client.name}]({link}) | {passed.version} | {passed.date} | {client.says} |\n"

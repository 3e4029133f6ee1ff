"""The unit and the image: what they start is a command line of ours, and what they name is there."""

from __future__ import annotations

import json
import re
import shlex
from configparser import ConfigParser
from pathlib import Path
from typing import Any

import pytest
from cli_runner import dnd

import dnd_sdk
from dnd_sdk.server import ServerSettings
from dnd_sdk.settings import unknown_variables

ROOT = Path(dnd_sdk.__file__).parents[1]
UNIT, IMAGE = (ROOT / "examples" / "serve" / name for name in ("dnd.service", "Dockerfile"))


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[ServerSettings]:
    """What `dnd serve` was to listen as, instead of doing it."""
    found: list[ServerSettings] = []

    def serve(load: Any, settings: ServerSettings, **_: Any) -> None:
        found.append(settings)

    monkeypatch.setattr("dnd_sdk.server.serve", serve)
    return found


def test_the_unit_starts_a_server(started: list[ServerSettings], monkeypatch: pytest.MonkeyPatch) -> None:
    unit = ConfigParser(strict=False, interpolation=None)
    unit.optionxform = str  # type: ignore[assignment,method-assign]
    unit.read_string(UNIT.read_text())
    service = unit["Service"]
    program, *words = shlex.split(service["ExecStart"])
    name, home = service["Environment"].split("=")
    assert (Path(program).name, name, home) == ("dnd", "DND_HOME", f"/var/lib/{service['StateDirectory']}")
    monkeypatch.setenv(*re.findall(r"(DND_\w+)=(\S+?)'", UNIT.read_text())[0])
    assert dnd(*words).exit_code == 0
    [settings] = started
    assert (settings.host, settings.port, dict(settings.keys)) == ("127.0.0.1", 8000, {"agents": "a-long-secret"})
    assert float(service["TimeoutStopSec"]) > settings.shutdown_s
    assert unknown_variables() == []


def steps(kind: str) -> list[str]:
    return re.findall(rf"^{kind} (.*?[^\\])$", IMAGE.read_text(), re.M | re.S)


def test_the_image_starts_a_server_only_with_a_key(
    started: list[ServerSettings], monkeypatch: pytest.MonkeyPatch
) -> None:
    program, *words = json.loads(steps("CMD")[-1])
    assert program == "dnd"
    refused = dnd(*words)
    assert refused.exit_code == 1 and "DND_API_KEY" in refused.stderr and started == []
    monkeypatch.setenv("DND_API_KEY", "agents=a-long-secret")
    assert dnd(*words).exit_code == 0
    [settings] = started
    assert (settings.host, settings.port) == ("0.0.0.0", int(steps("EXPOSE")[0]))
    assert steps("ENV") == [f"DND_HOME={steps('VOLUME')[0]}"]


def test_what_is_copied_into_the_image_is_all_that_installing_takes() -> None:
    kept = IMAGE.with_name("Dockerfile.dockerignore").read_text().splitlines()
    assert kept[0] == "*"  # no secrets, environments or runs of the checkout
    taken = {line.removeprefix("!") for line in kept if line.startswith("!")}
    assert all((ROOT / name).exists() for name in taken)
    assert {"dnd_sdk", "cli", "integrations", "pyproject.toml", "setup.py", "README.md", "constraints.txt"} <= taken
    [install] = [step for step in steps("RUN") if "pip install" in step]
    assert "-c constraints.txt" in install and "'.[server]'" in install
    pulled = dnd(*steps("RUN")[-1].split()[1:], "--help")
    assert pulled.exit_code == 0 and steps("RUN")[-1] == "dnd models pull"

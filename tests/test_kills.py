"""kill -9 at any moment loses nothing that was reported as stored, and leaves nothing behind, whatever locks do."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest


def killed(script: str, root: Path, *settings: object) -> dict:
    path = Path(__file__).with_name(script)
    command = [sys.executable, str(path), str(root), *map(str, settings)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert ended.returncode == 0, ended.stderr[-2000:]
    return json.loads(ended.stdout)


def test_kills_in_the_store(tmp_path: Path) -> None:
    report = killed("kill_store.py", tmp_path, "--kills", 40)
    assert report["kills"] == 40 and report["done"] > 40


def test_kills_in_adapt_and_the_command(tmp_path: Path) -> None:
    report = killed("kill_session.py", tmp_path, "--kills", 12)
    assert report["kills"] == 12 and report["done"] > 12


@pytest.mark.parametrize("kind", ["real", "none", "lying"])
def test_kills_among_several_writers(tmp_path: Path, kind: str) -> None:
    report = killed("kill_writers.py", tmp_path, "--rounds", 4, "--locks", kind)
    assert report["kills"] == 16 and report["done"] > 16

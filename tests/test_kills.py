"""kill -9 at any moment loses nothing that was reported as stored, and leaves nothing behind; see `kill_store`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize("seed", [0])
def test_forty_kills(tmp_path: Path, seed: int) -> None:
    script = Path(__file__).with_name("kill_store.py")
    command = [sys.executable, str(script), str(tmp_path), "--kills", "40", "--seed", str(seed)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode == 0, ended.stderr[-2000:]
    report = json.loads(ended.stdout)
    assert report["kills"] == 40 and report["done"] > 40

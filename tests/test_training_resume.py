"""Training killed at any moment: the same command goes on and gives the same curve."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from training_parts import make_world, silent

from dnd_sdk.config import Home
from dnd_sdk.training import run_generator, run_zoo
from dnd_sdk.training.run_dir import RunDir


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = make_world(tmp_path_factory.mktemp("resume"))
    run_zoo(root / "tasks", root / "train.toml", root / "zoo", home=Home(root / "home"), progress=silent)
    return root


@pytest.mark.parametrize("stage", ["zoo", "generator"])
def test_kill_9_and_the_same_command_gives_the_same_curve(world: Path, tmp_path: Path, stage: str) -> None:
    script = (
        "import sys,time; from pathlib import Path; from dnd_sdk.config import Home\n"
        "from dnd_sdk.training import run_zoo, run_generator\n"
        "w, out = Path(sys.argv[1]), Path(sys.argv[2])\n"
        "slow = lambda *a: time.sleep(float(sys.argv[4]))\n"
        "kw = dict(home=Home(w / 'home'), progress=slow)\n"
        "run_zoo(w / 'tasks', w / 'train.toml', out, **kw) if sys.argv[3] == 'zoo' else "
        "run_generator(w / 'tasks', w / 'train.toml', out, zoo=w / 'zoo', **kw)\n"
    )
    watched = "shared" if stage == "zoo" else "stage-1"
    command = [sys.executable, "-c", script, str(world), str(tmp_path / "out"), stage]
    env = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    process = subprocess.Popen([*command, "0.3"], env=env)
    deadline = time.monotonic() + 600
    while len(RunDir.read_losses(tmp_path / "out" / watched)) < 2:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert len(RunDir.read_losses(tmp_path / "out" / watched)) < (6 if stage == "zoo" else 4)
    subprocess.run([*command, "0"], env=env, check=True)
    straight = world / "zoo" if stage == "zoo" else tmp_path / "straight"
    if stage == "generator":
        kept = {"home": Home(world / "home"), "zoo": world / "zoo", "progress": silent}
        run_generator(world / "tasks", world / "train.toml", straight, **kept)
    curves = sorted(p.relative_to(tmp_path / "out") for p in (tmp_path / "out").rglob("losses.jsonl"))
    assert len(curves) >= 2
    for curve in curves:
        assert (tmp_path / "out" / curve).read_text() == (straight / curve).read_text(), curve

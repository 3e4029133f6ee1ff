"""The zoo in units: done by anybody, twice, in any order, with workers that are killed, it is the zoo trained alone."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from spread_parts import NAMES, Backwards, zoo_bytes, zoo_world
from training_parts import silent

from dnd_sdk.config import Home
from dnd_sdk.errors import ConfigError, WorkerError
from dnd_sdk.files import locked
from dnd_sdk.protocols import Job, Progress, ThisProcess, Work
from dnd_sdk.training import read_settings, run_zoo
from dnd_sdk.training.run_dir import RunDir
from dnd_sdk.training.zoo_units import SHARED, open_zoo, train_zoo


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = zoo_world(tmp_path_factory.mktemp("units"))
    run_zoo(root / "tasks", root / "train.toml", root / "alone", home=Home(root / "home"), progress=silent)
    return root


def test_this_process_opens_a_job_once() -> None:
    opened: list[str] = []

    def open_job(name: str) -> Work:
        opened.append(name)
        return lambda unit, progress: unit.upper()

    here, job, told = ThisProcess(), Job(open_job, {"name": "a"}), silent
    assert [d.value for d in here.run(job, ["x", "y"], told)] == ["X", "Y"]
    assert [tuple(d) for d in here.run(job, ["z"], told)] == [("z", "Z", None)] and opened == ["a"]
    list(here.run(Job(open_job, {"name": "a"}), ["x"], told))
    assert opened == ["a", "a"]


def test_any_order_and_every_unit_twice_gives_the_same_zoo(world: Path, tmp_path: Path) -> None:
    settings, out = read_settings(world / "train.toml"), tmp_path / "out"
    train_zoo(world / "tasks", settings, out, home=Home(world / "home"), progress=silent, workers=Backwards())
    assert zoo_bytes(out) == zoo_bytes(world / "alone")
    assert len(list((out / "tasks").iterdir())) == len(NAMES)


def test_a_unit_that_fails_is_named_and_the_others_are_done(world: Path, tmp_path: Path) -> None:
    settings, out, home = read_settings(world / "train.toml"), tmp_path / "out", Home(world / "home")
    with pytest.raises(WorkerError, match="2 of 8 groups of tasks failed: tasks t6: no such luck; tasks t3: no such"):
        train_zoo(world / "tasks", settings, out, home=home, progress=silent, workers=Backwards("t3", "t6"))
    assert sorted(p.stem for p in (out / "tasks").iterdir()) == [n for n in NAMES if n not in ("t3", "t6")]
    assert not (out / "importance.safetensors").exists()
    run_zoo(world / "tasks", world / "train.toml", out, home=home, progress=silent)
    assert zoo_bytes(out) == zoo_bytes(world / "alone")


def test_what_other_data_made_is_refused_also_where_it_is_finished(world: Path, tmp_path: Path) -> None:
    other = zoo_world(tmp_path)
    (other / "tasks" / "t5.jsonl").write_text('{"prompt": "p", "response": "r", "split": "train"}\n')
    before = zoo_bytes(world / "alone")
    with pytest.raises(ConfigError, match="alone/shared holds a run with other data"):
        run_zoo(other / "tasks", world / "train.toml", world / "alone", home=Home(world / "home"), progress=silent)
    settings = read_settings(world / "train.toml")
    more = settings.model_copy(update={"per_task": settings.per_task.model_copy(update={"steps": 31})})
    with pytest.raises(ConfigError, match="groups/t0 holds a run with other stage"):
        work = open_zoo(world / "tasks", more, world / "alone", Home(world / "home"))
        work("tasks t0", silent)
    assert zoo_bytes(world / "alone") == before


SCRIPT = """
import sys, time
from pathlib import Path
from dnd_sdk.config import Home
from dnd_sdk.training import read_settings
from dnd_sdk.training.zoo_units import SHARED, open_zoo

root, out, hangs = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3] == "hangs"

def progress(stage, done, total, value):
    if hangs and stage == "tasks 3/8" and done == 5:
        time.sleep(3600)

work = open_zoo(root / "tasks", read_settings(root / "train.toml"), out, Home(root / "home"))
for group in work(SHARED, progress):
    work("tasks " + ", ".join(group), progress)
"""


def test_two_processes_share_a_zoo_and_one_is_killed(world: Path, tmp_path: Path) -> None:
    out, env = tmp_path / "out", {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", SCRIPT, str(world), str(out)]
    first = subprocess.Popen([*command, "hangs"], env=env)
    second = subprocess.Popen([*command, "works"], env=env)
    try:
        while len(RunDir.read_losses(out / "groups" / "t2")) < 5:
            assert first.poll() is None
            time.sleep(0.05)
        with locked(out / "groups" / "t2", wait=False) as held:
            assert not held  # by the first one, or by both in turn
        # the second trained the third group itself, or waits for it until the first is gone
        first.kill()
        assert second.wait(timeout=600) == 0
    finally:
        first.kill()
        second.kill()
    told: list[Progress] = []
    run_zoo(
        world / "tasks",
        world / "train.toml",
        out,
        home=Home(world / "home"),
        progress=lambda *said: told.append(said),  # type: ignore[arg-type]
    )
    assert told == []  # all of it was found finished
    assert zoo_bytes(out) == zoo_bytes(world / "alone")


def test_the_first_unit_tells_the_groups(world: Path) -> None:
    work = open_zoo(world / "tasks", read_settings(world / "train.toml"), world / "alone", Home(world / "home"))
    assert work(SHARED, silent) == [[n] for n in NAMES]
    with pytest.raises(ConfigError, match="no group of tasks tasks t9"):
        work("tasks t9", silent)

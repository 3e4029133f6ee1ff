"""Ray workers: what needs no Ray, and, where it is installed, a cluster of this machine whose workers are killed."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_runner import dnd_json
from spread_parts import STEPS, eval_task, open_troubles, zoo_bytes, zoo_world
from tiny_world import World
from training_parts import silent

from dnd_sdk.config import Home
from dnd_sdk.errors import ConfigError, InputError, WorkerError
from dnd_sdk.evaluation import EvalSettings, evaluate_on, evaluate_session
from dnd_sdk.integrations.ray import RayWorkers, workers
from dnd_sdk.protocols import Job
from dnd_sdk.session import DnD
from dnd_sdk.training import run_zoo
from dnd_sdk.training.run_dir import RunDir


def test_without_ray_the_message_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "t.jsonl").write_text('{"prompt": "p", "response": "r", "split": "test"}\n')
    for command in (["train", "zoo", tmp_path / "tasks"], ["eval", tmp_path / "tasks"]):
        error = dnd_json(*command, "--ray", "local", code=1)["error"]
        assert error["type"] == "MissingExtraError" and error["fix"] == "pip install 'dnd-sdk[ray]'"
        error = dnd_json(*command, "--workers", 2, code=1)["error"]
        assert error["type"] == "ConfigError" and "--ray local" in error["fix"]


def test_other_versions_and_other_disks_are_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    workers._check_versions(workers._versions())
    with pytest.raises(ConfigError, match=r"a worker has torch \S+, not 0\.1"):
        workers._check_versions(workers._versions() | {"torch": "0.1"})
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="does not see the folder /nowhere: No such file"):
        workers._enter("/nowhere")


def test_units_side_by_side_are_told_as_one() -> None:
    told: list[tuple[str, int, int, float]] = []
    one, many = (workers._Standing(n, lambda *said: told.append(said)) for n in (1, 3))
    one.tell({"a": ("shared", 2, 9, 0.5)})
    many.tell({})
    for _ in range(2):  # the second time it is no news
        many.tell({"a": ("tasks 1/3", 4, 5, 0.5), "b": ("tasks 2/3", 1, 5, 0.25)})
    assert told == [("shared", 2, 9, 0.5), ("steps", 5, 15, 0.25)]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """Two workers of one thread; their own folder, which is short, for Ray puts sockets there."""
    ray = pytest.importorskip("ray")
    folder, before = tempfile.mkdtemp(prefix="dndr"), torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).parent))
        quiet = {"include_dashboard": False, "log_to_driver": False, "logging_level": "ERROR"}
        ray.init("local", num_cpus=2, _temp_dir=folder, **quiet)
        yield ray
        ray.shutdown()
    torch.set_num_threads(before)
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = zoo_world(tmp_path_factory.mktemp("zoo"))
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    run_zoo(root / "tasks", root / "train.toml", root / "alone", home=Home(root / "home"), progress=silent)
    torch.set_num_threads(before)
    return root


def busy_workers(root: int) -> list[int]:
    """Processes below `root` that do a unit now."""
    parents, busy = {}, []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            if (folder / "cmdline").read_bytes().startswith(b"ray::do"):
                busy.append(int(folder.name))
        except OSError:  # it has just ended
            continue

    def is_below(pid: int) -> bool:
        return pid == root or (pid in parents and is_below(parents[pid]))

    return [pid for pid in busy if is_below(pid)]


class Killer:
    """Kills, with SIGKILL, one worker that does a unit, as soon as `is_time`; runs beside the `with` block."""

    def __init__(self, is_time: Callable[[], bool], root: int | None = None) -> None:
        self._is_time, self._root = is_time, root or os.getpid()
        self.killed: int | None = None
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def __enter__(self) -> Killer:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._over.wait(0.01):
            if self._is_time() and (busy := busy_workers(self._root)):
                self.killed = busy[0]
                os.kill(self.killed, signal.SIGKILL)
                return


def is_half_way(out: Path) -> bool:
    """Whether some group's training is in its middle, and some are done."""
    curves = [len(RunDir.read_losses(p)) for p in (out / "groups").glob("*")]
    return STEPS in curves and any(3 < n < STEPS // 2 for n in curves)


def test_a_zoo_of_eight_tasks_on_two_workers_one_of_them_killed(cluster: Any, zoo: Path, tmp_path: Path) -> None:
    out, told = tmp_path / "out", []
    with Killer(lambda: is_half_way(out)) as killer, RayWorkers(n_threads=1) as workers:
        run_zoo(
            zoo / "tasks",
            zoo / "train.toml",
            out,
            home=Home(zoo / "home"),
            progress=lambda *said: told.append(said),
            workers=workers,
        )
    assert killer.killed is not None and not Path(f"/proc/{killer.killed}").exists()
    assert zoo_bytes(out) == zoo_bytes(zoo / "alone")
    assert {stage for stage, *_ in told} >= {"steps"} and all(0 < done <= total for _, done, total, _ in told)
    assert cluster.is_initialized()  # it was not ours to end


def test_an_evaluation_on_two_workers_one_of_them_killed(cluster: Any, world: World, tmp_path: Path) -> None:
    load = {"base": str(world.base), "generator": str(world.generator), "encoder": str(world.encoder)}
    load |= {"home": str(world.home.root), "deterministic": True}
    tasks, methods = (
        [eval_task(n) for n in ("upper", "digits", "lower")],
        ["base", "generated", "shuffled", "scratch-4"],
    )
    alone, spread = (EvalSettings(limit=4, max_new_tokens=8, run_dir=tmp_path / d) for d in ("alone", "spread"))
    report = evaluate_session(DnD.load(**load), tasks, methods, alone)
    assert report["failures"] == []
    results = tmp_path / "spread" / "results.jsonl"
    with (
        Killer(lambda: results.exists() and results.read_bytes().count(b"\n") >= 2) as killer,
        RayWorkers(n_threads=1) as workers,
    ):
        assert evaluate_on(workers, load, tasks, methods, spread) == report
    assert killer.killed is not None
    assert len(results.read_bytes().splitlines()) == len(tasks) * len(methods)


def test_what_fails_and_who_dies_is_told_and_the_others_go_on(cluster: Any, tmp_path: Path) -> None:
    with RayWorkers(n_threads=1) as workers:
        done = {d.unit: d for d in workers.run(Job(open_troubles, {}), ["bad", "odd", "deadly", "a", "b"], silent)}
    assert {unit: type(d.error) for unit, d in done.items()} == {
        "bad": InputError,
        "odd": WorkerError,
        "deadly": WorkerError,
        "a": type(None),
        "b": type(None),
    }
    assert done["bad"].error.message == "a bad row" and done["bad"].error.fix == "write a better one"  # type: ignore[union-attr]
    assert "AttributeError: no attribute x" in str(done["odd"].error)
    assert "4 workers ended with it undone" in str(done["deadly"].error)
    assert done["a"].value[1] == 1 and done["a"].value[0] != os.getpid()


def test_units_are_given_up_when_the_driver_is_interrupted(cluster: Any) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with RayWorkers(n_threads=1) as workers, pytest.raises(KeyboardInterrupt):
        list(workers.run(Job(open_troubles, {"seconds": 3600.0}), ["a", "b", "c"], interrupt))
    until = time.monotonic() + 60
    while busy_workers(os.getpid()):
        assert time.monotonic() < until
        time.sleep(0.1)


def test_more_threads_than_the_cluster_has_are_refused(cluster: Any) -> None:
    with pytest.raises(ConfigError, match="a worker takes 3 CPUs, the cluster has 2"), RayWorkers(n_threads=3):
        pass


def test_nobody_at_an_address_is_told_at_once(free_port: int) -> None:
    pytest.importorskip("ray")
    with pytest.raises(WorkerError, match=f"no Ray cluster at '127.0.0.1:{free_port}': .*refused"):
        RayWorkers(f"127.0.0.1:{free_port}")._start()


def test_the_command_starts_workers_and_ctrl_c_ends_them(zoo: Path, tmp_path: Path) -> None:
    pytest.importorskip("ray")
    folder, out = tempfile.mkdtemp(prefix="dndr"), tmp_path / "out"
    env = {**os.environ, "OMP_NUM_THREADS": "1", "RAY_TMPDIR": folder}
    command = [sys.executable, "-m", "dnd_sdk.cli", "train", "zoo", str(zoo / "tasks"), "--config"]
    command += [str(zoo / "train.toml"), "--out", "out", "--ray", "local", "--workers", "2", "--json"]
    try:
        first = subprocess.Popen(command, env=env, cwd=tmp_path, start_new_session=True)
        while not is_half_way(out):
            assert first.poll() is None
            time.sleep(0.01)
        os.killpg(first.pid, signal.SIGINT)  # as a terminal does: all processes of the command get it
        assert first.wait(timeout=120) == 130
        assert not (out / "importance.safetensors").exists()
        assert [p for p in Path("/proc").glob("[0-9]*") if _names(p, folder)] == []
        again = subprocess.run(command, env=env, cwd=tmp_path, check=True, capture_output=True, text=True)
        assert json.loads(again.stdout)["run_dir"] == "out"
        assert zoo_bytes(out) == zoo_bytes(zoo / "alone")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _names(process: Path, text: str) -> bool:
    try:
        return text.encode() in (process / "cmdline").read_bytes()
    except OSError:
        return False

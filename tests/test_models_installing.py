"""Building a folder once, whole or not at all: interruptions, full disks, several processes, hostile archives."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dnd_sdk.errors import StorageError
from dnd_sdk.models.installing import install_folder


def is_there(folder: Path) -> bool:
    return (folder / "done").exists()


@pytest.mark.parametrize(
    ("failure", "raised", "match"),
    [
        (KeyboardInterrupt(), KeyboardInterrupt, "^$"),
        (OSError(errno.ENOSPC, "No space left on device"), StorageError, "cannot make .*No space left"),
        (RuntimeError("I/O error: No space left on device (os error 28)"), StorageError, "os error 28"),
        (PermissionError(errno.EACCES, "Permission denied"), StorageError, "Permission denied"),
        (ZeroDivisionError("ours"), ZeroDivisionError, "ours"),
    ],
)
def test_a_failed_build_leaves_the_old_state(
    tmp_path: Path, failure: BaseException, raised: type[BaseException], match: str
) -> None:
    target = tmp_path / "models" / "m"
    target.mkdir(parents=True)
    (target / "old").touch()

    def build(folder: Path) -> None:
        (folder / "half").write_bytes(b"x" * 100)
        raise failure

    with pytest.raises(raised, match=match):
        install_folder(target, build, is_complete=is_there)
    assert [p.name for p in target.iterdir()] == ["old"]
    assert sorted(p.name for p in target.parent.iterdir()) == ["m"]


def test_too_little_space_is_said_before_anything_is_fetched(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"MB free, \d+ MB are needed"):
        install_folder(
            tmp_path / "m", lambda _: pytest.fail("it was built"), is_complete=is_there, needs=lambda: 1 << 62
        )


SCRIPT = """
import sys, time
from pathlib import Path
from dnd_sdk.models.installing import install_folder
target, log, seconds = Path(sys.argv[1]), Path(sys.argv[2]), float(sys.argv[3])
def build(folder):
    with log.open("a") as f: f.write("built\\n")
    (folder / "half").touch()
    time.sleep(seconds)
    (folder / "done").touch()
install_folder(target, build, is_complete=lambda p: (p / "done").exists())
"""


def test_whoever_waits_for_another_process_is_told(tmp_path: Path) -> None:
    target, log = tmp_path / "m", tmp_path / "log"
    other = start(target, log, 1.0)
    wait_for(log)
    notes: list[str] = []
    install_folder(target, lambda _: pytest.fail("it was built twice"), is_complete=is_there, note=notes.append)
    assert notes == [f"waiting for another process that fetches into {tmp_path}"] and other.wait(60) == 0


def start(target: Path, log: Path, seconds: float) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", SCRIPT, str(target), str(log), str(seconds)])


def wait_for(log: Path) -> None:
    deadline = time.monotonic() + 120
    while not log.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert log.exists()


def test_two_processes_build_once(tmp_path: Path) -> None:
    both = [start(tmp_path / "m", tmp_path / "log", 0.5) for _ in range(2)]
    assert [p.wait(120) for p in both] == [0, 0]
    assert (tmp_path / "log").read_text() == "built\n"


def test_a_killed_build_is_swept_by_the_next(tmp_path: Path) -> None:
    target, log = tmp_path / "m", tmp_path / "log"
    victim = start(target, log, 600)
    wait_for(log)
    os.kill(victim.pid, signal.SIGKILL)
    victim.wait(60)
    assert not target.exists() and list(tmp_path.glob(".tmp-m-*"))
    install_folder(target, lambda folder: (folder / "done").touch(), is_complete=is_there)
    assert is_there(target) and not list(tmp_path.glob(".tmp-m-*"))

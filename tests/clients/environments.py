"""The clients' table, and an environment for each, made once and kept until its row changes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tomllib
from dataclasses import asdict, dataclass, field
from pathlib import Path

TABLE = Path(__file__).with_name("clients.toml")
INSTALL_S = 900


class CannotRunError(Exception):
    """A client's environment cannot be had here; says why."""


@dataclass(frozen=True)
class Client:
    """A row of the table."""

    name: str
    packages: list[str]
    shows: str
    """The package whose version counts."""
    says: str
    """What is checked."""
    check: str = ""
    """The script's name; empty: the client's own."""
    python: str = ""
    """At least this version; empty: any."""
    environment: dict[str, str] = field(default_factory=dict)

    @property
    def script(self) -> Path:
        """What checks it."""
        return TABLE.with_name(f"check_{self.check or self.name}.py")


def read_clients() -> dict[str, Client]:
    """The table, by name."""
    rows = tomllib.loads(TABLE.read_text("utf-8"))
    return {name: Client(name, **row) for name, row in rows.items()}


def python_of(client: Client, root: Path) -> Path:
    """The interpreter of the client's environment in `root`, made if need be; raises `CannotRunError`."""
    folder = root / client.name
    python, stamp = folder / "bin" / "python", folder / "made.json"
    wanted = json.dumps(asdict(client), indent=1)
    if stamp.is_file() and stamp.read_text("utf-8") == wanted:
        return python
    shutil.rmtree(folder, ignore_errors=True)
    _run([_interpreter(client.python), "-m", "venv", "--without-pip", str(folder)])
    uv = shutil.which("uv", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    install = [uv, "pip", "install", "-q", "-p"] if uv else [sys.executable, "-m", "pip", "-q", "--python"]
    _run([*install, str(python), *([] if uv else ["install"]), *client.packages])
    stamp.write_text(wanted, "utf-8")
    return python


def version_in(python: Path, package: str) -> str:
    """Which version of a package an environment has."""
    code = f"import importlib.metadata as m; print(m.version({package!r}))"
    return _run([str(python), "-c", code]).strip()


def _interpreter(wanted: str) -> str:
    """One of at least this version: this one, else of that very version on the path or under pyenv."""
    if sys.version_info >= tuple(int(part) for part in wanted.split(".") if part):
        return sys.executable
    installed = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    for path in (f"python{wanted}", *map(str, installed.glob(f"{wanted}.*/bin/python"))):
        if (found := shutil.which(path)) and _runs(found):
            return found
    raise CannotRunError(f"needs Python {wanted}")


def _runs(python: str) -> bool:
    return subprocess.run([python, "-c", ""], capture_output=True, check=False).returncode == 0


def _run(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=INSTALL_S)
    except subprocess.TimeoutExpired as e:
        raise CannotRunError(f"installing took more than {INSTALL_S} s") from e
    if done.returncode:
        raise CannotRunError(f"cannot be installed: {last_line(done.stderr)}")
    return done.stdout


def last_line(text: str) -> str:
    """The last line that says something, cut to a readable length."""
    return next((line.strip()[:300] for line in reversed(text.splitlines()) if line.strip()), "no reason given")

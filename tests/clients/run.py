"""Runs real clients, each in an environment of its own, against one `dnd serve`: `make clients`.

python tests/clients/run.py [NAME ...] [--json FILE] [--docs]

A line each: passed, failed or why it cannot run here. Exit code 1 when one failed.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from environments import CannotRunError, Client, last_line, python_of, read_clients, version_in
from works_with import note_passed

ROOT = Path(__file__).parents[2]
KEY = "sk-clients-of-dnd"
READY_S, CHECK_S = 300, 1200


@dataclass(frozen=True)
class Result:
    """What came of one client."""

    name: str
    outcome: str
    """`passed`, `failed` or `cannot run`."""
    version: str | None = None
    why: str | None = None
    seconds: int = 0

    def __str__(self) -> str:
        told = f": {self.why}" if self.why else ""
        return f"{self.name:12} {self.outcome:10} {self.version or '':10} {self.seconds:4} s{told}"


@contextmanager
def serving() -> Iterator[str]:
    """The URL of a server on the scripted base, which ends with the block."""
    with tempfile.TemporaryDirectory() as folder, open(Path(folder) / "log", "w+", encoding="utf-8") as log:
        command = [sys.executable, str(ROOT / "tests" / "clients" / "serving.py"), folder]
        env = _environment(DND_API_KEY=KEY, HF_HUB_OFFLINE="1")
        server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, env=env)
        try:
            assert server.stdout is not None
            told = server.stdout.readline()  # ends at once where the server does
            if not told:
                log.seek(0)
                sys.exit(f"the server did not start: {last_line(log.read())}")
            yield json.loads(told)["url"] + "/v1"
        finally:
            server.terminate()
            server.wait(READY_S)


def run(client: Client, environments: Path, url: str) -> Result:
    """Check one client."""
    try:
        python = python_of(client, environments)
        version = version_in(python, client.shows)
    except CannotRunError as e:
        return Result(client.name, "cannot run", why=str(e))
    began = time.monotonic()
    more = {"NO_PROXY": "127.0.0.1", "PYTHONWARNINGS": "ignore", **client.environment}
    env = _environment(DND_URL=url, DND_API_KEY=KEY, **more)
    try:
        done = subprocess.run(
            [python, client.script], env=env, capture_output=True, text=True, timeout=CHECK_S, check=False
        )
        why = last_line(done.stderr) if done.returncode else None
    except subprocess.TimeoutExpired:
        why = f"took more than {CHECK_S} s"
    seconds = round(time.monotonic() - began)
    return Result(client.name, "failed" if why else "passed", version, why, seconds)


def _environment(**more: str) -> dict[str, str]:
    """This process's environment without the user's settings of dnd."""
    return {k: v for k, v in os.environ.items() if not k.startswith(("DND_", "OPENAI_"))} | more


def main() -> int:
    """Run them; the exit code."""
    clients = read_clients()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(clients)}; all unless given")
    parser.add_argument("--json", type=Path, help="where the results are written to")
    parser.add_argument("--docs", action="store_true", help="note in docs/works-with.md what passed")
    given = parser.parse_args()
    if unknown := set(given.names) - clients.keys():
        parser.error(f"no client {', '.join(sorted(unknown))}; there are {', '.join(clients)}")
    results = []
    with serving() as url:
        for name in given.names or clients:
            results.append(run(clients[name], ROOT / ".cache" / "clients", url))
            print(results[-1], flush=True)
    today = datetime.now(UTC).date().isoformat()
    if given.json:
        told = {"schema_version": 1, "date": today, "clients": [asdict(result) for result in results]}
        given.json.write_text(json.dumps(told, indent=1) + "\n", "utf-8")
    if given.docs:
        note_passed({r.name: r.version or "" for r in results if r.outcome == "passed"}, today)
    counts = [sum(r.outcome == outcome for r in results) for outcome in ("passed", "failed", "cannot run")]
    print("{} passed, {} failed, {} skipped".format(*counts))
    return 1 if counts[1] else 0


if __name__ == "__main__":
    sys.exit(main())

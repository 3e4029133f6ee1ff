"""Units of work as Ray tasks: `dnd train zoo` and `dnd eval` on more processes of this machine, or on a cluster.

* A task is one unit, so whatever ends a worker (kill -9, a full memory, a machine that is switched off) ends one unit,
  and Ray gives it to another worker. A unit that was done in vain, or twice, leaves nothing behind.
* A worker process loads the models once and keeps them for its later units.
* All see the same disk, at the same paths, and run the same versions: a worker that does not is refused, not mixed in.
"""

from __future__ import annotations

import logging
import os
import socket
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from types import TracebackType
from typing import Any, Self

from dnd_sdk.config import text_of, whole_number
from dnd_sdk.errors import ConfigError, DndError, MissingExtraError, WorkerError
from dnd_sdk.machine import n_cores
from dnd_sdk.protocols import Done, Job, Progress, Work

log = logging.getLogger(__name__)

RETRIES = 3
"""How often a unit is tried again whose worker has ended."""
_POLL_S, _CONNECT_S = 0.5, 10.0
_VERSIONS = ("dnd-sdk", "torch", "transformers")
_AGAIN = "run the same command again: what is finished is kept"


@dataclass(frozen=True)
class _Order:
    """What a worker is told once."""

    job: Job
    folder: str
    """Where relative paths begin."""
    n_threads: int
    versions: dict[str, str]


class RayWorkers:
    """At most `n_workers` units of a job at a time, each in a process of a Ray cluster; see `Workers`.

    A program that has called `ray.init` itself keeps its cluster; one that is started or joined here is left at the end
    of the `with` block, with all that runs there of this program.
    """

    def __init__(self, address: str = "local", n_workers: int = 2, *, n_threads: int | None = None) -> None:
        """Find Ray, start nothing.

        Args:
            address: "local" starts a cluster of this machine, "auto" joins the one that runs here, else where one is.
            n_workers: Units at a time.
            n_threads: Of a worker: it takes so many of the cluster's CPUs and computes with so many threads. None: this
                machine's cores shared out for "local", else 1. Results are the same, bit by bit, for the same number.

        Raises `MissingExtraError` without Ray.
        """
        self._address, self._n_workers = text_of("address", address), whole_number("n_workers", n_workers, 1)
        shared = max(1, n_cores() // n_workers) if address == "local" else 1
        self._n_threads = shared if n_threads is None else whole_number("n_threads", n_threads, 1)
        self._started = False
        try:
            import ray
        except ImportError as e:
            raise MissingExtraError("spreading work needs ray", fix="pip install 'dnd-sdk[ray]'") from e
        self._ray = ray

    def __enter__(self) -> Self:
        """Start or join the cluster; raises `WorkerError` where there is none, `ConfigError` for one too small."""
        if not self._ray.is_initialized():
            self._start()
        n_cpus = self._ray.cluster_resources().get("CPU", 0)
        if 0 < n_cpus < self._n_threads:  # none at all: it grows when it is asked for some
            self._leave()
            raise ConfigError(
                f"a worker takes {self._n_threads} CPUs, the cluster has {n_cpus:g}",
                fix="set OMP_NUM_THREADS to fewer threads of a worker, or join a larger cluster",
            )
        return self

    def _start(self) -> None:
        options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
        if self._address == "local":
            options |= {"num_cpus": self._n_workers * self._n_threads, "include_dashboard": False}
        try:
            _knock(self._address)
            self._ray.init(self._address, **options)
        except Exception as e:  # Ray raises that, too: of a node that does not start in time
            fix = "start one with `ray start --head`, or pass local to use this machine alone"
            raise WorkerError(f"no Ray cluster at {self._address!r}: {e}", fix=fix) from e
        self._started = True

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Leave the cluster; a local one ends."""
        self._leave()

    def _leave(self) -> None:
        if self._started:
            self._started = False
            self._ray.shutdown()

    def run(self, job: Job, units: Sequence[str], progress: Progress) -> Iterator[Done]:
        """See `Workers`; what was not yielded is given up when the iterator is closed, or with a cluster of its own."""
        ray = self._ray
        order = ray.put(_Order(job, os.getcwd(), self._n_threads, _versions()))
        board = ray.remote(Board).options(num_cpus=0).remote()
        # what a unit raises is in its `Done`: an exception is trouble of Ray's own, which comes of machines that go
        options = {"max_retries": RETRIES, "retry_exceptions": True, "num_gpus": self._n_gpus()}
        task = ray.remote(do).options(num_cpus=self._n_threads, **options)
        waiting, standing = deque(units), _Standing(len(units), progress)
        running: dict[Any, str] = {}
        try:
            while waiting or running:
                while waiting and len(running) < self._n_workers:
                    unit = waiting.popleft()
                    running[task.remote(order, unit, board)] = unit
                ended, _ = ray.wait(list(running), timeout=_POLL_S)
                standing.tell(self._read(board))
                for reference in ended:
                    yield self._ended(running.pop(reference), reference)
        finally:
            # what runs in a cluster of our own ends with it as a whole: Ray 2.60 can die of both at once
            if not (self._started and running):
                for reference in running:
                    ray.cancel(reference, force=True)
                ray.kill(board)

    def _n_gpus(self) -> int:
        """A worker takes a whole one where there are any."""
        return 1 if self._ray.cluster_resources().get("GPU") else 0

    def _read(self, board: Any) -> dict[str, tuple[str, int, int, float]]:
        try:
            found: dict[str, tuple[str, int, int, float]] = self._ray.get(board.read.remote(), timeout=_POLL_S)
        except self._ray.exceptions.RayError:  # lost with its machine, or slow: the work goes on
            return {}
        return found

    def _ended(self, unit: str, reference: Any) -> Done:
        try:
            done: Done = self._ray.get(reference)
        except self._ray.exceptions.RayError as e:
            # a traceback ends with its error, other messages begin with what they are about
            last = isinstance(e, self._ray.exceptions.RayTaskError)
            told = str(e).strip().splitlines()[-1 if last else 0]
            fix = f"{_AGAIN}; with fewer workers each has more memory"
            done = Done(unit, None, WorkerError(f"{RETRIES + 1} workers ended with it undone: {told}", fix=fix))
        if done.error is not None:
            log.warning("%s failed: %s", unit, done.error)
        return done


def _knock(address: str) -> None:
    """Raise `OSError` where nobody answers: Ray would try for minutes."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if colon and port.isdecimal():
        socket.create_connection((host.strip("[]"), int(port)), _CONNECT_S).close()


class Board:
    """An actor that knows how far each unit is."""

    def __init__(self) -> None:
        self._said: dict[str, tuple[str, int, int, float]] = {}

    def tell(self, unit: str, stage: str, done: int, total: int, value: float) -> None:
        """As a `Progress`, of one unit."""
        self._said[unit] = (stage, done, total, value)

    def read(self) -> dict[str, tuple[str, int, int, float]]:
        """The last thing said of every unit."""
        return self._said


class _Standing:
    """One progress of units that run side by side; they are taken to be equally long."""

    def __init__(self, n_units: int, progress: Progress) -> None:
        self._n_units, self._progress = n_units, progress
        self._last: tuple[str, int, int, float] | None = None

    def tell(self, said: dict[str, tuple[str, int, int, float]]) -> None:
        """Tell the sum of what the units said, where it is news."""
        if not said:
            return
        stage, steps, total, value = list(said.values())[-1]
        if self._n_units > 1:
            stage, total = "steps", self._n_units * total
            steps = sum(done for _, done, _, _ in said.values())
        now = (stage, steps, total, value)
        if now != self._last:
            self._last = now
            self._progress(*now)


_opened: dict[str, Work] = {}
"""Of this worker process: the job that it does, by id."""


def do(order: _Order, unit: str, board: Any) -> Done:
    """The Ray task: one unit in a worker process."""
    try:
        value = _work(order)(unit, partial(_tell, board, unit))
    except DndError as e:
        return Done(unit, None, e)
    except Exception as e:
        log.exception("unit %s", unit)
        return Done(unit, None, WorkerError(f"{type(e).__name__}: {e}", fix=_AGAIN))
    return Done(unit, value)


def _work(order: _Order) -> Work:
    """The job's work, opened here before or now."""
    if order.job.id not in _opened:
        _check_versions(order.versions)
        _enter(order.folder)
        import torch

        torch.set_num_threads(order.n_threads)
        _opened.clear()  # one set of models at a time
        _opened[order.job.id] = order.job.open(**order.job.arguments)
    return _opened[order.job.id]


def _tell(board: Any, unit: str, stage: str, done: int, total: int, value: float) -> None:
    board.tell.remote(unit, stage, done, total, value)  # nobody waits for it


def _versions() -> dict[str, str]:
    return {name: version(name) for name in _VERSIONS}


def _check_versions(wanted: dict[str, str]) -> None:
    here = _versions()
    if other := [f"{name} {here[name]}, not {wanted[name]}" for name in here if here[name] != wanted[name]]:
        raise ConfigError(f"a worker has {'; '.join(other)}", fix="install the same versions on every machine")


def _enter(folder: str) -> None:
    try:
        os.chdir(folder)
    except OSError as e:
        raise ConfigError(
            f"a worker does not see the folder {folder}: {e.strerror or e}",
            fix="run the command in a folder of a disk that all machines have at the same path",
        ) from e

"""What all routes of one server share: the session, its limits, counts, and threads for work that would block."""

from __future__ import annotations

import os
import threading
import time
import uuid
from collections import OrderedDict
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, NamedTuple, TypeVar

import anyio
import anyio.to_thread
from fastapi import Depends, Request
from starlette.types import Scope

from dnd_sdk.errors import BusyError
from dnd_sdk.server.access_log import log_access
from dnd_sdk.server.metrics import Metrics
from dnd_sdk.server.problems import hide
from dnd_sdk.server.settings import ServerSettings
from dnd_sdk.session import DnD

T = TypeVar("T")

SHORT_THREADS, LONG_THREADS = 8, 4
"""For what takes milliseconds (templates, routing, the store's files) and for what takes seconds (adapting)."""
MAX_LONG_WAITING = 32
_MAX_USES = 10_000


class Use(NamedTuple):
    """How often an adapter answered since the server was started, and when last."""

    hits: int = 0
    last: str | None = None
    """ISO 8601, UTC; None: it has not."""


class Service:
    """One server's state."""

    def __init__(self, dnd: DnD, settings: ServerSettings) -> None:
        self.dnd, self.settings = dnd, settings
        self.metrics = Metrics(dnd)
        for folder in (dnd.home.root, dnd.base.name, dnd.encoder.name):
            hide(folder)
        self.base_id, self.encoder_id = _shown_name(dnd.base.name), _shown_name(dnd.encoder.name)
        """What both are called by clients."""
        self.instance = uuid.uuid4().hex
        """Tells this run of the server from any other."""
        self.created = int(time.time())
        self.stopping = False
        """Whether it has been told to end."""
        self.n_starting = 0
        """Requests on their way to the engine; the event loop's alone."""
        self.pinned: set[str] = set()
        """Ids of the adapters that clients had pinned."""
        self.started = time.monotonic()
        self._short, self._long = anyio.CapacityLimiter(SHORT_THREADS), anyio.CapacityLimiter(LONG_THREADS)
        self._uses: OrderedDict[str, Use] = OrderedDict()
        self._lock = threading.Lock()

    async def run(self, work: Callable[[], T]) -> T:
        """Do something short in a thread."""
        return await anyio.to_thread.run_sync(work, limiter=self._short)

    async def run_long(self, work: Callable[[], T]) -> T:
        """Do something that takes seconds in a thread; raises `BusyError` when too much of it waits."""
        if self._long.statistics().tasks_waiting >= MAX_LONG_WAITING:
            raise BusyError(f"{MAX_LONG_WAITING} adaptations wait already", fix="try again later")
        return await anyio.to_thread.run_sync(work, limiter=self._long)

    def check_room(self) -> None:
        """Raise `BusyError` when no further request may wait for its answer."""
        n = self.dnd.engine.n_waiting + self.n_starting
        if n > self.settings.max_waiting:
            raise BusyError(f"{n} requests wait already", fix="try again later")

    def answered(self, scope: Scope, status: int, seconds: float) -> None:
        """Note one request that is over."""
        route = getattr(scope.get("route"), "path", "other")
        self.metrics.requests.labels(route, str(status)).inc()
        self.metrics.seconds.labels(route).observe(seconds)
        log_access(scope, status, seconds)

    def used(self, adapter: str | None) -> None:
        """Note that an adapter answered; None: the base did."""
        if adapter is None:
            return
        with self._lock:
            hits = self._uses.pop(adapter, Use()).hits + 1
            self._uses[adapter] = Use(hits, datetime.now(UTC).isoformat(timespec="seconds"))
            if len(self._uses) > _MAX_USES:
                self._uses.popitem(last=False)

    def use_of(self, adapter: str) -> Use:
        """How it was used."""
        with self._lock:
            return self._uses.get(adapter, Use())


def _shown_name(name: str) -> str:
    """Of a folder its last part: no path of this machine is told to anybody."""
    return Path(name).name if os.path.isabs(name) or name.startswith((".", "~")) else name


def _service(request: Request) -> Service:
    service: Service = request.app.state.service
    return service


TheService = Annotated[Service, Depends(_service)]
"""The parameter of a route that needs it."""


def note(request: Request, **fields: Any) -> None:
    """Add to what the access log says of this request."""
    request.scope.setdefault("dnd", {}).update(fields)

"""Which adapters a vLLM server has from us: loaded once, least recently used first to go; all in one event loop.

The server forgets them when it is started anew; a request that finds its adapter gone says so, and it is loaded again.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path, PurePosixPath

from dnd_sdk.adapters import served_name
from dnd_sdk.engine.vllm_http import ModelNotServedError, NoSuchPageError, Wire
from dnd_sdk.errors import (
    AdapterNotFoundError,
    BackendError,
    BankFullError,
    ConfigError,
    DndError,
    InputError,
    LayoutMismatchError,
)

log = logging.getLogger(__name__)

WAIT_S = 30.0
"""How long a load waits for running requests to free an adapter's place."""
_LOAD, _UNLOAD = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"

Prepare = Callable[[], Path]
"""Makes the folder to load; run in a thread, since it reads files."""


class LoadedAdapter:
    """One adapter that the server has."""

    def __init__(self, adapter_id: str, folder: Path) -> None:
        self.id, self.name, self.folder = adapter_id, served_name(adapter_id), folder
        self.n_users = 0
        """Requests that are being answered with it."""
        self.is_pinned = False


class LoadedAdapters:
    """Those of one server."""

    def __init__(self, wire: Wire, most: int, served: Path, seen_at: str | None) -> None:
        """At most `most` are loaded at a time. The server finds the folder `served` at `seen_at`; None: there, too."""
        self._wire, self._most = wire, most
        self._served, self._seen_at = served, seen_at
        self._loaded: dict[str, LoadedAdapter] = {}  # least recently used first
        self._loading: dict[str, asyncio.Task[LoadedAdapter]] = {}
        self._lost: dict[str, LoadedAdapter] = {}  # those that only the server has forgotten
        self._n_placed = 0  # loads under way that have their place
        self._freed = asyncio.Event()
        self._one_change = asyncio.Lock()

    def ids(self) -> list[str]:
        """Of those that are loaded, least recently used first; from any thread."""
        return list(self._loaded)

    def may_load(self, adapter_id: str) -> bool:
        """Whether it is loaded, or could be without waiting for a running request."""
        known = adapter_id in self._loaded or adapter_id in self._loading
        return known or self._has_room() or self._idle() is not None

    async def ensure(self, adapter_id: str, prepare: Prepare) -> LoadedAdapter:
        """Have it loaded; whoever else asks for it meanwhile waits for the same load.

        Raises what `prepare` raises, `LayoutMismatchError` with the server's reason for an adapter that it does not
        take, `BankFullError` when all others stay in use, `BackendError`.
        """
        if adapter_id in self._loaded:
            self._loaded[adapter_id] = entry = self._loaded.pop(adapter_id)
            return entry
        if adapter_id not in self._loading:
            task = asyncio.create_task(self._load(adapter_id, prepare))
            self._loading[adapter_id] = task
            task.add_done_callback(lambda done: self._end_load(adapter_id, done))
        return await asyncio.shield(self._loading[adapter_id])

    @asynccontextmanager
    async def leased(self, adapter_id: str, prepare: Prepare) -> AsyncIterator[LoadedAdapter]:
        """The adapter, loaded, which does not give way to others inside the block."""
        entry = await self.ensure(adapter_id, prepare)
        while self._loaded.get(adapter_id) is not entry:  # it gave way again before this went on
            entry = await self.ensure(adapter_id, prepare)
        entry.n_users += 1
        try:
            yield entry
        finally:
            entry.n_users -= 1
            self._freed.set()

    def lost(self, entry: LoadedAdapter) -> None:
        """Note that the server does not know it any more; whoever asks for it next has it loaded again."""
        if self._loaded.get(entry.id) is entry:
            del self._loaded[entry.id]
            self._lost[entry.id] = entry

    def pin(self, adapter_id: str, pinned: bool) -> None:
        """See `Backend.pin`."""
        entry = self._loaded.get(adapter_id)
        if entry is None:
            raise AdapterNotFoundError(f"adapter {adapter_id!r} is not held", fix="hold it before pinning")
        others = sum(e.is_pinned for e in self._loaded.values() if e is not entry)
        if pinned and others >= self._most - 1:
            raise BankFullError(f"{others} of {self._most} adapters are pinned", fix="unpin one, or raise n_slots")
        entry.is_pinned = pinned
        self._freed.set()

    async def forget(self, adapter_id: str) -> None:
        """Unload it, if it is loaded; raises `BankFullError` while a request uses it."""
        self._lost.pop(adapter_id, None)
        entry = self._loaded.get(adapter_id)
        if entry is not None:
            if entry.n_users:
                raise BankFullError(f"a running request uses adapter {adapter_id!r}", fix="wait for its end")
            await self._unload(entry)

    async def forget_idle(self) -> None:
        """Unload all that no request uses."""
        self._lost.clear()
        is_there = True
        for entry in list(self._loaded.values()):
            if entry.n_users:
                continue
            if is_there:
                is_there = await self._unload(entry)
            else:  # each further try would wait for the same dead server
                self._loaded.pop(entry.id, None)

    async def _load(self, adapter_id: str, prepare: Prepare) -> LoadedAdapter:
        before = self._lost.get(adapter_id)
        if before is not None and before.folder.is_dir():
            folder = before.folder
        else:
            folder = await asyncio.to_thread(prepare)
        entry = LoadedAdapter(adapter_id, folder)
        entry.is_pinned = before is not None and before.is_pinned
        await self._make_room()
        self._n_placed += 1
        try:
            async with self._one_change:
                await self._tell(entry.name, self._path_there(folder))
                self._loaded[adapter_id] = entry
                self._lost.pop(adapter_id, None)
        finally:
            self._n_placed -= 1
            self._freed.set()
        return entry

    async def _tell(self, name: str, path: str) -> None:
        try:
            await self._wire.post(_LOAD, {"lora_name": name, "lora_path": path})
        except DndError as e:
            # by whoever else uses this server: a name stands for its content
            if "already been loaded" not in e.message:
                raise _refused(e, name, path) from e

    def _end_load(self, adapter_id: str, done: asyncio.Task[LoadedAdapter]) -> None:
        del self._loading[adapter_id]
        if not done.cancelled():
            done.exception()  # heard, even if whoever asked has left

    async def _make_room(self) -> None:
        """Unload until one more may be loaded."""
        until = asyncio.get_running_loop().time() + WAIT_S
        while not self._has_room():
            idle = self._idle()
            if idle is not None:
                await self._unload(idle)
                continue
            self._freed.clear()
            left = until - asyncio.get_running_loop().time()
            try:
                await asyncio.wait_for(self._freed.wait(), max(left, 0.0))
            except TimeoutError as e:
                raise BankFullError(
                    f"all {self._most} adapters that the server may have are in use or pinned",
                    fix="raise n_slots (and the server's --max-loras), or unpin some",
                ) from e

    def _has_room(self) -> bool:
        return len(self._loaded) + self._n_placed < self._most

    def _idle(self) -> LoadedAdapter | None:
        """The next to give way."""
        return next((e for e in self._loaded.values() if not e.n_users and not e.is_pinned), None)

    async def _unload(self, entry: LoadedAdapter) -> bool:
        """Have the server forget it; whether it is there to do so."""
        if self._loaded.get(entry.id) is entry:
            del self._loaded[entry.id]
        try:
            async with self._one_change:
                if entry.id not in self._loaded:  # nobody has loaded it again meanwhile
                    await self._wire.post(_UNLOAD, {"lora_name": entry.name})
        except DndError as e:  # it is gone, or the server; or it stays there under a name that says what it is
            log.info("not unloaded: %s", e.message)
            return not isinstance(e, BackendError)
        return True

    def _path_there(self, folder: Path) -> str:
        if self._seen_at is None:
            return str(folder)
        return str(PurePosixPath(self._seen_at, *folder.relative_to(self._served).parts))


def _refused(error: DndError, name: str, path: str) -> DndError:
    """What the server says against an adapter, with what may help."""
    said = error.message
    if isinstance(error, NoSuchPageError):
        return ConfigError(
            f"{said}: it takes no adapters at run time", fix="start it with VLLM_ALLOW_RUNTIME_LORA_UPDATING=1"
        )
    if isinstance(error, ModelNotServedError) or "No such file" in said or "not found" in said.lower():
        return ConfigError(
            f"{said}: the server does not find {path}",
            fix="let both see the home folder, and say as shared where the server sees it",
        )
    if "not enabled" in said:
        return ConfigError(said, fix="start vLLM with --enable-lora")
    if "rank" in said:
        return LayoutMismatchError(f"adapter {name}: {said}", fix="start vLLM with a larger --max-lora-rank")
    if isinstance(error, InputError) or "target modules" in said.lower():
        return LayoutMismatchError(f"adapter {name}: {said}", fix="use an adapter made for the base that it serves")
    return error

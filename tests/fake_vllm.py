"""A stand-in for the parts of vLLM that `LocalVllmBackend` uses: its front end hands all requests to a stub server.

So whatever holds over HTTP can be seen to hold in this process, too; and how vLLM was started and ended.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from types import ModuleType, SimpleNamespace
from typing import Any

import httpx
import pytest
from stub_vllm import StubVllm

from dnd_sdk.engine.vllm_local import ENVIRONMENT

_LAUNCHERS = "vllm.entrypoints.launchers"


class FakeVllm:
    """What was asked of it."""

    def __init__(self, stub: StubVllm) -> None:
        self.stub = stub
        self.options: list[argparse.Namespace] = []
        """Of each start."""
        self.n_running = 0
        self.fails: BaseException | None = None
        """Raised instead of starting."""
        self.apps: list[Any] = []

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Let `import vllm` find it; what a backend sets in the environment ends with the test, too."""
        for name in ENVIRONMENT:
            monkeypatch.setenv(name, "")
            monkeypatch.delenv(name)
        entry = {"build_async_engine_client": self.build_engine}
        launchers = {
            "vllm": {"__version__": "0.fake"},
            "vllm.utils.argparse_utils": {"FlexibleArgumentParser": argparse.ArgumentParser},
            f"{_LAUNCHERS}.cli_args": {"make_arg_parser": arguments, "validate_parsed_serve_args": lambda _: None},
            f"{_LAUNCHERS}.app": {"build_app": self.build_app},
            f"{_LAUNCHERS}.api_server.app_state": {"init_app_state": init_state},
            f"{_LAUNCHERS}.api_server.entry": entry,
        }
        for name, members in launchers.items():
            parts = name.split(".")
            for i in range(1, len(parts)):  # the packages on the way
                monkeypatch.setitem(sys.modules, ".".join(parts[:i]), ModuleType(".".join(parts[:i])))
            module = ModuleType(name)
            vars(module).update(members)
            monkeypatch.setitem(sys.modules, name, module)
        sys.modules["vllm"].__version__ = "0.fake"  # type: ignore[attr-defined]

    @asynccontextmanager
    async def build_engine(self, options: argparse.Namespace) -> AsyncIterator[Any]:
        if self.fails is not None:
            raise self.fails
        self.options.append(options)
        self.stub.root = options.model
        self.n_running += 1

        async def tasks() -> tuple[str, ...]:
            return ("generate",)

        try:
            yield SimpleNamespace(get_supported_tasks=tasks, model_config="a model's")
        finally:
            self.n_running -= 1

    def build_app(self, options: argparse.Namespace, tasks: Sequence[str], model_config: Any) -> Any:
        assert (tasks, model_config) == (("generate",), "a model's")
        self.apps.append(_App(self.stub))
        return self.apps[-1]


async def init_state(client: Any, state: Any, options: argparse.Namespace, tasks: Sequence[str]) -> None:
    state.engine_client = client


def arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    for name in ("--model", "--dtype"):
        parser.add_argument(name)
    for name in ("--max-lora-rank", "--max-loras", "--max-cpu-loras", "--max-model-len"):
        parser.add_argument(name, type=int)
    for name in ("--disable-log-stats", "--enable-lora"):
        parser.add_argument(name, action="store_true")
    return parser


class _App:
    """Hands everything to the stub, piece by piece, and hangs up there when whoever asks does here."""

    def __init__(self, stub: StubVllm) -> None:
        self.state = SimpleNamespace()
        self._stub = stub

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        assert scope["type"] == "http"
        body, more = b"", True
        while more:
            message = await receive()
            body, more = body + message.get("body", b""), message.get("more_body", False)
        answering = asyncio.ensure_future(self._answer(scope, body, send))
        leaving = asyncio.ensure_future(receive())
        await asyncio.wait({answering, leaving}, return_when=asyncio.FIRST_COMPLETED)
        for task in (answering, leaving):
            task.cancel()
            with suppress(asyncio.CancelledError, OSError, httpx.HTTPError):
                await task

    async def _answer(self, scope: Any, body: bytes, send: Any) -> None:
        headers = [(k, v) for k, v in scope["headers"] if k not in (b"host", b"content-length")]
        async with httpx.AsyncClient(trust_env=False) as client:
            url = f"{self._stub.url}{scope['path']}"
            async with client.stream(scope["method"], url, content=body, headers=headers, timeout=30) as response:
                kept = [(k, v) for k, v in response.headers.raw if k.lower() == b"content-type"]
                await send({"type": "http.response.start", "status": response.status_code, "headers": kept})
                async for piece in response.aiter_raw():
                    await send({"type": "http.response.body", "body": piece, "more_body": True})
                await send({"type": "http.response.body", "body": b""})

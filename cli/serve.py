"""`dnd serve`: the session behind an OpenAI-compatible door."""

from __future__ import annotations

import logging
import os
import sys
import threading
from types import TracebackType
from typing import TYPE_CHECKING, Annotated

import typer

from dnd_sdk.cli.options import ModelOptions, SamplingFlags
from dnd_sdk.cli.output import Output
from dnd_sdk.config import Home
from dnd_sdk.errors import MissingExtraError, StorageError

if TYPE_CHECKING:
    from dnd_sdk.server import Listening
    from dnd_sdk.settings import Settings

SERVER = "Server"

_WORKER, _LAST_S = "AnyIO worker thread", 1.0
"""What the server's threads are called, and how long one is waited for after all answers have ended."""


def serve(
    out: Output,
    models: ModelOptions,
    sampling: SamplingFlags,
    host: Annotated[str | None, typer.Option("--host", help="127.0.0.1 unless set.", rich_help_panel=SERVER)] = None,
    port: Annotated[int | None, typer.Option("--port", help="8000; 0: any free.", rich_help_panel=SERVER)] = None,
    api_key: Annotated[
        list[str] | None,
        typer.Option(
            "--api-key",
            metavar="[NAME=]KEY",
            help="Asked of each request; repeatable. Better as DND_API_KEY: other users see flags.",
            rich_help_panel=SERVER,
        ),
    ] = None,
    allowed_hosts: Annotated[
        list[str] | None,
        typer.Option("--allowed-hosts", help="Name that requests call it by; repeatable.", rich_help_panel=SERVER),
    ] = None,
    answer_tokens: Annotated[
        int | None,
        typer.Option("--answer-tokens", help="Of answers whose request does not say; 1024.", rich_help_panel=SERVER),
    ] = None,
    max_waiting: Annotated[
        int | None,
        typer.Option("--max-waiting", help="Requests that may wait; 256.", rich_help_panel=SERVER),
    ] = None,
    log_prompts: Annotated[
        bool | None,
        typer.Option(
            "--log-prompts/--no-log-prompts", help="Log what is asked and answered, too.", rich_help_panel=SERVER
        ),
    ] = None,
) -> None:
    """Serve the session over HTTP, OpenAI-compatible, until Ctrl-C or SIGTERM."""
    from dnd_sdk.settings import load_settings

    settings = load_settings(
        home=out.home, **vars(models), **vars(sampling), host=host, port=port, api_key=api_key,
        allowed_hosts=allowed_hosts, answer_tokens=answer_tokens, max_waiting=max_waiting, log_prompts=log_prompts,
    )  # fmt: skip
    try:
        from dnd_sdk.server import ServerSettings, serve
    except ImportError as e:
        raise MissingExtraError(f"serving needs {e.name}", fix="pip install 'dnd-sdk[server]'") from e
    server = ServerSettings(**settings.serving())
    _log_to_stderr(out)
    with Announced(out, settings, next(iter(server.keys.values()), None)) as announced:
        serve(lambda: models.load(out), server, listening=announced.listening)


class Announced:
    """A server that commands of its home find as long as the block lasts."""

    def __init__(self, out: Output, settings: Settings, key: str | None) -> None:
        """`key` is one that the server takes, for these commands; None: it asks for none."""
        self._out, self._settings, self._key = out, settings, key
        self._home, self._instance = Home.find(settings.home), ""

    def listening(self, now: Listening) -> None:
        """It answers from now on."""
        from dnd_sdk.client import write_presence

        loaded, self._instance = self._settings.load_arguments(), now.instance
        base, own = loaded.pop("base"), {n: value for n, value in loaded.items() if n not in ("home", "key")}
        try:
            write_presence(self._home, url=now.url, key=self._key, base=base, instance=now.instance, settings=own)
        except StorageError as e:  # it serves all the same
            self._out.note(f"note: commands of this home will not find the server: {e.message}")
        self._out.emit({"url": now.url, "pid": os.getpid()}, "")
        sys.stdout.flush()
        self._out.note(f"listening on {now.url}/v1 (base {base}); Ctrl-C stops")

    def __enter__(self) -> Announced:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        from dnd_sdk.client import remove_presence

        remove_presence(self._home, self._instance)
        if kind is None or issubclass(kind, KeyboardInterrupt):
            _end_threads(0 if kind is None else 130)


def _end_threads(code: int) -> None:
    """End the process if the server's threads still work: they had their time, and would be waited for."""
    for thread in threading.enumerate():
        if thread.name == _WORKER:
            thread.join(_LAST_S)
            if thread.is_alive():
                sys.stdout.flush()
                os._exit(code)


def bench_serve(
    out: Output,
    models: ModelOptions,
    clients: Annotated[int, typer.Option("--clients", min=1, help="Streams at once.")] = 8,
    rounds: Annotated[int, typer.Option("--rounds", min=1, help="Of either way.")] = 5,
    tokens: Annotated[int, typer.Option("--tokens", min=1, help="Of each answer.")] = 32,
) -> None:
    """Time the same streams by turns from threads of a program and over HTTP."""
    from dnd_sdk.server import bench_serve as measure
    from dnd_sdk.server import render_serve

    with models.load(out) as dnd, out.progress("measuring") as report:
        result = measure(
            dnd,
            clients=clients,
            rounds=rounds,
            tokens=tokens,
            progress=lambda done, total, about: report(done, total, about, None),
        )
    out.emit(result, lambda: render_serve(result))


def _log_to_stderr(out: Output) -> None:
    """Errors always, one line a request unless --quiet."""
    if not out.debug:
        logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logging.getLogger("dnd_sdk.access").setLevel(logging.WARNING if out.quiet else logging.INFO)

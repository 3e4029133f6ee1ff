"""Who answers a command: the server that runs for its home, where it has what was asked for, else models loaded here.

Both are asked in the same words, so that no command has two ways.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from dnd_sdk.cli.options import ModelOptions, ServerOptions
from dnd_sdk.cli.output import Output
from dnd_sdk.config import Home

if TYPE_CHECKING:
    from dnd_sdk.adapters import AdapterStore
    from dnd_sdk.client import Adapted, Answer, AnswerStream, Routed, ServerClient
    from dnd_sdk.routing import RouteDecision
    from dnd_sdk.session import AdaptResult, Completion, CompletionStream, DnD
    from dnd_sdk.settings import Settings

    Answering = DnD | ServerClient
    AnyAnswer = Completion | Answer
    AnyStream = CompletionStream | AnswerStream
    AnyAdapted = AdaptResult | Adapted
    AnyRouted = RouteDecision | Routed

BASE, AUTO = "base", "auto"
LOADED_WITH = ("generator", "encoder", "device", "dtype", "n_slots", "r", "deterministic", "calibrate", "engine", "url")
"""Settings that hold from loading on: a server has them or has not."""


def answering(out: Output, models: ModelOptions, use: ServerOptions, adapter: str | None = None) -> Answering:
    """A context manager that gives who answers; `adapter`, if there is one, is known to it by then or is soon."""
    settings = models.settings(out)
    home = Home.find(settings.home)
    if not use.no_server and (server := _server(out, settings, home)) is not None:
        return server
    if adapter is not None:
        from dnd_sdk.adapters import AdapterStore

        known(AdapterStore(home), adapter, settings.base)  # before the slow part
    return models.load(out)


def chosen_by(adapter: str) -> str | None:
    """What `--adapter` says in the library's words: None is the base."""
    return None if adapter == BASE else adapter


def known(store: AdapterStore, adapter: str, base: str) -> None:
    """Raise `AdapterNotFoundError` for a name that is not in the store, and our other errors for another base's."""
    from dnd_sdk.adaptation import check_known_base

    if adapter not in (BASE, AUTO):
        check_known_base(store.get(adapter), base)


def check_usable(dnd: Answering, adapter: str) -> None:
    """Raise what an answer by this adapter would raise: there is none of that name, or it is another base's."""
    from dnd_sdk.client import ServerClient

    if adapter in (BASE, AUTO):
        return
    if isinstance(dnd, ServerClient):
        dnd.check_adapter(adapter)
    else:
        from dnd_sdk.adaptation import check_made_for

        check_made_for(dnd.store.get(adapter), dnd.base)


def _server(out: Output, settings: Settings, home: Home) -> ServerClient | None:
    from dnd_sdk.client import ServerClient, find_server

    found = find_server(home)
    if found is None:
        return None
    client = ServerClient(found, home)
    if why := _misfit(settings, client):
        out.note(f"note: loading here, since the server at {found.url} {why}")
        return None
    out.note(f"using the server at {found.url}")
    return client


def _misfit(settings: Settings, client: ServerClient) -> str | None:
    """Why a server is not what was asked for; None: it is. What is not asked for may be as it likes."""
    from dnd_sdk.client import PLACES, base_key

    if base_key(settings.base) != client.server.base:
        return f"serves {client.server.base}, not {settings.base}"
    asked = {name: getattr(settings, name) for name in LOADED_WITH}
    asked = {name: value for name, value in asked.items() if value != type(settings).model_fields[name].default}
    if not asked:
        return None
    told, status = client.server.settings, client.status()
    for name, value in asked.items():
        wanted = base_key(value) if name in PLACES else value
        if wanted not in (told.get(name), status.get(name)):  # as it was told to, or as it then chose
            return f"was started without {name} = {value}"
    return None

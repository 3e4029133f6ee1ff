"""`ServerClient`: a running server asked in the words of `DnD`, for commands that take either."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from dnd_sdk.client.answers import Adapted, Answer, Routed, read_adapted, read_routed
from dnd_sdk.client.call import Call, cut_off
from dnd_sdk.client.http import form_body, json_body
from dnd_sdk.client.presence import Presence
from dnd_sdk.client.stream import AnswerStream, chat_body
from dnd_sdk.config import Home, SamplingOptions
from dnd_sdk.errors import AdapterNotFoundError

if TYPE_CHECKING:
    from dnd_sdk.chat import Prompt
    from dnd_sdk.prompts import PromptSet, Role

_EVENTS = "text/event-stream"


class ServerClient:
    """The server of a home; each call is a connection of its own, so that any number of threads may ask.

    Every call raises `ServerError` when the server has ended or hangs, and what the library raises for what it refuses.
    """

    def __init__(self, server: Presence, home: Home) -> None:
        self.server, self.home = server, home

    def status(self) -> dict[str, Any]:
        """What the server says of itself: `/dnd/status`."""
        with Call(self.server, "GET", "/dnd/status") as call:
            return call.object()

    def complete(
        self, prompt: Prompt, adapter: str | None = None, *, role: Role | None = None, **sampling: Any
    ) -> Answer:
        """As `DnD.complete`; streamed, so that an answer may take as long as it wants."""
        with self.stream(prompt, adapter, role=role, **sampling) as stream:
            return stream.result

    def stream(
        self, prompt: Prompt, adapter: str | None = None, *, role: Role | None = None, **sampling: Any
    ) -> AnswerStream:
        """As `DnD.stream`; to leave it frees the server of it within a token."""
        options = SamplingOptions(**sampling)
        if adapter == "auto" and role is not None:
            adapter = self._routed(prompt, role)
        body = chat_body(prompt, adapter, role, options)
        with self._told_by_name(adapter):
            return AnswerStream(Call(self.server, "POST", "/v1/chat/completions", json_body(body), accept=_EVENTS))

    def adapt(
        self,
        prompts: PromptSet,
        mode: str = "auto",
        name: str | None = None,
        *,
        role: Role | None = None,
        top_k: int = 3,
        calibrate: bool | None = None,
    ) -> Adapted:
        """As `DnD.adapt`."""
        fields = {"mode": mode, "name": name, "top_k": top_k, "calibrate": calibrate}
        fields |= {"role": None if role is None else str(role)}
        # as a file: of one, servers take far more
        body = form_body(_given(fields), "prompts.jsonl", ({"prompt": text} for text in prompts.prompts))
        with Call(self.server, "POST", "/dnd/adapt", body, accept=_EVENTS) as call:
            for event, value in call.events():
                if event == "result" and isinstance(value, Mapping):
                    return read_adapted({**value, "notes": [*prompts.notes, *value.get("notes", ())]}, self.home)
        raise cut_off(self.server.url)

    def route(self, prompts: Sequence[str], *, role: Role | None = None) -> Routed:
        """As `DnD.route`."""
        body = _given({"prompts": list(prompts), "role": None if role is None else str(role)})
        with Call(self.server, "POST", "/dnd/route", json_body(body)) as call:
            return read_routed(call.object(), self.home)

    def check_adapter(self, adapter: str) -> None:
        """Raise what an answer by this adapter would raise: there is none of that name, or it is another base's."""
        with self._told_by_name(adapter), Call(self.server, "GET", f"/v1/models/{quote(f'dnd:{adapter}')}") as call:
            call.object()

    def close(self) -> None:
        """Nothing is held."""

    def __enter__(self) -> ServerClient:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _routed(self, prompt: Prompt, role: Role) -> str | None:
        """Who answers under a role: what the server routes by is the user's message alone."""
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        asked = next((str(m.get("content")) for m in reversed(messages) if m.get("role") == "user"), "")
        chosen = self.route([asked], role=role).adapter
        return None if chosen is None else chosen.name

    @contextmanager
    def _told_by_name(self, adapter: str | None) -> Iterator[None]:
        try:
            yield
        except AdapterNotFoundError:
            from dnd_sdk.adapters import AdapterStore

            if adapter is not None:
                AdapterStore(self.home).get(adapter)  # says what there is of a like name
            raise


def _given(body: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in body.items() if value is not None}

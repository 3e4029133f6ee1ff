"""What a vLLM server says of itself, as far as it can be asked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from dnd_sdk.engine.vllm_http import NoSuchPageError, Wire
from dnd_sdk.errors import BackendError, InputError

_WORD = "probe_offered"
_CHAT = [{"role": "user", "content": "probe"}]
_TOOL = {
    "type": "function",
    "function": {"name": _WORD, "description": "A probe.", "parameters": {"type": "object", "properties": {}}},
}


@dataclass(frozen=True)
class ServedBase:
    """The base of one server."""

    name: str
    """What requests call it."""
    root: str
    """The folder or hub id that it was loaded from, as the server sees it."""
    context_tokens: int
    version: str | None
    """vLLM's; None: not told."""
    has_chat_template: bool
    shows_tools: bool
    """Whether its chat template takes tools up; whatever cannot be asked is taken for yes."""


async def read_base(wire: Wire) -> ServedBase:
    """Ask for all of it; raises `BackendError` for a server that cannot be reached or is no vLLM, and when it serves
    no base.
    """
    card = await base_card(wire)
    name = str(card["id"])
    plain = await _rendered(wire, {"model": name, "messages": _CHAT})
    offered = await _rendered(wire, {"model": name, "messages": _CHAT, "tools": [_TOOL]})
    try:
        version = (await wire.get("/version")).get("version")
    except NoSuchPageError:
        version = None
    return ServedBase(
        name=name,
        root=str(card.get("root") or name),
        context_tokens=int(card.get("max_model_len") or 2**31),
        version=None if version is None else str(version),
        has_chat_template=plain != 0,
        shows_tools=plain is None or (plain > 0 and (offered or 0) > plain),
    )


async def base_card(wire: Wire) -> dict[str, Any]:
    """The base in its list of models: the first one that is no adapter. Raises `BackendError`."""
    models = (await wire.get("/v1/models")).get("data")
    listed = models if isinstance(models, list) else []
    bases = [m for m in listed if isinstance(m, dict) and isinstance(m.get("id"), str) and not m.get("parent")]
    if not bases:
        raise BackendError(f"{wire.url} serves no base model", fix="give the url of a vLLM")
    return bases[0]


async def token_ids(wire: Wire, name: str, text: str) -> list[int] | None:
    """The tokens of a text without special ones; None: the server does not tell."""
    try:
        answer = await wire.post("/tokenize", {"model": name, "prompt": text, "add_special_tokens": False})
    except NoSuchPageError:
        return None
    tokens = answer.get("tokens")
    return [int(t) for t in tokens] if isinstance(tokens, list) else None


async def _rendered(wire: Wire, body: dict[str, Any]) -> int | None:
    """Tokens of a chat; 0: its template refuses it or there is none."""
    try:
        return await n_tokens(wire, body)
    except InputError:
        return 0


async def n_tokens(wire: Wire, body: dict[str, Any]) -> int | None:
    """Tokens of a chat with its tools; None: the server does not tell. Raises `InputError` for what it refuses."""
    try:
        count = (await wire.post("/tokenize", body)).get("count")
    except NoSuchPageError:
        return None
    return count if isinstance(count, int) else None

"""A `VllmBackend` over the stub: adapters for it, and requests."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from engine_parts import tiny_base, tiny_layout
from stub_vllm import written

from dnd_sdk.adapters import Adapter
from dnd_sdk.config import SamplingOptions
from dnd_sdk.engine import CompletionRequest, Generation, VllmBackend

LAYOUT = tiny_layout(tiny_base())
ADD = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}
CHAT = "/v1/chat/completions"


def stored(root: Path, i: int, name: str | None = None) -> Adapter:
    """The `i`-th adapter, in a folder of its name."""
    name = name or f"adapter-{i}"
    adapter = Adapter(name, f"{i:x}".ljust(64, "a"), root / name, "trained", "2026-01-01T00:00:00+00:00", "f", "d")
    return replace(adapter, path=written(root, adapter, LAYOUT))


def hold(backend: VllmBackend, i: int) -> Adapter:
    adapter = stored(backend.served.parent / "store", i)
    backend.hold(adapter, lambda: None)  # type: ignore[arg-type, return-value]
    return adapter


def ask(adapter: Adapter | None = None, chat: Any = "hello there", **more: Any) -> CompletionRequest:
    options = {k: more.pop(k) for k in list(more) if k in SamplingOptions.__dataclass_fields__}
    return CompletionRequest(chat, None if adapter is None else adapter.id, SamplingOptions(**options), **more)


def answer(backend: VllmBackend, request: CompletionRequest) -> Generation:
    return backend.complete([request])[0]


def said_by(adapter: Adapter | None) -> str:
    return "base" if adapter is None else adapter.id[:20]

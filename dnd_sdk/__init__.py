"""dnd_sdk: prompts in, a task LoRA out, hot-swapped on one resident LLM.

Names resolve on first use, so importing the package loads neither torch nor faiss.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dnd_sdk.adapters import Adapter, AdapterStore
    from dnd_sdk.config import Home, SamplingOptions
    from dnd_sdk.errors import DndError
    from dnd_sdk.generator import Generator
    from dnd_sdk.lora_layout import LoraLayout
    from dnd_sdk.roles import Role
    from dnd_sdk.session import DnD

__version__ = "0.1.0"

_HOMES = {
    "Adapter": "adapters",
    "AdapterStore": "adapters",
    "DnD": "session",
    "DndError": "errors",
    "Generator": "generator",
    "Home": "config",
    "LoraLayout": "lora_layout",
    "Role": "roles",
    "SamplingOptions": "config",
}

__all__ = ["Adapter", "AdapterStore", "DnD", "DndError", "Generator", "Home", "LoraLayout", "Role", "SamplingOptions"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'dnd_sdk' has no attribute {name!r}")
    return getattr(importlib.import_module(f"dnd_sdk.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])

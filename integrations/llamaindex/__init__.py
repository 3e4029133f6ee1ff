"""LlamaIndex on a resident `DnD`: `DnDLLM` answers with its adapters, `DnDEmbedding` embeds with its encoder.

`DnDFunctionCallingLLM` is a `DnDLLM` that also calls tools, on a base whose chat template renders them.

Names resolve on first use, so importing the package loads neither torch nor llama_index.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dnd_sdk.integrations.llamaindex.embedding import DnDEmbedding
    from dnd_sdk.integrations.llamaindex.function_calling import DnDFunctionCallingLLM
    from dnd_sdk.integrations.llamaindex.llm import DnDLLM

_HOMES = {"DnDEmbedding": "embedding", "DnDFunctionCallingLLM": "function_calling", "DnDLLM": "llm"}

__all__ = ["DnDEmbedding", "DnDFunctionCallingLLM", "DnDLLM"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])

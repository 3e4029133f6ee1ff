"""LlamaIndex on a resident `DnD`: `DnDLLM` answers with its adapters, `DnDEmbedding` embeds with its encoder.

`DnDFunctionCallingLLM` is a `DnDLLM` that also calls tools, on a base whose chat template renders them.

Names resolve on first use, so importing the package loads neither torch nor llama_index.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from dnd_sdk.integrations.lazy import lazy_names

if TYPE_CHECKING:
    from dnd_sdk.integrations.llamaindex.embedding import DnDEmbedding
    from dnd_sdk.integrations.llamaindex.function_calling import DnDFunctionCallingLLM
    from dnd_sdk.integrations.llamaindex.llm import DnDLLM

__all__ = ["DnDEmbedding", "DnDFunctionCallingLLM", "DnDLLM"]

__getattr__, __dir__ = lazy_names(
    __name__, {"DnDEmbedding": "embedding", "DnDFunctionCallingLLM": "function_calling", "DnDLLM": "llm"}
)

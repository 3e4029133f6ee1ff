"""LangChain and LangGraph on a resident `DnD`, in process: `DnDChat` is a chat model that answers with its adapters.

The name resolves on first use, so importing the package loads neither torch nor langchain_core.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dnd_sdk.integrations.langchain.chat import DnDChat

__all__ = ["DnDChat"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return getattr(importlib.import_module(f"{__name__}.chat"), name)
    except ModuleNotFoundError as e:
        if str(e.name).split(".")[0] != "langchain_core":
            raise
        from dnd_sdk.errors import MissingExtraError

        raise MissingExtraError("langchain-core is not installed", fix='pip install "dnd-sdk[langchain]"') from e


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])

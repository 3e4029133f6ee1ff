"""LangChain and LangGraph on a resident `DnD`, in process: `DnDChat` is a chat model that answers with its adapters.

The name resolves on first use, so importing the package loads neither torch nor langchain_core.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from dnd_sdk.integrations.lazy import lazy_names

if TYPE_CHECKING:
    from dnd_sdk.integrations.langchain.chat import DnDChat

__all__ = ["DnDChat"]

__getattr__, __dir__ = lazy_names(__name__, {"DnDChat": "chat"}, extra="langchain", needs=("langchain_core",))

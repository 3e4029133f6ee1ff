"""Adapters as data: one PEFT folder each, content-addressed, checked before use, safe for several processes."""

from __future__ import annotations

from dnd_sdk.adapters.adapter import Adapter, Problem
from dnd_sdk.adapters.store import AdapterStore

__all__ = ["Adapter", "AdapterStore", "Problem"]

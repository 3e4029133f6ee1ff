"""The facade: `DnD` and the values it returns."""

from __future__ import annotations

from dnd_sdk.session.loading import DEFAULT_GENERATOR
from dnd_sdk.session.results import AdaptResult, Completion, ObserveResult
from dnd_sdk.session.session import DnD
from dnd_sdk.session.stream import CompletionStream
from dnd_sdk.session.vetting import Limits

__all__ = ["DEFAULT_GENERATOR", "AdaptResult", "Completion", "CompletionStream", "DnD", "Limits", "ObserveResult"]

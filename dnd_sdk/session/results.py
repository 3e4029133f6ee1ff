"""The values a session returns: what a completion comes to, and what rooms below give under their own names."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from dnd_sdk.adaptation import AdaptResult as AdaptResult
from dnd_sdk.adaptation import Limits as Limits
from dnd_sdk.observing import ObserveResult as ObserveResult

if TYPE_CHECKING:
    from dnd_sdk.adaptation import Decision
    from dnd_sdk.adapters import Adapter
    from dnd_sdk.engine import FinishReason, Generation, TokenLogprob


@dataclass(frozen=True)
class Completion:
    """One answer."""

    text: str
    usage: dict[str, int]
    """`prompt_tokens` and `completion_tokens`."""
    adapter: str | None
    """Name of the adapter that answered; None: the base model."""
    decision: Decision
    """`"reuse"` with an adapter, `"base"` without."""
    finish_reason: FinishReason = "stop"
    """`"stop"`: end of turn or stop string; `"length"`: `max_new_tokens` reached; `"cancelled"`."""
    logprobs: tuple[TokenLogprob, ...] | None = None
    """Of its tokens, if `logprobs` asked for them."""


def completion(generation: Generation, adapter: Adapter | None) -> Completion:
    """The engine's generation as an answer of this adapter."""
    usage = {"prompt_tokens": generation.prompt_tokens, "completion_tokens": generation.completion_tokens}
    decision: Decision
    name, decision = (None, "base") if adapter is None else (adapter.name, "reuse")
    return Completion(generation.text, usage, name, decision, generation.finish_reason, generation.logprobs)

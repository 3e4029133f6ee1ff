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
class Chosen:
    """Who answers a prompt."""

    adapter: Adapter | None
    """None: the base."""
    score: float | None = None
    """Of the nearest adapter, where the prompt was routed by it; None: it was named, or nothing was compared."""


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
    score: float | None = None
    """Similarity to the nearest adapter, where the prompt was routed by it."""


def completion(generation: Generation, chosen: Chosen) -> Completion:
    """The engine's generation as an answer of whom was chosen."""
    usage = {"prompt_tokens": generation.prompt_tokens, "completion_tokens": generation.completion_tokens}
    decision: Decision
    name, decision = (None, "base") if chosen.adapter is None else (chosen.adapter.name, "reuse")
    return Completion(
        generation.text, usage, name, decision, generation.finish_reason, generation.logprobs, chosen.score
    )

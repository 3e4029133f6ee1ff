"""What a backend is asked: one value that carries all of it."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from dnd_sdk.config import SamplingOptions

if TYPE_CHECKING:
    from dnd_sdk.chat import Messages, Tools


@dataclass(frozen=True)
class CompletionRequest:
    """One chat to complete."""

    chat: Messages
    adapter_id: str | None = None
    """None: the base."""
    options: SamplingOptions = field(default_factory=SamplingOptions)
    """Its own: requests that are run together may differ in all of them."""
    tools: Tools | None = None
    """What the model may call; see `chat.prompt_ids`."""
    cancel: threading.Event | None = None
    """Ends this request within a token once it is set; None: nothing does."""

    deadline_s: float | None = None
    """Seconds, from when it is handed in, after which it ends as if cancelled; None: never."""
    may_clip: bool = False
    """Whether `max_new_tokens` becomes what the context leaves, where that is less, instead of an error."""

    @property
    def cancelled(self) -> bool:
        """Whether somebody asked for its end."""
        return self.cancel is not None and self.cancel.is_set()

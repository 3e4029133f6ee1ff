"""Who answers: what a session and the integrations ask of an engine, wherever its base may run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING, Protocol

from dnd_sdk.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

    from dnd_sdk.adapters import Adapter
    from dnd_sdk.engine.engine import Engine
    from dnd_sdk.engine.request import CompletionRequest
    from dnd_sdk.engine.stream import Emit, TextStream
    from dnd_sdk.engine.text import Generation
    from dnd_sdk.lora import LoraLayout


class Backend(Protocol):
    """One base with adapters; every method may be called from any thread."""

    @property
    def layout(self) -> LoraLayout:
        """Of its adapters."""

    @property
    def context_tokens(self) -> int:
        """Prompt and answer together cannot be longer."""

    @property
    def shows_tools(self) -> bool:
        """Whether the base gets to see tools; a request with `tools` raises `ConfigError` where it does not."""

    @property
    def has_chat_template(self) -> bool:
        """Whether the base was made for chats."""

    @property
    def local(self) -> Engine | None:
        """The engine of a base in this process, for what must look inside it; None: it runs elsewhere."""

    @property
    def n_running(self) -> int:
        """Requests that are being answered."""

    @property
    def n_waiting(self) -> int:
        """Requests that wait for others to end."""

    def resident(self) -> list[str]:
        """Ids of the adapters that are held, least recently used first."""

    def hold(self, adapter: Adapter, load: Callable[[], Tensor]) -> None:
        """Let requests name an adapter by its id; harmless when it is held.

        A backend takes what it needs: the adapter's folder, or its flat vector `(P,)` from `load`.
        Raises what `load` raises; nothing has changed then.
        """

    def pin(self, adapter_id: str, pinned: bool) -> None:
        """Keep an adapter that is held from giving way to others, or do so no longer.

        Raises `AdapterNotFoundError` when it is not held, `BankFullError` when too many are pinned.
        """

    def forget(self, adapter_id: str) -> None:
        """Free what is kept of an adapter, if it is held; `BankFullError` where a running request stands against it."""

    def complete(self, requests: Sequence[CompletionRequest]) -> list[Generation]:
        """Answer requests together, each as it would be answered alone, in their order.

        Raises `InputError` for a chat that cannot be used or that exceeds the context with its `max_new_tokens`,
        `ConfigError` for tools that would not be seen, `AdapterNotFoundError` for an adapter that is neither held nor
        known otherwise.
        """

    def submit(self, request: CompletionRequest, emit: Emit | None = None) -> Future[Generation]:
        """Hand one request in and return at once; bad requests raise here, as in `complete`.

        `emit` is told each new piece of text. Cancelling the future ends the request within a token. `emit` and the
        future's callbacks run in a thread of the backend's and must be quick.
        """

    def stream(self, request: CompletionRequest) -> TextStream:
        """Answer one request piece by piece; bad requests raise here, as in `complete`."""

    def close(self) -> None:
        """Free what is kept of all adapters that no request uses; the backend can be used on."""


def local_engine(backend: Backend, what: str) -> Engine:
    """The engine of a base in this process; raises `ConfigError` when it runs elsewhere, naming `what` needs it."""
    if backend.local is None:
        raise ConfigError(
            f"{what} needs the base in this process, it is served by {type(backend).__name__}",
            fix="use a session whose engine is the embedded one",
        )
    return backend.local

"""What a server refuses, as the error that the library would have raised."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dnd_sdk.errors import (
    AdapterCorruptError,
    AdapterNotFoundError,
    BackendError,
    BankFullError,
    BusyError,
    ConfigError,
    ContextLengthError,
    DndError,
    GeneratorError,
    InputError,
    LayoutMismatchError,
    ServerError,
    StorageError,
)

_KINDS: Mapping[str, type[DndError]] = {
    "adapter_not_found": AdapterNotFoundError,
    "model_not_found": AdapterNotFoundError,
    "context_length_exceeded": ContextLengthError,
    "adapter_corrupt": AdapterCorruptError,
    "layout_mismatch": LayoutMismatchError,
    "no_generator": GeneratorError,
    "invalid_input": InputError,
    "invalid_value": ConfigError,
    "busy": BusyError,
    "slots_full": BankFullError,
    "backend": BackendError,
    "storage": StorageError,
}
"""By the error's code."""
_ALONE = "--no-server works without the server"


def refusal(status: int, body: Mapping[str, Any]) -> DndError:
    """The error that an answer of this status tells."""
    told = body.get("error")
    if not isinstance(told, Mapping):
        return ServerError(f"the server answers with status {status} and no reason", fix=_ALONE)
    message, fix = told.get("message"), told.get("fix")
    kind = _KINDS.get(str(told.get("code")), ServerError)
    fixed = fix if isinstance(fix, str) else None
    return kind(str(message), fix=fixed or (_ALONE if kind is ServerError else None))

"""What a server refuses, as the error that the library would have raised."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from dnd_sdk.errors import AdapterNotFoundError, DndError, ServerError

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


def _coded(kind: type[DndError]) -> Iterator[type[DndError]]:
    """The kinds of error below this one that have a code of their own."""
    for inner in kind.__subclasses__():
        if "code" in vars(inner):
            yield inner
        yield from _coded(inner)


_KINDS: dict[str, type[DndError]] = {
    "model_not_found": AdapterNotFoundError,
    **{kind.code: kind for kind in _coded(DndError)},
}
"""By the error's code; the first is OpenAI's own word."""

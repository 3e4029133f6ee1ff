"""Which adapter a request names, so that it goes where that one is in memory already."""

from __future__ import annotations

import json

from dnd_sdk.adapters import AdapterStore
from dnd_sdk.config import MODEL_PREFIX
from dnd_sdk.errors import DndError

_ANSWERING = ("/v1/chat/completions", "/v1/completions")
_NOBODY = (f"{MODEL_PREFIX}auto", f"{MODEL_PREFIX}base")


def adapter_of(store: AdapterStore, path: str, body: bytes) -> str | None:
    """The id of the stored adapter that a request for text names; None: it names none, or nothing can be said.

    None costs an adapter's loading at most: who answers is decided by the replica, with its own reading of the body.
    """
    if path not in _ANSWERING:
        return None
    try:
        model = json.loads(body)["model"]
        return None if model in _NOBODY else store.get(model.removeprefix(MODEL_PREFIX)).id
    except (ValueError, RecursionError, LookupError, TypeError, AttributeError, DndError):
        return None

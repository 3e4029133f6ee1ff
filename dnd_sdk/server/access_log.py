"""The access log: one JSON object a line, through the logger `dnd_sdk.access`; no text of prompts unless asked."""

from __future__ import annotations

import json
import logging
from datetime import UTC, datetime

from starlette.types import Scope

log = logging.getLogger("dnd_sdk.access")


def log_access(scope: Scope, status: int, seconds: float) -> None:
    """Note one request that was answered."""
    if not log.isEnabledFor(logging.INFO):
        return
    client = scope.get("client")
    line = {
        "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
        "client": None if client is None else client[0],
        "method": scope["method"],
        "path": scope["path"][:200],
        "status": status,
        "ms": round(1000 * seconds),
        **scope.get("dnd", {}),
    }
    log.info("%s", json.dumps(line, ensure_ascii=True, default=str))

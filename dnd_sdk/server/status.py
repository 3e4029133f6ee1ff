"""`/health`, `/ready`, `/metrics`, `/dnd/status` and `/dnd/log`: how the server is and what it decided."""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import Annotated, Any

from fastapi import APIRouter, Query, Response
from fastapi.responses import PlainTextResponse
from prometheus_client import CONTENT_TYPE_LATEST

from dnd_sdk import __version__
from dnd_sdk.routing import read_decisions
from dnd_sdk.server.documented import FLAG, MAYBE_TEXT, NUMBER, TEXT, TEXTS, WHOLE, answers, listed, shaped
from dnd_sdk.server.problems import Problem, RequestError, without_paths
from dnd_sdk.server.service import Service, TheService
from dnd_sdk.session import DnD

router = APIRouter(tags=["status"])

_STATUS = {
    **{name: TEXT for name in ("version", "base", "encoder")},
    **{name: MAYBE_TEXT for name in ("generator", "device", "dtype", "slow_because")},
    **{name: WHOLE for name in ("context_tokens", "running", "waiting")},
    "resident": TEXTS,
    "uptime_s": NUMBER,
    "settings": shaped({"answer_tokens": WHOLE, "max_waiting": WHOLE, "needs_key": FLAG}),
}


@router.get("/health", responses=answers({"status": TEXT, "instance": TEXT, "version": TEXT}))
async def health(service: TheService) -> dict[str, Any]:
    """That it runs, and which one it is."""
    return {"status": "ok", "instance": service.instance, "version": __version__}


@router.get("/ready", responses=answers({"status": TEXT}))
async def ready(service: TheService) -> dict[str, Any]:
    """Whether it takes requests."""
    if service.stopping:
        raise RequestError(Problem(503, "the server is stopping", "server_error", None, "stopping"))
    service.check_room()
    return {"status": "ready"}


@router.get("/metrics", response_class=PlainTextResponse)
async def metrics(service: TheService) -> Response:
    """Counters and times, for Prometheus."""
    return Response(service.metrics.text(), media_type=CONTENT_TYPE_LATEST)


@router.get("/dnd/status", responses=answers(_STATUS))
async def status(service: TheService) -> dict[str, Any]:
    """What it serves, with what, and what it is doing."""
    return await service.run(lambda: _status(service))


@router.get("/dnd/log", responses=answers({"data": listed({})}))
async def decisions(service: TheService, limit: Annotated[int, Query(ge=1, le=1000)] = 100) -> dict[str, Any]:
    """The latest decisions of this home, newest first; they hold no prompt's text."""
    found, _ = await service.run(lambda: read_decisions(service.dnd.home.logs, last=limit))
    return {"data": [asdict(decision) for decision in reversed(found)]}


def _status(service: Service) -> dict[str, Any]:
    dnd, settings = service.dnd, service.settings
    local, engine = dnd.engine.local, dnd.engine
    return {
        "version": __version__,
        "base": service.base_id,
        "generator": None if dnd.generator is None else dnd.generator.id,
        "encoder": service.encoder_id,
        "device": None if local is None else str(local.base.model.device),
        "dtype": None if local is None else str(local.base.model.dtype).removeprefix("torch."),
        "context_tokens": engine.context_tokens,
        "n_slots": None if local is None else local.bank.n_slots,
        "resident": [_name_of(dnd, i) for i in engine.resident()],
        "running": engine.n_running,
        "waiting": engine.n_waiting,
        "uptime_s": round(time.monotonic() - service.started, 1),
        "settings": {
            "answer_tokens": settings.answer_tokens,
            "max_waiting": settings.max_waiting,
            "max_body_bytes": settings.max_body_bytes,
            "max_upload_bytes": settings.max_upload_bytes,
            "needs_key": bool(settings.keys),
            "sampling": {k: v for k, v in settings.sampling.items() if v is not None},
        },
        "slow_because": without_paths(local.slow_because) if local is not None and local.slow_because else None,
    }


def _name_of(dnd: DnD, adapter_id: str) -> str:
    """An adapter's name; of one that was removed and still is in a slot its id."""
    stored = dnd.store.with_id(adapter_id)
    return stored[-1].name if stored else adapter_id

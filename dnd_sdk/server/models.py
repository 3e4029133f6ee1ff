"""Model ids: the base's name or `dnd:base`, `dnd:auto`, `dnd:ADAPTER` or its bare name; for vectors the encoder's."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from fastapi import APIRouter

from dnd_sdk.adaptation import check_made_for, stored_for
from dnd_sdk.adapters import Adapter
from dnd_sdk.config import MODEL_PREFIX as PREFIX
from dnd_sdk.errors import AdapterNotFoundError, ConfigError
from dnd_sdk.server.documented import MAYBE_TEXT, TEXT, WHOLE, answers, listed
from dnd_sdk.server.problems import invalid, model_not_found
from dnd_sdk.server.service import Service, TheService
from dnd_sdk.session import AUTO, AdapterChoice

router = APIRouter(prefix="/v1/models", tags=["models"])

_ENTRY = {"id": TEXT, "object": TEXT, "created": WHOLE, "owned_by": TEXT, "root": TEXT, "parent": MAYBE_TEXT}


@router.get("", responses=answers({"object": TEXT, "data": listed(_ENTRY)}))
async def ls(service: TheService) -> dict[str, Any]:
    """Every id that a request may name."""
    return {"object": "list", "data": await service.run(lambda: _models(service))}


@router.get("/{model:path}", responses=answers(_ENTRY))
async def show(model: str, service: TheService) -> dict[str, Any]:
    """One of them."""
    return await service.run(lambda: _model(service, model))


def chosen_by(service: Service, model: str) -> AdapterChoice:
    """Whom a model id means; raises `RequestError` (404) for nobody."""
    dnd = service.dnd
    name = model.removeprefix(PREFIX)
    if model == service.base_id or model == f"{PREFIX}base":
        return None
    if model == PREFIX + AUTO:
        return AUTO
    if model == service.encoder_id:
        raise invalid(f"{model!r} makes embeddings and does not answer", "model", "model_not_found", 404)
    try:
        found = dnd.store.get(name)
    except (AdapterNotFoundError, ConfigError) as e:
        raise model_not_found(model) from e
    check_made_for(found, dnd.base)
    return found


def check_encoder(service: Service, model: str) -> None:
    """Raise `RequestError` (404) unless a model id is the encoder's."""
    if model != service.encoder_id:
        raise model_not_found(model)


def _models(service: Service) -> list[dict[str, Any]]:
    dnd, since = service.dnd, service.created
    base, encoder = service.base_id, service.encoder_id
    fixed = [_entry(base, since, base, None), _entry(PREFIX + AUTO, since, base, base)]
    made = [_adapter_entry(a, base) for a in stored_for(dnd.store, dnd.base)]
    return [*fixed, *made, _entry(encoder, since, encoder, None)]


def _model(service: Service, model: str) -> dict[str, Any]:
    base = service.base_id
    if model == service.encoder_id:
        return _entry(model, service.created, model, None)
    chosen = chosen_by(service, model)
    if isinstance(chosen, Adapter):
        return {**_adapter_entry(chosen, base), "id": model}
    return _entry(model, service.created, base, None if chosen is None else base)


def _adapter_entry(adapter: Adapter, base: str) -> dict[str, Any]:
    created = int(datetime.fromisoformat(adapter.created).timestamp())
    return _entry(PREFIX + adapter.name, created, adapter.name, base)


def _entry(model: str, created: int, root: str, parent: str | None) -> dict[str, Any]:
    return {"id": model, "object": "model", "created": created, "owned_by": "dnd", "root": root, "parent": parent}

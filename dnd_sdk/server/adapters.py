"""`/dnd/adapters`, and vLLM's calls to load and unload one, so that its operators feel at home."""

from __future__ import annotations

import tempfile
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Form, UploadFile
from fastapi.responses import PlainTextResponse
from pydantic import BaseModel

from dnd_sdk.adaptation import stored_for
from dnd_sdk.adapters import Adapter, check_name
from dnd_sdk.errors import AdapterNotFoundError, BankFullError
from dnd_sdk.server.documented import FLAG, MAYBE_TEXT, TEXT, WHOLE, answers, listed
from dnd_sdk.server.problems import invalid
from dnd_sdk.server.service import Service, TheService
from dnd_sdk.server.uploads import prompts_of, save_upload
from dnd_sdk.server.wire import Name

MAX_CONFIG_BYTES = 2**20

router = APIRouter(tags=["adapters"])

_SHOWN = {
    **{name: TEXT for name in ("name", "id", "source", "created")},
    **{name: MAYBE_TEXT for name in ("encoder", "role", "origin", "last_used")},
    **{name: WHOLE for name in ("bytes", "hits")},
    **{name: FLAG for name in ("resident", "pinned")},
}


class LoadLora(BaseModel):
    """vLLM's `POST /v1/load_lora_adapter`."""

    lora_name: Name
    lora_path: Name


class UnloadLora(BaseModel):
    """vLLM's `POST /v1/unload_lora_adapter`."""

    lora_name: Name


@router.get("/dnd/adapters", responses=answers({"data": listed(_SHOWN)}))
async def ls(service: TheService) -> dict[str, Any]:
    """All that are stored for this base."""
    return {"data": await service.run(partial(_ls, service))}


@router.get("/dnd/adapters/{name}", responses=answers(_SHOWN))
async def show(name: str, service: TheService) -> dict[str, Any]:
    """One of them."""
    return await service.run(lambda: _shown(service, service.dnd.store.get(name)))


@router.delete("/dnd/adapters/{name}", responses=answers({"name": TEXT, "deleted": FLAG}))
async def rm(name: str, service: TheService) -> dict[str, Any]:
    """Remove one from the store; requests that run with it end as they would."""
    return await service.run(partial(_rm, service, name))


@router.post("/dnd/adapters", status_code=201, responses=answers(_SHOWN, status=201))
async def import_(
    service: TheService,
    config: UploadFile,
    weights: UploadFile,
    name: Annotated[str | None, Form()] = None,
    prompts: UploadFile | None = None,
) -> dict[str, Any]:
    """Take in a PEFT LoRA: its `adapter_config.json`, its `adapter_model.safetensors`, and prompts of its task."""
    return await service.run_long(partial(_import, service, config, weights, name or None, prompts))


@router.put("/dnd/adapters/{name}/pin", responses=answers(_SHOWN))
async def pin(name: str, service: TheService) -> dict[str, Any]:
    """Keep one in its slot until it is unpinned."""
    return await service.run(partial(_pin, service, name, True))


@router.delete("/dnd/adapters/{name}/pin", responses=answers(_SHOWN))
async def unpin(name: str, service: TheService) -> dict[str, Any]:
    """Let it give way to others again."""
    return await service.run(partial(_pin, service, name, False))


@router.post("/v1/load_lora_adapter", response_class=PlainTextResponse)
async def load_lora(body: LoadLora, service: TheService) -> str:
    """Bring a stored adapter into a slot; a server's own paths cannot be named, `lora_path` is its name."""
    if body.lora_path != body.lora_name:
        raise invalid("lora_path must be the name of a stored adapter, and lora_name the same", "lora_path")
    await service.run(lambda: _held(service, body.lora_name))
    return f"Success: LoRA adapter '{body.lora_name}' added successfully."


@router.post("/v1/unload_lora_adapter", response_class=PlainTextResponse)
async def unload_lora(body: UnloadLora, service: TheService) -> str:
    """Free an adapter's slot; it stays stored."""
    await service.run(lambda: service.dnd.engine.forget(service.dnd.store.get(body.lora_name).id))
    return f"Success: LoRA adapter '{body.lora_name}' removed successfully."


def _ls(service: Service) -> list[dict[str, Any]]:
    dnd = service.dnd
    resident = set(dnd.engine.resident())
    return [_shown(service, a, resident) for a in stored_for(dnd.store, dnd.base)]


def _shown(service: Service, adapter: Adapter, resident: set[str] | None = None) -> dict[str, Any]:
    known = set(service.dnd.engine.resident()) if resident is None else resident
    use = service.use_of(adapter.name)
    return {
        "name": adapter.name,
        "id": adapter.id,
        "source": adapter.source,
        "created": adapter.created,
        "encoder": adapter.encoder,
        "n_prompts": adapter.n_prompts,
        "role": adapter.role,
        "origin": adapter.origin,
        "bytes": _size(adapter.path),
        "resident": adapter.id in known,
        "pinned": adapter.id in known and adapter.id in service.pinned,
        "hits": use.hits,
        "last_used": use.last,
    }


def _size(folder: Path) -> int:
    try:
        return sum(file.stat().st_size for file in folder.iterdir())
    except OSError:  # removed meanwhile
        return 0


def _held(service: Service, name: str) -> Adapter:
    adapter = service.dnd.store.get(name)
    service.dnd.make_resident(adapter)
    return adapter


def _pin(service: Service, name: str, pinned: bool) -> dict[str, Any]:
    if pinned:
        adapter = _held(service, name)
        try:
            service.dnd.engine.pin(adapter.id, True)
        except AdapterNotFoundError as e:  # all slots are in use, it waits for one
            raise BankFullError("no slot is free for it now", fix="try again when fewer requests run") from e
        service.pinned.add(adapter.id)
    else:
        adapter = service.dnd.store.get(name)
        _release(service, adapter)
    return _shown(service, adapter)


def _release(service: Service, adapter: Adapter) -> None:
    service.pinned.discard(adapter.id)
    with suppress(AdapterNotFoundError):  # in no slot: nothing to be kept there
        service.dnd.engine.pin(adapter.id, False)


def _rm(service: Service, name: str) -> dict[str, Any]:
    found = service.dnd.store.find(name)
    try:
        adapter: Adapter | None = service.dnd.store.get(found)
    except (AdapterNotFoundError, ValueError):  # a damaged one can be removed, too
        adapter = None
    service.dnd.store.rm(found)
    if adapter is not None and not service.dnd.store.with_id(adapter.id):
        _release(service, adapter)
        with suppress(BankFullError):  # a request still runs with it
            service.dnd.engine.forget(adapter.id)
    return {"name": found, "deleted": True}


def _import(
    service: Service, config: UploadFile, weights: UploadFile, name: str | None, prompts: UploadFile | None
) -> dict[str, Any]:
    if name is not None:
        check_name(name)
    notes: list[str] = []
    limit = service.settings.max_upload_bytes
    found = None if prompts is None else prompts_of(prompts, limit)
    with tempfile.TemporaryDirectory(prefix="dnd-") as folder:
        save_upload(config, Path(folder, "adapter_config.json"), MAX_CONFIG_BYTES)
        save_upload(weights, Path(folder, "adapter_model.safetensors"), limit)
        adapter = service.dnd.import_adapter(folder, name, found, note=notes.append)
    return {**_shown(service, adapter), "notes": notes}

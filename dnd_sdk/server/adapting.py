"""`/dnd/adapt`, `/dnd/route` and `/dnd/observe`: what the library calls do, over HTTP."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from functools import partial
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from pydantic import BaseModel, Field, TypeAdapter, ValidationError
from starlette.datastructures import UploadFile

from dnd_sdk.prompts import PromptSet, clean_prompts
from dnd_sdk.routing import decision_fields
from dnd_sdk.server.documented import MAYBE_TEXT, NUMBER, TEXT, TEXTS, WHOLE, answers, listed, shaped
from dnd_sdk.server.problems import invalid, problem_of
from dnd_sdk.server.service import Service, TheService, note
from dnd_sdk.server.uploads import prompts_of
from dnd_sdk.server.wire import MAX_PROMPTS, event
from dnd_sdk.session import AdaptResult

router = APIRouter(prefix="/dnd", tags=["dnd"])

Prompt = Annotated[str, Field(min_length=1)]
Prompts = Annotated[list[Prompt], Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True)]
Role = Annotated[str | None, Field(max_length=65_536)]


class AdaptOptions(BaseModel):
    """How to adapt; see `DnD.adapt`."""

    name: Annotated[str | None, Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,63}$")] = None
    mode: Literal["auto", "reuse", "generate", "merge"] = "auto"
    role: Role = None
    top_k: Annotated[int, Field(ge=1, le=16)] = 3
    calibrate: bool | None = None


class AdaptRequest(AdaptOptions):
    """`POST /dnd/adapt` as JSON."""

    prompts: Prompts


class FileOptions(AdaptOptions):
    """`POST /dnd/adapt` as a form, beside the file."""

    column: str = "prompt"
    field: str | None = None


class RouteRequest(BaseModel):
    """`POST /dnd/route`."""

    prompts: Prompt | Prompts
    role: Role = None


class ObserveRequest(BaseModel):
    """`POST /dnd/observe`."""

    prompt: Prompt


_NEIGHBOURS = listed({"name": TEXT, "score": NUMBER})
_DECIDED = {"decision": TEXT, "reason": TEXT, "neighbours": _NEIGHBOURS}
_ADAPTED = answers({**_DECIDED, "n_prompts": WHOLE, "timings_s": shaped({}), "notes": TEXTS}, streams=True)
_ROUTED = answers({**_DECIDED, "adapter": MAYBE_TEXT})
_OBSERVED = answers({"adapter": MAYBE_TEXT, "cluster": {}, "adapted": {}})
_FORM = {
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {"schema": AdaptRequest.model_json_schema()},
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["file"],
                    "properties": {
                        "file": {"type": "string", "format": "binary"},
                        **FileOptions.model_json_schema()["properties"],
                    },
                }
            },
        },
    }
}


@router.post("/adapt", openapi_extra=_FORM, responses=_ADAPTED)
async def adapt(request: Request, service: TheService) -> Response:
    """Make or find the adapter for prompts; as server-sent events where the client accepts them."""
    if request.headers.get("content-type", "").startswith("multipart/"):
        async with request.form(max_files=1, max_fields=16) as form:
            options: AdaptOptions = _checked(FileOptions, {k: v for k, v in form.items() if isinstance(v, str)})
            assert isinstance(options, FileOptions)
            file, limit = form.get("file"), service.settings.max_upload_bytes
            if not isinstance(file, UploadFile):
                raise invalid("the form has no file", "file")
            read = partial(prompts_of, file, limit, column=options.column, field=options.field)
            prompts = await service.run(read)
    else:
        options = _checked(AdaptRequest, await _json(request))
        assert isinstance(options, AdaptRequest)
        prompts = await service.run(partial(clean_prompts, options.prompts))
    adapting = _Adapting(service, prompts, options)
    note(request, n_prompts=len(prompts.prompts))
    if "text/event-stream" in request.headers.get("accept", ""):
        return StreamingResponse(
            adapting.events(), media_type="text/event-stream", headers={"cache-control": "no-store"}
        )
    result = await service.run_long(adapting.run)
    note(request, adapter=result.adapter and result.adapter.name)
    return JSONResponse(adapted(result))


@router.post("/route", responses=_ROUTED)
async def route(body: RouteRequest, service: TheService) -> dict[str, Any]:
    """Which adapter would serve these prompts; changes nothing."""
    found = await service.run(lambda: service.dnd.route(body.prompts, role=body.role))
    return {**decision_fields(found), "adapter": None if found.adapter is None else found.adapter.name}


@router.post("/observe", responses=_OBSERVED)
async def observe(body: ObserveRequest, service: TheService) -> dict[str, Any]:
    """Take in one prompt of a mixed stream; adapts to tasks that have shown enough of themselves."""
    seen = await service.run_long(lambda: service.dnd.observe(body.prompt))
    made = seen.adapted
    return {
        "adapter": None if seen.adapter is None else seen.adapter.name,
        "cluster": seen.cluster,
        "adapted": None if made is None else adapted(made),
    }


def adapted(result: AdaptResult) -> dict[str, Any]:
    """An adaptation as it is told."""
    made = result.adapter
    return {
        **result.to_dict(),
        **decision_fields(result),
        "adapter": None if made is None else {"name": made.name, "source": made.source},
        "notes": list(result.notes),
    }


class _Adapting:
    def __init__(self, service: Service, prompts: PromptSet, options: AdaptOptions) -> None:
        self._service, self._prompts, self._options = service, prompts, options
        self._loop = asyncio.get_running_loop()
        self._steps: asyncio.Queue[str | None] = asyncio.Queue()

    def run(self) -> AdaptResult:
        """In a thread of its own."""
        o = self._options
        result = self._service.dnd.adapt(
            self._prompts, o.mode, o.name, role=o.role, top_k=o.top_k, calibrate=o.calibrate, progress=self._tell
        )
        self._service.metrics.adaptations.labels(result.decision).inc()
        return result

    async def events(self) -> AsyncIterator[bytes]:
        """Its steps, then what came of it."""
        work = asyncio.create_task(self._service.run_long(self.run))
        work.add_done_callback(lambda _: self._steps.put_nowait(None))
        while (step := await self._steps.get()) is not None:
            yield event({"step": step}, "step")
        try:
            yield event(adapted(await work), "result")
        except Exception as error:
            yield event(problem_of(error).body, "error")

    def _tell(self, step: str) -> None:
        self._loop.call_soon_threadsafe(self._steps.put_nowait, step)


async def _json(request: Request) -> Any:
    if request.headers.get("content-type", "").partition(";")[0].strip() != "application/json":
        raise invalid("content-type must be application/json, or multipart/form-data with a file", status=415)
    try:
        return await request.json()
    except (ValueError, RecursionError) as e:
        raise invalid(f"the body is not JSON: {e}") from e


def _checked(kind: type[AdaptOptions], values: Any) -> Any:
    try:
        return TypeAdapter(kind).validate_python(values)
    except ValidationError as e:
        problem = e.errors()[0]
        place = ".".join(map(str, problem["loc"]))
        raise invalid(f"{place}: {problem['msg']}", place or None) from e

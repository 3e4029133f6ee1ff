"""The application: its routes, its errors, and what stands in front of them."""

from __future__ import annotations

from functools import partial
from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.types import ASGIApp

from dnd_sdk import __version__
from dnd_sdk.errors import DndError, brief, shown
from dnd_sdk.server import adapters, adapting, completing, models, pages, status
from dnd_sdk.server.documented import PROBLEMS, allowed, document
from dnd_sdk.server.guard import Guard, answer_of
from dnd_sdk.server.problems import Problem, RequestError, problem_of
from dnd_sdk.server.service import Service
from dnd_sdk.server.settings import ServerSettings
from dnd_sdk.session import DnD


def create_app(dnd: DnD, settings: ServerSettings | None = None) -> FastAPI:
    """A server of one session, for uvicorn or any ASGI server with one worker; the session stays the caller's."""
    service = Service(dnd, settings or ServerSettings())
    app = FastAPI(
        title="dnd", version=__version__, responses=PROBLEMS, docs_url=None, redoc_url=None, redirect_slashes=False
    )
    app.state.service = service
    app.openapi = partial(document, app, needs_key=bool(service.settings.keys))  # type: ignore[method-assign]
    for routes in (models, completing, adapting, adapters, status, pages):
        app.include_router(routes.router)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(DndError, _failed)
    app.add_exception_handler(RequestError, _failed)
    app.add_middleware(_guarding(service))
    return app


def _guarding(service: Service) -> Any:
    def guard(app: ASGIApp) -> Guard:
        return Guard(app, service.settings, note=service.answered, is_stopping=lambda: service.stopping)

    return guard


async def _invalid(request: Request, error: Exception) -> JSONResponse:
    """What pydantic finds wrong with a body, its deepest finding first: of several forms one was meant."""
    assert isinstance(error, RequestValidationError)
    problem = max(error.errors(), key=lambda p: len(p["loc"]))
    place = ".".join(str(part) for part in problem["loc"][1:] if not str(part).startswith(("list[", "function-")))
    message = f"{place or 'the body'}: {problem['msg']}, got {shown(problem.get('input'))}"
    return answer_of(Problem(400, brief(message), param=place[:200] or None, code="invalid_value"))


async def _http_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    headers = dict(error.headers or {})
    if error.status_code == 405:  # each route knows its own method only
        headers["Allow"] = allowed(request.app, request.url.path) or headers.get("Allow", "")
    return answer_of(Problem(error.status_code, brief(str(error.detail)), code=None, headers=headers))


async def _failed(request: Request, error: Exception) -> JSONResponse:
    return answer_of(problem_of(error))

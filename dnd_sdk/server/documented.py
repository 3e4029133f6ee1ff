"""What the OpenAPI document says of answers: their shapes, statuses and kinds of content."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from starlette.routing import compile_path

from dnd_sdk.server.guard import is_open

Schema = Mapping[str, Any]

TEXT: Schema = {"type": "string"}
MAYBE_TEXT: Schema = {"type": ["string", "null"]}
TEXTS: Schema = {"type": "array", "items": TEXT}
WHOLE: Schema = {"type": "integer"}
NUMBER: Schema = {"type": "number"}
FLAG: Schema = {"type": "boolean"}

_ERROR: dict[str, Any] = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
                "fix": {"type": "string"},
            },
        }
    },
}
_STATUSES = {
    400: "What was asked cannot be done",
    401: "The API key is missing or wrong",
    403: "Another host or site was meant",
    404: "No such model, adapter or route",
    405: "Another method is meant",
    408: "The request came in too slowly",
    409: "It contradicts what is there",
    413: "The request is too large",
    415: "Another content type is meant",
    422: "What was sent is damaged",
    429: "Too much waits; see Retry-After",
    500: "The server failed",
    503: "No slot is free, or the server is stopping",
}
PROBLEMS: dict[int | str, dict[str, Any]] = {
    code: {"description": text, "content": {"application/json": {"schema": _ERROR}}} for code, text in _STATUSES.items()
}
"""Of every route."""


def shaped(fields: Mapping[str, Schema]) -> Schema:
    """An object that has at least these fields."""
    return {"type": "object", "required": list(fields), "properties": dict(fields)}


def listed(fields: Mapping[str, Schema]) -> Schema:
    """A list of such objects."""
    return {"type": "array", "items": shaped(fields)}


def answers(
    fields: Mapping[str, Schema], *, status: int = 200, streams: bool = False
) -> dict[int | str, dict[str, Any]]:
    """A route's own answer; `streams`: it may also come as server-sent events."""
    content: dict[str, Any] = {"application/json": {"schema": shaped(fields)}}
    if streams:
        content["text/event-stream"] = {"schema": shaped({"data": TEXT})}  # of each event
    return {status: {"description": "Done", "content": content}}


def document(app: FastAPI, *, needs_key: bool) -> dict[str, Any]:
    """The OpenAPI document, made once; with keys it says which paths ask for one."""
    if app.openapi_schema is None:
        made = get_openapi(title=app.title, version=app.version, routes=app.routes)
        if needs_key:
            made.setdefault("components", {})["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
            for path, methods in made["paths"].items():
                for operation in methods.values():
                    operation["security"] = [] if is_open(path) else [{"key": []}]
        app.openapi_schema = made
    return app.openapi_schema


def allowed(app: FastAPI, path: str) -> str:
    """The methods that a path is documented with, for `Allow`; empty for a path that is not."""
    found = (methods for template, methods in app.openapi()["paths"].items() if compile_path(template)[0].match(path))
    return ", ".join(sorted({method.upper() for methods in found for method in methods}))

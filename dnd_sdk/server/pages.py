"""The page at `/` and its files. All are read once and known by name: no path of a request reaches the disk."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from hashlib import sha256
from importlib.resources import files

from fastapi import APIRouter, HTTPException, Request, Response

INDEX = "index.html"
CONTENT_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".svg": "image/svg+xml",
}
"""By suffix; a file of any other is not served."""
POLICY = "; ".join(
    (
        "default-src 'self'",
        "style-src 'self'",
        "script-src 'self'",
        "object-src 'none'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        # texts of strangers cannot become markup even by mistake: the browser refuses every sink that reads HTML
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    )
)
HEADERS = {
    # files import each other by plain names, so a new release must be seen at once: asked for each time, sent when new
    "Cache-Control": "no-cache",
    "Content-Security-Policy": POLICY,
    "Referrer-Policy": "no-referrer",
}

router = APIRouter(include_in_schema=False)


@dataclass(frozen=True)
class PageFile:
    """One file as it is sent."""

    content: bytes
    content_type: str
    etag: str
    """Quoted hash of the content."""


@router.api_route("/", methods=["GET", "HEAD"])
def index(request: Request) -> Response:
    """The page."""
    return _answer(request, INDEX)


@router.api_route("/page/{name}", methods=["GET", "HEAD"])
def page_file(request: Request, name: str) -> Response:
    """One of its files; 404 for any other name."""
    return _answer(request, name)


@cache
def page_files() -> dict[str, PageFile]:
    """The page's files by name."""
    folder = files(__package__ or "dnd_sdk.server") / "page"
    return {entry.name: _read(entry.name, entry.read_bytes()) for entry in folder.iterdir() if _type_of(entry.name)}


def _read(name: str, content: bytes) -> PageFile:
    return PageFile(content, _type_of(name), f'"{sha256(content).hexdigest()[:32]}"')


def _type_of(name: str) -> str:
    return CONTENT_TYPES.get(name[name.rfind(".") :], "")


def _answer(request: Request, name: str) -> Response:
    found = page_files().get(name)
    if found is None:
        raise HTTPException(404, f"the page has no file {name!r}")
    headers = {**HEADERS, "ETag": found.etag}
    known = request.headers.get("if-none-match", "")
    if found.etag in (tag.strip().removeprefix("W/") for tag in known.split(",")):
        return Response(status_code=304, headers=headers)
    return Response(found.content, media_type=found.content_type, headers=headers)

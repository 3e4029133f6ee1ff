"""Requests to a vLLM server and what it refuses, in our own errors; everything here runs in one event loop."""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from dnd_sdk.errors import (
    AdapterNotFoundError,
    BackendError,
    BusyError,
    ConfigError,
    ContextLengthError,
    DndError,
    InputError,
)

if TYPE_CHECKING:
    import httpx

CONNECT_S, CONTROL_S = 5.0, 300.0
"""For opening a connection, and for whatever is no answer of the base: an adapter may come from a slow disk."""
HEALTH_S, HEALTH_KEPT_S = 3.0, 1.0
"""For saying that it is well, and how long that counts."""
_MAX_CONNECTIONS = 512
_KEPT_S = 2.0
"""How long an idle connection is kept: vLLM closes them after 5 s, and one that closes just then would fail."""
_START_AGAIN = "start it again, or correct the url; requests succeed as soon as it answers"
_READ_LOG = "its log tells why"
_TOO_LONG = re.compile(
    r"maximum context length|max_tokens.{0,80}too large|maximum model length|longer than the|cannot be greater than",
    re.I,
)


class ModelNotServedError(AdapterNotFoundError):
    """The server knows no model of that name: it was started anew, or somebody unloaded it."""


class NoSuchPageError(BackendError):
    """The server has nothing at that path: it is of another version, was started without it, or is no vLLM."""


class Wire:
    """HTTP to one server."""

    def __init__(self, url: str, key: str | None, fix: str | None = None) -> None:
        """`url` is `http://HOST:PORT`, with or without `/v1`, or `unix:/PATH` of a socket; `fix` is what helps when the
        server fails or is gone, None: what helps with most. Raises `ConfigError` for a url that is none.
        """
        import httpx

        self.url = checked_url(url)
        self._gone_fix, self._failed_fix = fix or _START_AGAIN, fix or _READ_LOG
        path = _socket_of(self.url)
        self._base = self.url if path is None else "http://localhost"
        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        limits = httpx.Limits(max_connections=_MAX_CONNECTIONS, keepalive_expiry=_KEPT_S)
        # only where it is needed: one of our own would leave the environment's proxies out
        transport = None if path is None else httpx.AsyncHTTPTransport(limits=limits, uds=path)
        self._patient = httpx.Timeout(CONTROL_S, connect=CONNECT_S, read=None, pool=None)
        # how an answer is awaited is up to the caller: it may stay silent as long as the server is well
        self._client = httpx.AsyncClient(headers=headers, limits=limits, timeout=self._patient, transport=transport)
        self._quick = httpx.Timeout(HEALTH_S)
        self._control = httpx.Timeout(CONTROL_S, connect=CONNECT_S, pool=None)
        self._looking, self._looked, self._is_well = asyncio.Lock(), -HEALTH_KEPT_S, True

    async def get(self, path: str) -> dict[str, Any]:
        """The JSON object at `path`; raises as `post` does."""
        with self._told():
            response = await self._client.get(self._base + path, timeout=self._control)
        return self._object(response)

    async def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """What a request that is no completion is answered; a plain text is `{"text": ...}`.

        Raises `BackendError` for a server that cannot be reached or fails, our other errors for what it refuses.
        """
        with self._told():
            response = await self._client.post(self._base + path, json=body, timeout=self._control)
        return self._object(response)

    async def is_alive(self) -> bool:
        """Whether the server says, or said just now to whoever else waits for it, that it is well."""
        async with self._looking:
            if time.monotonic() - self._looked >= HEALTH_KEPT_S:
                self._is_well, self._looked = await self._look(), time.monotonic()
            return self._is_well

    async def _look(self) -> bool:
        import httpx

        try:
            response = await self._client.get(f"{self._base}/health", timeout=self._quick)
        except (httpx.HTTPError, OSError):
            return False
        return response.status_code < 500  # one in front of it may have no such page

    @asynccontextmanager
    async def events(self, path: str, body: dict[str, Any]) -> AsyncIterator[AsyncIterator[dict[str, Any]]]:
        """The objects of a streamed answer; leaving the context hangs up, which ends the server's work."""
        with self._told():
            request = self._client.build_request("POST", self._base + path, json=body)
            response = await self._client.send(request, stream=True)
            try:
                if response.status_code >= 400:
                    await response.aread()
                    raise self._refusal(response)
                yield self._read(response)
            finally:
                # to its end, also if whoever asks is cancelled meanwhile: httpx would leave the connection open
                await asyncio.shield(asyncio.ensure_future(response.aclose()))

    async def _read(self, response: httpx.Response) -> AsyncIterator[dict[str, Any]]:
        with self._told():
            async for line in _lines(response):
                if not line.startswith("data:"):
                    continue
                data = line[5:].strip()
                if data == "[DONE]":
                    return
                chunk = self._loads(data)
                if chunk.get("error") or chunk.get("object") == "error":
                    code = _detail(chunk).get("code")
                    raise refusal(code if isinstance(code, int) else 500, chunk, self.url, self._failed_fix)
                yield chunk
        raise BackendError(f"vLLM at {self.url} ended in the middle of an answer", fix=self._gone_fix)

    def _object(self, response: httpx.Response) -> dict[str, Any]:
        if response.status_code >= 400:
            raise self._refusal(response)
        if not response.headers.get("content-type", "").startswith("application/json"):
            return {"text": response.text}
        return self._loads(response.text)

    def _loads(self, text: str) -> dict[str, Any]:
        try:
            made = json.loads(text)
        except ValueError as e:
            raise BackendError(
                f"the server at {self.url} answers as no vLLM does: {text[:200]!r}", fix=self._gone_fix
            ) from e
        return made if isinstance(made, dict) else {"text": str(made)}

    def _refusal(self, response: httpx.Response) -> DndError:
        try:
            body = response.json()
        except ValueError:
            body = {}
        told = body if isinstance(body, dict) and body else {"message": response.text[:500]}
        return refusal(response.status_code, told, self.url, self._failed_fix)

    @contextmanager
    def _told(self) -> Iterator[None]:
        import httpx

        try:
            yield
        except DndError:
            raise
        except httpx.ConnectError as e:
            raise BackendError(f"vLLM at {self.url} cannot be reached: {e}", fix=self._gone_fix) from e
        except httpx.HTTPError as e:
            why = str(e) or type(e).__name__
            raise BackendError(f"vLLM at {self.url} does not answer to the end: {why}", fix=self._gone_fix) from e


async def _lines(response: httpx.Response) -> AsyncIterator[str]:
    """Whole lines; only a line feed ends one, while httpx also cuts at characters that JSON leaves as they are."""
    rest = b""
    async for piece in response.aiter_bytes():
        *lines, rest = (rest + piece).split(b"\n")
        for line in lines:
            yield line.decode(errors="replace")


def checked_url(url: str) -> str:
    """`http(s)://HOST[:PORT][/PATH]` without `/v1` and slashes at its end, or `unix:/PATH`; raises `ConfigError` for
    anything else.
    """
    if _socket_of(url) is not None:
        return url
    try:
        parts = urlsplit(url)
        good = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0 and not parts.query
    except ValueError:
        good = False
    if not good or "@" in url:
        raise ConfigError(f"url must be like http://127.0.0.1:8000, got {url[:80]!r}", fix="give the key as key")
    return url.rstrip("/").removesuffix("/v1").rstrip("/")


def _socket_of(url: str) -> str | None:
    """The path of the socket that a url names; None: it is another kind of url."""
    path = url.removeprefix("unix:")
    return path if path != url and path.startswith("/") else None


def refusal(status: int, body: dict[str, Any], url: str, failed_fix: str = _READ_LOG) -> DndError:
    """The error that an answer of this status tells; `failed_fix`: what helps when it failed."""
    said = str(_detail(body).get("message") or body.get("detail") or f"status {status}")
    if status in (401, 403):
        return BackendError(f"vLLM at {url} refuses the key: {said}", fix="give its --api-key as key or DND_KEY")
    if status == 404 and ("error" in body or body.get("object") == "error"):
        return ModelNotServedError(f"vLLM at {url}: {said}", fix="load the adapter again")
    if status == 404:
        return NoSuchPageError(f"the server at {url} has no such page: {said}", fix="give the url of a vLLM")
    if status in (429, 503):
        return BusyError(f"vLLM at {url} takes no more requests: {said}", fix="try again later")
    if status >= 500:
        return BackendError(f"vLLM at {url} failed: {said}", fix=failed_fix)
    if _TOO_LONG.search(said):
        return ContextLengthError(
            f"a prompt and its answer may have at most as many tokens as the base's context: {said}",
            fix="shorten the prompt or lower max_new_tokens",
        )
    fix = "start vLLM with --chat-template FILE" if "chat template" in said else None
    return InputError(f"vLLM at {url} refuses the request: {said}", fix=fix)


def _detail(body: dict[str, Any]) -> dict[str, Any]:
    """Where the message stands: under `error`, and in older versions at the top."""
    inner = body.get("error")
    return inner if isinstance(inner, dict) else {"message": inner} if isinstance(inner, str) else body

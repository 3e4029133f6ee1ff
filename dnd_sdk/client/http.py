"""Requests to a server of ours, by the standard library: importing an HTTP library takes as long as a whole command."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterable, Iterator, Mapping
from http.client import HTTPConnection, HTTPException, HTTPResponse
from typing import Any, NamedTuple
from urllib.parse import urlsplit

MAX_ANSWER_BYTES, MAX_LINE_BYTES = 64 * 2**20, 16 * 2**20


class Body(NamedTuple):
    """What a request sends."""

    kind: str
    """Its content type."""
    raw: bytes


class Event(NamedTuple):
    """One server-sent event."""

    name: str
    data: str


def connect(url: str, timeout_s: float) -> HTTPConnection:
    """An open connection to `http://HOST:PORT`; raises `OSError` within `timeout_s`, which holds for reading, too."""
    parts = urlsplit(url)
    connection = HTTPConnection(parts.hostname or "", parts.port, timeout=timeout_s)
    connection.connect()
    return connection


def get_json(url: str, path: str, *, timeout_s: float) -> dict[str, Any]:
    """What `GET path` answers to anybody; raises `OSError` for anything but a JSON object with status 200."""
    try:
        connection = connect(url, timeout_s)
        try:
            connection.request("GET", path)
            response = connection.getresponse()
            if response.status != 200:
                raise OSError(f"status {response.status}")
            return read_object(response)
        finally:
            connection.close()
    except HTTPException as e:
        raise OSError(f"no HTTP answer: {e!r}") from e


def read_object(response: HTTPResponse) -> dict[str, Any]:
    """The JSON object that an answer holds; raises `OSError`, and `HTTPException` where the answer ends too soon."""
    raw = response.read(MAX_ANSWER_BYTES + 1)
    if len(raw) > MAX_ANSWER_BYTES:
        raise OSError("the answer is too long")
    return object_of(raw)


def object_of(raw: bytes | str) -> dict[str, Any]:
    """The JSON object of this text; raises `OSError`."""
    try:
        data = json.loads(raw)
    except (ValueError, RecursionError) as e:
        raise OSError(f"the answer is not JSON: {str(e)[:200]}") from e
    if not isinstance(data, dict):
        raise OSError("the answer is no JSON object")
    return data


def read_events(response: HTTPResponse) -> Iterator[Event]:
    """The server-sent events of an answer, as they come; raises like `read_object`."""
    name, data = "message", ""
    while raw := response.readline(MAX_LINE_BYTES):
        if not raw.endswith(b"\n"):
            raise OSError("the answer ends within a line, or one is too long")
        field, _, value = raw.decode("utf-8", "replace").rstrip("\r\n").partition(":")
        if field == "data":
            data += value.removeprefix(" ")
        elif field == "event":
            name = value.removeprefix(" ")
        elif not field and not value and data:  # not a comment, which keeps the connection alive
            yield Event(name, data)
            name, data = "message", ""


def json_body(value: object) -> Body:
    """An object as JSON."""
    return Body("application/json", json.dumps(value).encode())


def form_body(fields: Mapping[str, object], file_name: str, rows: Iterable[object]) -> Body:
    """A form of these fields and a file of JSON lines."""
    edge = uuid.uuid4().hex
    file = b"".join(json.dumps(row).encode() + b"\n" for row in rows)
    parts = [(f'name="{name}"', str(value).encode()) for name, value in fields.items()]
    parts.append((f'name="file"; filename="{file_name}"', file))
    raw = b"".join(
        f"--{edge}\r\nContent-Disposition: form-data; {head}\r\n\r\n".encode() + data + b"\r\n" for head, data in parts
    )
    return Body(f"multipart/form-data; boundary={edge}", raw + f"--{edge}--\r\n".encode())

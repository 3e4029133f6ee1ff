"""Requests to a server of ours, by the standard library: importing an HTTP library takes as long as a whole command."""

from __future__ import annotations

import json
from http.client import HTTPConnection, HTTPException, HTTPResponse
from typing import Any
from urllib.parse import urlsplit

MAX_ANSWER_BYTES = 64 * 2**20
CONNECT_TIMEOUT_S = 3.0


def connect(url: str, timeout_s: float = CONNECT_TIMEOUT_S) -> HTTPConnection:
    """An open connection to `http://HOST:PORT`; raises `OSError` within `timeout_s`, which holds for reading, too."""
    parts = urlsplit(url)
    connection = HTTPConnection(parts.hostname or "", parts.port, timeout=timeout_s)
    connection.connect()
    return connection


def get_json(url: str, path: str, *, timeout_s: float, key: str | None = None) -> dict[str, Any]:
    """What `GET path` answers; raises `OSError` for anything but a JSON object with status 200."""
    connection = connect(url, timeout_s)
    try:
        connection.request("GET", path, headers=authorization(key))
        response = connection.getresponse()
        return read_object(response) if response.status == 200 else _refused(response)
    except HTTPException as e:
        raise OSError(f"no HTTP answer: {e!r}") from e
    finally:
        connection.close()


def authorization(key: str | None) -> dict[str, str]:
    """The header that shows the key; None: no header."""
    return {} if key is None else {"Authorization": f"Bearer {key}"}


def read_object(response: HTTPResponse) -> dict[str, Any]:
    """The JSON object that an answer holds; raises `OSError`."""
    raw = response.read(MAX_ANSWER_BYTES + 1)
    try:
        data = json.loads(raw) if len(raw) <= MAX_ANSWER_BYTES else None
    except (ValueError, RecursionError) as e:
        raise OSError(f"the answer is not JSON: {str(e)[:200]}") from e
    if not isinstance(data, dict):
        raise OSError("the answer is no JSON object")
    return data


def _refused(response: HTTPResponse) -> dict[str, Any]:
    raise OSError(f"status {response.status}")

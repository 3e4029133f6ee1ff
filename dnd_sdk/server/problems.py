"""Errors as OpenAI's clients know them: `{"error": {"message", "type", "param", "code"}}`.

No answer tells a path of this machine or holds a traceback: what is unexpected goes to the log.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from starlette.exceptions import HTTPException

from dnd_sdk.errors import (
    AdapterCorruptError,
    AdapterNotFoundError,
    BackendError,
    BankFullError,
    BusyError,
    ConfigError,
    DndError,
    GeneratorError,
    InputError,
    LayoutMismatchError,
    brief,
)

log = logging.getLogger(__name__)

RETRY_S = 2
"""Seconds after which whoever came to a full queue may try again."""

_INVALID = "invalid_request_error"
_ROOTS = "|".join(re.escape(name) for name in sorted(os.listdir(os.sep)))
_PART = r"[^\s/'\",:;]"
_PATH = re.compile(rf"(?<![\w.:/#])(?:~|/(?:{_ROOTS})(?![\w-]))(?:/{_PART}+)*/?|[A-Za-z]:\\\S+")
"""An absolute path begins with what lies in the root; a JSON pointer or a fraction does not."""


_hidden: set[str] = set()


class Problem(NamedTuple):
    """One error as it is sent."""

    status: int
    message: str
    type: str = _INVALID
    param: str | None = None
    code: str | None = None
    fix: str | None = None
    headers: Mapping[str, str] = {}

    @property
    def body(self) -> dict[str, Any]:
        """The object of the answer."""
        told = {"message": self.message, "type": self.type, "param": self.param, "code": self.code}
        return {"error": told if self.fix is None else {**told, "fix": self.fix}}


class RequestError(HTTPException):
    """What ends a request with this problem; of a kind that frameworks let through wherever it is raised."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        super().__init__(problem.status, problem.message)


_KINDS: tuple[tuple[type[DndError], int, str], ...] = (
    (AdapterNotFoundError, 404, _INVALID),
    (AdapterCorruptError, 422, _INVALID),
    (LayoutMismatchError, 409, _INVALID),
    (GeneratorError, 409, _INVALID),
    (InputError, 400, _INVALID),
    (ConfigError, 400, _INVALID),
    (BusyError, 429, "rate_limit_error"),
    (BankFullError, 503, "server_error"),
    (BackendError, 503, "server_error"),
    (DndError, 500, "server_error"),
)
"""The first that fits counts."""


def problem_of(error: BaseException) -> Problem:
    """How an error is told to a client."""
    if isinstance(error, RequestError):
        return error.problem
    for kind, status, name in _KINDS:
        if isinstance(error, kind):
            if status >= 500 and status != 503:
                log.error("a request failed: %s", error)
            headers = {"Retry-After": str(RETRY_S)} if status in (429, 503) else {}
            fix = None if error.fix is None else without_paths(error.fix)
            message = without_paths(error.message)
            return Problem(status, message, name, None, error.code, fix, headers)
    log.error("a request failed", exc_info=error)
    return Problem(500, "the server failed; its log says how", "server_error", None, "internal_error")


def hide(folder: str | os.PathLike[str]) -> None:
    """From now on nobody is told this path, though it may hold spaces and thus look like words."""
    if os.path.isabs(path := os.fspath(folder)):
        _hidden.add(path.rstrip(os.sep) + os.sep)


def without_paths(text: str) -> str:
    """The text with each absolute path cut to its last part."""
    for path in sorted(_hidden, key=len, reverse=True):
        text = text.replace(path, "").replace(path[:-1], path[:-1].rpartition(os.sep)[2])
    return _PATH.sub(lambda match: re.split(r"[/\\]", match[0].rstrip("/\\"))[-1], text)


def invalid(message: str, param: str | None = None, code: str | None = None, status: int = 400) -> RequestError:
    """An error of the request's own."""
    return RequestError(Problem(status, brief(message), param=param, code=code))


def model_not_found(name: str) -> RequestError:
    """No model of that id."""
    return RequestError(
        Problem(
            404,
            brief(f"the model {name[:200]!r} does not exist"),
            param="model",
            code="model_not_found",
            fix="GET /v1/models lists them",
        )
    )

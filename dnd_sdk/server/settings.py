"""What a server is started with."""

from __future__ import annotations

import hmac
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from dnd_sdk.config import SamplingOptions, flag, real_number, text_of, whole_number
from dnd_sdk.errors import ConfigError, shown

LOOPBACK = frozenset({"127.0.0.1", "localhost", "::1"})
EVERYWHERE = frozenset({"0.0.0.0", "::"})

_KEY = re.compile(r"(?:(?P<name>[A-Za-z0-9._-]{1,64})=)?(?P<key>[\x21-\x7e]{8,512})")
_HOST = re.compile(r"(?:\[(?P<address>[^\[\]]*)\]|(?P<name>[^:]*))(?::\d*)?")


@dataclass(frozen=True)
class ServerSettings:
    """Where a server listens, whom it answers and how much it takes; checked when made (`ConfigError`)."""

    host: str = "127.0.0.1"
    port: int = 8000
    """0: any that is free."""
    api_keys: Sequence[str] = ()
    """`KEY` or `NAME=KEY`; one of them must come with each request. None given: any request is answered."""
    allowed_hosts: Sequence[str] = ()
    """Names by which requests may call this host, beside its own; `*` is any."""
    answer_tokens: int = 1024
    """What an answer may take where its request does not say."""
    sampling: Mapping[str, Any] = field(default_factory=dict)
    """Fields of `SamplingOptions` where a request does not say; `answer_tokens` stands for `max_new_tokens`."""
    max_waiting: int = 256
    """Requests that may wait for others; further ones are told to come later."""
    max_body_bytes: int = 4 * 2**20
    """Of a request without files."""
    max_upload_bytes: int = 256 * 2**20
    """Of a request with files: prompts or an adapter."""
    body_timeout_s: float = 30.0
    """For the head and the body of a request to come in whole, and for a client to take what it is sent."""
    shutdown_s: float = 30.0
    """For running requests to end once the server is told to stop."""
    log_prompts: bool = False
    """Whether the access log holds what was asked and answered."""

    def __post_init__(self) -> None:
        text_of("host", self.host)
        whole_number("port", self.port, 0, 65_535)
        for name in ("answer_tokens", "max_body_bytes", "max_upload_bytes"):
            whole_number(name, getattr(self, name), 1)
        whole_number("max_waiting", self.max_waiting, 0)
        for name in ("body_timeout_s", "shutdown_s"):
            real_number(name, getattr(self, name), "above 0", lambda x: x > 0.0)
        flag("log_prompts", self.log_prompts)
        for name in ("api_keys", "allowed_hosts"):
            given = getattr(self, name)
            if isinstance(given, str) or not all(isinstance(item, str) and item for item in given):
                raise ConfigError(f"{name} must be a list of texts")  # a key is a secret: it is not shown
        SamplingOptions(**self.sampling)
        _ = self.keys
        if not self.is_local and not self.api_keys:
            raise ConfigError(
                f"host {shown(self.host)} can be reached from outside, and there is no key",
                fix="give --api-key (or DND_API_KEY), or listen on 127.0.0.1",
            )

    @property
    def is_local(self) -> bool:
        """Whether only this machine reaches it."""
        return self.host in LOOPBACK

    @cached_property
    def keys(self) -> dict[str, str]:
        """Keys by the names they are logged under."""
        keys: dict[str, str] = {}
        for i, text in enumerate(self.api_keys):
            found = _KEY.fullmatch(text)
            name = (found and found["name"]) or f"key-{i + 1}"
            if found is None or name in keys:
                raise ConfigError(
                    f"API key {i + 1} is not usable, or its name is taken",
                    fix="use KEY or NAME=KEY: 8 to 512 printable ASCII characters without spaces, each name once",
                )
            keys[name] = found["key"]
        return keys

    def key_name(self, key: str) -> str | None:
        """Whose key it is; None: nobody's. The time it takes tells nothing about the keys."""
        given = key.encode("utf-8", "surrogateescape")
        matches = [name for name, known in self.keys.items() if hmac.compare_digest(given, known.encode())]
        return matches[0] if matches else None

    def is_called(self, host: str) -> bool:
        """Whether a request's `Host` means this server."""
        name = _without_port(host)
        if "*" in self.allowed_hosts or name in self.allowed_hosts:
            return True
        return name in LOOPBACK or name == self.host or (self.host in EVERYWHERE and not self.allowed_hosts)


def _without_port(host: str) -> str:
    """`[::1]:80`, `::1`, `name:80` and `name` without port and brackets; what is neither as it is."""
    found = _HOST.fullmatch(host)
    return host.lower() if found is None else (found["address"] or found["name"]).lower()

"""Small frozen settings that several rows share; no torch, no environment except `DND_HOME` in `Home.find`."""

from __future__ import annotations

import operator
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, SupportsFloat, SupportsIndex, TypeVar

from dnd_sdk.errors import ConfigError, shown

_F = TypeVar("_F", bound=Callable[..., Any])

ENGINES = ("embedded", "vllm", "vllm-local")
"""What may run a session's base."""
ENGINE_OF = {"url": "vllm", "key": "vllm", "shared": "vllm", "vllm_args": "vllm-local"}
"""The options that only one of them takes."""

MODEL_PREFIX = "dnd:"
"""What begins the names by which a server's clients call adapters, `auto` and `base`."""

MAX_LOGPROBS = 20
"""The most likely tokens that can be asked for at each place."""

_MAX_PART, _MAX_PATH = 255, 4_095
"""Bytes of a file's name and characters of a path that usual systems take."""


@dataclass(frozen=True)
class Home:
    """The folder that holds everything the SDK keeps: adapters are data, the index and models can be made again."""

    root: Path

    @classmethod
    def find(cls, path: str | os.PathLike[str] | None = None) -> Home:
        """`path`, else `DND_HOME`, else the platform's user data folder. Creates nothing."""
        chosen = path if path not in (None, "") else os.environ.get("DND_HOME")
        if chosen not in (None, ""):
            return cls(path_of("home", chosen).absolute())
        from platformdirs import user_data_path

        return cls(user_data_path("dnd"))

    @property
    def adapters(self) -> Path:
        """One PEFT folder per adapter, named by the adapter."""
        return self.root / "adapters"

    @property
    def served(self) -> Path:
        """The adapters that an engine elsewhere reads, one folder per content: a cache, linked from the adapters."""
        return self.root / "served"

    @property
    def index(self) -> Path:
        """The FAISS index: a cache, rebuilt from the adapters' exemplars."""
        return self.root / "index"

    @property
    def logs(self) -> Path:
        """What was decided, for people and for `dnd logs --replay`."""
        return self.root / "logs"

    @property
    def streams(self) -> Path:
        """What `observe` has seen, one folder per base and encoder; holds prompts."""
        return self.root / "streams"

    @property
    def models(self) -> Path:
        """Embedded default weights, fetched and converted once."""
        return self.root / "models"


@dataclass(frozen=True)
class SamplingOptions:
    """How text is completed."""

    max_new_tokens: int = 128
    """Upper bound on generated tokens per completion."""
    temperature: float = 0.0
    """0 is greedy."""
    top_p: float = 1.0
    """Nucleus mass, used when temperature > 0."""
    top_k: int = 0
    """0 keeps every token."""
    seed: int | None = None
    """None draws fresh randomness."""
    stop: tuple[str, ...] = ()
    """Text is cut before the first of these."""
    min_p: float = 0.0
    """Tokens less likely than this share of the likeliest are left out, used when temperature > 0."""
    repetition_penalty: float = 1.0
    """Above 1, tokens of the prompt and the answer become less likely."""
    schema: str | None = None
    """JSON text of a schema that the answer is held to; `chat.checked_schema` makes it of a dict or a class."""
    logprobs: int | None = None
    """How many of the likeliest tokens are told beside each token's own log-probability; None tells nothing."""

    def __post_init__(self) -> None:
        """Raises `ConfigError` naming the field; what a whole number or a single stop string stands for is taken so."""
        checked = {
            "max_new_tokens": whole_number("max_new_tokens", self.max_new_tokens, 1),
            "temperature": real_number("temperature", self.temperature, "within 0..10", lambda x: 0.0 <= x <= 10.0),
            "top_p": real_number("top_p", self.top_p, "within (0, 1]", lambda x: 0.0 < x <= 1.0),
            "top_k": whole_number("top_k", self.top_k, 0),
            "min_p": real_number("min_p", self.min_p, "within 0..1", lambda x: 0.0 <= x <= 1.0),
            "repetition_penalty": real_number(
                "repetition_penalty", self.repetition_penalty, "within (0, 10]", lambda x: 0.0 < x <= 10.0
            ),
            "logprobs": None if self.logprobs is None else whole_number("logprobs", self.logprobs, 0, MAX_LOGPROBS),
            "seed": None if self.seed is None else whole_number("seed", self.seed, None),
            "stop": _strings("stop", self.stop),
            "schema": None if self.schema is None else _json_text("schema", self.schema),
        }
        for name, value in checked.items():
            object.__setattr__(self, name, value)


def whole_number(name: str, value: object, least: int | None, most: int | None = None) -> int:
    """`value` as an int within both bounds; raises `ConfigError` naming `name`."""
    # anything with __index__ is a whole number, numpy's and torch's included; True and False are none
    if isinstance(value, bool) or not isinstance(value, SupportsIndex):
        raise ConfigError(f"{name} must be a whole number, got {shown(value)}")
    try:
        number = operator.index(value)
    except TypeError as e:  # an array or tensor of several numbers, or of floats
        raise ConfigError(f"{name} must be a whole number, got {shown(value)}") from e
    if least is not None and number < least:
        raise ConfigError(f"{name} must be {least} or more, got {shown(number)}")
    if most is not None and number > most:
        raise ConfigError(f"{name} must be at most {most}, got {shown(number)}")
    return number


def one_of(name: str, value: object, known: Sequence[str]) -> str:
    """`value`, one of the strings in `known`; raises `ConfigError` naming `name`."""
    if not isinstance(value, str) or value not in known:
        raise ConfigError(f"{name} must be one of {', '.join(known)}, got {shown(value)}")
    return value


def text_of(name: str, value: object) -> str:
    """`value`, text or a path, as text that is not empty; raises `ConfigError` naming `name`."""
    text = os.fspath(value) if isinstance(value, os.PathLike) else value
    if not isinstance(text, str) or not text or len(text) > _MAX_PATH:
        raise ConfigError(f"{name} must be a name or a path, got {shown(text)}")
    return text


def flag(name: str, value: object) -> bool:
    """`value`, True or False; raises `ConfigError` naming `name`."""
    if not isinstance(value, bool):
        raise ConfigError(f"{name} must be True or False, got {shown(value)}")
    return value


def callable_of(name: str, value: _F | None) -> _F | None:
    """`value`, a function or None; raises `ConfigError` naming `name`."""
    if value is not None and not callable(value):
        raise ConfigError(f"{name} must be a function or None, got {shown(value)}")
    return value


def path_of(name: str, value: object) -> Path:
    """`value`, text or a path, as a path that may exist, `~` expanded; raises `ConfigError` naming `name`."""
    if not isinstance(value, str | os.PathLike):
        raise ConfigError(f"{name} must be a path, got {shown(value)}")
    text = os.fspath(value)
    if not isinstance(text, str) or not text or "\0" in text:
        raise ConfigError(f"{name} must be a path, got {shown(text)}")
    try:
        too_long = any(len(part) > _MAX_PART for part in os.fsencode(text).split(b"/"))
        if too_long or len(text) > _MAX_PATH:
            raise ConfigError(f"{name} is longer than any path, got {shown(text)}")
        return Path(text).expanduser()
    except (UnicodeEncodeError, RuntimeError) as e:  # half a surrogate pair; a `~` of nobody
        raise ConfigError(f"{name} must be a path, got {shown(text)}", fix="correct its spelling") from e


def real_number(name: str, value: object, bounds: str, within: Callable[[float], bool]) -> float:
    """`value` as a float that is `within` the `bounds` as words say them; raises `ConfigError` naming `name`."""
    if isinstance(value, bool | str | bytes) or not isinstance(value, SupportsFloat):
        raise ConfigError(f"{name} must be a number {bounds}, got {shown(value)}")
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError) as e:
        raise ConfigError(f"{name} must be a number {bounds}, got {shown(value)}") from e
    if not within(number):  # also refuses NaN
        raise ConfigError(f"{name} must be {bounds}, got {number}")
    return number


def _json_text(name: str, value: object) -> str:
    if not isinstance(value, str):
        raise ConfigError(f"{name} must be JSON text, got {shown(value)}", fix="use chat.checked_schema to make it")
    return value


def _strings(name: str, value: object) -> tuple[str, ...]:
    found = (value,) if isinstance(value, str) else value
    if not isinstance(found, list | tuple) or not all(isinstance(s, str) for s in found):
        raise ConfigError(f"{name} must be a string or a list of strings, got {shown(value)}")
    if not all(found):
        raise ConfigError(f"{name} strings must not be empty")
    return tuple(found)


PER_CALL = ("schema", "logprobs")
"""Sampling options that one call asks for; no setting."""

SAMPLING = tuple(f.name for f in fields(SamplingOptions) if f.name not in PER_CALL)
"""The names of the sampling options that can be set for all calls."""

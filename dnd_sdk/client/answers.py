"""What a server answers, checked, in the words of the library's own results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from dnd_sdk.config import Home
from dnd_sdk.errors import ServerError
from dnd_sdk.files import is_finite_number

T = TypeVar("T")


@dataclass(frozen=True)
class Answer:
    """One answer."""

    text: str
    usage: dict[str, int]
    """`prompt_tokens` and `completion_tokens`."""
    adapter: str | None
    """Name of the adapter that answered; None: the base."""
    decision: str
    finish_reason: str


@dataclass(frozen=True)
class StoredAdapter:
    """An adapter in the home that the server shares with whoever asks."""

    name: str
    path: Path
    source: str | None
    """None: not told."""


@dataclass(frozen=True)
class Routed:
    """As `routing.RouteDecision`, whose fields it has."""

    adapter: StoredAdapter | None
    decision: str
    score: float | None
    neighbours: Sequence[tuple[str, float]]
    reason: str
    probability: float | None
    in_distribution: float | None


@dataclass(frozen=True)
class Adapted(Routed):
    """As `adaptation.AdaptResult`, whose fields it has."""

    n_prompts: int
    notes: Sequence[str]
    timings_s: Mapping[str, float]


def read_routed(data: Mapping[str, Any], home: Home) -> Routed:
    """What `/dnd/route` answers; raises `ServerError`."""
    return Routed(**_decision(data, home))


def read_adapted(data: Mapping[str, Any], home: Home) -> Adapted:
    """What `/dnd/adapt` answers; raises `ServerError`."""
    timings = _of(data, "timings_s", dict)
    return Adapted(
        **_decision(data, home),
        n_prompts=_of(data, "n_prompts", int),
        notes=[str(line) for line in _of(data, "notes", list)],
        timings_s={str(step): _number(seconds, "timings_s") or 0.0 for step, seconds in timings.items()},
    )


def read_usage(data: object) -> dict[str, int]:
    """The numbers of tokens; raises `ServerError`."""
    told = data if isinstance(data, Mapping) else {}
    return {name: _of(told, name, int) for name in ("prompt_tokens", "completion_tokens")}


def _decision(data: Mapping[str, Any], home: Home) -> dict[str, Any]:
    return {
        "adapter": _adapter(data.get("adapter"), home),
        "decision": _of(data, "decision", str),
        "reason": _of(data, "reason", str),
        "neighbours": [_neighbour(item) for item in _of(data, "neighbours", list)],
        **{name: _number(data.get(name), name) for name in ("score", "probability", "in_distribution")},
    }


def _adapter(told: object, home: Home) -> StoredAdapter | None:
    if told is None:
        return None
    named = {"name": told} if isinstance(told, str) else told
    if not isinstance(named, Mapping):
        raise _unexpected("adapter")
    name, source = _of(named, "name", str), named.get("source")
    return StoredAdapter(name, home.adapters / name, source if isinstance(source, str) else None)


def _neighbour(item: object) -> tuple[str, float]:
    if not isinstance(item, Mapping):
        raise _unexpected("neighbours")
    return _of(item, "name", str), _number(item.get("score"), "score") or 0.0


def _of(data: Mapping[str, Any], name: str, kind: type[T]) -> T:
    value = data.get(name)
    if not isinstance(value, kind):
        raise _unexpected(name)
    return value


def _number(value: object, name: str) -> float | None:
    if value is not None and not is_finite_number(value):
        raise _unexpected(name)
    return value


def _unexpected(name: str) -> ServerError:
    return ServerError(
        f"the server answers without a proper {name!r}: it is of another version",
        fix="start it again: `dnd stop`, then `dnd serve`",
    )

"""Options of a constructor or of one call: known names only, one name each, checked before anything is loaded."""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import asdict
from typing import Any

from pydantic import ValidationError

from dnd_sdk.chat import checked_schema
from dnd_sdk.config import PER_CALL, SAMPLING, SamplingOptions
from dnd_sdk.errors import ConfigError, shown
from dnd_sdk.session.choosing import AdapterChoice, check_choice

ALIASES = {"max_tokens": "max_new_tokens"}
CALL_OPTIONS = (*SAMPLING, *PER_CALL, *ALIASES, "adapter")
"""What one call may set."""


def check_known(given: Iterable[str], known: Collection[str], owner: str) -> None:
    """Raise `ConfigError` for a name that `owner` does not have; the fix is the nearest one."""
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            raise ConfigError(
                f"{owner} has no option {name!r}; it has {', '.join(sorted(known))}",
                fix=f"use {near[0]}" if near else "leave it out",
            )


def renamed(given: Mapping[str, Any]) -> dict[str, Any]:
    """The options by their own names. Raises `ConfigError` when one is given under two names."""
    twice = [(other, name) for other, name in ALIASES.items() if other in given and name in given]
    if twice:
        raise ConfigError(f"{twice[0][0]} and {twice[0][1]} are the same option", fix=f"use {twice[0][1]} alone")
    return {ALIASES.get(name, name): value for name, value in given.items()}


def call_options(
    defaults: Mapping[str, Any], given: Mapping[str, Any], owner: str
) -> tuple[AdapterChoice, dict[str, Any]]:
    """The adapter and the sampling of one call of `owner`: what is given wins over `defaults`.

    None counts as not given, except for `adapter`, where it is the base. Raises `ConfigError`.
    """
    check_known(given, CALL_OPTIONS, f"a call of {owner}")
    own = {k: v for k, v in renamed(given).items() if v is not None or k == "adapter"}
    merged = {**defaults, **own}
    check_choice(merged["adapter"])
    if merged.get("schema") is not None:
        merged["schema"] = checked_schema(merged["schema"])
    own_or_default = {k: merged[k] for k in (*SAMPLING, *PER_CALL) if k in merged}
    return merged["adapter"], asdict(SamplingOptions(**own_or_default))


@contextlib.contextmanager
def as_config_error(owner: str) -> Iterator[None]:
    """Raise what pydantic finds wrong with the fields of `owner` as `ConfigError`."""
    try:
        yield
    except ValidationError as e:
        told = (f"{'.'.join(map(str, p['loc']))}: {p['msg']}, got {shown(p['input'])}" for p in e.errors()[:4])
        raise ConfigError(f"{owner} refuses {'; '.join(told)}") from e

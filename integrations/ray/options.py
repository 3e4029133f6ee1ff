"""What an application on Ray Serve is built with."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from typing import Any, NamedTuple

from pydantic import BaseModel, ConfigDict, Field

from dnd_sdk.config import Home
from dnd_sdk.errors import ConfigError
from dnd_sdk.server import ServerSettings
from dnd_sdk.settings import load_settings

_NAMES_OR_FOLDERS = ("base", "generator", "encoder")


class RayOptions(BaseModel):
    """How many replicas there are and what each may take; names are Ray's where Ray has the same."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    min_replicas: int = Field(1, ge=0)
    """0: none while nobody asks; the first request then waits until a base is loaded, up to `wait_s`."""
    max_replicas: int | None = Field(None, ge=1)
    """Ray starts as many as the traffic needs, up to these; as many as `min_replicas`, always, unless set."""
    target_ongoing_requests: float = Field(16.0, gt=0)
    """Requests of a replica that Ray aims at when it starts and ends replicas; a base answers 16 together."""
    max_ongoing_requests: int | None = Field(None, ge=1)
    """Requests that a replica takes at a time; a quarter more than is aimed at unless set, so that some are ready when
    others end. Further ones go to other replicas, even if these have to load the adapter.
    """
    num_cpus: float = Field(1.0, ge=0)
    """Of each replica, which also is its number of threads."""
    num_gpus: float = Field(0.0, ge=0)
    """Of each replica."""
    ingress_replicas: int = Field(1, ge=1)
    """Processes that take requests in and pass them on; they hold no base."""
    wait_s: float = Field(60.0, gt=0)
    """For a replica to take a request up, which then is refused as too many are."""

    @property
    def most_ongoing(self) -> int:
        """`max_ongoing_requests`, set or not."""
        return self.max_ongoing_requests or math.ceil(1.25 * self.target_ongoing_requests)


class Plan(NamedTuple):
    """Everything that is settled before Ray starts anything."""

    ray: RayOptions
    load: dict[str, Any]
    """Arguments of `DnD.load`: every replica's."""
    server: ServerSettings


def plan(options: Mapping[str, Any]) -> Plan:
    """`options` by name, a field of `RayOptions` or a setting of `dnd.toml`; what is not given is read as the command
    reads it, here and now: replicas look for no settings of their own.

    Raises `ConfigError` for a name that neither has or a bad value.
    """
    from dnd_sdk.session import as_config_error

    own = {name: value for name, value in options.items() if name in RayOptions.model_fields}
    with as_config_error("ray"):
        ray = RayOptions(**own)
    if ray.max_replicas is not None and ray.max_replicas < ray.min_replicas:
        raise ConfigError(f"max_replicas must be at least min_replicas, {ray.min_replicas}, got {ray.max_replicas}")
    if ray.min_replicas == 0 and ray.max_replicas is None:
        raise ConfigError("min_replicas=0 leaves no replica ever", fix="set max_replicas, too")
    settings = load_settings(**{name: value for name, value in options.items() if name not in own})
    load = settings.load_arguments()
    load |= {name: _absolute(load[name]) for name in _NAMES_OR_FOLDERS}
    load["home"] = str(Home.find(settings.home).root)
    return Plan(ray, load, ServerSettings(**settings.serving()))


def _absolute(name: str | None) -> str | None:
    """A folder by a path that replicas understand, too: they work in other folders."""
    return os.path.abspath(name) if name is not None and os.path.isdir(name) else name

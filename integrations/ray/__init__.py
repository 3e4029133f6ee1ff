"""Ray: `build`, `dnd serve` on Ray Serve with replicas asked by adapter, and `RayWorkers`, which share out work.

Both resolve on first use, so importing the package loads neither torch nor ray.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dnd_sdk.integrations.ray.deployments import build
    from dnd_sdk.integrations.ray.workers import RayWorkers

__all__ = ["RayWorkers", "build"]
_HOMES = {"RayWorkers": "workers", "build": "deployments"}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    except ImportError as e:  # also of a ray without Serve, and of a folder of that name
        if str(e.name).split(".")[0] not in ("ray", "fastapi", "starlette", "prometheus_client"):
            raise
        from dnd_sdk.errors import MissingExtraError

        raise MissingExtraError(f"{e.name} is not installed", fix='pip install "dnd-sdk[ray]"') from e


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])

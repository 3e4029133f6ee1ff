"""Ray: `build`, `dnd serve` on Ray Serve with replicas asked by adapter, and `RayWorkers`, which share out work.

Both resolve on first use, so importing the package loads neither torch nor ray.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from dnd_sdk.integrations.lazy import lazy_names

if TYPE_CHECKING:
    from dnd_sdk.integrations.ray.deployments import build
    from dnd_sdk.integrations.ray.workers import RayWorkers

__all__ = ["RayWorkers", "build"]

__getattr__, __dir__ = lazy_names(
    __name__,
    {"RayWorkers": "workers", "build": "deployments"},
    extra="ray",
    needs=("ray", "fastapi", "starlette", "prometheus_client"),
)

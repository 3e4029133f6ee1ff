"""A local Ray cluster that serves a tiny world, in processes of its own, for as long as a block lasts."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # before ray: nobody is told of a test
os.environ.setdefault("RAY_AUTH_MODE", "disabled")  # else a token is left in the user's folder

import ray
from ray import serve
from tiny_world import World

from dnd_sdk.integrations.ray import build

_OBJECTS_BYTES, _STARTS_S = 100 * 2**20, 180


class Cluster(NamedTuple):
    """A running application."""

    url: str

    def replicas(self) -> dict[str, int]:
        """Process ids of the replicas that are there, by name."""
        named = ray.util.list_named_actors(all_namespaces=True)
        names = [a["name"] for a in named if "#Replica#" in a["name"]]
        return {name.rpartition("#")[2]: pid for name in names if (pid := _pid_of(name)) is not None}

    def kill(self, n: int) -> list[str]:
        """End so many replicas' processes at once; their names."""
        found = list(self.replicas().items())[:n]
        for _, pid in found:
            os.kill(pid, signal.SIGKILL)
        return [name for name, _ in found]

    def wait_for(self, n: int) -> None:
        """Until so many replicas run and answer health checks."""

        def there() -> bool:
            found = serve.status().applications["default"].deployments["Replica"]
            return found.replica_states.get("RUNNING", 0) == n and len(self.replicas()) == n

        end = time.monotonic() + _STARTS_S
        while not there():
            assert time.monotonic() < end, serve.status()
            time.sleep(0.2)


def _pid_of(name: str) -> int | None:
    try:
        return ray.get(ray.get_actor(name, namespace="serve").__ray_call__.remote(lambda _: os.getpid()), timeout=20)
    except (ray.exceptions.RayError, ValueError, TimeoutError):  # it ends, or starts
        return None


@contextmanager
def cluster(world: World, *, num_cpus: int = 4, **options: Any) -> Iterator[Cluster]:
    """Serve a world on a free port of this machine; `options` as for `build`."""
    folder = tempfile.mkdtemp(prefix="dnd-ray-", dir="/tmp")  # short: sockets lie in it
    given = {"base": str(world.base), "generator": str(world.generator), "home": str(world.home.root), **options}
    try:
        ray.init(
            num_cpus=num_cpus,
            include_dashboard=False,
            object_store_memory=_OBJECTS_BYTES,
            log_to_driver=False,
            _temp_dir=folder,
        )
        try:
            port = _free_port()
            serve.start(http_options={"host": "127.0.0.1", "port": port})
            serve.run(build(given))
            yield Cluster(f"http://127.0.0.1:{port}")
        finally:
            serve.shutdown()
            ray.shutdown()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]

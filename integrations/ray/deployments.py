"""The two deployments: replicas, each a whole server of one session, and the ingress in front of them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import aclosing
from pathlib import Path
from typing import Any

from ray import serve
from ray.exceptions import (
    NodeDiedError,
    ObjectLostError,
    RayActorError,
    RayTaskError,
    TaskUnschedulableError,
    WorkerCrashedError,
)
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle
from starlette.applications import Starlette
from starlette.routing import Mount
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dnd_sdk.adapters import AdapterStore
from dnd_sdk.config import Home
from dnd_sdk.errors import DndError
from dnd_sdk.files import storage_errors
from dnd_sdk.integrations.ray.exchange import Request, answered
from dnd_sdk.integrations.ray.forwarding import Answer, Faults, Forwarding
from dnd_sdk.integrations.ray.options import RayOptions, plan
from dnd_sdk.server import Guard, ServerSettings

REPLICA, INGRESS = "Replica", "Ingress"
"""What Ray calls them, in its status, its metrics and the files that configure it."""
_MANY = 1_000_000
"""As good as no bound: what the ingress passes on is bounded where it is answered."""
_FAULTS = Faults(
    ended=(RayActorError, WorkerCrashedError, NodeDiedError, ObjectLostError),
    full=(BackPressureError,),
    failed=(RayTaskError, DeploymentUnavailableError, TaskUnschedulableError),
)


class Replica:
    """One base with its session, and the server's application around it."""

    def __init__(self, load: Mapping[str, Any], settings: ServerSettings) -> None:
        from dnd_sdk.server import create_app  # here: the ingress, of the same module, goes without torch
        from dnd_sdk.session import DnD

        self._dnd = DnD.load(**load)
        self._app = create_app(self._dnd, settings)
        self._tag = serve.get_replica_context().replica_tag.encode()
        local = self._dnd.engine.local
        n_held = (load["n_slots"] or _MANY) if local is None else local.bank.n_slots

        async def hold(adapter_id: str) -> None:
            await asyncio.to_thread(self._hold, adapter_id)

        # as many as there are slots, so that Ray knows of those adapters that are in one
        self._multiplexed = serve.multiplexed(hold, max_num_models_per_replica=n_held)

    async def answer(self, adapter: str, request: Request) -> AsyncIterator[list[Message]]:
        """The server's answer in batches, after an empty one; `adapter`: the id of the one it names, or empty."""
        yield []
        is_resident = adapter in self._dnd.engine.resident()
        if adapter:
            try:
                await self._multiplexed(adapter)
            except DndError:  # the server will say what is wrong with it
                adapter = ""
        told = [(b"x-dnd-replica", self._tag)]
        if adapter:
            told.append((b"x-dnd-resident", b"%d" % is_resident))
        async with aclosing(answered(self._app, request)) as batches:
            async for batch in batches:
                if batch[0]["type"] == "http.response.start":
                    batch[0]["headers"] = [*batch[0]["headers"], *told]
                yield batch

    async def check_health(self) -> None:
        """Raise what stands in the way of answering; a base that answers just now is not asked besides."""
        await asyncio.to_thread(self._check)

    def _check(self) -> None:
        dnd = self._dnd
        dnd.home.root.stat()  # a shared folder may go away, and be there on another machine
        if dnd.engine.local is not None and dnd.engine.n_running == dnd.engine.n_waiting == 0:
            dnd.complete("hi", max_new_tokens=1)

    def _hold(self, adapter_id: str) -> None:
        self._dnd.make_resident(self._dnd.store.get(adapter_id))

    def __del__(self) -> None:
        if hasattr(self, "_dnd"):
            self._dnd.close()


def _door() -> ASGIApp:
    """The ingress' application; made in its process, where Ray knows the object."""

    async def door(scope: Scope, receive: Receive, send: Send) -> None:
        ingress: Any = serve.get_replica_context().servable_object
        await ingress.answer(scope, receive, send)

    return Starlette(routes=[Mount("/", door)])


@serve.ingress(_door)
class Ingress:
    """Checks requests as the server does, and passes them to a replica that has their adapter."""

    def __init__(self, replicas: DeploymentHandle[Any], home: str, settings: ServerSettings, wait_s: float) -> None:
        self._replicas = replicas.options(stream=True)
        store, is_open = AdapterStore(Home.find(home)), bool(settings.keys)
        forwarding = Forwarding(self._ask, _FAULTS, store, wait_s=wait_s, is_open=is_open)
        self._app = Guard(forwarding, settings, note=_not_noted)

    async def answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        await self._app(scope, receive, send)

    def _ask(self, adapter: str, request: Request) -> Answer:
        answer: Answer = self._replicas.options(multiplexed_model_id=adapter).answer.remote(adapter, request)
        return answer


def _not_noted(scope: Scope, status: int, seconds: float) -> None:
    """Ray's own log has it, and the replica's what else is known of it."""


def build(options: Mapping[str, Any] | None = None) -> serve.Application:
    """The application, for `serve.run` and `serve run dnd_sdk.integrations.ray:build min_replicas=2`.

    `options` are fields of `RayOptions` and settings of `dnd.toml` by name; what is not given is read here from `DND_*`
    and the settings files. Raises `ConfigError`, or `StorageError` where the home cannot be created.
    """
    ray, load, server = plan(options or {})
    home = Path(load["home"])
    with storage_errors("creating the home folder", home):
        home.mkdir(parents=True, exist_ok=True)  # from now on a replica that does not see it is not well
    replicas = serve.deployment(
        name=REPLICA,
        ray_actor_options={"num_cpus": ray.num_cpus, "num_gpus": ray.num_gpus},
        max_ongoing_requests=ray.most_ongoing,
        max_queued_requests=max(1, server.max_waiting),
        graceful_shutdown_timeout_s=server.shutdown_s,
        **_how_many(ray),
    )(Replica)
    ingress = serve.deployment(
        name=INGRESS,
        ray_actor_options={"num_cpus": 0},
        max_ongoing_requests=_MANY,
        graceful_shutdown_timeout_s=server.shutdown_s,
        num_replicas=ray.ingress_replicas,
    )(Ingress)
    return ingress.bind(replicas.bind(load, server), load["home"], server, ray.wait_s)


def _how_many(ray: RayOptions) -> dict[str, Any]:
    if ray.max_replicas is None or ray.max_replicas == ray.min_replicas:
        return {"num_replicas": ray.min_replicas}
    return {
        "autoscaling_config": {
            "min_replicas": ray.min_replicas,
            "max_replicas": ray.max_replicas,
            "target_ongoing_requests": ray.target_ongoing_requests,
        }
    }

"""What adapters already stored cost whoever adds, removes, routes, adapts or lists: `dnd bench store`.

* A store of each size is made of small adapters with as many exemplars as real ones have, of the default width; rounds
  go over all sizes in turn, so that load that comes and goes slows all of them.
* Raw FAISS is `IndexFlatIP.search` over the same exemplars, five nearest of each prompt, in this process.
* Adapting is done with the stand-ins of `stand_in`: what is left to see is the SDK's own work.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dnd_sdk.adapters import MAX_EXEMPLARS, Adapter, AdapterStore
from dnd_sdk.bench.stand_in import WIDTH, router_of, stand_in
from dnd_sdk.bench.timing import host, in_turn, ratio
from dnd_sdk.config import Home
from dnd_sdk.errors import ConfigError
from dnd_sdk.session import DnD

SCHEMA_VERSION = 1
SIZES = (10, 100, 1000, 5000)
N_PROMPTS = 64
NEAREST = 5
"""Neighbours that raw FAISS is asked for."""
_SPREAD = 0.8
"""How far a made-up task's prompts are from its centre: their cosines are about 0.6."""
_QUERIES = 16
"""Prompt sets that are asked about in turn, each of another stored adapter's task."""
COMMANDS = ("ls", "show", "verify", "rm")
MODEL_STEPS = ("encode", "generate", "validate")
"""Steps of adapting that are the models' work."""


def bench_store(
    sizes: Sequence[int] = SIZES,
    *,
    repeats: int = 15,
    commands: bool = True,
    clock: Callable[[], float] = time.perf_counter,
    progress: Callable[[int, int, str], None] | None = None,
) -> dict[str, Any]:
    """Time a store of each size, in a temporary folder; the JSON-able report that `dnd bench store --json` prints.

    Args:
        sizes: adapters stored, each one or more.
        repeats: rounds per measurement.
        commands: whether `dnd adapters` is timed too, in processes of its own.
        clock: seconds, rising.
        progress: told what is done, of how much.

    Raises `ConfigError` for sizes or repeats below one.
    """
    if not sizes or min(sizes) < 1 or repeats < 1:
        raise ConfigError(f"sizes and repeats must be at least 1, got {list(sizes)} and {repeats}")
    with tempfile.TemporaryDirectory(prefix="dnd-bench-") as folder:
        stores = [_Stored(Home(Path(folder) / str(n)), n) for n in sorted(set(sizes))]
        n_all, n_done = sum(s.n for s in stores), 0
        for stored in stores:
            for _ in range(stored.n):
                stored.add()
                n_done += 1
                if progress is not None:
                    progress(n_done, n_all, "storing adapters")
        rounds = _timed(stores, repeats, clock)
        blocks = [_block(s, rounds[s.n], rounds[stores[0].n]) for s in stores]
        if commands:
            for stored, block in zip(stores, blocks, strict=True):
                block["commands_s"] = {name: _command(stored, name) for name in COMMANDS}
    return {
        "schema_version": SCHEMA_VERSION,
        "kind": "store",
        "width": WIDTH,
        "exemplars": MAX_EXEMPLARS,
        "n_prompts": N_PROMPTS,
        "repeats": repeats,
        "sizes": blocks,
        "machine": host(),
    }


def render_store(report: dict[str, Any]) -> str:
    """The report as a table for people."""
    lines = [
        "adapters   route set (FAISS)      route one (FAISS)   add    remove  first   adapt: all  own  (x smallest)"
    ]
    for b in report["sizes"]:
        lines.append(
            f"{b['n']:8d}  {b['route_set_ms']:7.2f} ms ({b['faiss_set_ms']:8.2f})  {b['route_one_ms']:6.2f} "
            f"({b['faiss_one_ms']:7.2f})  {b['add_ms']:6.2f}  {b['remove_ms']:6.2f}  {b['first_route_ms']:6.1f}  "
            f"{b['adapt_ms']:7.2f}  {b['adapt_own_ms']:6.2f}  ({b['adapt_over_smallest']:.2f})"
        )
    for b in report["sizes"]:
        if times := b.get("commands_s"):
            told = ", ".join(f"{name} {seconds:.2f} s" for name, seconds in times.items())
            lines.append(f"dnd adapters with {b['n']}: {told}")
    return "\n".join(lines)


class _Stored:
    """A store that a number of made-up adapters are put into, and plain FAISS over the same exemplars."""

    def __init__(self, home: Home, n: int) -> None:
        import faiss

        self.home, self.n = home, n
        self.dnd: DnD = stand_in(home)
        self._faiss = faiss.IndexFlatIP(WIDTH)
        self._n_made = self._n_asked = 0
        self._queries = [_task(i * n // _QUERIES, N_PROMPTS, seed=1) for i in range(_QUERIES)]
        self._passing: list[str] = []
        self.steps: list[dict[str, float]] = []
        """Seconds of each step of every adaptation."""

    def add(self) -> Adapter:
        """One more adapter; those of the first `n` are also given to FAISS."""
        vectors = _task(self._n_made, MAX_EXEMPLARS, seed=0)
        if self._n_made < self.n:
            self._faiss.add(vectors.numpy())
        parts = self.dnd
        adapter = parts.store.put(
            torch.randn(parts.layout.n_parameters, generator=_rng(self._n_made)) * 0.05,
            parts.layout,
            name=f"bench-{self._n_made}",
            base_name=parts.base.name,
            base_fingerprint=parts.base.fingerprint,
            source="generated",
            prompt_hash=f"{self._n_made:064x}",
            n_prompts=MAX_EXEMPLARS,
            exemplars=vectors,
            encoder=parts.encoder.name,
            encoder_fingerprint=parts.encoder.fingerprint,
        )
        self._n_made += 1
        return adapter

    def calls(self) -> dict[str, tuple[Callable[[], Any], Callable[[], Any]]]:
        """What is timed, by name, and what cleans up after it."""
        router, store = self.dnd.router, self.dnd.store

        def nothing() -> None: ...

        def add_and_route() -> None:
            self._passing.append(self.add().name)
            router.route_one(self._query(1))

        def remove_and_route() -> None:
            store.rm(self._passing.pop())
            router.route_one(self._query(1))

        return {
            "route_set": (lambda: router.route(self._query(N_PROMPTS)), nothing),
            "route_one": (lambda: router.route_one(self._query(1)), nothing),
            "faiss_set": (lambda: self._faiss.search(self._query(N_PROMPTS).numpy(), NEAREST), nothing),
            "faiss_one": (lambda: self._faiss.search(self._query(1).numpy(), NEAREST), nothing),
            "add": (add_and_route, nothing),
            "remove": (remove_and_route, nothing),
            "first_route": (self._first_route, nothing),
            "adapt": (self._adapt, self._forget),
        }

    def _query(self, n: int) -> Tensor:
        self._n_asked += 1
        return self._queries[self._n_asked % _QUERIES][:n]

    def _first_route(self) -> None:
        """As a new process asks: the store and the index are read from disk."""
        router = router_of(AdapterStore(self.home), self.dnd.encoder, self.dnd.base.fingerprint, self.home)
        router.route_one(self._query(1))

    def _adapt(self) -> None:
        self._n_asked += 1
        prompts = [f"{self._n_asked}: what is {i} and {self._n_asked}?" for i in range(N_PROMPTS)]
        result = self.dnd.adapt(prompts, mode="generate", calibrate=False)
        assert result.adapter is not None, result.reason
        self._passing.append(result.adapter.name)
        self.steps.append(result.timings_s)

    def _forget(self) -> None:
        name = self._passing.pop()
        self.dnd.engine.forget(self.dnd.store.get(name).id)
        self.dnd.store.rm(name)


def _timed(stores: Sequence[_Stored], repeats: int, clock: Callable[[], float]) -> dict[int, dict[str, list[float]]]:
    """Seconds by size and measurement, one after the other of these, all sizes in turn."""
    calls = {s.n: s.calls() for s in stores}
    rounds: dict[int, dict[str, list[float]]] = {s.n: {} for s in stores}
    for name in calls[stores[0].n]:
        for n, seconds in zip(
            calls, in_turn(*(c[name] for c in calls.values()), repeats=repeats, clock=clock), strict=True
        ):
            rounds[n][name] = seconds
    return rounds


def _block(stored: _Stored, rounds: dict[str, list[float]], smallest: dict[str, list[float]]) -> dict[str, Any]:
    n_timed = len(rounds["adapt"])
    own = [s["total"] - sum(s.get(step, 0.0) for step in MODEL_STEPS) for s in stored.steps[-n_timed:]]
    return {
        "n": stored.n,
        **{f"{name}_ms": 1e3 * statistics.median(seconds) for name, seconds in rounds.items()},
        "adapt_own_ms": 1e3 * statistics.median(own),
        "adapt_over_smallest": ratio(rounds["adapt"], smallest["adapt"]),
    }


def _command(stored: _Stored, name: str) -> float:
    """Seconds of one `dnd adapters` command in a process of its own, its start included."""
    names = [] if name in ("ls", "verify") else ["bench-0"]
    line = [sys.executable, "-m", "dnd_sdk.cli", "adapters", name, *names, "--home", str(stored.home.root), "--json"]
    start = time.perf_counter()
    subprocess.run(line, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    return time.perf_counter() - start


def _task(task: int, n: int, *, seed: int) -> Tensor:
    """`n` vectors (n, WIDTH) of a made-up task's prompts."""
    centre = torch.randn(WIDTH, generator=_rng(task))
    noise = torch.randn(n, WIDTH, generator=_rng(task + (seed << 32)))
    vectors = torch.nn.functional.normalize(centre, dim=0) + _SPREAD * noise / WIDTH**0.5
    return torch.nn.functional.normalize(vectors, dim=-1)


def _rng(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)

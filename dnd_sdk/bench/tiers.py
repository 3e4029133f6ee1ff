"""Which adapters are where: a trace of jobs replayed against slots, host memory and disk (`dnd bench tiers`).

* The rules are the engine's (`engine/slot_table.py`, `engine/host_tier.py`): the adapter used the longest ago loses its
  slot and is kept in host memory, from where the one kept the longest ago goes; what is in neither is read from disk.
* One adapter at a time is brought into a replica's slots: who finds his there waits for nobody, the others queue.
* Nothing is loaded here, neither a model nor torch: only who is where, with times and sizes measured elsewhere.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from dnd_sdk.config import flag, real_number, whole_number

SCHEMA_VERSION = 1
TIERS = ("slot", "host", "disk")
"""Where a job finds its adapter, the fastest first."""
ADAPTER_BYTES = 8_798_208
"""Of one packed adapter of the default base (`qwen2.5-coder-0.5b`, rank 8, all linear layers) in bfloat16."""
STORED_BYTES = 17_700_000
"""Of its folder, weights in float32."""
MAX_JOBS = 20_000_000


@dataclass(frozen=True)
class Deployment:
    """Who asks for what, and what there is to answer it with; raises `ConfigError` for values out of range."""

    adapters: int = 1_000_000
    """Stored adapters."""
    jobs: int = 1_000_000
    """Requests that are counted, one adapter each."""
    warm_up: int = 0
    """Requests before them that are not counted."""
    zipf: float = 1.0
    """The k-th most wanted adapter is asked for in proportion to `k ** -zipf`; 0: all alike."""
    replicas: int = 1
    """Processes that each have a base, slots and host memory of their own."""
    slots: int = 64
    """Adapters in each replica's slots."""
    host_bytes: int = 8 * 10**9
    """Host memory of each replica for adapters that lost their slot."""
    adapter_bytes: int = ADAPTER_BYTES
    """Of one adapter in a slot or in host memory."""
    stored_bytes: int = STORED_BYTES
    """Of one adapter on disk."""
    jobs_s: float = 10.0
    """Requests a second that come in, at random moments, for each replica."""
    host_ms: float = 0.3
    """From host memory into a slot."""
    disk_ms: float = 28.0
    """From disk into a slot, packing included."""
    affinity: bool = True
    """Whether each adapter has a replica of its own, as a hash of its name gives; False: any replica, at random."""
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("jobs", "replicas", "slots", "adapter_bytes", "stored_bytes"):
            whole_number(name, getattr(self, name), 1)
        for name in ("warm_up", "host_bytes", "seed"):
            whole_number(name, getattr(self, name), 0)
        whole_number("adapters", self.adapters, 1, 10**8)
        whole_number("jobs + warm_up", self.jobs + self.warm_up, 1, MAX_JOBS)
        for name in ("zipf", "host_ms", "disk_ms"):
            real_number(name, getattr(self, name), "from 0 on", lambda value: value >= 0)
        real_number("jobs_s", self.jobs_s, "above 0", lambda value: value > 0)
        flag("affinity", self.affinity)

    @property
    def loading_s(self) -> tuple[float, ...]:
        """How long an adapter takes into a slot, by where it was (`TIERS`)."""
        return 0.0, self.host_ms / 1e3, self.disk_ms / 1e3


class Replica:
    """Who is in the slots and the host memory of one process, by the engine's rules."""

    def __init__(self, n_slots: int, n_kept: int) -> None:
        """`n_kept` adapters fit in host memory."""
        self._n_slots, self._n_kept = n_slots, n_kept
        self._slots: OrderedDict[int, None] = OrderedDict()
        self._kept: OrderedDict[int, None] = OrderedDict()

    def use(self, adapter: int) -> int:
        """Bring an adapter into a slot; the index in `TIERS` of where it was."""
        if adapter in self._slots:
            self._slots.move_to_end(adapter)
            return 0
        tier = 2
        if adapter in self._kept:
            del self._kept[adapter]
            tier = 1
        if len(self._slots) == self._n_slots:
            self._keep(self._slots.popitem(last=False)[0])
        self._slots[adapter] = None
        return tier

    def _keep(self, loser: int) -> None:
        if self._n_kept:
            if len(self._kept) == self._n_kept:
                self._kept.popitem(last=False)
            self._kept[loser] = None


def trace(n_adapters: int, n_jobs: int, zipf: float, seed: int) -> np.ndarray:
    """The adapter (0: the most wanted) that each job asks for, `(n_jobs,)`."""
    shares = np.cumsum(np.arange(1, n_adapters + 1, dtype=np.float64) ** -zipf)
    drawn = np.random.default_rng(seed).random(n_jobs) * shares[-1]
    return np.minimum(np.searchsorted(shares, drawn), n_adapters - 1)


def simulate(deployment: Deployment) -> dict[str, Any]:
    """Replay a made-up trace; the JSON-able report that `dnd bench tiers --json` prints."""
    d = deployment
    n_all = d.warm_up + d.jobs
    asked = trace(d.adapters, n_all, d.zipf, d.seed)
    rng = np.random.default_rng([d.seed, 1])
    at = rng.integers(d.replicas, size=d.adapters)[asked] if d.affinity else rng.integers(d.replicas, size=n_all)
    times = np.cumsum(rng.exponential(1.0 / (d.jobs_s * d.replicas), n_all))
    found, waits = _replayed(d, asked.tolist(), at.tolist(), times.tolist())
    return _report(d, asked[d.warm_up :], at[d.warm_up :], found[d.warm_up :], waits[d.warm_up :])


def replay(asked: Sequence[int], n_slots: int, n_kept: int) -> list[int]:
    """Where one replica finds the adapter of each job, as indices in `TIERS`."""
    replica = Replica(n_slots, n_kept)
    return [replica.use(adapter) for adapter in asked]


def _replayed(d: Deployment, asked: list[int], at: list[int], times: list[float]) -> tuple[np.ndarray, np.ndarray]:
    """Of each job where its adapter was, and how many seconds passed until it was in a slot."""
    replicas = [Replica(d.slots, d.host_bytes // d.adapter_bytes) for _ in range(d.replicas)]
    takes, free_at = d.loading_s, [0.0] * d.replicas
    found, waits = np.zeros(len(asked), np.int8), np.zeros(len(asked))
    for job, (adapter, r, now) in enumerate(zip(asked, at, times, strict=True)):
        tier = replicas[r].use(adapter)
        if tier:
            free_at[r] = max(now, free_at[r]) + takes[tier]
            found[job], waits[job] = tier, free_at[r] - now
    return found, waits


def _report(d: Deployment, asked: np.ndarray, at: np.ndarray, found: np.ndarray, waits: np.ndarray) -> dict[str, Any]:
    n = {tier: int((found == i).sum()) for i, tier in enumerate(TIERS)}
    busiest = np.bincount(at, minlength=d.replicas).max() / d.jobs
    loading_s = np.bincount(at, np.choose(found, d.loading_s), d.replicas)
    return {
        "schema_version": SCHEMA_VERSION,
        "kind": "tiers",
        "deployment": asdict(d),
        "asked_for": len(np.unique(asked)),
        "hit_rates": {tier: n[tier] / d.jobs for tier in TIERS},
        "wait_ms": {name: 1e3 * float(np.percentile(waits, q)) for name, q in (("p50", 50), ("p99", 99), ("max", 100))},
        "moved_bytes": {
            "host_to_slots": (n["host"] + n["disk"]) * d.adapter_bytes,
            "disk_to_host": n["disk"] * d.stored_bytes,
        },
        "busiest_replica": {
            "jobs_over_mean": float(busiest * d.replicas),
            "loading_share": float(loading_s.max() * d.jobs_s * d.replicas / d.jobs),
        },
        "holds_bytes": {
            "slots_each": d.slots * d.adapter_bytes,
            "host_each": d.host_bytes // d.adapter_bytes * d.adapter_bytes,
            "disk": d.adapters * d.stored_bytes,
        },
    }


def render_tiers(report: dict[str, Any]) -> str:
    """The report as lines for people."""
    d, rates, wait, moved = (report[key] for key in ("deployment", "hit_rates", "wait_ms", "moved_bytes"))
    busiest, holds = report["busiest_replica"], report["holds_bytes"]
    by = "each adapter on one replica" if d["affinity"] else "jobs on any replica"
    return "\n".join(
        (
            f"jobs       {d['jobs']:,} of {report['asked_for']:,} adapters (of {d['adapters']:,}; Zipf {d['zipf']:g}), "
            f"{d['replicas']} x {d['jobs_s']:g} a second, {by}",
            f"found in   slots {rates['slot']:.1%}   host memory {rates['host']:.1%}   disk {rates['disk']:.1%}",
            f"wait       p50 {wait['p50']:.1f} ms   p99 {wait['p99']:.1f} ms   longest {wait['max']:.1f} ms",
            f"moved      {size(moved['host_to_slots'])} into slots, {size(moved['disk_to_host'])} from disk",
            f"busiest    {busiest['jobs_over_mean']:.2f} x the mean replica's jobs, "
            f"loads adapters {busiest['loading_share']:.1%} of the time",
            f"holds      slots {size(holds['slots_each'])} and host memory {size(holds['host_each'])} each, "
            f"disk {size(holds['disk'])}",
        )
    )


def size(n_bytes: int) -> str:
    """Bytes as people read them, in powers of a thousand."""
    scaled, unit = float(n_bytes), "B"
    for unit in ("B", "kB", "MB", "GB", "TB", "PB"):
        if scaled < 1000 or unit == "PB":
            break
        scaled /= 1000
    return f"{scaled:.3g} {unit}"

"""`PromptStream`: sorts an agent's mixed stream of prompts into tasks as they arrive, from their embeddings alone.

* Leader clustering with running sums: a prompt joins the nearest cluster if it is about as near to it as the cluster's
  own prompts are to each other, else it starts one. Uniform tasks thus stay narrow and varied ones may be wide.
* One task often starts as several clusters; they merge once what lies between them is like what lies within them.
* Memory is bounded: the least recently used cluster goes when there are too many, and each keeps a random sample of
  its prompts.
"""

from __future__ import annotations

import hashlib
import json
import logging
import random
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch  # noqa: TID253 - row 4 shares torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor  # noqa: TID253

from dnd_sdk.errors import AdapterNotFoundError, ConfigError, InputError
from dnd_sdk.routing.files import write_atomic
from dnd_sdk.routing.similarity import check_vectors

log = logging.getLogger(__name__)

FORMAT_VERSION = 1
STATE_FILE = "stream.json"
SUMS_FILE = "stream.safetensors"


@dataclass(frozen=True)
class StreamSettings:
    """How prompts are clustered; the defaults were tuned on mixed streams of the training tasks."""

    min_prompts: int = 32
    """A cluster of this size is ready to be adapted to."""
    join: float = 0.9
    """A prompt joins from this share of the cosine to be expected of a prompt of the cluster."""
    merge: float = 0.9
    """Two clusters merge from this ratio of mean cosine between them to mean cosine within."""
    merge_size: int = 8
    """Smaller clusters do not merge: too little is known about them."""
    usual_cosine: float = 0.4
    """Mean cosine between two prompts of a task, assumed until a cluster has shown its own."""
    min_cosine: float = 0.15
    """No cluster counts as more varied than this."""
    max_clusters: int = 256
    max_prompts: int = 128
    """Prompts kept per cluster."""

    def __post_init__(self) -> None:
        for name in ("min_prompts", "merge_size", "max_clusters", "max_prompts"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("join", "merge", "usual_cosine", "min_cosine"):
            if not 0.0 < getattr(self, name) <= 1.0:
                raise ConfigError(f"{name} must be within (0, 1], got {getattr(self, name)}")
        if self.min_prompts > self.max_prompts:
            raise ConfigError(f"min_prompts {self.min_prompts} is above max_prompts {self.max_prompts}")


class Observation(NamedTuple):
    """Where one prompt went."""

    cluster_id: int
    size: int
    """Prompts the cluster has seen."""
    ready: bool
    """True once per cluster: when it has reached `min_prompts`."""


@dataclass
class _Cluster:
    id: int
    n: int = 0
    ready: bool = False
    used: int = 0
    """When it last took in a prompt, in prompts of the stream."""
    prompts: list[str] = field(default_factory=list)


class PromptStream:
    """One agent's stream; every method may be called from any thread."""

    def __init__(self, settings: StreamSettings | None = None, *, encoder: str = "") -> None:
        """Start with nothing seen; `encoder` names where the embeddings come from, so saved state is not mixed up."""
        self.settings = settings or StreamSettings()
        self.encoder = encoder
        self._clusters: list[_Cluster] = []
        self._sums: Tensor | None = None
        """(clusters, C): row i is the sum of the vectors of cluster i."""
        self._next_id = 0
        self._seen = 0
        self._rng = random.Random(0)
        self._lock = threading.Lock()

    def add(self, prompt: str, vector: Tensor) -> Observation:
        """Take in one prompt with its normalised embedding, `(C,)` or `(1, C)`.

        Raises `InputError` for an embedding that is not finite, not normalised or of another width than before.
        """
        vector = vector.reshape(1, -1) if vector.dim() == 1 else vector
        with self._lock:
            v = check_vectors(vector, None if self._sums is None else self._sums.shape[1])
            if len(v) != 1:
                raise InputError(f"one prompt has one embedding, got {len(v)}")
            self._seen += 1
            row = self._merged(self._joined(prompt, v[0]))
            cluster = self._clusters[row]
            ready = not cluster.ready and cluster.n >= self.settings.min_prompts
            cluster.ready = cluster.ready or ready
            self._evict()
            return Observation(cluster.id, cluster.n, ready)

    def prompts(self, cluster_id: int) -> list[str]:
        """The kept prompts of a cluster; raises `AdapterNotFoundError` when it was merged into another or dropped."""
        with self._lock:
            for c in self._clusters:
                if c.id == cluster_id:
                    return list(c.prompts)
        raise AdapterNotFoundError(f"no cluster {cluster_id} in the stream")

    def sizes(self) -> dict[int, int]:
        """Prompts seen per cluster id."""
        with self._lock:
            return {c.id: c.n for c in self._clusters}

    def save(self, folder: Path) -> None:
        """Write the state as JSON and safetensors; raises `StorageError`."""
        with self._lock:
            data = save({} if self._sums is None else {"sums": self._sums.contiguous()})
            state = {
                "format_version": FORMAT_VERSION,
                "encoder": self.encoder,
                "next_id": self._next_id,
                "seen": self._seen,
                "clusters": [vars(c) for c in self._clusters],
                "sha256": hashlib.sha256(data).hexdigest(),
            }
            text = json.dumps(state)
        write_atomic(folder / SUMS_FILE, data)
        write_atomic(folder / STATE_FILE, text.encode())

    @classmethod
    def load(cls, folder: Path, settings: StreamSettings | None = None, *, encoder: str = "") -> PromptStream | None:
        """The saved stream, or None when there is none of this encoder or it is damaged: then start afresh."""
        stream = cls(settings, encoder=encoder)
        try:
            state = json.loads((folder / STATE_FILE).read_bytes())
            stream._restore(state, (folder / SUMS_FILE).read_bytes())
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, SafetensorError) as e:
            log.warning("the prompt stream in %s is not usable (%s), it starts afresh", folder, str(e)[:200])
            return None
        return stream

    def _restore(self, state: dict[str, Any], data: bytes) -> None:
        if (state["format_version"], state["encoder"]) != (FORMAT_VERSION, self.encoder):
            raise ValueError("it is of another encoder or version")
        if hashlib.sha256(data).hexdigest() != state["sha256"]:
            raise ValueError("its two files do not belong together")
        self._clusters = [_checked(_Cluster(**c)) for c in state["clusters"]]
        self._sums = load(data).get("sums")
        if len(self._clusters) != (0 if self._sums is None else len(self._sums)):
            raise ValueError("its clusters and sums do not match")
        self._next_id, self._seen = int(state["next_id"]), int(state["seen"])

    def _joined(self, prompt: str, v: Tensor) -> int:
        """Put the prompt into a cluster, old or new, and return its row."""
        row = self._nearest(v)
        if row is None:
            row = len(self._clusters)
            self._clusters.append(_Cluster(self._next_id))
            self._next_id += 1
            empty = torch.zeros(1, len(v))
            self._sums = empty if self._sums is None else torch.cat([self._sums, empty])
        assert self._sums is not None
        self._sums[row] += v
        cluster = self._clusters[row]
        cluster.n += 1
        cluster.used = self._seen
        self._keep(cluster, prompt)
        return row

    def _nearest(self, v: Tensor) -> int | None:
        """The row of the nearest of the clusters that `v` may join."""
        if self._sums is None or not self._clusters:
            return None
        n, within = self._counts(), self._within()
        cosines = (self._sums @ v) / self._sums.norm(dim=1)
        # of a fellow prompt to the sum of n: n * within / |sum|, with the sum's length as these figures predict it
        expected = n * within / (n + n * (n - 1) * within).sqrt()
        cosines[cosines < self.settings.join * expected] = -torch.inf
        best = int(cosines.argmax())
        return best if torch.isfinite(cosines[best]) else None

    def _counts(self) -> Tensor:
        return torch.tensor([float(c.n) for c in self._clusters])

    def _within(self) -> Tensor:
        """Mean cosine between two prompts of each cluster, drawn towards the usual while there are few."""
        assert self._sums is not None
        n, usual = self._counts(), self.settings.usual_cosine
        squared = self._sums.square().sum(dim=1)
        return ((squared - n + 2 * usual) / (n * (n - 1) + 2)).clamp(self.settings.min_cosine, 1.0)

    def _merged(self, row: int) -> int:
        """Merge the cluster in `row` with any it has grown alike to; returns where it is then."""
        while (other := self._alike(row)) is not None:
            a, b = self._clusters[row], self._clusters[other]
            # the one that may have an adapter keeps its id, else the larger
            into, gone = (row, other) if (a.ready, a.n) > (b.ready, b.n) else (other, row)
            self._absorb(into, gone)
            row = into - (gone < into)
        return row

    def _alike(self, row: int) -> int | None:
        assert self._sums is not None
        n, within = self._counts(), self._within()
        between = (self._sums @ self._sums[row]) / (n * n[row])
        ratio = between / (within * within[row]).sqrt()
        ratio[row] = -torch.inf
        ratio[n < self.settings.merge_size] = -torch.inf
        best = int(ratio.argmax())
        enough = n[row] >= self.settings.merge_size and ratio[best] >= self.settings.merge
        return best if enough else None

    def _absorb(self, into: int, gone: int) -> None:
        assert self._sums is not None
        kept, lost = self._clusters[into], self._clusters[gone]
        both = kept.prompts + lost.prompts
        kept.prompts = both if len(both) <= self.settings.max_prompts else self._sampled(kept, lost)
        kept.n += lost.n
        kept.used = max(kept.used, lost.used)
        self._sums[into] += self._sums[gone]
        self._drop(gone)

    def _sampled(self, a: _Cluster, b: _Cluster) -> list[str]:
        """A sample of both clusters' prompts in proportion to their sizes."""
        k = self.settings.max_prompts
        from_a = min(len(a.prompts), max(k - len(b.prompts), round(k * a.n / (a.n + b.n))))
        return self._rng.sample(a.prompts, from_a) + self._rng.sample(b.prompts, k - from_a)

    def _keep(self, cluster: _Cluster, prompt: str) -> None:
        """Reservoir sampling: every prompt the cluster has seen is equally likely to be kept."""
        if len(cluster.prompts) < self.settings.max_prompts:
            cluster.prompts.append(prompt)
        elif (at := self._rng.randrange(cluster.n)) < self.settings.max_prompts:
            cluster.prompts[at] = prompt

    def _evict(self) -> None:
        while len(self._clusters) > self.settings.max_clusters:
            self._drop(min(range(len(self._clusters)), key=lambda i: self._clusters[i].used))

    def _drop(self, row: int) -> None:
        assert self._sums is not None
        del self._clusters[row]
        self._sums = torch.cat([self._sums[:row], self._sums[row + 1 :]])


def _checked(c: _Cluster) -> _Cluster:
    numbers = all(isinstance(x, int) for x in (c.id, c.n, c.used, c.ready))
    if not numbers or c.n < max(1, len(c.prompts)) or not all(isinstance(p, str) for p in c.prompts):
        raise ValueError(f"its cluster {str(c.id)[:20]} is not one")
    return c

"""`PromptStream`: sorts an agent's mixed stream of prompts into tasks as they arrive, from their embeddings alone.

* Leader clustering with running sums: a prompt joins the nearest cluster if it is about as near to it as the cluster's
  own prompts are to each other, else it starts one. Uniform tasks thus stay narrow and varied ones may be wide.
* One task often starts as several clusters; they merge once what lies between them is like what lies within them.
* Memory is bounded: the least recently fed cluster goes when there are too many, and each keeps a random sample of its
  prompts with their embeddings. The sample never decides where a prompt goes, only the sums do.
"""

from __future__ import annotations

import random
import threading
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch  # noqa: TID253 - row 4 shares torch
from torch import Tensor  # noqa: TID253

from dnd_sdk.errors import AdapterNotFoundError, ConfigError, InputError
from dnd_sdk.routing import check_vectors

MAX_KEPT_CHARS = 8192
"""Of a longer prompt its first and last half are kept."""


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
    max_prompts: int = 64
    """Prompts kept per cluster, each with its embedding."""

    def __post_init__(self) -> None:
        for name in ("min_prompts", "merge_size", "max_clusters", "max_prompts"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("join", "merge", "usual_cosine", "min_cosine"):
            if not 0.0 < getattr(self, name) <= 1.0:
                raise ConfigError(f"{name} must be within (0, 1], got {getattr(self, name)}")
        if self.min_prompts > self.max_prompts:
            raise ConfigError(f"min_prompts {self.min_prompts} is above max_prompts {self.max_prompts}")


class Choice(NamedTuple):
    """What serves a cluster."""

    decision: Literal["reuse", "generate", "base"]
    adapter_id: str | None
    """None: the base."""
    final: bool = True
    """False: chosen from few prompts, to be chosen again once the cluster is of full size."""


class Observation(NamedTuple):
    """Where one prompt went."""

    cluster_id: int
    size: int
    """Prompts the cluster has seen."""
    choice: Choice | None
    """What serves the cluster; None: nothing was chosen yet."""
    chosen_at: int
    """Its size when the choice was made."""


@dataclass
class Cluster:
    """One task, or a part of one."""

    id: int
    n: int = 0
    """Prompts seen."""
    used: int = 0
    """When it last took in a prompt, in prompts of the stream."""
    prompts: list[str] = field(default_factory=list)
    vectors: list[Tensor] = field(default_factory=list)
    """`(C,)` each, of `prompts`."""
    choice: Choice | None = None
    chosen_at: int = 0

    @property
    def rank(self) -> tuple[int, int]:
        """Which of two clusters keeps its id when they merge: a final choice counts most, then any, then size."""
        return 0 if self.choice is None else 1 + self.choice.final, self.n


class PromptStream:
    """One agent's stream; every method may be called from any thread."""

    def __init__(self, settings: StreamSettings | None = None) -> None:
        """Start with nothing seen; `observing.saved` saves and restores what was."""
        self.settings = settings or StreamSettings()
        self.lock = threading.Lock()
        """Held while anything below is read or changed."""
        self.clusters: list[Cluster] = []
        self.sums: Tensor | None = None
        """(clusters, C): row i is the sum of the vectors of cluster i."""
        self.next_id = 0
        self.seen = 0

    def add(self, prompt: str, vector: Tensor) -> Observation:
        """Take in one prompt with its normalised embedding, `(C,)` or `(1, C)`.

        Raises `InputError` for an embedding that is not finite, not normalised or of another width than before.
        """
        vector = vector.reshape(1, -1) if vector.dim() == 1 else vector
        with self.lock:
            v = check_vectors(vector, None if self.sums is None else self.sums.shape[1])
            if len(v) != 1:
                raise InputError(f"one prompt has one embedding, got {len(v)}")
            self.seen += 1
            # a copy: a row of a batch would keep the whole batch in memory
            row = self._merged(self._joined(_clipped(prompt), v[0].clone()))
            cluster = self.clusters[row]
            self.evict()
            return Observation(cluster.id, cluster.n, cluster.choice, cluster.chosen_at)

    def choose(self, cluster_id: int, choice: Choice | None) -> None:
        """Note what serves a cluster from now on; one that was merged into another or dropped is passed over.

        A choice that is not final never takes the place of one that is: a thread that only looks may be late.
        """
        with self.lock:
            for c in self.clusters:
                settled = c.choice is not None and c.choice.final
                if c.id == cluster_id and not (settled and choice is not None and not choice.final):
                    c.choice, c.chosen_at = choice, c.n

    def choice(self, cluster_id: int) -> Choice | None:
        """What serves a cluster; raises `AdapterNotFoundError` when it was merged into another or dropped."""
        with self.lock:
            return self._get(cluster_id).choice

    def prompts(self, cluster_id: int) -> list[str]:
        """The kept prompts of a cluster; raises the same."""
        with self.lock:
            return list(self._get(cluster_id).prompts)

    def vectors(self, cluster_id: int) -> Tensor:
        """The embeddings `(k, C)` of those prompts; raises the same."""
        with self.lock:
            return torch.stack(self._get(cluster_id).vectors)

    def sizes(self) -> dict[int, int]:
        """Prompts seen per cluster id."""
        with self.lock:
            return {c.id: c.n for c in self.clusters}

    def evict(self) -> None:
        """Drop the least recently fed clusters beyond the bound; the caller holds the lock."""
        while len(self.clusters) > self.settings.max_clusters:
            self._drop(min(range(len(self.clusters)), key=lambda i: self.clusters[i].used))

    def _get(self, cluster_id: int) -> Cluster:
        for c in self.clusters:
            if c.id == cluster_id:
                return c
        raise AdapterNotFoundError(f"no cluster {cluster_id} in the stream")

    def _joined(self, prompt: str, v: Tensor) -> int:
        """Put the prompt into a cluster, old or new, and return its row."""
        row = self._nearest(v)
        if row is None:
            row = len(self.clusters)
            self.clusters.append(Cluster(self.next_id))
            self.next_id += 1
            empty = torch.zeros(1, len(v))
            self.sums = empty if self.sums is None else torch.cat([self.sums, empty])
        assert self.sums is not None
        self.sums[row] += v
        cluster = self.clusters[row]
        cluster.n += 1
        cluster.used = self.seen
        self._keep(cluster, prompt, v)
        return row

    def _nearest(self, v: Tensor) -> int | None:
        """The row of the nearest of the clusters that `v` may join."""
        if self.sums is None or not self.clusters:
            return None
        n, within = self._counts(), self._within()
        cosines = (self.sums @ v) / self.sums.norm(dim=1)
        # of a fellow prompt to the sum of n: n * within / |sum|, with the sum's length as these figures predict it
        expected = n * within / (n + n * (n - 1) * within).sqrt()
        cosines[cosines < self.settings.join * expected] = -torch.inf
        best = int(cosines.argmax())
        return best if torch.isfinite(cosines[best]) else None

    def _counts(self) -> Tensor:
        return torch.tensor([float(c.n) for c in self.clusters])

    def _within(self) -> Tensor:
        """Mean cosine between two prompts of each cluster, drawn towards the usual while there are few."""
        assert self.sums is not None
        n, usual = self._counts(), self.settings.usual_cosine
        squared = self.sums.square().sum(dim=1)
        return ((squared - n + 2 * usual) / (n * (n - 1) + 2)).clamp(self.settings.min_cosine, 1.0)

    def _merged(self, row: int) -> int:
        """Merge the cluster in `row` with any it has grown alike to; returns where it is then."""
        while (other := self._alike(row)) is not None:
            a, b = self.clusters[row], self.clusters[other]
            into, gone = (row, other) if a.rank > b.rank else (other, row)
            self._absorb(into, gone)
            row = into - (gone < into)
        return row

    def _alike(self, row: int) -> int | None:
        assert self.sums is not None
        n, within = self._counts(), self._within()
        between = (self.sums @ self.sums[row]) / (n * n[row])
        ratio = between / (within * within[row]).sqrt()
        ratio[row] = -torch.inf
        ratio[n < self.settings.merge_size] = -torch.inf
        best = int(ratio.argmax())
        enough = n[row] >= self.settings.merge_size and ratio[best] >= self.settings.merge
        return best if enough else None

    def _absorb(self, into: int, gone: int) -> None:
        assert self.sums is not None
        kept, lost = self.clusters[into], self.clusters[gone]
        kept.prompts, kept.vectors = self._sampled(kept, lost)
        kept.n += lost.n
        kept.used = max(kept.used, lost.used)
        self.sums[into] += self.sums[gone]
        self._drop(gone)

    def _sampled(self, a: Cluster, b: Cluster) -> tuple[list[str], list[Tensor]]:
        """A sample of both clusters' prompts in proportion to their sizes."""
        k, rng = min(self.settings.max_prompts, len(a.prompts) + len(b.prompts)), self._rng()
        from_a = min(len(a.prompts), max(k - len(b.prompts), round(k * a.n / (a.n + b.n))))
        rows_a, rows_b = rng.sample(range(len(a.prompts)), from_a), rng.sample(range(len(b.prompts)), k - from_a)
        prompts = [a.prompts[i] for i in rows_a] + [b.prompts[i] for i in rows_b]
        return prompts, [a.vectors[i] for i in rows_a] + [b.vectors[i] for i in rows_b]

    def _keep(self, cluster: Cluster, prompt: str, v: Tensor) -> None:
        """Reservoir sampling: every prompt the cluster has seen is equally likely to be kept."""
        if len(cluster.prompts) < self.settings.max_prompts:
            cluster.prompts.append(prompt)
            cluster.vectors.append(v)
        elif (at := self._rng().randrange(cluster.n)) < self.settings.max_prompts:
            cluster.prompts[at], cluster.vectors[at] = prompt, v

    def _rng(self) -> random.Random:
        return random.Random(self.seen)  # so that a restored stream draws as the one that was never stopped

    def _drop(self, row: int) -> None:
        assert self.sums is not None
        del self.clusters[row]
        self.sums = torch.cat([self.sums[:row], self.sums[row + 1 :]])


def _clipped(prompt: str) -> str:
    half = MAX_KEPT_CHARS // 2
    return prompt if len(prompt) <= MAX_KEPT_CHARS else prompt[:half] + prompt[-half:]

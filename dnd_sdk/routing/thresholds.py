"""Routing thresholds measured on real tasks, and the vectors that say where a generator was trained.

* A positive is a sample of a task's prompts against disjoint exemplars of the same task; a negative is the best score
  any OTHER task's adapter reaches, as if the task's own adapter did not exist. Tasks cut from one source share
  sentences and differ only in what is asked; they are among those others, so the thresholds hold against them too.
* `reuse` and `reuse_single` are the lowest thresholds that keep false reuse within its bound.
* `support` is measured leaving out whole families: prompts of a family nothing alike was trained on must still pass.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from dnd_sdk.adapters import MAX_EXEMPLARS
from dnd_sdk.errors import ConfigError, DndError, GeneratorError
from dnd_sdk.files import is_finite_number, write_atomic
from dnd_sdk.routing.probability import Probabilities, reuse_map, support_map
from dnd_sdk.routing.similarity import check_vectors, coherence, kernel
from dnd_sdk.routing.support import NOISE_CENTRES, Support, centres_of

FORMAT_VERSION = 1
THRESHOLDS_FILE = "router.json"
SUPPORT_FILE = "support.safetensors"
SET_SIZES = (8, 16, 32, 64)
MIN_TASKS = 2
MIN_PROMPTS = 4
"""Per task: half of them serve as exemplars, the others ask."""


@dataclass(frozen=True)
class Thresholds:
    """Scores at which the router changes its mind."""

    reuse: float
    """A set of prompts reuses an adapter from this similarity on."""
    reuse_single: float
    """The same for one prompt."""
    support: float
    """A prompt set with a lower `Support.score` stays on the base model."""
    fitted_on: dict[str, Any] = field(default_factory=dict, hash=False)
    """What they were measured on, for people."""
    probability: Probabilities = field(default_factory=Probabilities)
    """What the scores mean; all None in files of before it was measured."""

    def __post_init__(self) -> None:
        for name in ("reuse", "reuse_single", "support"):
            value = getattr(self, name)
            if not is_finite_number(value) or not -1.0 <= value <= 2.0:
                raise ConfigError(f"threshold {name} must be a number within -1..2, got {value!r}")
        if not isinstance(self.fitted_on, dict):
            raise ConfigError(f"fitted_on must be a dict, got {type(self.fitted_on).__name__}")

    def save(self, path: Path) -> None:
        """Write as JSON; raises `StorageError`."""
        text = json.dumps({"format_version": FORMAT_VERSION, **asdict(self)}, indent=2, allow_nan=False)
        write_atomic(path, text + "\n")

    @classmethod
    def load(cls, path: Path) -> Thresholds:
        """Inverse of `save`; raises `GeneratorError` when the file is missing or damaged."""
        try:
            data = json.loads(path.read_bytes())
            if data.pop("format_version") != FORMAT_VERSION:
                raise ConfigError(f"its format_version is not {FORMAT_VERSION}")
            maps = Probabilities.from_dict(data.pop("probability", {}))
            return cls(**{f.name: data[f.name] for f in fields(cls) if f.name != "probability"}, probability=maps)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
            raise GeneratorError(f"{path}: no usable routing thresholds: {str(e)[:200]}", fix=_FIX) from e


_FIX = "fetch or train the generator again; its folder holds the routing data made with it"


@dataclass(frozen=True)
class RouterData:
    """All that routing needs to know about one generator and encoder."""

    thresholds: Thresholds
    support: Support

    def save(self, folder: Path) -> None:
        """Write `router.json` and `support.safetensors`; raises `StorageError`."""
        tensors = {"tasks": self.support.tasks}
        if self.support.noise is not None:
            tensors["noise"] = self.support.noise
        write_atomic(folder / SUPPORT_FILE, save(tensors))
        self.thresholds.save(folder / THRESHOLDS_FILE)

    @classmethod
    def load(cls, folder: Path) -> RouterData:
        """Inverse of `save`; raises `GeneratorError` when a file is missing or damaged."""
        thresholds = Thresholds.load(folder / THRESHOLDS_FILE)
        path = folder / SUPPORT_FILE
        try:
            tensors = load(path.read_bytes())
            return cls(thresholds, Support(tensors["tasks"], tensors.get("noise")))
        except (OSError, SafetensorError, KeyError, DndError) as e:
            raise GeneratorError(f"{path}: no usable support vectors: {str(e)[:200]}", fix=_FIX) from e


Calibration = RouterData
"""The name it had; programs import it."""


def fit_thresholds(
    task_vectors: Mapping[str, Tensor],
    families: Mapping[str, str],
    *,
    noise: Tensor | None = None,
    max_false_reuse: float = 0.01,
    max_false_single: float = 0.02,
    support_margin: float = 0.05,
    centres_per_task: int = 4,
    n_draws: int = 12,
    seed: int = 0,
    fitted_on: Mapping[str, Any] | None = None,
) -> tuple[RouterData, dict[str, Any]]:
    """Measure thresholds on the prompts of the training tasks.

    Args:
        task_vectors: Per task `(n, C)` normalised embeddings of distinct prompts; n of 128 or more uses all set sizes.
        families: Per task the family whose members must not vouch for one another's support.
        noise: `(m, C)` embeddings of `noise_prompts()` by the same encoder; None: support counts task nearness alone,
            which lets much gibberish through.
        max_false_reuse: Share of prompt sets that may be given another task's adapter.
        max_false_single: The same for single prompts.
        support_margin: Subtracted from the 1st percentile of the support scores.
        centres_per_task: Support vectors per task.
        n_draws: Random splits per task and size.
        seed: Of the splits.
        fitted_on: Added to the thresholds' own note of what they were fitted on.

    Returns:
        The router's data, and a report of recall and false reuse per set size.

    Raises:
        ConfigError: Fewer than `MIN_TASKS` tasks, or a task without family or with fewer than `MIN_PROMPTS` prompts.
        InputError: Embeddings that are not finite, not normalised or of different widths.
    """
    vectors = _checked(task_vectors, families)
    width = next(iter(vectors.values())).shape[1]
    noise = None if noise is None else check_vectors(noise, width)
    rng, sizes = torch.Generator().manual_seed(seed), _set_sizes(vectors)
    sets = {n: compare_tasks(vectors, families, n, n_draws=n_draws, rng=rng) for n in sizes}
    # one prompt says little, so more of them are drawn
    alone = compare_tasks(vectors, families, 1, n_draws=8 * n_draws, rng=rng)
    reuse = threshold_for(torch.cat([t.other for t in sets.values()]), max_false_reuse)
    single = threshold_for(alone.other, max_false_single)
    whole, unseen = _supports(vectors, families, noise, centres_per_task)
    nearness = torch.tensor([unseen[name].score(v) for name, v in vectors.items()])
    support = torch.quantile(nearness, 0.01).item() - support_margin
    maps = Probabilities(
        reuse_map(torch.cat([t.own for t in sets.values()]), torch.cat([t.other for t in sets.values()]), len(vectors)),
        reuse_map(alone.own, alone.other, len(vectors)),
        None if noise is None else support_map(vectors, unseen, whole.tasks, noise, sizes, n_draws=n_draws, rng=rng),
    )
    note = {"n_tasks": len(vectors), "n_families": len({families[t] for t in vectors}), "width": width, "seed": seed}
    thresholds = Thresholds(reuse, single, support, {**note, **(fitted_on or {})}, maps)
    return RouterData(thresholds, whole), _report(thresholds, sets, alone, nearness)


def _supports(
    vectors: Mapping[str, Tensor], families: Mapping[str, str], noise: Tensor | None, centres_per_task: int
) -> tuple[Support, dict[str, Support]]:
    """The support of all tasks, and for each task the one of the tasks outside its family."""
    centres = {name: centres_of(v, centres_per_task) for name, v in vectors.items()}
    noise_centres = None if noise is None else centres_of(noise, NOISE_CENTRES)
    return Support(torch.cat(list(centres.values())), noise_centres), _unseen_support(families, centres, noise_centres)


def _report(thresholds: Thresholds, sets: Mapping[int, Trials], alone: Trials, nearness: Tensor) -> dict[str, Any]:
    """Recall and false reuse per set size and of single prompts; `nearness` (tasks,) to the tasks of other families."""
    near = {"min": nearness.min().item(), "median": nearness.median().item(), "threshold": thresholds.support}
    return {
        "sets": {n: trials.report(thresholds.reuse) for n, trials in sets.items()},
        "single": alone.report(thresholds.reuse_single),
        "support": near,
    }


@dataclass(frozen=True)
class Trials:
    """Scores of many prompt sets of one size, each task against its own adapter and against all others."""

    own: Tensor
    """(trials,): against the task's own adapter."""
    other: Tensor
    """(trials,): the best of the other tasks' adapters."""
    family: Tensor
    """(trials,): the best of the other tasks of its family, -inf if it has none."""

    def report(self, threshold: float) -> dict[str, float]:
        """Shares: recall; false reuse with the own adapter missing, and within its family alone; wrong one picked."""
        has_family = torch.isfinite(self.family)
        return {
            "recall": (self.own >= threshold).float().mean().item(),
            "false_reuse": (self.other >= threshold).float().mean().item(),
            "false_reuse_in_family": (self.family[has_family] >= threshold).float().mean().item(),
            "wrong_pick": ((self.other > self.own) & (self.other >= threshold)).float().mean().item(),
            "n_trials": float(len(self.own)),
        }


def threshold_for(foreign: Tensor, max_false: float) -> float:
    """The lowest threshold that at most this share of the foreign scores reaches."""
    ranked = foreign.sort(descending=True).values
    last_refused = ranked[int(max_false * len(ranked))]
    above = ranked[ranked > last_refused]
    # halfway to the next score above it, so that rounding on another machine changes no decision
    return ((above[-1] + last_refused) / 2 if len(above) else last_refused + 1e-3).item()


def compare_tasks(
    vectors: Mapping[str, Tensor], families: Mapping[str, str], n: int, *, n_draws: int, rng: torch.Generator
) -> Trials:
    """Score sets of `n` prompts of every task against every task's exemplars, on `n_draws` disjoint random splits."""
    names = list(vectors)
    kin = torch.tensor([[families[a] == families[b] for b in names] for a in names])
    scores = torch.stack(
        [_one_split(list(vectors.values()), n, rng) for _ in range(n_draws)]
    )  # (draws, query, adapter)
    own = scores.diagonal(dim1=1, dim2=2).flatten()
    foreign = scores.masked_fill(torch.eye(len(names), dtype=torch.bool), -torch.inf)
    family = foreign.masked_fill(~kin, -torch.inf).max(dim=2).values.flatten()
    return Trials(own, foreign.max(dim=2).values.flatten(), family)


def _one_split(tasks: Sequence[Tensor], n: int, rng: torch.Generator) -> Tensor:
    """`similarity` of `n` random prompts of each task (rows) to the other half of each task (columns)."""
    queries, exemplars = [], []
    for v in tasks:
        order = torch.randperm(len(v), generator=rng)
        half = len(v) // 2
        exemplars.append(v[order[:half][:MAX_EXEMPLARS]])
        queries.append(v[order[half:][:n]])
    averaging = torch.block_diag(*[torch.full((len(e), 1), 1 / len(e)) for e in exemplars])  # (exemplars, tasks)
    everything = torch.cat(exemplars).T
    cross = torch.stack([kernel(q @ everything).mean(dim=0) for q in queries]) @ averaging
    mine = torch.tensor([[coherence(q)] for q in queries])
    theirs = torch.tensor([[coherence(e) for e in exemplars]])
    return cross / (mine * theirs).sqrt()


def _unseen_support(
    families: Mapping[str, str], centres: Mapping[str, Tensor], noise: Tensor | None
) -> dict[str, Support]:
    """Each task's support by the tasks outside its family, or by all others if there is but one family."""
    apart = families if len({families[name] for name in centres}) > 1 else {name: name for name in centres}
    return {
        name: Support(torch.cat([c for other, c in centres.items() if apart[other] != apart[name]]), noise)
        for name in centres
    }


def _set_sizes(vectors: Mapping[str, Tensor]) -> tuple[int, ...]:
    smallest = min(len(v) - len(v) // 2 for v in vectors.values())
    return tuple(n for n in SET_SIZES if n <= smallest) or (smallest,)


def _checked(task_vectors: Mapping[str, Tensor], families: Mapping[str, str]) -> dict[str, Tensor]:
    if len(task_vectors) < MIN_TASKS:
        raise ConfigError(f"calibration needs at least {MIN_TASKS} tasks, got {len(task_vectors)}")
    orphans = sorted(set(task_vectors) - set(families))
    if orphans:
        raise ConfigError(f"tasks without a family: {orphans[:5]}", fix="name a family for each in index.json")
    width = next(iter(task_vectors.values())).shape[-1]
    vectors = {name: check_vectors(v, width) for name, v in sorted(task_vectors.items())}
    for name, v in vectors.items():
        if len(v) < MIN_PROMPTS:
            raise ConfigError(f"task {name!r} has {len(v)} prompts, calibration needs {MIN_PROMPTS}")
    return vectors

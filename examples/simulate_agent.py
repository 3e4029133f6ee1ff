"""A long-lived agent, simulated: many jobs of a tasks folder, interleaved at random, fed prompt by prompt to `observe`.

No text is generated: encoder, clustering, routing, generator and store do their real work. Reported are

* purity: share of prompts that are of the commonest job of their cluster, at the end (`purity_ready`: of the clusters
  that were big enough to be adapted to; many small clusters would flatter the former);
* generations, and how many jobs have an adapter of their own: made from prompts that were mostly theirs;
* reuse rate: share of prompts served by their own job's adapter, of those that came when it existed;
* regret: share of prompts served by another job's adapter, or by the base although their job's adapter existed.

Run `python examples/simulate_agent.py TASKS_FOLDER --tasks 20 --prompts 64 --seed 0 --json out.json`.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from dnd_sdk import DnD, Home
from dnd_sdk.models import Encoded, Encoder
from dnd_sdk.observing import MAX_KEPT_CHARS
from dnd_sdk.tasks import read_tasks

ENCODE_BATCH = 64


class Turn(NamedTuple):
    """One prompt of the agent's day and the job it belongs to, which only the score knows."""

    job: str
    prompt: str


@dataclass(frozen=True)
class ScratchHome(Home):
    """A home of its own for adapters, with the weights of another."""

    weights: Path = field(kw_only=True)

    @property
    def models(self) -> Path:
        """Where the weights are."""
        return self.weights


class Seen(NamedTuple):
    """A cluster at the end: the prompts it saw, and the jobs of those it kept."""

    size: int
    jobs: list[str]


def progress(text: str, *, done: bool) -> None:
    """One line that is written over until `done`, for somebody who watches."""
    if sys.stderr.isatty():
        print(f"\r{text}", end="\n" if done else "", file=sys.stderr, flush=True)


class ReadAhead(Encoder):
    """An encoder that has the embeddings of known prompts ready; anything else goes to the real one."""

    def __init__(self, encoder: Encoder, prompts: Sequence[str]) -> None:
        self._encoder = encoder
        self._known: dict[str, torch.Tensor] = {}
        for at in range(0, len(prompts), ENCODE_BATCH):
            batch = prompts[at : at + ENCODE_BATCH]
            self._known.update(zip(batch, encoder.encode(batch, with_states=False).pooled, strict=True))
            progress(f"encoded {len(self._known)}/{len(prompts)} prompts", done=len(self._known) == len(prompts))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._encoder, name)

    def encode(self, prompts: Sequence[str], *, state_tokens: int = 64, with_states: bool = True) -> Encoded:
        """As `Encoder.encode`."""
        if with_states or any(p not in self._known for p in prompts):
            return self._encoder.encode(prompts, state_tokens=state_tokens, with_states=with_states)
        return Encoded(None, torch.stack([self._known[p] for p in prompts]), 0, 0)


@dataclass
class Score:
    """What happened, counted."""

    served: Counter[str] = field(default_factory=Counter)
    """Turns by who answered: `own`, `other`, `base_waiting` (no adapter of the job yet), `base_regret`."""
    n_with_own: int = 0
    """Turns that came when there was an adapter of their job."""
    owner: dict[str, str] = field(default_factory=dict)
    """Adapter name to the job most of its prompts came from."""
    generations: int = 0
    adapt_s: list[float] = field(default_factory=list)
    observe_s: list[float] = field(default_factory=list)

    def note(self, turn: Turn, adapter: str | None) -> None:
        """Count who answered one turn."""
        has_own = turn.job in self.owner.values()
        self.n_with_own += has_own
        if adapter is None:
            self.served["base_regret" if has_own else "base_waiting"] += 1
        else:
            self.served["own" if self.owner.get(adapter) == turn.job else "other"] += 1

    def figures(self, clusters: Sequence[Seen], min_prompts: int) -> dict[str, Any]:
        """The report over the clusters at the end."""
        n = self.served.total()
        ready = [c for c in clusters if c.size >= min_prompts]
        return {
            "purity": purity(clusters),
            "purity_ready": purity(ready),
            "clusters": len(clusters),
            "clusters_ready": len(ready),
            "generations": self.generations,
            "jobs_with_an_adapter": len(set(self.owner.values())),
            "reuse_rate": self.served["own"] / max(1, self.n_with_own),
            "served_by_other": self.served["other"] / n,
            "base_though_adapter_existed": self.served["base_regret"] / n,
            "regret": (self.served["other"] + self.served["base_regret"]) / n,
            "served": dict(self.served),
            "seconds": {"observe_median": median(self.observe_s), "adapt_median": median(self.adapt_s)},
        }


def purity(clusters: Sequence[Seen]) -> float | None:
    """Share of prompts that are of the commonest job of their cluster; None without any."""
    n = sum(c.size for c in clusters)
    return sum(c.size * max(Counter(c.jobs).values()) / len(c.jobs) for c in clusters) / n if n else None


def median(values: Sequence[float]) -> float | None:
    """The middle value, None without any."""
    return sorted(values)[len(values) // 2] if values else None


def turns_of(folder: Path, role: str | None, n_tasks: int, n_prompts: int, rng: random.Random) -> list[Turn]:
    """Prompts of randomly chosen tasks, shuffled; no prompt twice."""
    tasks = [t for t in read_tasks(folder) if role is None or t.role == role]
    if len(tasks) < n_tasks:
        raise SystemExit(f"{folder} has {len(tasks)} tasks of role {role}, {n_tasks} are wanted")
    turns: dict[str, Turn] = {}
    for task in rng.sample(tasks, n_tasks):
        # the stream cuts longer prompts, and the score knows them by their text
        prompts = sorted({r.prompt for r in task.train if len(r.prompt) <= MAX_KEPT_CHARS} - turns.keys())
        for prompt in rng.sample(prompts, min(n_prompts, len(prompts))):
            turns[prompt] = Turn(task.name, prompt)
    mixed = list(turns.values())
    rng.shuffle(mixed)
    return mixed


def feed(dnd: DnD, turns: Sequence[Turn]) -> dict[str, Any]:
    """Observe every turn and score it."""
    score, job_of, stream = Score(), {turn.prompt: turn.job for turn in turns}, dnd.observed
    for i, turn in enumerate(turns):
        started = time.perf_counter()
        seen = dnd.observe(turn.prompt)
        (score.adapt_s if seen.adapted else score.observe_s).append(time.perf_counter() - started)
        if seen.adapted is not None and seen.adapted.decision == "generate" and seen.adapter is not None:
            score.generations += 1
            jobs = Counter(job_of[p] for p in stream.prompts(seen.cluster))
            score.owner[seen.adapter.name] = jobs.most_common(1)[0][0]
        score.note(turn, None if seen.adapter is None else seen.adapter.name)
        progress(f"observed {i + 1}/{len(turns)}, {score.generations} generations", done=i + 1 == len(turns))
    clusters = [Seen(size, [job_of[p] for p in stream.prompts(c)]) for c, size in stream.sizes().items()]
    return score.figures(clusters, stream.settings.min_prompts)


def main(argv: Sequence[str] | None = None) -> int:
    """Simulate and report."""
    parser = argparse.ArgumentParser(description="A long-lived agent with many jobs, simulated.")
    parser.add_argument("tasks_folder", type=Path)
    parser.add_argument("--tasks", type=int, default=20, help="jobs of the agent")
    parser.add_argument("--prompts", type=int, default=64, help="prompts per job, at most 8192 characters each")
    parser.add_argument("--role", default=None, help="train or validation: only tasks of this role")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--base", help="base LLM (default: the embedded one)")
    parser.add_argument("--generator", help="generator folder (default: the shipped one)")
    parser.add_argument("--home", help="folder with the weights (default: DND_HOME or the user data folder)")
    parser.add_argument("--json", type=Path, help="write the report here as well")
    args = parser.parse_args(argv)
    turns = turns_of(args.tasks_folder, args.role, args.tasks, args.prompts, random.Random(args.seed))
    models = {} if args.base is None else {"base": args.base}
    with tempfile.TemporaryDirectory() as scratch:
        home = ScratchHome(Path(scratch), weights=Home.find(args.home).models)
        parts = DnD.load(**models, generator=args.generator, home=home).parts
        with DnD(replace(parts, encoder=ReadAhead(parts.encoder, [turn.prompt for turn in turns]))) as dnd:
            figures = feed(dnd, turns)
    about = {name: getattr(args, name) for name in ("tasks", "prompts", "role", "seed")}
    report = {"schema_version": 1, "settings": {**about, "turns": len(turns)}, **figures}
    text = json.dumps(report, indent=2)
    print(text)
    if args.json is not None:
        args.json.write_text(text + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

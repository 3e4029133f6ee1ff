"""The gate (reuse, generate or base) put to tasks it was not fitted on: `dnd bench gate`.

* No base model, no response and no label is needed: prompts, the encoder, and the thresholds kept with the generator.
* Per seed a task's prompts are split: one half becomes the exemplars of its adapter, disjoint sets of the other ask.
  All tasks' adapters are stored together. Every query is judged twice: with its own adapter stored, and without.
* Noise asks, too: fresh prompts of the kinds that the support was fitted against, and kinds that no fit has seen.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file, save
from torch import Tensor

from dnd_sdk.config import Home
from dnd_sdk.errors import ConfigError, InputError
from dnd_sdk.evaluation.gate.noise import held_out_noise
from dnd_sdk.files import write_atomic
from dnd_sdk.generator import Generator, check_encoder, generator_folder
from dnd_sdk.models import DEFAULT_ENCODER, Encoder
from dnd_sdk.prompts import clean_prompts
from dnd_sdk.protocols import Progress
from dnd_sdk.routing import (
    NOISE_KINDS,
    AdapterIndex,
    Hit,
    Key,
    Support,
    Thresholds,
    choose_exemplars,
    measured,
    noise_prompts,
    verdict,
)
from dnd_sdk.tasks import Task

SIZES = (1, 8, 16, 64)
"""Prompts per query; one prompt is judged by the rule for single prompts."""
MAX_POOL = 128
"""Per task, so that a half has enough for the largest set and for all exemplars."""
MAX_SETS, MAX_SINGLES = 4, 8
"""Disjoint queries of one size per task and seed."""
STORED, MISSING, KNOWN, UNSEEN = "own stored", "own missing", "known noise", "unseen noise"
SITUATIONS = (STORED, MISSING, KNOWN, UNSEEN)
OUTCOMES = ("reuse own", "reuse other", "generate", "base")
_NOISE_SEED = 1
"""Calibration is fitted on `noise_prompts(seed=0)`."""


@dataclass(frozen=True)
class Gate:
    """What the gate consists of."""

    encoder: Encoder
    thresholds: Thresholds
    support: Support | None
    generator: str
    """Id of the generator whose calibration this is."""

    @classmethod
    def load(
        cls,
        base: str,
        generator: str | PathLike[str] | None = None,
        encoder: str | None = None,
        home: Home | None = None,
        device: str = "cpu",
    ) -> Gate:
        """The gate that `DnD.load` would use, without loading the base.

        Raises `ConfigError` without a generator for this base or with another encoder than its own.
        """
        folder = generator_folder(base, generator)
        if folder is None:
            raise ConfigError(f"there is no generator for {base!r}", fix="give its folder with --generator")
        made = Generator.from_pretrained(folder)
        loaded = Encoder.load(encoder or made.encoder_name or DEFAULT_ENCODER, home, device=device)
        check_encoder(loaded, made)
        return cls(loaded, *measured(folder, loaded.name), made.id)


class Event(NamedTuple):
    """One decision of the gate."""

    unit: str
    """The task, or the kind of noise."""
    situation: str
    size: int
    """Prompts in the query."""
    outcome: str
    score: float
    """Of the nearest adapter."""
    own: bool
    """Whether that one is the task's own."""
    support: float | None


def pooled_prompts(
    gate: Gate, tasks: Sequence[Task], progress: Progress, cache: Path | None = None
) -> dict[str, Tensor]:
    """Per task the embeddings of up to `MAX_POOL` distinct train-split prompts, in random order.

    Tasks with too few for the smallest set are left out. Embeddings are kept in the folder `cache` (None: nowhere), so
    that a killed run goes on where it was. Raises `InputError` when fewer than two tasks are left.
    """
    texts = {t.name: _drawn(t) for t in tasks}
    kept = {name: prompts for name, prompts in texts.items() if len(prompts) >= 2 * SIZES[1]}
    if len(kept) < 2:
        raise InputError(f"the gate needs 2 tasks of {2 * SIZES[1]} distinct prompts or more, got {len(kept)}")
    return _encoded(gate.encoder, kept, progress, cache)


def pooled_noise(gate: Gate, progress: Progress, cache: Path | None = None) -> dict[str, dict[str, Tensor]]:
    """By situation and kind the embeddings of prompts that are no job."""
    n = max(SIZES)
    listed = noise_prompts(n, seed=_NOISE_SEED)
    known = {kind: listed[k * n : (k + 1) * n] for k, kind in enumerate(NOISE_KINDS)}
    return {s: _encoded(gate.encoder, v, progress, cache) for s, v in ((KNOWN, known), (UNSEEN, held_out_noise(n)))}


def try_gate(
    gate: Gate,
    tasks: Mapping[str, Tensor],
    noise: Mapping[str, Mapping[str, Tensor]],
    *,
    seeds: int,
    progress: Progress,
) -> list[Event]:
    """All decisions on these embeddings, over `seeds` random splits."""
    events: list[Event] = []
    for seed in range(seeds):
        rng = torch.Generator().manual_seed(seed)
        index = AdapterIndex(Key(gate.encoder.width, gate.encoder.name, gate.encoder.fingerprint, ""))
        asking = {}
        for name, v in tasks.items():
            order = torch.randperm(len(v), generator=rng)
            index.add(name, choose_exemplars(v[order[: len(v) // 2]]))
            asking[name] = v[order[len(v) // 2 :]]
        for i, (name, v) in enumerate(asking.items()):
            progress(name, seed * len(tasks) + i + 1, seeds * len(tasks), 0.0)
            events += [e for query in _queries(v, rng) for e in _ask(gate, index, query, name)]
        for situation, kinds in noise.items():
            events += [
                _event(gate, kind, situation, query, index.score(query))
                for kind, v in kinds.items()
                for query in _queries(v, rng)
            ]
    return events


def _ask(gate: Gate, index: AdapterIndex, query: Tensor, task: str) -> list[Event]:
    hits = index.score(query)
    others = [h for h in hits if h.name != task]
    return [_event(gate, task, STORED, query, hits), *([_event(gate, task, MISSING, query, others)] if others else [])]


def _event(gate: Gate, unit: str, situation: str, query: Tensor, hits: Sequence[Hit]) -> Event:
    best, single = hits[0], len(query) == 1
    support = None if single or gate.support is None else gate.support.score(query)
    decision = verdict(gate.thresholds, "single" if single else "set", "auto", best.score, support)
    own = best.name == unit
    outcome = f"reuse {'own' if own else 'other'}" if decision == "reuse" else str(decision)
    return Event(unit, situation, len(query), outcome, best.score, own, support)


def _queries(v: Tensor, rng: torch.Generator) -> Iterator[Tensor]:
    """Disjoint sets of each size that `v` (n, C) has enough prompts for."""
    for n in SIZES:
        order = torch.randperm(len(v), generator=rng)
        for i in range(min(MAX_SINGLES if n == 1 else MAX_SETS, len(v) // n)):
            yield v[order[i * n : (i + 1) * n]]


def _drawn(task: Task) -> list[str]:
    prompts = list(clean_prompts([row.prompt for row in task.train]).prompts) if task.train else []
    return random.Random(f"gate/{task.name}").sample(prompts, min(MAX_POOL, len(prompts)))


def _encoded(
    encoder: Encoder, texts: Mapping[str, Sequence[str]], progress: Progress, cache: Path | None
) -> dict[str, Tensor]:
    found = {}
    for i, (name, prompts) in enumerate(texts.items()):
        found[name] = _kept(encoder, prompts, cache)
        progress(f"encoding {name}", i + 1, len(texts), 0.0)
    return found


def _kept(encoder: Encoder, prompts: Sequence[str], cache: Path | None) -> Tensor:
    """The prompts' embeddings, from `cache` if they are there."""
    key = hashlib.sha256(json.dumps([encoder.fingerprint, *prompts]).encode()).hexdigest()
    path = None if cache is None else cache / f"{key[:32]}.safetensors"
    if path is not None and path.exists():
        return load_file(path)["pooled"]
    pooled = encoder.embed(prompts)
    if path is not None:
        write_atomic(path, save({"pooled": pooled.contiguous()}))
    return pooled

"""Prompt pools as encoder states, and the conditions drawn from them."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from dnd_sdk.generator import select_states
from dnd_sdk.models import Encoder
from dnd_sdk.protocols import Progress
from dnd_sdk.tasks import Task
from dnd_sdk.training.run_dir import write_tensors

_SMALL_SETS = 0.3
"""Share of conditions with fewer prompts than the decoder takes, so that a handful works at run time."""


@dataclass(frozen=True)
class Pools:
    """Per task: token states (n, L, C) in half precision and pooled vectors (n, C)."""

    states: dict[str, Tensor]
    pooled: dict[str, Tensor]

    def draw(self, task: str, n_prompts: int, step: int, seed: int) -> Tensor:
        """A fresh condition (n_prompts, L, C): random prompts of the task in random order, sometimes few of them."""
        rng = random.Random(f"{seed}/condition/{task}/{step}")
        states = self.states[task]
        n = rng.randint(1, n_prompts) if rng.random() < _SMALL_SETS else n_prompts
        rows = rng.sample(range(len(states)), min(n, len(states)))
        return select_states(states, rows, n_prompts).float()


def encode_pools(
    tasks: Mapping[str, Task],
    encoder: Encoder,
    *,
    size: int,
    state_tokens: int,
    seed: int,
    cache: Path,
    progress: Progress,
) -> Pools:
    """Encode `size` random train prompts of every task (never a response); kept in `cache` for a resumed run."""
    if not cache.exists():
        tensors = {}
        for i, (name, task) in enumerate(sorted(tasks.items())):
            rng = random.Random(f"{seed}/pool/{name}")
            rows = rng.sample(task.train, min(size, len(task.train)))
            encoded = encoder.encode([r.prompt for r in rows], state_tokens=state_tokens)
            assert encoded.states is not None
            tensors[f"states.{name}"] = encoded.states.to(torch.float16).cpu()
            tensors[f"pooled.{name}"] = encoded.pooled.cpu()
            progress("encode", i + 1, len(tasks), 0.0)
        write_tensors(cache, tensors)
    loaded = load_file(cache)
    names = [k.removeprefix("pooled.") for k in loaded if k.startswith("pooled.")]
    return Pools({n: loaded[f"states.{n}"] for n in names}, {n: loaded[f"pooled.{n}"] for n in names})

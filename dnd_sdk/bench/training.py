"""What a recipe costs on this machine: one end-to-end training step and one generation, in time and memory.

Any base a recipe names is measured the same way, with a fresh generator: untrained weights cost what trained ones do.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from dnd_sdk.config import Home
from dnd_sdk.errors import ConfigError
from dnd_sdk.generator import Generator, decoder_shapes
from dnd_sdk.machine import cpu_name, peak_rss_mb
from dnd_sdk.models import Encoder
from dnd_sdk.protocols import Progress
from dnd_sdk.training import (
    OBJECTIVES,
    Curriculum,
    Lesson,
    Pools,
    Stage,
    TrainingParts,
    TrainSettings,
    encode_pools,
    new_generator,
    prepare,
)

SCHEMA_VERSION = 1


def bench_train(
    tasks_dir: Path,
    settings: TrainSettings,
    home: Home,
    progress: Progress,
    *,
    repeats: int = 3,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Any]:
    """Time the first end-to-end stage's step and one generation of `settings`; nothing is kept.

    Args:
        tasks_dir: Task rows to train on.
        settings: The recipe.
        home: Where weights are.
        progress: Told of the preparation.
        repeats: Timed rounds after one that warms up; medians are reported.
        clock: seconds, rising.

    Returns a JSON-able report: seconds, parameters, peak memory. Raises `ConfigError` without an end-to-end stage.
    """
    stages = [s for s in settings.stages if OBJECTIVES[s.objective].is_checked]
    if not stages or repeats < 1:
        raise ConfigError("there is no end-to-end stage to measure, or no repeats", fix="add one to [[stages]]")
    parts = prepare(tasks_dir, settings, home, progress)
    encoder = Encoder.load(settings.encoder, home, device=str(parts.base.device))
    generator = new_generator(settings, parts, encoder).to(parts.base.device)
    pools = _pools(parts.curriculum, encoder, settings, progress)
    step_s = _time_steps(generator, parts, pools, stages[0], repeats, clock)
    generate_s = _time_generating(generator, pools, repeats, clock)
    return {
        "schema_version": SCHEMA_VERSION,
        **_sizes(generator, parts),
        "step": {"tasks": stages[0].tasks, "rows": stages[0].tasks * stages[0].rows},
        "step_s": step_s,
        "generate_s": generate_s,
        "repeats": repeats,
        "peak_mb": _peak_mb(parts.base.device),
        "machine": {"cpu": cpu_name(), "device": str(parts.base.device), "torch_threads": torch.get_num_threads()},
    }


def render_training(report: dict[str, Any]) -> str:
    """The report in a few lines for people."""
    step, sizes = report["step"], report["generator"]
    return "\n".join(
        (
            f"base            {report['base']['name']}, {report['base']['parameters'] / 1e6:.0f} M parameters",
            f"adapter         r {report['adapter']['r']}, {report['adapter']['parameters'] / 1e6:.2f} M parameters",
            f"generator       {sizes['parameters'] / 1e6:.1f} M parameters, {sizes['share_of_base']:.1%} of the base",
            f"shapes          {' '.join('x'.join(map(str, s)) for s in sizes['shapes'])}",
            f"training step   {report['step_s']:.2f} s  ({step['tasks']} tasks, {step['rows']} rows)",
            f"generation      {1e3 * report['generate_s']:.0f} ms  (states in, LoRA out)",
            f"peak memory     {report['peak_mb']:.0f} MB on {report['machine']['device']}",
        )
    )


def _pools(curriculum: Curriculum, encoder: Encoder, settings: TrainSettings, progress: Progress) -> Pools:
    sizes = {"size": settings.generator.pool, "state_tokens": settings.generator.state_tokens}
    with TemporaryDirectory() as scratch:
        cache = Path(scratch) / "pools.safetensors"
        return encode_pools(curriculum.sources, encoder, **sizes, seed=0, cache=cache, progress=progress)


def _time_steps(
    generator: Generator, parts: TrainingParts, pools: Pools, stage: Stage, repeats: int, clock: Callable[[], float]
) -> float:
    lesson = Lesson(parts, pools, {name: torch.empty(0) for name in parts.curriculum.tasks}, torch.empty(0))
    generator.train()
    optimizer = torch.optim.AdamW(generator.parameters(), lr=stage.lr)
    objective = OBJECTIVES[stage.objective](generator, lesson, stage)

    def one(step: int) -> None:
        optimizer.zero_grad()
        objective.step(step)
        optimizer.step()

    return _median_s(one, repeats, clock, parts.base.device)


def _time_generating(generator: Generator, pools: Pools, repeats: int, clock: Callable[[], float]) -> float:
    generator.eval()
    states = torch.cat([s.float() for s in pools.states.values()])[: generator.max_prompts]
    return _median_s(lambda _: generator.generate(states), repeats, clock, generator.shared.device)


def _median_s(work: Callable[[int], Any], repeats: int, clock: Callable[[], float], device: torch.device) -> float:
    times = []
    for i in range(repeats + 1):
        start = clock()
        work(i)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(clock() - start)
    return statistics.median(times[1:])


def _sizes(generator: Generator, parts: TrainingParts) -> dict[str, Any]:
    tokens = generator.weight_tokenizer
    parameters = sum(p.numel() for p in generator.parameters())
    return {
        "base": {"name": parts.base.name, "parameters": parts.base.n_parameters},
        "adapter": {"r": parts.base.layout.r, "parameters": parts.base.layout.n_parameters},
        "generator": {
            "parameters": parameters,
            "share_of_base": parameters / parts.base.n_parameters,
            "shapes": decoder_shapes(generator.config, (tokens.T, tokens.H, tokens.W)),
        },
    }


def _peak_mb(device: torch.device) -> float:
    return torch.cuda.max_memory_allocated(device) / 1e6 if device.type == "cuda" else peak_rss_mb()

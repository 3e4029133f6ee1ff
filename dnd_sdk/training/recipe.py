"""From a finished zoo to a generator folder: conditions, calibration, stages, card."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dnd_sdk.adapters import AdapterStore
from dnd_sdk.config import Home
from dnd_sdk.errors import ConfigError, LayoutMismatchError
from dnd_sdk.generator import Generator, GeneratorConfig, write_card
from dnd_sdk.models import Encoder
from dnd_sdk.protocols import Progress
from dnd_sdk.routing import RouterData, choose_exemplars, fit_thresholds, noise_prompts
from dnd_sdk.tasks import Task
from dnd_sdk.training.conditions import Pools, encode_pools
from dnd_sdk.training.objectives import Lesson
from dnd_sdk.training.parts import TrainingParts, prepare
from dnd_sdk.training.run_dir import RunDir, write_json, write_tensors
from dnd_sdk.training.settings import TrainSettings
from dnd_sdk.training.trainer import train_stages
from dnd_sdk.training.zoo import read_importance, read_zoo


def train_generator(
    tasks_dir: Path, settings: TrainSettings, out: Path, *, zoo: Path, home: Home, progress: Progress
) -> Path:
    """Train (or continue) in `out` and return the finished folder `out/generator`.

    Raises `InputError` for an unfinished zoo and `LayoutMismatchError` for the zoo of another base or rank.
    """
    shared, snapshots = read_zoo(zoo)
    parts = prepare(tasks_dir, settings, home, progress)
    n_weights, device = parts.base.layout.n_parameters, parts.base.device
    if len(shared) != n_weights:
        raise LayoutMismatchError(
            f"zoo {zoo} has adapters of {len(shared)} weights, this base and rank need {n_weights}",
            fix="train the zoo with the same base and [lora] settings",
        )
    encoder = Encoder.load(settings.encoder, home, device=str(device))
    generator = new_generator(settings, parts, encoder).to(device)
    generator.shared.data.copy_(shared)
    out.mkdir(parents=True, exist_ok=True)
    pools = encode_pools(
        parts.curriculum.sources,
        encoder,
        size=settings.generator.pool,
        state_tokens=settings.generator.state_tokens,
        seed=settings.run.seed,
        cache=out / "conditions.safetensors",
        progress=progress,
    )
    store_zoo(parts, encoder, pools, snapshots, out)
    write_tensors(out / "shared.safetensors", {"shared": shared})  # the zoo's, before the generator moves its own
    lesson = Lesson(parts, pools, snapshots, read_importance(zoo))
    train_stages(generator, lesson, settings.stages, settings.check, out)
    return finish(generator, parts, encoder, pools, settings, zoo, out)


def new_generator(settings: TrainSettings, parts: TrainingParts, encoder: Encoder) -> Generator:
    """A fresh generator for this base, seeded."""
    sizes = settings.generator.model_dump(exclude={"pool", "fresh"})
    config = GeneratorConfig(
        encoder_width=encoder.width,
        base_name=parts.base.name,
        base_fingerprint=parts.base.fingerprint,
        encoder_name=encoder.name,
        encoder_fingerprint=encoder.fingerprint,
        **sizes,
    )
    torch.manual_seed(settings.run.seed)
    generator = Generator(config, parts.base.layout)
    if parts.start is not None and not settings.generator.fresh:
        _check_sizes(parts.start.config, config)
        generator.load_state_dict(parts.start.state_dict())
    return generator


def _check_sizes(start: GeneratorConfig, wanted: GeneratorConfig) -> None:
    """Raise `ConfigError` when the generator to go on from has another decoder than the settings ask for."""
    before, after = asdict(start), asdict(wanted)
    named = {"base_name", "encoder_name"}  # a folder may have moved; the fingerprints tell what it holds
    if odd := [k for k in before.keys() - named if before[k] != after[k]]:
        raise ConfigError(
            f"start: its generator differs in {', '.join(f'{k} ({before[k]}, here {after[k]})' for k in sorted(odd))}",
            fix="set the same [generator] sizes, base and encoder, or train without start",
        )


def store_zoo(parts: TrainingParts, encoder: Encoder, pools: Pools, snapshots: dict[str, Tensor], out: Path) -> None:
    """Keep every task's adapter as a PEFT folder in `out/adapters`, findable by its prompts (`dnd eval --zoo out`)."""
    store = AdapterStore(Home(out))
    for i, (name, trained) in enumerate(sorted(snapshots.items())):
        store.put(
            trained.mean(0),
            parts.base.layout,
            base_name=parts.base.name,
            base_fingerprint=parts.base.fingerprint,
            source="trained",
            name=name,
            n_prompts=len(pools.pooled[name]),
            exemplars=choose_exemplars(pools.pooled[name]),
            encoder=encoder.name,
            encoder_fingerprint=encoder.fingerprint,
        )
        parts.progress("store zoo", i + 1, len(snapshots), 0.0)


def fit_router(
    tasks: Mapping[str, Task], pools: Pools, encoder: Encoder, seed: int
) -> tuple[RouterData, dict[str, Any]]:
    """Routing thresholds and support measured on the train tasks' prompts, against prompts that mean nothing."""
    noise = encoder.embed(noise_prompts())
    return fit_thresholds(pools.pooled, {n: t.family for n, t in tasks.items()}, noise=noise, seed=seed)


def finish(
    generator: Generator,
    parts: TrainingParts,
    encoder: Encoder,
    pools: Pools,
    settings: TrainSettings,
    zoo: Path,
    out: Path,
) -> Path:
    """Write the generator folder: weights, the router's data, what made it, card. Replaces an older one whole."""
    folder, tmp = out / "generator", out / ".generator.tmp"
    shutil.rmtree(tmp, ignore_errors=True)
    generator.save_pretrained(tmp)
    router_data, report = fit_router(parts.curriculum.sources, pools, encoder, settings.run.seed)
    router_data.save(tmp)
    write_json(tmp / "training.json", _training_record(generator, parts, settings, report, zoo, out))
    write_card(tmp)
    shutil.rmtree(folder, ignore_errors=True)
    tmp.rename(folder)
    return folder


def _training_record(
    generator: Generator, parts: TrainingParts, settings: TrainSettings, router: dict[str, Any], zoo: Path, out: Path
) -> dict[str, Any]:
    stages = [f"stage-{i}" for i in range(len(settings.stages))]
    curves = {"shared": zoo / "shared", **{s: out / s for s in stages}}
    return {
        **parts.manifest,
        # without what did not make it, and without a path of this machine (its id is kept)
        "settings": json.loads(settings.model_dump_json(exclude={"start", "few_shot", "full_shot"})),
        "generator": {**asdict(generator.config), "parameters": sum(p.numel() for p in generator.parameters())},
        "base_parameters": parts.base.n_parameters,
        "router": router,
        "tasks": {n: {"family": t.family, "licence": t.licence} for n, t in sorted(parts.curriculum.sources.items())},
        "losses": {name: _thinned(path) for name, path in curves.items()},
        "before": _record_before(settings),
    }


def _record_before(settings: TrainSettings) -> dict[str, Any] | None:
    """How the generator was made that this training went on from; None when it started from the base or says not."""
    file = Path(settings.start) / "training.json" if settings.start else None
    if file is None or not file.exists():
        return None
    record = json.loads(file.read_text(encoding="utf-8"))
    return {k: record.get(k) for k in ("settings", "seed", "base_precision", "losses", "before")}


def _thinned(path: Path, keep: int = 40) -> list[dict[str, float]]:
    """The loss curve as means over at most `keep` stretches."""
    lines = RunDir.read_losses(path)
    size = max(1, -(-len(lines) // keep))
    parts = [lines[i : i + size] for i in range(0, len(lines), size)]
    return [{"step": p[-1]["step"], "loss": round(sum(x["loss"] for x in p) / len(p), 4)} for p in parts]

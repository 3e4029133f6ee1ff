"""Methods that train: on a tiny real session, with the zoo's own code, kept so that nothing is trained twice."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from eval_fakes import LABELS
from helpers import random_flat, tiny_model, tiny_tokenizer
from safetensors.torch import save_file
from tiny_world import World, prompts_of

import dnd_sdk
from dnd_sdk.adapters import AdapterStore
from dnd_sdk.config import Home
from dnd_sdk.engine import Engine
from dnd_sdk.errors import ConfigError
from dnd_sdk.evaluation import EvalSettings, TaskTrainer, Zoo, evaluate
from dnd_sdk.evaluation.settings import Standing
from dnd_sdk.lora.layout import LoraLayout
from dnd_sdk.models.loading import Base
from dnd_sdk.session import DnD
from dnd_sdk.tasks.reading import Row, Task
from dnd_sdk.training import zoo as training_zoo
from dnd_sdk.training.parts import TrainingParts
from dnd_sdk.training.settings import PerTaskSettings

SETTINGS = {"per_task": {"steps": 2, "rows": 2, "lr": 5e-2, "checkpoints": 2}, "base": "ignored"}


def task_of(name: str) -> Task:
    rows = [Row(p, LABELS[0], "train" if i < 16 else "test") for i, p in enumerate(prompts_of(name))]
    return Task(name, name, "label", LABELS, "exact_match", "validation", "MIT", tuple(rows[:16]), tuple(rows[16:]))


def likelihood(dnd: DnD, task: Task, flat: torch.Tensor | None) -> float:
    """Mean log-probability of the right answers to the task's test rows."""
    if flat is not None:
        dnd.engine.bank.load("probe", flat)
    ids: Sequence[str | None] = [None if flat is None else "probe"] * len(task.test)
    scores = dnd.engine.option_logprobs([task.messages(r) for r in task.test], ids, LABELS[:1])
    dnd.engine.bank.evict("probe")
    return scores.mean().item()


def test_training_learns_moves_b_alone_and_leaves_the_base_as_it_was(world: World) -> None:
    dnd, task = world.session(), task_of("upper")
    before = likelihood(dnd, task, None)
    trainer = TaskTrainer(dnd, SETTINGS)
    start = random_flat(dnd.layout, std=0.02)
    trained = trainer.train(task, 0, start, 8)
    assert likelihood(dnd, task, trained) > likelihood(dnd, task, start) + 0.5
    for segment, view in dnd.layout.views(trained - start):
        assert (view.abs().max() > 0) == (segment.part == "lora_B"), segment
    assert likelihood(dnd, task, None) == before
    assert torch.equal(trainer.train(task, 0, start, 8), trained)
    scratch = trainer.train(task, 1, steps=8)
    assert likelihood(dnd, task, scratch) > before + 0.5


def test_what_was_trained_is_kept_by_what_made_it(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dnd, task = world.session(), task_of("upper")
    trainer, start = TaskTrainer(dnd, SETTINGS, tmp_path / "kept"), random_flat(dnd.layout, std=0.02)
    stages = []

    def watched(parts: TrainingParts, stage: PerTaskSettings, *args: Any) -> None:
        stages.append((stage.steps, stage.rows, stage.checkpoints, parts.curriculum.seed))
        training_zoo.train_tasks(parts, stage, *args)

    monkeypatch.setattr("dnd_sdk.training.train_tasks", watched)
    first = trainer.train(task, 0, start)
    other = [trainer.train(task, 1, start), trainer.train(task, 0, start, 1), trainer.train(task, 0, start * 2)]
    assert stages == [(2, 2, 2, 0), (2, 2, 2, 1), (1, 2, 1, 0), (2, 2, 2, 0)]
    assert len(list((tmp_path / "kept").iterdir())) == 4
    assert not any(torch.equal(first, o) for o in other)

    def never(*_: object) -> None:
        raise AssertionError("trained again")

    monkeypatch.setattr("dnd_sdk.training.train_tasks", never)
    again = TaskTrainer(dnd, SETTINGS, tmp_path / "kept")
    assert torch.equal(again.train(task, 0, start), first)
    with pytest.raises(AssertionError, match="trained again"):
        TaskTrainer(dnd, {"per_task": {"steps": 3}}, tmp_path / "kept").train(task, 0, start)


def test_a_base_in_bfloat16_is_trained_on_in_float32() -> None:
    model = tiny_model().to(torch.bfloat16)
    base, layout = Base(model, tiny_tokenizer(), "tiny", "f" * 64), LoraLayout.from_model(model, r=4)
    encoder = SimpleNamespace(embed=None)
    session = SimpleNamespace(base=base, layout=layout, engine=Engine(base, layout), generator=None, encoder=encoder)
    trained = TaskTrainer(session, SETTINGS).train(task_of("upper"), 0, steps=2)
    assert trained.dtype == torch.float32 and trained.isfinite().all()
    assert not torch.equal(trained, training_zoo.initial_adapter(layout, 0))


def test_settings_of_the_zoo_are_checked_at_once(world: World) -> None:
    with pytest.raises(ConfigError, match="the zoo's settings cannot be used"):
        TaskTrainer(world.session(), {"per_task": {"steps": 0}})


def test_every_method_runs_together_and_resumes_without_training(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dnd, tasks = world.session(), [task_of("upper"), task_of("digits")]
    generator = dnd.generator
    assert generator is not None
    store = AdapterStore(Home(tmp_path / "zoo"))
    for name in ("digits", "lower"):
        encoded = dnd.encoder.encode(prompts_of(name), state_tokens=generator.state_tokens)
        store.put(
            generator.generate(encoded.states),
            dnd.layout,
            name=name,
            exemplars=encoded.pooled,
            base_name=dnd.base.name,
            base_fingerprint=dnd.base.fingerprint,
            source="trained",
            encoder_fingerprint=dnd.encoder.fingerprint,
        )
    save_file({"shared": generator.mean()}, tmp_path / "zoo" / "shared.safetensors")
    zoo = Zoo(tmp_path / "zoo", dnd.layout, dnd.base.fingerprint, dnd.encoder.fingerprint)
    methods = [
        "base",
        "icl-2",
        "generated",
        "nearest",
        "mean",
        "merge-2",
        "multitask",
        "oracle",
        "oracle-1",
        "polish-1",
        "scratch-1",
    ]
    run = tmp_path / "run"
    settings = EvalSettings(limit=2, max_new_tokens=3, run_dir=run, unrelated=1, against="multitask")
    trainer = TaskTrainer(dnd, SETTINGS, run / "trained")
    report = evaluate(dnd, tasks, methods, settings, zoo=zoo, trainer=trainer)
    assert report["failures"] == [] and list(report["methods"]) == methods
    assert set(report["methods"]["oracle"]["vs"]) == {"base", "multitask"}
    assert report["methods"]["oracle"]["tasks"]["upper"]["unrelated"] is not None
    assert len(list((run / "trained").iterdir())) == 2 * 4
    said = {}
    for line in (run / "results.jsonl").read_text().splitlines():
        record = json.loads(line)
        if record["rows"]:  # a line without any notes whose answers those of another line are
            said.setdefault(record["key"], []).append(record["method"])
    assert all(len(found) == 1 for found in said.values())

    monkeypatch.setattr("dnd_sdk.training.train_tasks", None)
    told: list[Standing] = []
    assert evaluate(dnd, tasks, methods, settings, told.append, zoo=zoo, trainer=trainer) == report
    assert all(p.cached for p in told)


def test_training_is_imported_only_to_train() -> None:
    code = "import sys, dnd_sdk.evaluation; print(any(m.startswith('dnd_sdk.training') for m in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
    for path in (Path(dnd_sdk.__file__).parent / "evaluation").glob("*.py"):
        named = {n.module or "" for n in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(n, ast.ImportFrom)}
        trains = path.name in ("trained.py", "paper_training.py")
        assert trains or not any(m.startswith("dnd_sdk.training") for m in named), path

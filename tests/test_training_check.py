"""Judging a generator on held-out tasks while it trains: what is held out, what is measured, what is kept."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from training_parts import config_file, make_world, silent

from dnd_sdk.config import Home
from dnd_sdk.errors import ConfigError
from dnd_sdk.generator.generator import Generator
from dnd_sdk.models.encoder import Encoder
from dnd_sdk.training import run_generator, run_zoo
from dnd_sdk.training.check import Check
from dnd_sdk.training.conditions import encode_pools
from dnd_sdk.training.curriculum import held_out, sample_rows, sample_tasks
from dnd_sdk.training.parts import TrainingParts, prepare
from dnd_sdk.training.recipe import new_generator
from dnd_sdk.training.run_dir import RunDir
from dnd_sdk.training.settings import CheckSettings, read_settings

HELD = "held_out = 2"
CHECK = "[check]\nevery = 2\nrows = 3\npatience = 1"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = make_world(tmp_path_factory.mktemp("check"))
    config_file(root, data=HELD, check=CHECK, stages="8")
    run_zoo(root / "tasks", root / "train.toml", root / "zoo", home=Home(root / "home"), progress=silent)
    return root


def train(world: Path, out: Path, progress: Callable[..., None] = silent) -> Path:
    """`dnd train generator` into `out`."""
    home = Home(world / "home")
    return run_generator(world / "tasks", world / "train.toml", out, zoo=world / "zoo", home=home, progress=progress)


def parts_of(world: Path) -> TrainingParts:
    """What the stages share, made anew."""
    return prepare(world / "tasks", read_settings(world / "train.toml"), Home(world / "home"), silent)


def test_held_out_tasks_are_of_different_families_and_never_trained_on(world: Path) -> None:
    curriculum = parts_of(world).curriculum
    assert len(curriculum.held) == 2 and not curriculum.held.keys() & curriculum.tasks.keys()
    assert curriculum.held.keys() | curriculum.tasks.keys() == curriculum.sources.keys()
    assert len({curriculum.sources[n].family for n in curriculum.held}) == 2
    assert {p.stem for p in (world / "zoo" / "tasks").glob("*.safetensors")} == curriculum.tasks.keys()


def test_held_out_takes_every_family_before_a_second_task_of_one() -> None:
    families = {"a1": "a", "a2": "a", "a3": "a", "b1": "b", "c1": "c"}
    for seed in range(5):
        order = held_out(families, 5, seed)
        assert {families[n] for n in order[:3]} == {"a", "b", "c"} and sorted(order) == sorted(families)
    assert len({tuple(held_out(families, 1, seed)) for seed in range(20)}) > 1


def test_holding_out_everything_is_refused(world: Path, tmp_path: Path) -> None:
    for part in ("base", "encoder"):
        (tmp_path / part).symlink_to(world / part)
    settings = read_settings(config_file(tmp_path, data="held_out = 99"))
    with pytest.raises(ConfigError, match="held_out is 99"):
        prepare(world / "tasks", settings, Home(tmp_path), silent)


def test_a_pass_over_families_shows_one_task_of_each() -> None:
    families = {f"big{i}": "big" for i in range(6)} | {"x": "x", "y": "y", "z": "z"}
    seen = [n for step in range(12) for n in sample_tasks([*families], 2, step, 0, families)]
    assert all(len({families[n] for n in seen[i : i + 4]}) == 4 for i in range(0, 24, 4))
    assert {n for n in seen if families[n] == "big"} == {f"big{i}" for i in range(6)}


def test_the_losses_are_those_of_own_others_and_no_prompts(world: Path, tmp_path: Path) -> None:
    parts = parts_of(world)
    settings = read_settings(world / "train.toml")
    encoder = Encoder.load(settings.encoder, Home(world / "home"))
    generator = new_generator(settings, parts, encoder)
    torch.nn.init.normal_(generator.shared, std=0.05)
    torch.nn.init.constant_(generator.gain, 0.3)
    sizes = {"size": 24, "state_tokens": 8, "seed": 0, "cache": tmp_path / "pools.safetensors"}
    pools = encode_pools(parts.curriculum.sources, encoder, **sizes, progress=silent)
    check = Check(parts, pools, CheckSettings(every=1, rows=3), RunDir(tmp_path / "stage", {}))
    measured = check.after(0, generator)

    held = parts.curriculum.held
    names = sorted(held)
    adapters = [generator(pools.draw(n, generator.config.n_prompts, 0, 0)[None])[0] for n in names]

    def mean(of: list[Tensor]) -> float:
        rows = [(row, a) for n, a in zip(names, of, strict=True) for row in sample_rows(held[n], 3, 0, 0)]
        return sum(parts.base.loss(a[None], [(row, 0)]) for row, a in rows) / len(rows)

    assert measured["held"] == pytest.approx(mean(adapters), rel=1e-4)
    assert measured["held_shuffled"] == pytest.approx(mean(adapters[::-1]), rel=1e-4)
    assert measured["held_zero"] == pytest.approx(mean([generator.mean()] * 2), rel=1e-4)
    assert len({round(v, 5) for v in measured.values()}) == 3


def test_the_best_checked_weights_come_back_and_patience_ends_the_stage(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = parts_of(world)
    settings = read_settings(world / "train.toml")
    generator = new_generator(settings, parts, Encoder.load(settings.encoder, Home(world / "home")))
    script = iter([0.9, 0.5, 0.7, 0.6])
    monkeypatch.setattr(Check, "_measure", lambda *_: {"held": next(script)})
    run = RunDir(tmp_path / "stage", {})
    check = Check(parts, None, CheckSettings(every=2, patience=2), run)  # type: ignore[arg-type]  # not measured here
    for step in range(8):
        assert not check.over
        generator.shared.data.fill_(float(step))
        run.log(step, **check.after(step, generator))
    assert check.over
    check.restore_best(generator)
    assert generator.shared.eq(3.0).all()  # the second check came after step 3
    resumed = Check(parts, None, CheckSettings(every=2, patience=2), run)  # type: ignore[arg-type]
    assert resumed.over


def test_an_interrupted_stage_stops_where_a_straight_one_does(world: Path, tmp_path: Path) -> None:
    straight = train(world, tmp_path / "straight")
    left = iter(range(13))

    def interrupt(stage: str, *_: object) -> None:
        if stage == "end-to-end" and next(left, None) in (3, 5):
            raise KeyboardInterrupt

    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            train(world, tmp_path / "broken", interrupt)
    broken = train(world, tmp_path / "broken", interrupt)
    curves = [tmp_path / run / "stage-1" / "losses.jsonl" for run in ("straight", "broken")]
    assert curves[0].read_text() == curves[1].read_text() and "held_shuffled" in curves[0].read_text()
    assert Generator.from_pretrained(broken).id == Generator.from_pretrained(straight).id

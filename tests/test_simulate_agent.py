"""The simulated agent: its score, and the whole program on a tiny installation."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
from test_examples import load
from tiny_world import World

simulate = load("simulate_agent.py")


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    """Six generated jobs of 40 train prompts."""
    load("tiny_tasks/make.py").main(["--out", str(tmp_path / "tasks"), "--rows", "50"])
    return tmp_path / "tasks"


def test_the_score_by_hand() -> None:
    score, turn = simulate.Score(), simulate.Turn
    score.note(turn("a", "1"), None)
    score.note(turn("b", "2"), None)
    score.owner["made"] = "a"
    for job, adapter in [("a", "made"), ("a", "made"), ("a", None), ("b", "made"), ("b", None)]:
        score.note(turn(job, "x"), adapter)
    assert score.served == {"base_waiting": 3, "own": 2, "base_regret": 1, "other": 1}
    seen = [simulate.Seen(30, ["a"] * 9 + ["b"]), simulate.Seen(10, ["b", "a"])]
    figures = score.figures(seen, 20)
    assert figures["purity"] == pytest.approx((27 + 5) / 40) and figures["purity_ready"] == pytest.approx(0.9)
    assert figures["reuse_rate"] == pytest.approx(2 / 3) and figures["regret"] == pytest.approx(2 / 7)
    assert simulate.purity([]) is None


def test_turns_are_those_of_the_seed_and_no_prompt_comes_twice(tasks: Path) -> None:
    turns = simulate.turns_of(tasks, None, 4, 30, random.Random(1))
    assert turns == simulate.turns_of(tasks, None, 4, 30, random.Random(1))
    assert len({t.prompt for t in turns}) == len(turns) == 120 and len({t.job for t in turns}) == 4
    assert {t.job for t in turns[:20]} == {t.job for t in turns}, "shuffled"
    assert len({t.job for t in simulate.turns_of(tasks, "validation", 2, 9, random.Random(1))}) == 2
    with pytest.raises(SystemExit, match="2 tasks of role validation, 3 are wanted"):
        simulate.turns_of(tasks, "validation", 3, 9, random.Random(1))


def test_the_program_runs_and_leaves_the_home_alone(
    world: World, tasks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["--tasks", "3", "--prompts", "40", "--json", str(tmp_path / "out.json"), *world.options]
    assert simulate.main([str(tasks), *argv]) == 0
    report = json.loads((tmp_path / "out.json").read_text())
    assert report == json.loads(capsys.readouterr().out)
    assert sum(report["served"].values()) == report["settings"]["turns"] == 120
    assert report["generations"] >= 1 and 1 / 3 <= report["purity"] <= 1
    assert not world.home.adapters.exists() and not world.home.streams.exists()


def test_read_ahead_says_what_the_encoder_says(world: World) -> None:
    encoder = world.session().encoder
    ahead = simulate.ReadAhead(encoder, ["one two", "three"])
    expected = encoder.encode(["three", "one two"], with_states=False).pooled
    assert torch.allclose(ahead.encode(["three", "one two"], with_states=False).pooled, expected, atol=1e-6)
    assert ahead.encode(["three"]).states is not None and ahead.name == encoder.name
    assert ahead.encode(["new"], with_states=False).pooled.shape == (1, encoder.width)

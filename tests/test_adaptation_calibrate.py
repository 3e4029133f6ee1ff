"""`adapt(calibrate=True)`: when it acts, what is told and kept of it, and that it is vetted like any weights."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_runner import dnd as run_dnd
from cli_runner import dnd_json
from tiny_world import World, make_world, prompts_of
from torch import Tensor

from dnd_sdk.adaptation import Calibrated, LabelCalibration
from dnd_sdk.prompts.roles import Role
from dnd_sdk.session import DnD

SHARES = {"yes": 0.75, "no": 0.125}


@pytest.fixture
def world(tmp_path: Path) -> World:
    return make_world(tmp_path)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """A calibration that adds a little to every weight; what it was given is written down."""
    seen: list[Any] = []

    def calibrate(self: LabelCalibration, flat: Tensor, prompts: Sequence[str], chats: Sequence[Any]) -> Calibrated:
        seen.append((list(prompts), list(chats)))
        return Calibrated(flat + 0.01, SHARES)

    monkeypatch.setattr(LabelCalibration, "calibrate", calibrate)
    return seen


def test_a_generated_adapter_is_calibrated_told_of_and_recorded(world: World, calls: list[Any]) -> None:
    dnd, prompts = world.session(), prompts_of("upper")
    plain = dnd.adapt(prompts, mode="generate", name="plain", calibrate=False)
    assert not calls
    done = dnd.adapt(prompts, mode="generate", name="fair", calibrate=True)
    assert [sorted(p) for p, _ in calls] == [sorted(prompts)]
    assert any("yes 0.75, no 0.12" in note for note in done.notes)
    assert done.adapter is not None and plain.adapter is not None
    assert done.adapter.scores == {"label_share.yes": 0.75, "label_share.no": 0.125}
    flats = [
        dnd.store.load(a, dnd.layout, base_fingerprint=dnd.base.fingerprint) for a in (plain.adapter, done.adapter)
    ]
    torch.testing.assert_close(flats[1], flats[0] + 0.01)


def test_the_session_says_whether_and_a_call_may_say_otherwise(world: World, calls: list[Any]) -> None:
    dnd = world.session()
    dnd.adapt(prompts_of("upper"), mode="generate", calibrate=False)
    assert not calls
    dnd.adapt(prompts_of("digits"), mode="generate")
    assert len(calls) == 1
    dnd.adapt(prompts_of("digits"))  # the same set: nothing is made
    assert len(calls) == 1
    dnd = DnD(dnd.parts, calibrate=False)
    dnd.adapt(prompts_of("digits"), mode="generate", name="again")
    assert len(calls) == 1
    dnd.adapt(prompts_of("digits"), mode="generate", name="fair", calibrate=True)
    assert len(calls) == 2


def test_the_base_is_asked_under_the_role(world: World, calls: list[Any]) -> None:
    world.session().adapt(prompts_of("upper"), role=Role.parse("Be brief."), mode="generate", calibrate=True)
    [(prompts, chats)] = calls
    assert [c[-1]["content"] for c in chats] == prompts
    assert all(c[0]["role"] == "system" and "Be brief." in c[0]["content"] for c in chats)


def test_where_there_is_no_label_calibration_the_adapter_is_the_plain_one(world: World) -> None:
    dnd, prompts = world.session(), prompts_of("upper")
    plain = dnd.adapt(prompts, mode="generate")
    assert plain.notes == ()  # nobody asked
    done = dnd.adapt(prompts, mode="generate", calibrate=True)
    assert any(note.startswith("not calibrated: ") for note in done.notes)
    assert plain.adapter is not None and done.adapter is not None and done.adapter.id == plain.adapter.id


def test_calibrated_weights_are_vetted(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    bad = lambda self, flat, prompts, chats: Calibrated(flat * float("nan"), SHARES)  # noqa: E731
    monkeypatch.setattr(LabelCalibration, "calibrate", bad)
    dnd = world.session()
    done = dnd.adapt(prompts_of("upper"), mode="generate", calibrate=True)
    assert done.decision == "base" and "not finite" in done.reason and dnd.store.ls() == []


def test_the_command_and_the_setting(
    world: World, calls: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "prompts.txt"
    file.write_text("\n".join(prompts_of("upper")), "utf-8")
    command = ["adapt", file, "--mode", "generate", *world.options]
    assert "calibrated; the labels were said: yes 0.75" in run_dnd(*command, "--calibrate").stderr
    dnd_json(*command)
    assert len(calls) == 2
    dnd_json(*command, "--no-calibrate")
    assert len(calls) == 2
    Path("dnd.toml").write_text("calibrate = false\n", "utf-8")
    dnd_json(*command)
    assert len(calls) == 2

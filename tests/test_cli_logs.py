"""`dnd logs`: a table for people, JSON for programs, and decisions made again."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cli_runner import dnd, dnd_json
from test_routing_decision_log import decision

from dnd_sdk.config import Home
from dnd_sdk.routing import Thresholds
from dnd_sdk.routing.decision_log import LOG_FILE, DecisionLog


@pytest.fixture
def logged(home: Home) -> Home:
    """30 old decisions, and two new ones: a prompt that barely reached its threshold, and one far from it."""
    log, now = DecisionLog(home.logs), datetime.now(UTC)
    for i in range(30):
        log.append(decision(time=(now - timedelta(days=2, minutes=-i)).isoformat(), by="cluster", neighbours=()))
    log.append(decision(time=now.isoformat(), adapter="barely", score=0.56, neighbours=(("barely", 0.56),)))
    log.append(decision(time=now.isoformat(), decision="base", adapter=None, score=0.1, neighbours=(("far", 0.1),)))
    return home


def test_an_empty_home(home: Home) -> None:
    assert dnd("logs", "--home", home.root).stdout == "no decisions yet\n"
    assert dnd_json("logs", "--home", home.root)["decisions"] == []
    assert not home.root.exists()


def test_the_table_and_its_bounds(logged: Home) -> None:
    at = ("--home", logged.root)
    text = dnd("logs", *at).stdout
    assert "barely" in text and "0.56" in text and "observe" in text and text.count("tickets") == 18
    assert len(dnd_json("logs", *at)["decisions"]) == 20
    assert dnd_json("logs", "--limit", "3", *at)["n_logged"] == 32
    assert [d["score"] for d in dnd_json("logs", "--limit", "1", *at)["decisions"]] == [0.1]


def test_since(logged: Home) -> None:
    at = ("--home", logged.root)
    assert len(dnd_json("logs", "--since", "1h", *at)["decisions"]) == 2
    assert dnd_json("logs", "--since", "3d", *at)["n_logged"] == 32
    day = (datetime.now() - timedelta(days=1)).isoformat()
    assert dnd_json("logs", "--since", day, *at)["n_logged"] == 2
    refused = dnd("logs", "--since", "yesterday", *at)
    assert refused.exit_code == 1 and "--since 'yesterday' is not a time" in refused.stderr


def test_lines_that_cannot_be_read_are_said(logged: Home) -> None:
    with (logged.logs / LOG_FILE).open("ab") as f:
        f.write(b"torn\n")
    assert "1 lines of the log could not be read" in dnd("logs", "--home", logged.root).stderr


def test_replay_shows_what_other_thresholds_change(logged: Home, tmp_path: Path) -> None:
    at = ("--home", logged.root, "--generator", tmp_path)
    Thresholds(reuse=0.9, reuse_single=0.55, support=-0.1).save(tmp_path / "router.json")
    from safetensors.torch import save_file
    from torch import eye

    save_file({"tasks": eye(4)}, tmp_path / "support.safetensors")
    same = dnd_json("logs", "--replay", *at)
    assert same["changed"] == [] and same["n_scored"] == 2 and same["thresholds"]["reuse_single"] == 0.55
    Thresholds(reuse=0.9, reuse_single=0.6, support=-0.1).save(tmp_path / "router.json")
    (changed,) = dnd_json("logs", "--replay", *at)["changed"]
    assert (changed["decision"], changed["now"], changed["adapter"]) == ("reuse", "base", "barely")
    text = dnd("logs", "--replay", *at).stdout
    assert "barely" in text and "1 of 2 decisions by score would change, 32 in the log" in text


def test_replay_asks_the_settings_for_base_and_generator(
    logged: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Flag, variable and dnd.toml alike: what `dnd route` would go by is what a replay goes by."""
    from safetensors.torch import save_file
    from torch import eye

    made = tmp_path / "made"
    made.mkdir()
    Thresholds(reuse=0.9, reuse_single=0.6, support=-0.1).save(made / "router.json")
    save_file({"tasks": eye(4)}, made / "support.safetensors")
    monkeypatch.chdir(tmp_path)
    at = ("logs", "--replay", "--home", logged.root)
    shipped = dnd_json(*at)["thresholds"]
    assert shipped["reuse"] != 0.9
    (tmp_path / "dnd.toml").write_text('generator = "made"\n')
    assert dnd_json(*at)["thresholds"]["reuse_single"] == 0.6
    (tmp_path / "dnd.toml").unlink()
    monkeypatch.setenv("DND_GENERATOR", str(made))
    assert dnd_json(*at)["thresholds"]["reuse_single"] == 0.6
    monkeypatch.delenv("DND_GENERATOR")
    # another base without a generator: nothing was measured for another encoder, so only identical sets are reused
    monkeypatch.setenv("DND_BASE", "some/other-base")
    monkeypatch.setenv("DND_ENCODER", "some/other-encoder")
    other = dnd_json(*at)["thresholds"]
    assert other != shipped and other == dnd_json(*at, "--base", "third/base")["thresholds"]

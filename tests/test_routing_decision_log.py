"""The decision log: whole lines from any number of processes, bounded, and never in the way."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import threading
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from dnd_sdk.routing.decision_log import LOG_FILE, OLD_FILE, Decision, DecisionLog, read_decisions


def decision(**changes: Any) -> Decision:
    made = Decision(
        kind="observe",
        prompts="a" * 64,
        n_prompts=1,
        decision="reuse",
        adapter="tickets",
        score=0.7,
        neighbours=(("tickets", 0.7), ("notes", 0.2)),
        support=None,
        thresholds={"reuse": 0.9, "reuse_single": 0.5, "support": -0.1},
        rule="single",
        mode="auto",
        by="scores",
        reason="near enough",
        cluster=3,
    )
    return replace(made, **changes)


def test_what_is_written_is_read(tmp_path: Path) -> None:
    made = [decision(), decision(kind="adapt", adapter=None, score=None, neighbours=(), support=0.1, cluster=None)]
    log = DecisionLog(tmp_path / "logs")
    for d in made:
        log.append(d)
    assert read_decisions(tmp_path / "logs") == (made, 0)
    assert datetime.fromisoformat(made[0].time) - datetime.now(UTC) < timedelta(minutes=1)


def test_probabilities_are_kept_and_lines_of_before_read_without(tmp_path: Path) -> None:
    made = decision(probability=0.75, in_distribution=0.5)
    DecisionLog(tmp_path).append(made)
    assert read_decisions(tmp_path) == ([made], 0)
    line = json.loads((tmp_path / LOG_FILE).read_text())
    (tmp_path / LOG_FILE).write_text(json.dumps({**line, "probability": "high"}) + "\n")
    assert read_decisions(tmp_path) == ([], 1)
    del line["probability"], line["in_distribution"]
    (tmp_path / LOG_FILE).write_text(json.dumps(line) + "\n")
    assert read_decisions(tmp_path) == ([replace(made, probability=None, in_distribution=None)], 0)


def test_no_log_is_an_empty_one(tmp_path: Path) -> None:
    assert read_decisions(tmp_path) == ([], 0)


def test_since(tmp_path: Path) -> None:
    log = DecisionLog(tmp_path)
    old, new = decision(time="2026-01-01T00:00:00+00:00"), decision(time="2026-01-03T00:00:00+00:00")
    log.append(old)
    log.append(new)
    assert read_decisions(tmp_path, since=datetime(2026, 1, 2, tzinfo=UTC))[0] == [new]
    assert read_decisions(tmp_path, since=datetime(2026, 1, 3, tzinfo=UTC))[0] == [new]


def test_the_last_are_read_over_the_turn_of_the_file(tmp_path: Path) -> None:
    log = DecisionLog(tmp_path, max_bytes=2000)
    made = [decision(cluster=i) for i in range(12)]
    for one in made:
        log.append(one)
    whole, _ = read_decisions(tmp_path)
    n_old = len((tmp_path / OLD_FILE).read_bytes().splitlines())
    assert 1 < n_old < len(whole)
    for last in (1, len(whole) - n_old + 1, 100):
        assert read_decisions(tmp_path, last=last) == (whole[-last:], 0)


def test_it_is_bounded_by_rotation(tmp_path: Path) -> None:
    log = DecisionLog(tmp_path, max_bytes=4000)
    for i in range(200):
        log.append(decision(cluster=i))
        assert sum(f.stat().st_size for f in tmp_path.glob("*.jsonl")) < 2 * 4000 + 1000
    kept, n_bad = read_decisions(tmp_path)
    numbers = [d.cluster for d in kept]
    assert numbers == list(range(200 - len(kept), 200)) and 5 < len(kept) < 100 and n_bad == 0
    assert {f.name for f in tmp_path.glob("*.jsonl")} <= {LOG_FILE, OLD_FILE}


@pytest.mark.parametrize(
    "line",
    [
        b"{torn",
        b"[]",
        b"7",
        b"\xff\xfe",
        json.dumps({"v": 2}).encode(),
        json.dumps({"v": 1, "kind": "adapt"}).encode(),
        b"{" * 70000,
    ],
)
def test_damaged_lines_are_passed_over_and_counted(tmp_path: Path, line: bytes) -> None:
    log = DecisionLog(tmp_path)
    log.append(decision(cluster=1))
    with (tmp_path / LOG_FILE).open("ab") as f:
        f.write(line + b"\n")
    log.append(decision(cluster=2))
    found, n_bad = read_decisions(tmp_path)
    assert [d.cluster for d in found] == [1, 2] and n_bad >= 1


@pytest.mark.parametrize(
    "changes", [{"score": "high"}, {"score": float("nan")}, {"neighbours": [1]}, {"thresholds": {}}, {"time": "now"}]
)
def test_wrong_fields_are_no_decision(tmp_path: Path, changes: dict[str, Any]) -> None:
    DecisionLog(tmp_path).append(decision())
    record = json.loads((tmp_path / LOG_FILE).read_text()) | changes
    (tmp_path / LOG_FILE).write_text(json.dumps(record) + "\n")
    assert read_decisions(tmp_path) == ([], 1)


def test_a_full_disk_is_warned_of_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    log = DecisionLog(tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(os, "write", full)
        log.append(decision())
        log.append(decision())
    assert caplog.text.count("No space left") == 1
    log.append(decision())
    assert len(read_decisions(tmp_path)[0]) == 1


def test_a_folder_that_cannot_be_made(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("")
    DecisionLog(tmp_path / "file" / "logs").append(decision())
    assert "not logged" in caplog.text


def append_many(folder: Path, who: int, n: int, max_bytes: int) -> None:
    log = DecisionLog(folder, max_bytes=max_bytes)
    for i in range(n):
        log.append(decision(cluster=1000 * who + i, reason="x" * (i % 300)))


def test_lines_of_several_processes_and_threads_never_mix(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    others = [context.Process(target=append_many, args=(tmp_path, who, 100, 2**30)) for who in range(3)]
    others += [threading.Thread(target=append_many, args=(tmp_path, who, 100, 2**30)) for who in (3, 4)]  # type: ignore[list-item]
    for o in others:
        o.start()
    for o in others:
        o.join()
    found, n_bad = read_decisions(tmp_path)
    numbers = [d.cluster or 0 for d in found]
    assert n_bad == 0 and sorted(numbers) == [1000 * who + i for who in range(5) for i in range(100)]
    for who in range(5):
        own = [n for n in numbers if n // 1000 == who]
        assert own == sorted(own)


def test_several_processes_rotate_without_harm(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    others = [context.Process(target=append_many, args=(tmp_path, who, 100, 5000)) for who in range(3)]
    for o in others:
        o.start()
    for o in others:
        o.join()
    found, n_bad = read_decisions(tmp_path)
    assert [o.exitcode for o in others] == [0] * 3 and found and n_bad == 0
    assert sum(f.stat().st_size for f in tmp_path.glob("*.jsonl")) < 2 * 5000 + 3 * 1000

"""The precision that a CPU is faster at: measured once, kept for this machine, and never in the way."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from dnd_sdk.config import Home
from dnd_sdk.models import precision


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, float]]:
    """How often it was measured; what it comes to is put in by the test."""
    runs: list[dict[str, float]] = []

    def request_s() -> dict[str, float]:
        runs.append({"float32": 1.0, "bfloat16": 0.5})
        return runs[-1]

    monkeypatch.setattr(precision, "request_s", request_s)
    return runs


def test_it_is_measured_once_a_machine(
    home: Home, measured: list[dict[str, float]], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert [precision.faster_dtype(home) for _ in range(3)] == [torch.bfloat16] * 3 and len(measured) == 1
    monkeypatch.setattr(precision, "cpu_name", lambda: "another processor")
    assert precision.faster_dtype(home) == torch.bfloat16 and len(measured) == 2


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [(0.5, torch.bfloat16), (1.05, torch.bfloat16), (1.2, torch.float32), (9.0, torch.float32)],
)
def test_bfloat16_may_be_a_little_slower_for_half_the_memory(
    home: Home, monkeypatch: pytest.MonkeyPatch, seconds: float, expected: torch.dtype
) -> None:
    monkeypatch.setattr(precision, "request_s", lambda: {"float32": 1.0, "bfloat16": seconds})
    assert precision.faster_dtype(home) == expected
    assert json.loads((home.models / "precision.json").read_text())["seconds"]["bfloat16"] == seconds


@pytest.mark.parametrize("content", ["", "[]", "{", '{"cpu": 3}', '{"faster": "int8"}', "\udc80"])
def test_a_damaged_answer_is_measured_again(home: Home, measured: list[dict[str, float]], content: str) -> None:
    precision.faster_dtype(home)
    file = home.models / "precision.json"
    good = file.read_text()
    file.write_bytes(content.encode("utf-8", "surrogateescape"))
    assert precision.faster_dtype(home) == torch.bfloat16 and len(measured) == 2
    assert file.read_text() == good


def test_a_home_that_cannot_be_written_is_measured_each_time(tmp_path: Path, measured: list[dict[str, float]]) -> None:
    (tmp_path / "file").touch()
    home = Home(tmp_path / "file")
    assert [precision.faster_dtype(home) for _ in range(2)] == [torch.bfloat16] * 2 and len(measured) == 2


def test_the_measurement_is_of_both() -> None:
    seconds = precision.request_s()
    assert seconds.keys() == {"float32", "bfloat16"} and all(s > 0 for s in seconds.values())

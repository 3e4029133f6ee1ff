"""`dnd bench store`: a small run of the real thing, its table, its picture, and refusals."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from cli_runner import dnd, dnd_json

from dnd_sdk.bench import bench_store, growth, render_store
from dnd_sdk.config import Home
from dnd_sdk.errors import ConfigError, InputError
from dnd_sdk.evaluation import read_report, write_plots
from dnd_sdk.evaluation.store_plot import LINES, growth_plot


@pytest.fixture(scope="module")
def report() -> dict:
    told: list[tuple[int, int, str]] = []
    made = bench_store((40, 3), repeats=1, commands=False, progress=lambda *step: told.append(step))
    assert told[0] == (1, 43, "storing adapters") and told[-1] == (43, 43, "storing adapters")
    return json.loads(json.dumps(made, allow_nan=False))


def test_the_report_holds_every_measurement_of_every_size(report: dict) -> None:
    assert [b["n"] for b in report["sizes"]] == [3, 40]
    for block in report["sizes"]:
        assert all(block[key] > 0 for key in LINES) and block["adapt_own_ms"] < block["adapt_ms"]
    assert report["sizes"][0]["adapt_over_smallest"] == 1.0
    table = render_store(report)
    assert len(table.splitlines()) == 3 and "FAISS" in table


def test_stand_ins_route_to_the_task_that_was_asked_about(tmp_path: Path) -> None:
    stored = growth._Stored(Home(tmp_path), 40)
    for _ in range(40):
        stored.add()
    for i in (0, 17, 39):
        nearest = stored.dnd.router.nearest(growth._task(i, 64, seed=1))
        assert nearest[0][0].name == f"bench-{i}" and len(nearest) == 32
        _, found = stored._faiss.search(growth._task(i, 64, seed=1).numpy(), 1)
        assert (found // 64 == i).mean() > 0.9, "plain FAISS searches the same vectors"
    assert torch.equal(growth._task(5, 8, seed=1), growth._task(5, 8, seed=1))


def test_what_a_round_adds_is_gone_after_it(tmp_path: Path) -> None:
    stored = growth._Stored(Home(tmp_path), 3)
    for _ in range(3):
        stored.add()
    growth._timed([stored], 1, lambda: 0.0)
    assert [a.name for a in stored.dnd.store.ls()] == ["bench-0", "bench-1", "bench-2"]
    assert stored.dnd.store.verify() == []


def test_the_command_and_its_picture(report: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dnd_sdk.bench.bench_store", lambda sizes, **_: report | {"asked": sizes})
    printed = dnd_json("bench", "store", "--sizes", "3,40")
    assert printed["asked"] == [3, 40] and printed["schema_version"] == 1
    assert "adapters" in dnd("bench", "store").stdout
    path = tmp_path / "store.json"
    path.write_text(json.dumps(report))
    files = write_plots(read_report(path), tmp_path / "out")
    assert [f.name for f in files] == ["report.md", "store.svg"]
    text, picture = (f.read_text() for f in files)
    assert all(name in text and name in picture for name in LINES.values())
    assert "| milliseconds | 3 adapters | 40 adapters |" in text


@pytest.mark.parametrize("harm", [{"schema_version": 9}, {"sizes": []}, {"sizes": [{"n": 0}]}, {"machine": None}])
def test_a_report_that_cannot_be_drawn_is_refused(report: dict, tmp_path: Path, harm: dict) -> None:
    path = tmp_path / "store.json"
    path.write_text(json.dumps(report | harm))
    with pytest.raises(InputError, match="store report"):
        read_report(path)


@pytest.mark.parametrize("sizes", ["", "x", "0", "5,-1", "1.5", "999999999"])
def test_sizes_that_are_none(sizes: str) -> None:
    failed = dnd("bench", "store", "--sizes", sizes)
    assert failed.exit_code == 2 or "--sizes must be" in failed.stderr
    with pytest.raises(ConfigError, match="at least 1"):
        bench_store((), repeats=1)


def test_a_timed_command_is_run(tmp_path: Path) -> None:
    stored = growth._Stored(Home(tmp_path), 2)
    for _ in range(2):
        stored.add()
    assert growth._command(stored, "rm") > 0
    assert [a.name for a in stored.dnd.store.ls()] == ["bench-1"]


def test_what_the_docs_show_is_what_was_measured() -> None:
    docs = Path(__file__).parents[1] / "docs"
    report = read_report(docs / "store.json")
    assert growth_plot(report) == (docs / "store.svg").read_text()
    assert [b["n"] for b in report["sizes"]] == [10, 100, 1000, 5000]
    for block in report["sizes"]:  # the figures that were promised, as they stand in the file: nothing is timed here
        assert block["adapt_over_smallest"] <= 1.2
        assert all(block[f"route_{k}_ms"] <= 2 * block[f"faiss_{k}_ms"] + 0.3 for k in ("set", "one"))
    assert max(report["sizes"][2]["commands_s"].values()) < 1.5

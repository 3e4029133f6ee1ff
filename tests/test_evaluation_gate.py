"""`dnd bench gate`: measures against naive loops, decisions against the router's own, the command without the base."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from cli_runner import dnd, dnd_json
from routing_parts import FakeStore, adapter, task_vectors, unit
from tiny_world import World, prompts_of

from dnd_sdk.errors import InputError
from dnd_sdk.evaluation.gate.gate import KNOWN, MISSING, OUTCOMES, STORED, UNSEEN, Event, Gate, try_gate
from dnd_sdk.evaluation.gate.noise import held_out_noise
from dnd_sdk.evaluation.gate.plot import reliability_plot
from dnd_sdk.evaluation.gate.reliability import auroc, brier, ece, measure, table
from dnd_sdk.evaluation.gate.report import build_gate_report
from dnd_sdk.evaluation.plot import read_report, write_plots
from dnd_sdk.routing import (
    Probabilities,
    Router,
    RouterData,
    ScoreMap,
    Support,
    Thresholds,
    choose_exemplars,
    noise_prompts,
)

WIDTH = 48
MAPS = Probabilities(ScoreMap(2.0, -3.0, "logit"), ScoreMap(2.0, 0.0, "logit"), ScoreMap(9.0, 0.0))
THRESHOLDS = Thresholds(0.9, 0.4, -0.1, {}, MAPS)


@pytest.fixture(autouse=True)
def _few_resamples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dnd_sdk.evaluation.gate.reliability.RESAMPLES", 60)


def events(n: int = 60, seed: int = 0) -> tuple[Any, Any, Any]:
    """Probabilities with ties, truths, whole-number weights."""
    rng = np.random.default_rng(seed)
    return rng.integers(0, 21, n) / 20, (rng.random(n) < 0.4).astype(float), rng.integers(0, 4, n).astype(float)


def repeated(p: Any, y: Any, w: Any) -> list[tuple[float, float]]:
    return [(a, b) for a, b, k in zip(p, y, w, strict=True) for _ in range(int(k))]


def test_brier_is_the_mean_squared_error() -> None:
    rows = repeated(*events())
    assert brier(*events()) == pytest.approx(sum((p - y) ** 2 for p, y in rows) / len(rows))


def test_ece_equals_a_loop_over_bins() -> None:
    rows, total = repeated(*events()), 0.0
    for i in range(10):
        inside = [(p, y) for p, y in rows if i / 10 <= p < (i + 1) / 10 or (i == 9 and p == 1.0)]
        if inside:
            said, held = (sum(v) / len(inside) for v in zip(*inside, strict=True))
            total += len(inside) / len(rows) * abs(said - held)
    assert ece(*events()) == pytest.approx(total)
    p = np.array([0.0, 0.0, 1.0, 1.0])
    assert ece(p, p, np.ones(4)) == 0.0 and ece(1 - p, p, np.ones(4)) == 1.0


def test_auroc_equals_comparing_all_pairs() -> None:
    rows = repeated(*events())
    ones, zeros = [p for p, y in rows if y], [p for p, y in rows if not y]
    wins = sum((a > b) + (a == b) / 2 for a in ones for b in zeros)
    assert auroc(*events()) == pytest.approx(wins / len(ones) / len(zeros))
    assert math.isnan(auroc(np.array([0.5]), np.array([1.0]), np.ones(1)))


def test_the_table_holds_every_event_in_its_bin() -> None:
    p, y, _ = events()
    rows = table(p, y, np.ones(len(p)))
    assert sum(r["n"] for r in rows) == len(p)
    assert all(r["low"] <= r["predicted"] <= r["high"] and 0 <= r["observed"] <= 1 for r in rows)


def test_intervals_come_from_whole_units_and_even_weighs_truths_alike() -> None:
    p, y, _ = events(200)
    units = np.arange(200) // 20
    found = measure(p, y, units)
    for name in ("ece", "brier", "auroc"):
        low, high = found[name]["ci95"]
        assert low <= high and (name == "ece" or low <= found[name]["value"] <= high)
    same = measure(np.tile(p[:20], 5), np.tile(y[:20], 5), np.arange(100) // 20)
    assert same["brier"]["ci95"] == pytest.approx([same["brier"]["value"]] * 2)  # equal units leave nothing to chance
    apart = measure(p, y, np.where(y > 0.5, units, units + 10), even=True)
    assert apart["brier"]["value"] == pytest.approx((((p - y)[y > 0.5] ** 2).mean() + (p[y < 0.5] ** 2).mean()) / 2)


def test_held_out_noise_is_deterministic_and_of_other_kinds() -> None:
    first = held_out_noise(6)
    assert first == held_out_noise(6) != held_out_noise(6, seed=1) and len(first) == 5
    everything = [p for prompts in first.values() for p in prompts]
    assert len(set(everything)) == 30 and all(p.strip() for p in everything)
    assert not set(everything) & set(noise_prompts())


class FakeEncoder:
    width, name, fingerprint = WIDTH, "a/folder/mini", "e" * 64


def tasks() -> dict[str, torch.Tensor]:
    return {f"t{t}": task_vectors(t, 40) for t in range(5)}


def gate(thresholds: Thresholds = THRESHOLDS) -> Gate:
    noise = unit(torch.randn(30, WIDTH, generator=torch.Generator().manual_seed(9)))
    return Gate(FakeEncoder(), thresholds, Support(torch.cat(list(tasks().values())), noise), "g")  # type: ignore[arg-type]


def noise() -> dict[str, dict[str, torch.Tensor]]:
    rng = torch.Generator().manual_seed(1)
    return {s: {f"{s} {k}": unit(torch.randn(16, WIDTH, generator=rng)) for k in range(3)} for s in (KNOWN, UNSEEN)}


def test_decisions_are_those_of_the_router() -> None:
    found = try_gate(gate(), tasks(), noise(), seeds=1, progress=lambda *_: None)
    rng, store, asking = torch.Generator().manual_seed(0), FakeStore(), {}
    for name, v in tasks().items():
        order = torch.randperm(40, generator=rng)
        store.put(adapter(name), choose_exemplars(v[order[:20]]))
        asking[name] = v[order[20:]]
    router = Router(store, "mini", "e" * 64, "b" * 64, THRESHOLDS, support=gate().support)
    order = torch.randperm(20, generator=rng)
    route = router.route_one(asking["t0"][order[:1]])
    first = found[0]
    assert (first.unit, first.situation, first.size, first.support) == ("t0", STORED, 1, None)
    assert route.score == pytest.approx(first.score) and first.outcome.split()[0] == route.decision
    order = torch.randperm(20, generator=rng)
    query, at = asking["t0"][order[:8]], next(i for i, e in enumerate(found) if e.size == 8)
    assert router.route(query).score == pytest.approx(found[at].score) and found[at].outcome == "reuse own"
    store.rm("t0")
    without = router.route(query)
    assert (without.decision, without.score) == (found[at + 1].outcome, pytest.approx(found[at + 1].score))
    assert found[at + 1].situation == MISSING and without.support == pytest.approx(found[at + 1].support)


def test_the_report_counts_what_was_decided() -> None:
    found = try_gate(gate(), tasks(), noise(), seeds=2, progress=lambda *_: None)
    report = build_gate_report(gate(), found, {"role": "validation", "seeds": 2})
    assert report["encoder"] == "mini" and list(report["sizes"]) == ["1", "8", "16"]
    block = report["sizes"]["8"]
    assert block["n_queries"] == 5 * 2 * 2  # two disjoint sets of 8 in a half of 20
    own = [e for e in found if e.size == 8 and e.situation == STORED]
    assert block["recall"]["mean"] == pytest.approx(sum(e.outcome == "reuse own" for e in own) / len(own))
    assert all(sum(d.values()) == pytest.approx(1) and tuple(d) == OUTCOMES for d in block["decisions"].values())
    assert block["reuse"]["n"] == 2 * block["n_queries"] and block["reuse"]["auroc"]["value"] > 0.99
    assert block["in_distribution"][UNSEEN]["auroc"]["value"] > 0.99
    assert report["sizes"]["1"]["in_distribution"] == {KNOWN: None, UNSEEN: None}
    json.dumps(report, allow_nan=False)
    plain = build_gate_report(gate(Thresholds(0.9, 0.4, -0.1)), found, {})
    assert plain["sizes"]["8"]["reuse"] is None and plain["sizes"]["8"]["recall"] == block["recall"]


def test_rates_of_decisions_made_by_hand() -> None:
    stored = [Event("a", STORED, 8, o, 0.5, True, 0.0) for o in ("reuse own", "reuse own", "generate", "reuse other")]
    missing = [Event(t, MISSING, 8, o, 0.1, False, 0.0) for t, o in (("a", "reuse other"), ("b", "base"))]
    wrong = [Event("b", STORED, 8, "reuse other", 0.5, False, 0.0)]
    block = build_gate_report(gate(), [*stored, *wrong, *missing], {})["sizes"]["8"]
    assert block["recall"]["mean"] == 0.25  # a half of task a, none of task b: tasks count alike
    assert block["false_reuse"]["mean"] == 0.5
    assert block["decisions"][STORED] == {"reuse own": 0.25, "reuse other": 0.625, "generate": 0.125, "base": 0.0}


@pytest.fixture
def report(tmp_path: Path) -> Path:
    found = try_gate(gate(), tasks(), noise(), seeds=1, progress=lambda *_: None)
    path = tmp_path / "gate.json"
    path.write_text(json.dumps(build_gate_report(gate(), found, {"role": "validation", "seeds": 1})))
    return path


def test_the_report_is_drawn(report: Path, tmp_path: Path) -> None:
    files = dnd_json("plot", report, "--out", tmp_path / "out")["files"]
    assert [Path(f).name for f in files] == ["report.md", "gate.svg"]
    drawn = ElementTree.parse(files[1]).getroot()
    texts = {t.text for t in drawn.iter("{http://www.w3.org/2000/svg}text")}
    assert {"the job's own adapter", f"a job, not {UNSEEN}", "8 prompts", "1 prompt"} <= texts
    assert "| own stored |" in Path(files[0]).read_text(encoding="utf-8").replace("8 | ", "| ")
    data = read_report(report)
    bins = sum(
        len(m["bins"]) for b in data["sizes"].values() for m in (b["reuse"], *b["in_distribution"].values()) if m
    )
    assert reliability_plot(data).count("<circle") == bins


def test_reports_that_cannot_be_drawn_are_refused(report: Path, tmp_path: Path) -> None:
    good = json.loads(report.read_text())
    for key, value in (("sizes", {"8": {}}), ("schema_version", 2), ("settings", 3), ("thresholds", {"reuse": "x"})):
        report.write_text(json.dumps({**good, key: value}))
        with pytest.raises(InputError, match="gate report"):
            read_report(report)
    good["sizes"]["8"]["reuse"]["bins"][0]["observed"] = 7
    report.write_text(json.dumps(good))
    with pytest.raises(InputError, match="7 is not between"):
        read_report(report)
    assert not write_plots({**good, "sizes": {}}, tmp_path / "none")[0].read_text().startswith("# Evaluation")


def tasks_folder(root: Path) -> Path:
    root.mkdir()
    for task in ("upper", "digits", "lower"):
        rows = [{"prompt": p, "response": "-", "split": "train"} for p in prompts_of(task, 32)]
        (root / f"{task}.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return root


def test_the_command_needs_no_base(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dnd_sdk.models.loading.load_base", lambda *_, **__: pytest.fail("the base was loaded"))
    monkeypatch.setattr("dnd_sdk.session.loading.load_base", lambda *_, **__: pytest.fail("the base was loaded"))
    monkeypatch.setattr("dnd_sdk.evaluation.gate.gate.SIZES", (1, 8))
    folder = shutil.copytree(world.generator, tmp_path / "generator")
    RouterData(THRESHOLDS, Support(torch.eye(32)[:3], torch.eye(32)[3:6])).save(folder)
    options = ["--base", tmp_path / "none", "--generator", folder, "--home", world.home.root]
    tasks, kept = tasks_folder(tmp_path / "tasks"), tmp_path / "run"
    found = dnd_json("bench", "gate", tasks, "--set", "train", "--seeds", 1, "--run-dir", kept, *options)
    assert found["kind"] == "gate" and found["settings"] == {"role": "train", "seeds": 1, "n_tasks": 3, "sizes": [1, 8]}
    assert found["sizes"]["8"]["n_queries"] == 3 * 2 and str(tmp_path) not in json.dumps(found)
    assert len(list(kept.iterdir())) == 3 + 14 + 5
    monkeypatch.setattr("dnd_sdk.models.encoder.Encoder.encode", lambda *_, **__: pytest.fail("encoded again"))
    assert found == dnd_json("bench", "gate", tasks, "--set", "train", "--seeds", 1, "--run-dir", kept, *options)
    shown = dnd("bench", "gate", tasks, "--set", "train", "--seeds", 1, "--run-dir", kept, *options).stdout
    assert "| prompts | recall | false reuse |" in shown and "| shuffled words |" in shown


def test_unusable_requests_are_refused(world: World, tmp_path: Path) -> None:
    tasks = tasks_folder(tmp_path / "tasks")
    assert dnd_json("bench", "gate", tasks, "--set", "none", code=1)["error"]["type"] == "ConfigError"
    bare = ["--set", "train", "--base", world.base, "--home", world.home.root]
    assert "no generator for" in dnd_json("bench", "gate", tasks, *bare, code=1)["error"]["message"]
    for name in ("upper", "lower"):
        rows = (tasks / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()[:9]
        (tasks / f"{name}.jsonl").write_text("\n".join(rows), encoding="utf-8")
    options = ["--set", "train", *world.options]
    assert "needs 2 tasks of 16" in dnd_json("bench", "gate", tasks, *options, code=1)["error"]["message"]

"""The figures of the README's tables are those of the committed JSON files that it names."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from test_readme import ROOT, TEXT

from dnd_sdk.models.catalogue import DEFAULT_BASE, EMBEDDED

SHIPPED = ROOT / "dnd_sdk" / "generator" / "shipped"
METRICS = ("exact_match", "option_accuracy", "valid_format")
ROW = re.compile(r"^\| ([a-z0-9-]+) \| [^|]+ \| ([0-9.]+) \| ([0-9.]+) \| ([0-9.]+) \|$", re.MULTILINE)


def tables() -> list[tuple[Path, list[tuple[str, ...]]]]:
    """Each table of figures and the last JSON file that is named before it."""
    found: list[tuple[Path, list[tuple[str, ...]]]] = []
    for part in re.split(r"\n\n(?=\| method \|)", TEXT)[1:]:
        before = TEXT[: TEXT.index(part)]
        folder, file = re.findall(r"`([\w.-]+)/(evaluation\w*\.json)`", before)[-1]
        path = ROOT / "docs" / file if folder == "docs" else SHIPPED / folder / file
        found.append((path, ROW.findall(part.split("\n\n")[0])))
    return found


def test_every_embedded_base_has_its_table() -> None:
    bases = {m.name for m in EMBEDDED.values() if m.kind == "base"}
    assert {path.parent.name for path, _ in tables()} >= bases and all(len(rows) >= 3 for _, rows in tables())


@pytest.mark.parametrize(("path", "rows"), tables(), ids=lambda x: x.parent.name if isinstance(x, Path) else "")
def test_every_figure_is_of_the_file_that_is_named(path: Path, rows: list[tuple[str, ...]]) -> None:
    methods: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))["methods"]
    assert {name for name, *_ in rows} == set(methods)  # all of them, also where ours loses
    for name, *figures in rows:
        for metric, figure in zip(METRICS, figures, strict=True):
            assert float(figure) == pytest.approx(100 * methods[name]["mean"][metric], abs=0.0501), (name, metric)


def test_what_is_said_of_single_tasks_is_in_the_file() -> None:
    evaluation = json.loads((SHIPPED / DEFAULT_BASE / "evaluation.json").read_text(encoding="utf-8"))
    tasks: dict[str, Any] = evaluation["methods"]["generated"]["tasks"]

    def lost(metric: str, more_than: float) -> dict[str, dict[str, Any]]:
        found = {name: t["vs_base"][metric] for name, t in tasks.items() if t["vs_base"][metric] is not None}
        return {name: x for name, x in found.items() if x["mean"] < -more_than - 1e-4}

    any_loss, much, options = lost("exact_match", 0), lost("exact_match", 0.05), lost("option_accuracy", 0.01)
    labels, text = sum(t["option_accuracy"] is not None for t in tasks.values()), " ".join(TEXT.split())
    assert (
        f"exact match falls on {len(any_loss)} of the {len(tasks)} tasks, on {len(much)} of them by more than 5 "
        f"points, and option accuracy by more than a point on {len(options)} of {labels}"
    ) in text
    (first, worst), *others = sorted(any_loss.items(), key=lambda item: item[1]["mean"])[:3]
    mean, low, high = (100 * x for x in (worst["mean"], *worst["ci95"]))
    named = [f"{name}, {100 * x['mean']:.0f}" for name, x in others]
    assert (
        f"The worst are {first}, {mean:.0f} [{low:.0f}, {high:.0f}] points of exact match, {', and '.join(named)}."
    ) in text


def test_what_is_said_of_the_differences_is_in_the_file() -> None:
    evaluation = json.loads((SHIPPED / DEFAULT_BASE / "evaluation.json").read_text(encoding="utf-8"))
    against, text = evaluation["methods"]["generated"]["vs"], " ".join(TEXT.split())

    def said(other: str, metric: str) -> str:
        mean, low, high = (100 * x for x in (against[other][metric]["mean"], *against[other][metric]["ci95"]))
        return f"{mean:+.1f} [{low:+.1f}, {high:+.1f}]"

    for other in ("base", "zero"):
        exact, option = (said(other, metric) for metric in METRICS[:2])
        assert re.search(rf"{re.escape(exact)} (points of exact match )?and {re.escape(option)}", text), (exact, option)

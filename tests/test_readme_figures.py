"""The figures of the README's tables are those of the committed JSON files that it names."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from test_readme import ROOT, TEXT

from dnd_sdk.models.catalogue import EMBEDDED

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
    tasks: dict[str, Any] = json.loads(SHIPPED.read_text(encoding="utf-8"))["methods"]["generated"]["tasks"]
    lost = {
        metric: [
            t["vs_base"][metric] for t in tasks.values() if (t["vs_base"][metric] or {"mean": 0})["mean"] < -0.0101
        ]
        for metric in ("exact_match", "option_accuracy")
    }
    labels = sum(t["option_accuracy"] is not None for t in tasks.values())
    text = " ".join(TEXT.split())
    assert (
        f"exact match falls on {len(lost['exact_match'])} of the {len(tasks)} tasks and option accuracy by more than a "
        f"point on {len(lost['option_accuracy'])} of {labels}, on none beyond its own rows' interval"
    ) in text
    assert not [x for both in lost.values() for x in both if x["ci95"][1] < -0.01]
    name, worst = min(tasks.items(), key=lambda item: (item[1]["vs_base"]["option_accuracy"] or {"mean": 0})["mean"])
    mean, low, high = (
        100 * x for x in (worst["vs_base"]["option_accuracy"]["mean"], *worst["vs_base"]["option_accuracy"]["ci95"])
    )
    assert f"The worst is {name}, {mean:.0f} [{low:.0f}, {high:.0f}] points" in text

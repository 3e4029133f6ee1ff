from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from cli_runner import dnd, dnd_json
from eval_fakes import make_parts, make_task

from dnd_sdk.errors import InputError, StorageError
from dnd_sdk.evaluation import EvalSettings, evaluate
from dnd_sdk.evaluation.plot import read_report, tasks_plot, write_plots

TASKS = [make_task("alpha"), make_task("be<ta & co", answer_type="short-text", metric="rouge_l"), make_task("gamma")]


@pytest.fixture(scope="module")
def report() -> dict[str, Any]:
    """Of the fakes: base 0, generated 2/3, zero 0 exact match."""
    made = evaluate(make_parts(), TASKS, ["base", "generated", "zero"], EvalSettings(limit=4))
    return json.loads(json.dumps(made))


def drawn(text: str, tag: str) -> list[ElementTree.Element]:
    return ElementTree.fromstring(text).findall(f"{{http://www.w3.org/2000/svg}}{tag}")


def test_a_report_becomes_markdown_and_pictures_that_parse(report: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "eval.json"
    path.write_text(json.dumps(report))
    written = write_plots(read_report(path), tmp_path / "plots" / "new")
    pictures = ["methods.svg", "format.svg", "tasks-generated.svg", "tasks-zero.svg"]
    assert [p.name for p in written] == ["report.md", *pictures]
    text = written[0].read_text()
    assert all(f"]({name})" in text for name in pictures) and "| generated | 66.7 [0.0, 100.0]" in text
    for picture in written[1:]:
        said = [t.text for t in drawn(picture.read_text(), "text")]
        assert said, picture
    names = {t.text for t in drawn(written[1].read_text(), "text")}
    assert {"base", "generated", "zero", "66.7", "exact match", "option accuracy"} <= names


def test_bars_are_as_long_as_the_means(report: dict[str, Any], tmp_path: Path) -> None:
    changed = copy.deepcopy(report)
    changed["methods"]["zero"]["mean"]["exact_match"] = 0.25
    changed["methods"]["zero"]["ci95"]["exact_match"] = [0.2, 0.5]
    write_plots(changed, tmp_path)
    bars = [float(r.attrib["width"]) for r in drawn((tmp_path / "methods.svg").read_text(), "rect")[1 + 2 :]]
    shares = [b["mean"][m] for b in changed["methods"].values() for m in ("exact_match", "option_accuracy")]
    assert bars == pytest.approx([530 * s for s in shares], abs=0.1)


def test_tasks_are_sorted_by_what_they_gained(report: dict[str, Any]) -> None:
    changed = copy.deepcopy(report)
    changed["methods"]["generated"]["tasks"]["gamma"]["exact_match"] = 0.5
    changed["methods"]["base"]["tasks"]["be<ta & co"]["exact_match"] = 0.75
    said = [str(t.text) for t in drawn(tasks_plot(changed, "generated", "base"), "text")][1:]
    assert said == ["2 better, 1 worse, 0 equal", "alpha", "+100", "gamma", "+50", "be<ta & co", "-75"]


def test_the_reference_is_the_one_that_was_asked_for(tmp_path: Path) -> None:
    made = evaluate(make_parts(), TASKS, ["base", "generated", "zero"], EvalSettings(limit=4, against="zero"))
    names = {p.name for p in write_plots(json.loads(json.dumps(made)), tmp_path)}
    assert {"tasks-base.svg", "tasks-generated.svg"} <= names and "tasks-zero.svg" not in names
    assert "against zero" in (tmp_path / "report.md").read_text()


def test_a_report_without_label_tasks_or_with_failures_is_drawn(tmp_path: Path) -> None:
    tasks = [make_task("words", answer_type="short-text"), make_task("bad", test=())]
    made = json.loads(json.dumps(evaluate(make_parts(), tasks, ["base", "zero"], EvalSettings(limit=2, unrelated=0))))
    del made["methods"]["base"]["vs"], made["methods"]["zero"]["vs"]  # as version 0.1.0 wrote it
    path = tmp_path / "old.json"
    path.write_text(json.dumps(made))
    write_plots(read_report(path), tmp_path)
    assert "2 runs failed" in (tmp_path / "report.md").read_text()
    assert "zero (no label task)" in (tmp_path / "format.svg").read_text()


def broken(report: dict[str, Any], *path: str, value: Any) -> Any:
    changed = copy.deepcopy(report)
    *way, last = path
    at = changed
    for key in way:
        at = at[key]
    at[last] = value
    return changed


BAD = {
    "version": (("schema_version",), 2),
    "methods": (("methods",), []),
    "name": (("methods", "../../x"), {}),
    "block": (("methods", "zero"), {"tasks": {}}),
    "mean": (("methods", "zero", "mean", "exact_match"), "much"),
    "nan": (("methods", "zero", "mean", "exact_match"), float("nan")),
    "interval": (("methods", "zero", "ci95", "exact_match"), [0.1]),
    "row": (("methods", "zero", "tasks", "alpha"), None),
    "score": (("methods", "zero", "tasks", "alpha", "exact_match"), 7),
    "difference": (("methods", "zero", "vs", "base", "exact_match"), {"mean": 0.1}),
    "recovered": (("methods", "zero", "recovered"), {"exact_match": "all"}),
    "reference": (("methods", "zero", "vs", "<b>"), {}),
}


@pytest.mark.parametrize("kind", BAD)
def test_what_is_no_report_is_refused(report: dict[str, Any], tmp_path: Path, kind: str) -> None:
    path, value = BAD[kind]
    (tmp_path / "bad.json").write_text(json.dumps(broken(report, *path, value=value)))
    with pytest.raises(InputError, match="is no report of dnd eval") as caught:
        read_report(tmp_path / "bad.json")
    assert caught.value.fix


def test_the_command_writes_and_tells_what(report: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "eval.json"
    path.write_text(json.dumps(report))
    files = dnd_json("plot", path, "--out", tmp_path / "out")["files"]
    assert len(files) == 5 and all(Path(f).is_file() for f in files)
    for missing in ("nothing.json", "."):
        assert dnd_json("plot", tmp_path / missing, code=1)["error"]["type"] == "InputError"
    path.write_text("{")
    assert "is not JSON" in dnd_json("plot", path, code=1)["error"]["message"]
    with pytest.raises(StorageError, match="cannot write into"):
        write_plots(report, path / "below")
    assert dnd("plot").exit_code == 2

"""From the JSON of `dnd eval` alone to a Markdown report with plots: methods, tasks, format against knowledge.

Those of `dnd bench gate|store|engine`, known by their `kind`, are read and written here too, each drawn by its own.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dnd_sdk.errors import InputError, StorageError
from dnd_sdk.evaluation.drawn import DrawnReport
from dnd_sdk.evaluation.engine_plot import ENGINE_REPORT
from dnd_sdk.evaluation.gate import GATE_REPORT
from dnd_sdk.evaluation.report import SCHEMA_VERSION, render
from dnd_sdk.evaluation.scoring import COMPARED, METRICS
from dnd_sdk.evaluation.store_plot import STORE_REPORT
from dnd_sdk.evaluation.svg import FAINT, INK, PALETTE, Canvas

MAX_BYTES = 256 * 2**20
_METHOD = re.compile(r"[a-z]+(-[a-z]+)?(-[0-9]+)?")
_WIDTH, _TOP, _ROW = 720, 46, 15
_NAMES = {"exact_match": "exact match", "option_accuracy": "option accuracy"}


def read_report(path: Path) -> dict[str, Any]:
    """The report that `dnd eval` or `dnd bench gate|store|engine` printed into `path`; else raises `InputError`."""
    try:
        if path.stat().st_size > MAX_BYTES:
            raise InputError(f"{path} has more than {MAX_BYTES} bytes", fix="pass the report of dnd eval --json")
        report = json.loads(path.read_text(encoding="utf-8"))
    except OSError as e:
        raise InputError(f"cannot read {path}: {e.strerror or e}", fix="make one: dnd eval TASKS --json > FILE") from e
    except (ValueError, RecursionError) as e:
        raise InputError(f"{path} is not JSON: {str(e)[:200]}", fix="make one: dnd eval TASKS --json > FILE") from e
    if (drawn := _drawn(report)) is not None:
        return drawn.checked(report)
    for block in _blocks(report):
        block.setdefault("vs", {})  # version 0.1.0 wrote none
    if problem := next(_problems(report), None):
        raise InputError(f"{path} is no report of dnd eval: {problem}", fix="make one: dnd eval TASKS --json > FILE")
    return dict(report)


def write_plots(report: dict[str, Any], out: Path) -> list[Path]:
    """Write `report.md` and its SVGs into `out`, replacing those of the same name; returns what was written."""
    drawn = _drawn(report)
    texts = _texts(report) if drawn is None else drawn.texts(report)
    try:
        out.mkdir(parents=True, exist_ok=True)
        for name, text in texts.items():
            (out / name).write_text(text, encoding="utf-8")
    except OSError as e:
        raise StorageError(f"cannot write into {out}: {e.strerror or e}", fix="choose another --out folder") from e
    return [out / name for name in texts]


def _drawn(report: Any) -> DrawnReport | None:
    """The kind of a report that says what it is; None: it is of `dnd eval`, if of anything."""
    return next((kind for kind in (GATE_REPORT, STORE_REPORT, ENGINE_REPORT) if kind.is_kind_of(report)), None)


def _texts(report: dict[str, Any]) -> dict[str, str]:
    reference = _reference(report)
    drawn = {"methods.svg": methods_plot(report), "format.svg": format_plot(report)}
    others = [m for m in report["methods"] if m != reference] if reference else []
    for method in others:
        drawn[f"tasks-{method}.svg"] = tasks_plot(report, method, str(reference))
    return {"report.md": _markdown(report, [n for n in drawn if n.startswith("tasks-")], reference), **drawn}


def methods_plot(report: dict[str, Any]) -> str:
    """Bars of every method's mean scores with their 95 % intervals."""
    blocks = report["methods"]
    left, right = 120, _WIDTH - 70
    canvas = Canvas(_WIDTH, _TOP + len(blocks) * (2 * _ROW + 8) + 30)
    _legend(canvas, left, {_NAMES[m]: PALETTE[i] for i, m in enumerate(COMPARED)})
    _percent_axis(canvas, left, right, _TOP, canvas.height - 24)
    y = float(_TOP + 6)
    for name, block in blocks.items():
        canvas.text(left - 8, y + _ROW + 3, name, anchor="end")
        for i, metric in enumerate(COMPARED):
            mean, interval = block["mean"][metric], block["ci95"][metric]
            if mean is not None:
                _bar(canvas, left, right, y + i * _ROW, mean, interval, PALETTE[i])
        y += 2 * _ROW + 8
    return canvas.render()


def tasks_plot(report: dict[str, Any], method: str, reference: str) -> str:
    """Every task's exact match minus the reference's, sorted, so that gains and losses are seen at once."""
    mine, other = report["methods"][method]["tasks"], report["methods"][reference]["tasks"]
    gains = sorted(((mine[t]["exact_match"] - other[t]["exact_match"], t) for t in mine if t in other), reverse=True)
    widest = max([abs(g) for g, _ in gains], default=0.0) or 1.0
    left, right = 190, _WIDTH - 60
    middle, scale = (left + right) / 2, (right - left) / 2 / widest
    canvas = Canvas(_WIDTH, _TOP + max(1, len(gains)) * _ROW + 20)
    canvas.text(middle, 18, f"exact match: {method} minus {reference}, by task (points)", anchor="middle", bold=True)
    better = sum(g > 0 for g, _ in gains)
    worse = sum(g < 0 for g, _ in gains)
    canvas.text(middle, 36, f"{better} better, {worse} worse, {len(gains) - better - worse} equal", anchor="middle")
    for i, (gain, task) in enumerate(gains):
        y = _TOP + i * _ROW
        canvas.text(left - 8, y + 11, _short(task), anchor="end")
        canvas.bar(middle, y + 2, gain * scale, _ROW - 4, ink=PALETTE[0] if gain >= 0 else PALETTE[1], note=task)
        canvas.text(right + 52, y + 11, f"{100 * gain:+.0f}", anchor="end")
    canvas.line(middle, _TOP, middle, _TOP + len(gains) * _ROW, ink=INK)
    return canvas.render()


def format_plot(report: dict[str, Any]) -> str:
    """Exact match against option accuracy on label tasks: what is said against what is held likeliest."""
    blocks = report["methods"]
    left, top, side = 60, 24, 420
    canvas = Canvas(_WIDTH, max(top + side, top + 22 * len(blocks)) + 50)
    for tick in range(0, 101, 20):
        x, y = left + side * tick / 100, top + side * (1 - tick / 100)
        canvas.line(x, top, x, top + side)
        canvas.line(left, y, left + side, y)
        canvas.text(x, top + side + 16, str(tick), anchor="middle")
        canvas.text(left - 6, y + 4, str(tick), anchor="end")
    canvas.line(left, top + side, left + side, top, ink=INK)
    canvas.text(left + side / 2, top + side + 36, "option accuracy (%), label tasks", anchor="middle")
    canvas.text(left - 40, 14, "exact match (%)")
    means = []
    for i, (name, block) in enumerate(blocks.items()):
        ink = PALETTE[i % len(PALETTE)]
        rows = block["tasks"].values()
        both = [(t["option_accuracy"], t["exact_match"]) for t in rows if t["option_accuracy"] is not None]
        for x, y in both:
            canvas.dot(left + side * x, top + side * (1 - y), 2.5, ink=ink, opacity=0.3)
        _numbered(canvas, left + side + 30, top + 8 + 22 * i, i + 1, ink)
        canvas.text(left + side + 46, top + 12 + 22 * i, name if both else f"{name} (no label task)")
        if both:
            x, y = (sum(v) / len(both) for v in zip(*both, strict=True))
            means.append((x, y, i + 1, ink, f"{name}: option accuracy {100 * x:.1f}, exact match {100 * y:.1f}"))
    for x, y, number, ink, note in means:  # above the dots of the tasks
        _numbered(canvas, left + side * x, top + side * (1 - y), number, ink, note)
    return canvas.render()


def _blocks(report: Any) -> list[dict[str, Any]]:
    methods = report.get("methods") if isinstance(report, dict) else None
    return [b for b in methods.values() if isinstance(b, dict)] if isinstance(methods, dict) else []


def _problems(report: Any) -> Iterator[str]:
    """What keeps `report` from being drawn, most basic first."""
    if not isinstance(report, dict) or report.get("schema_version") != SCHEMA_VERSION:
        yield f"expected an object with schema_version {SCHEMA_VERSION}"
        return
    methods = report.get("methods")
    if not isinstance(methods, dict) or not methods:
        yield "it has no methods"
        return
    for name, block in methods.items():
        if not _METHOD.fullmatch(name):
            yield f"{name[:40]!r} is no method's name"
        elif not isinstance(block, dict) or not all(
            isinstance(block.get(k), dict) for k in ("tasks", "mean", "ci95", "vs")
        ):
            yield f"method {name} lacks tasks, mean, ci95 or vs"
        elif not block["vs"].keys() <= methods.keys():
            yield f"method {name} is compared with one that was not run"
        elif bad := next(_bad_numbers(block), None):
            yield f"method {name}: {bad}"


def _bad_numbers(block: dict[str, Any]) -> Iterator[str]:
    for metric in METRICS:
        mean, interval = block["mean"].get(metric, -1), block["ci95"].get(metric)
        pair = isinstance(interval, list) and len(interval) == 2 and all(_is_share(v) for v in interval)
        if not (mean is None and interval is None) and not (_is_share(mean) and pair):
            yield f"its mean {metric} has no value between 0 and 1 with an interval"
    for task, row in block["tasks"].items():
        scores = [row.get(m, -1) for m in COMPARED] if isinstance(row, dict) else [None]
        if not _is_share(scores[0]) or not all(v is None or _is_share(v) for v in scores):
            yield f"task {task[:40]!r} has no exact_match between 0 and 1"
    recovered = block.get("recovered", {})
    if not isinstance(recovered, dict) or not all(v is None or _is_number(v) for v in recovered.values()):
        yield "recovered is not a number by metric"
    for found in (*block["vs"].values(), block["mean"].get("unrelated", {})):
        if not isinstance(found, dict) or not all(c is None or _is_change(c) for c in found.values()):
            yield "a difference is not a mean with an interval"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_share(value: Any) -> bool:
    return _is_number(value) and 0 <= value <= 1


def _is_change(value: Any) -> bool:
    if not isinstance(value, dict) or not isinstance(value.get("ci95"), list) or len(value["ci95"]) != 2:
        return False
    return all(_is_number(v) and -1 <= v <= 1 for v in (value.get("mean"), *value["ci95"]))


def _reference(report: dict[str, Any]) -> str | None:
    """What the methods are compared with task by task: `--against`, else the base; None if neither was run."""
    settings = report.get("settings")
    against = settings.get("against") if isinstance(settings, dict) else None
    return next((r for r in (against, "base") if isinstance(r, str) and r in report["methods"]), None)


def _markdown(report: dict[str, Any], task_plots: list[str], reference: str | None) -> str:
    settings = report.get("settings") if isinstance(report.get("settings"), dict) else {}
    failures = report.get("failures") if isinstance(report.get("failures"), list) else []
    lines = [
        "# Evaluation",
        "",
        f"- base: {_code(report.get('base'))}, generator: {_code(report.get('generator'))}",
        *(f"- {key}: {_code(value)}" for key, value in (settings or {}).items() if key != "methods"),
        *([f"- **{len(failures)} runs failed**; they are in the JSON"] if failures else []),
        "",
        "Means over tasks in points (0-100), with 95 % bootstrap intervals over tasks; differences are paired by task.",
        "",
        render(report),
        "",
        "![Mean scores by method](methods.svg)",
        "",
        "## What is said against what is held likeliest",
        "",
        "Each faint dot is a label task, each big one a method's mean. Below the line a method knows more than it says",
        "in the asked format.",
        "",
        "![Exact match against option accuracy](format.svg)",
    ]
    if task_plots:
        lines += ["", f"## Task by task, against {reference}"]
    for name in task_plots:
        lines += ["", f"![{name.removesuffix('.svg')}]({name})"]
    return "\n".join([*lines, ""])


def _code(value: Any) -> str:
    return f"`{str(value)[:200].replace('`', '').replace(chr(10), ' ')}`"


def _bar(
    canvas: Canvas, left: float, right: float, y: float, mean: float, interval: tuple[float, float], ink: str
) -> None:
    span = right - left
    canvas.bar(left, y + 1, span * mean, _ROW - 2, ink=ink)
    low, high = (left + span * v for v in interval)
    canvas.whisker(low, high, y + _ROW / 2)
    canvas.text(max(high, left + span * mean) + 6, y + _ROW - 3, f"{100 * mean:.1f}")


def _numbered(canvas: Canvas, x: float, y: float, number: int, ink: str, note: str = "") -> None:
    """A dot with its number, which tells methods apart where colours repeat."""
    canvas.dot(x, y, 10, ink="white")
    canvas.dot(x, y, 9, ink=ink, note=note)
    canvas.text(x, y + 4, str(number), anchor="middle", ink="white")


def _percent_axis(canvas: Canvas, left: float, right: float, top: float, bottom: float) -> None:
    for tick in range(0, 101, 20):
        x = left + (right - left) * tick / 100
        canvas.line(x, top, x, bottom, ink=FAINT if tick else INK)
        canvas.text(x, bottom + 16, f"{tick} %" if tick == 100 else str(tick), anchor="middle")


def _legend(canvas: Canvas, x: float, entries: dict[str, str]) -> None:
    for name, ink in entries.items():
        canvas.bar(x, 14, 12, 12, ink=ink)
        canvas.text(x + 18, 24, name)
        x += 140


def _short(name: str, most: int = 26) -> str:
    return name if len(name) <= most else f"{name[: most - 3]}..."

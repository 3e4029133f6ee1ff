"""From the JSON of `dnd bench gate` alone to reliability diagrams and a Markdown report."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from dnd_sdk.evaluation.drawn import DrawnReport
from dnd_sdk.evaluation.gate.report import KIND, SCHEMA_VERSION, render_gate
from dnd_sdk.evaluation.svg import FAINT, INK, PALETTE, Canvas

_SIDE, _GAP, _LEFT, _TOP = 240, 50, 50, 70


def gate_texts(report: dict[str, Any]) -> dict[str, str]:
    """The files that make up the report, by name."""
    settings = ", ".join(f"{k} {v}" for k, v in report["settings"].items() if k != "sizes")
    lines = [
        "# The gate: reuse, generate or base",
        "",
        f"- generator: `{report['generator']}`, encoder: `{report['encoder']}`, {settings}",
        f"- thresholds: {', '.join(f'{k} {v:.3f}' for k, v in report['thresholds'].items())}",
        "",
        "Recall, false reuse and shares in percent, with 95 % bootstrap intervals over tasks (and kinds of noise).",
        "",
        render_gate(report),
        "",
        "![Reliability diagrams](gate.svg)",
        "",
    ]
    return {"report.md": "\n".join(lines), "gate.svg": reliability_plot(report)}


def reliability_plot(report: dict[str, Any]) -> str:
    """One diagram per probability: how often it held against what it said, a line per query size."""
    panels = _panels(report)
    canvas = Canvas(_LEFT + len(panels) * (_SIDE + _GAP), _TOP + _SIDE + 50)
    inks = {n: PALETTE[i % len(PALETTE)] for i, n in enumerate(report["sizes"])}
    for i, (n, ink) in enumerate(inks.items()):
        canvas.bar(_LEFT + 110 * i, 12, 12, 12, ink=ink)
        canvas.text(_LEFT + 110 * i + 18, 22, f"{n} prompt{'s' if n != '1' else ''}")
    for i, (title, lines) in enumerate(panels.items()):
        left = _LEFT + i * (_SIDE + _GAP)
        _axes(canvas, left, title)
        for n, bins in lines.items():
            _line(canvas, left, bins, inks[n], f"{n} prompts")
    return canvas.render()


def _panels(report: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """By title the bins of each query size."""
    panels: dict[str, dict[str, Any]] = {}
    for n, block in report["sizes"].items():
        others = {f"a job, not {kind}": found for kind, found in block["in_distribution"].items()}
        for title, found in {"the job's own adapter": block["reuse"], **others}.items():
            if found is not None:
                panels.setdefault(title, {})[n] = found["bins"]
    return panels


def _axes(canvas: Canvas, left: float, title: str) -> None:
    bottom = _TOP + _SIDE
    canvas.text(left + _SIDE / 2, _TOP - 12, title, anchor="middle", bold=True)
    for tick in range(0, 101, 20):
        at = _SIDE * tick / 100
        canvas.line(left + at, _TOP, left + at, bottom, ink=FAINT)
        canvas.line(left, bottom - at, left + _SIDE, bottom - at, ink=FAINT)
        canvas.text(left + at, bottom + 16, str(tick), anchor="middle")
        canvas.text(left - 6, bottom - at + 4, str(tick), anchor="end")
    canvas.line(left, bottom, left + _SIDE, _TOP, ink=INK)
    canvas.text(left + _SIDE / 2, bottom + 36, "said (%), against observed (%)", anchor="middle")


def _line(canvas: Canvas, left: float, bins: Sequence[dict[str, Any]], ink: str, name: str) -> None:
    points = [(left + _SIDE * _share(b["predicted"]), _TOP + _SIDE * (1 - _share(b["observed"]))) for b in bins]
    for (x1, y1), (x2, y2) in pairwise(points):
        canvas.line(x1, y1, x2, y2, ink=ink, width=1.5)
    for b, (x, y) in zip(bins, points, strict=True):
        note = (
            f"{name}: said {100 * b['predicted']:.1f} %, observed {100 * b['observed']:.1f} %, {int(b['n'])} decisions"
        )
        canvas.dot(x, y, 4, ink=ink, note=note)


def _share(value: Any) -> float:
    if not 0 <= value <= 1:
        raise ValueError(f"{value} is not between 0 and 1")
    return float(value)


GATE_REPORT = DrawnReport(KIND, SCHEMA_VERSION, "dnd bench gate TASKS", gate_texts)

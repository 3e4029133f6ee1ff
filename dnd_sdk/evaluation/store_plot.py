"""From the JSON of `dnd bench store` alone to a picture of what stored adapters cost, and a Markdown report."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

from dnd_sdk.evaluation.drawn import DrawnReport
from dnd_sdk.evaluation.svg import FAINT, INK, PALETTE, Canvas

LINES = {
    "route_set_ms": "route 64 prompts",
    "faiss_set_ms": "plain FAISS, 64 prompts",
    "route_one_ms": "route one prompt",
    "faiss_one_ms": "plain FAISS, one prompt",
    "adapt_ms": "adapt, tiny models",
    "adapt_own_ms": "adapt, without the models",
    "add_ms": "add one, then route",
    "remove_ms": "remove one, then route",
    "first_route_ms": "a new process's first route",
}
_WIDTH, _HEIGHT, _LEFT, _TOP = 760, 420, 60, 30


def store_texts(report: dict[str, Any]) -> dict[str, str]:
    """The files that make up the report, by name."""
    blocks = report["sizes"]
    head = ["milliseconds", *(f"{b['n']:,} adapters" for b in blocks)]
    rows = [[name, *(f"{b[key]:.2f}" for b in blocks)] for key, name in LINES.items()]
    rows.append(["adapt over that of the smallest store", *(f"{b['adapt_over_smallest']:.2f}" for b in blocks)])
    for name in blocks[0].get("commands_s", {}):
        rows.append([f"`dnd adapters {name}`", *(f"{1e3 * b['commands_s'][name]:.0f}" for b in blocks)])
    table = [f"| {' | '.join(row)} |" for row in (head, ["---", *["---:"] * len(blocks)], *rows)]
    lines = [
        "# What stored adapters cost",
        "",
        f"{report['exemplars']} exemplars of width {report['width']} each; medians of {report['repeats']} rounds that "
        f"took the sizes in turn, on {report['machine']['cpu']}, {report['machine']['cores']} cores.",
        "",
        *table,
        "",
        "![Milliseconds against adapters stored](store.svg)",
        "",
    ]
    return {"report.md": "\n".join(lines), "store.svg": growth_plot(report)}


def growth_plot(report: dict[str, Any]) -> str:
    """A line for each measurement over the number of adapters, both axes logarithmic."""
    blocks = report["sizes"]
    values = [b[key] for b in blocks for key in LINES]
    x, y = _Axis([b["n"] for b in blocks], _LEFT, _WIDTH - 220), _Axis(values, _HEIGHT - 40, _TOP)
    canvas = Canvas(_WIDTH, _HEIGHT)
    for mark in y.decades:
        canvas.line(_LEFT, y.at(mark), _WIDTH - 220, y.at(mark), ink=FAINT)
        canvas.text(_LEFT - 6, y.at(mark) + 4, f"{mark:g}", anchor="end")
    for n in x.values:
        canvas.line(x.at(n), _TOP, x.at(n), _HEIGHT - 40, ink=FAINT)
        canvas.text(x.at(n), _HEIGHT - 24, f"{n:,}", anchor="middle")
    canvas.text(_LEFT, 18, "milliseconds, against adapters stored", ink=INK)
    for i, (key, name) in enumerate(LINES.items()):
        ink = PALETTE[i % len(PALETTE)]
        points = [(x.at(b["n"]), y.at(b[key])) for b in blocks]
        for (x1, y1), (x2, y2) in pairwise(points):
            canvas.line(x1, y1, x2, y2, ink=ink, width=1.6)
        for (px, py), b in zip(points, blocks, strict=True):
            canvas.dot(px, py, 3, ink=ink, note=f"{name}: {b[key]:.2f} ms with {b['n']:,}")
        canvas.bar(_WIDTH - 205, _TOP + 18 * i, 10, 10, ink=ink)
        canvas.text(_WIDTH - 190, _TOP + 9 + 18 * i, name)
    return canvas.render()


class _Axis:
    """Positive values on a logarithmic scale between two positions in pixels."""

    def __init__(self, values: list[float], start: float, end: float) -> None:
        self.values, self._start, self._end = values, start, end
        low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
        self._low, self._span = low, max(1, high - low)

    @property
    def decades(self) -> list[float]:
        return [10.0**i for i in range(self._low, self._low + self._span + 1)]

    def at(self, value: float) -> float:
        return self._start + (self._end - self._start) * (math.log10(value) - self._low) / self._span


STORE_REPORT = DrawnReport("store", 1, "dnd bench store", store_texts)

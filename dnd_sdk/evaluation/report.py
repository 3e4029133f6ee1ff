"""From scored units to the report that `dnd eval --json` prints, and to a table for people."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from dnd_sdk.evaluation.scoring import METRICS, mean_ci95

if TYPE_CHECKING:
    from dnd_sdk.evaluation.parts import Parts
    from dnd_sdk.evaluation.runner import EvalSettings

SCHEMA_VERSION = 1

Scores = dict[str, float | None]


@dataclass(frozen=True)
class Unit:
    """What one (task, method, seed) came to: `scores`, or `error`."""

    task: str
    method: str
    seed: int
    n: int
    """Test rows asked."""
    scores: Scores | None
    error: str | None = None


def build_report(parts: Parts, methods: Sequence[str], settings: EvalSettings, units: Sequence[Unit]) -> dict[str, Any]:
    """The JSON-able report: per task (seeds averaged), means over tasks with 95 % intervals, failures.

    `mean` also holds `delta_vs_base`: per metric the mean paired difference to `base` over the tasks both have, with
    its interval; left out for `base` itself and when `base` was not run.
    """
    tables = {m: _by_task([u for u in units if u.method == m]) for m in methods}
    base = tables.get("base")
    kept = {k: v for k, v in asdict(settings).items() if k != "run_dir"}
    return {
        "schema_version": SCHEMA_VERSION,
        "base": parts.base_name,
        "generator": None if parts.generator is None else parts.generator.id,
        "methods": {m: _method_block(table, None if m == "base" else base) for m, table in tables.items()},
        "settings": {**kept, "methods": list(methods), "n_tasks": len({u.task for u in units})},
        "failures": [
            {"task": u.task, "method": u.method, "seed": u.seed, "error": u.error} for u in units if u.error is not None
        ],
    }


def render(report: dict[str, Any]) -> str:
    """A Markdown table of the means: one line per method, in points (0-100) with intervals."""
    head = ["method", *METRICS, "exact_match vs base", "option_accuracy vs base", "tasks"]
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    for name, block in report["methods"].items():
        delta = block["mean"].get("delta_vs_base") or {}
        cells = [_points(block["mean"][m], block["ci95"][m]) for m in METRICS]
        for metric in ("exact_match", "option_accuracy"):
            d = delta.get(metric)
            cells.append(_points(d["mean"], d["ci95"], sign="+") if d else "")
        lines.append(f"| {' | '.join([name, *cells, str(len(block['tasks']))])} |")
    return "\n".join(lines)


def _points(mean: float | None, ci95: Sequence[float] | None, *, sign: str = "") -> str:
    if mean is None or ci95 is None:
        return ""
    return f"{100 * mean:{sign}.1f} [{100 * ci95[0]:{sign}.1f}, {100 * ci95[1]:{sign}.1f}]"


def _by_task(units: Sequence[Unit]) -> dict[str, dict[str, Any]]:
    """Scores per task, averaged over the seeds that succeeded; tasks where none did are absent."""
    runs: dict[str, list[Unit]] = {}
    for unit in units:
        if unit.scores is not None:
            runs.setdefault(unit.task, []).append(unit)
    return {
        task: {**{m: _average([u.scores[m] for u in same if u.scores]) for m in METRICS}, "n": same[0].n}
        for task, same in runs.items()
    }


def _average(values: Sequence[float | None]) -> float | None:
    present = [v for v in values if v is not None]
    return sum(present) / len(present) if present else None


def _method_block(table: dict[str, dict[str, Any]], base: dict[str, dict[str, Any]] | None) -> dict[str, Any]:
    mean: dict[str, Any] = {}
    ci95: dict[str, Any] = {}
    for metric in METRICS:
        values = [row[metric] for row in table.values() if row[metric] is not None]
        mean[metric], ci95[metric] = mean_ci95(values) if values else (None, None)
    if base is not None:
        mean["delta_vs_base"] = {metric: _delta(table, base, metric) for metric in METRICS}
    return {"tasks": table, "mean": mean, "ci95": ci95}


def _delta(table: dict[str, Any], base: dict[str, Any], metric: str) -> dict[str, Any] | None:
    shared = [t for t in table if t in base and table[t][metric] is not None and base[t][metric] is not None]
    if not shared:
        return None
    mean, ci95 = mean_ci95([table[t][metric] - base[t][metric] for t in shared])
    return {"mean": mean, "ci95": ci95}

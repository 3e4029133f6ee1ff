"""From scored units to the report that `dnd eval --json` prints, and to a table for people."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from dnd_sdk.evaluation.scoring import COMPARED, METRICS, mean_ci95
from dnd_sdk.evaluation.units import Made, RowScores, Scores, Unit

if TYPE_CHECKING:
    from dnd_sdk.evaluation.settings import EvalSettings

SCHEMA_VERSION = 1

Table = dict[str, dict[str, Any]]
"""A method's scores by task."""


def build_report(made: Made, methods: Sequence[str], settings: EvalSettings, units: Sequence[Unit]) -> dict[str, Any]:
    """The JSON-able report: per task (seeds averaged), means over tasks with 95 % intervals, failures.

    * `vs` holds, for `base` and for `settings.against` where they were run, the mean paired difference of each metric
      over the tasks that both methods have, with its 95 % interval and their number; a method is not compared with
      itself. `mean["delta_vs_base"]` is the part of it for `base`, without the number.
    * A task's `vs_base`, where its rows are known, is the same over its own rows: with the interval of one task alone.
    * `recovered`, where `base` and some oracle were run, is the share of the (first) oracle's gain over the base that
      the method reaches, by metric: None where the oracle gains nothing.
    * With `settings.unrelated`, tasks and means also hold `unrelated`: the change of scores on tasks of other families.
    """
    tables = {m: _by_task([u for u in units if u.method == m], settings) for m in methods}
    references = {r: tables[r] for r in dict.fromkeys(("base", settings.against)) if r in tables}
    oracle = next((t for m, t in tables.items() if m.split("-")[0] == "oracle"), None)
    blocks = {m: _method_block(table, {r: t for r, t in references.items() if r != m}) for m, table in tables.items()}
    if "base" in tables:
        _compare_rows(tables, units)
    for name, block in blocks.items():
        if "base" in block["vs"] and oracle is not None:
            block["recovered"] = {m: _recovered(tables[name], tables["base"], oracle, m) for m in METRICS}
    kept = {k: v for k, v in asdict(settings).items() if k != "run_dir"}
    return {
        "schema_version": SCHEMA_VERSION,
        "base": made.base,
        "generator": made.generator,
        "methods": blocks,
        "settings": {**kept, "methods": list(methods), "n_tasks": len({u.task for u in units})},
        "failures": [
            {"task": u.task, "method": u.method, "seed": u.seed, "error": u.error} for u in units if u.error is not None
        ],
    }


def render(report: dict[str, Any]) -> str:
    """A Markdown table of the means: one line per method, in points (0-100) with intervals."""
    blocks = report["methods"]
    references = sorted({r for block in blocks.values() for r in block["vs"]}, key=lambda r: (r != "base", r))
    head = ["method", *METRICS, *(f"{metric} vs {r}" for r in references for metric in COMPARED), "tasks"]
    with_oracle = any("recovered" in block for block in blocks.values())
    if with_oracle:
        head.append("exact_match recovered")
    with_unrelated = any("unrelated" in block["mean"] for block in blocks.values())
    if with_unrelated:
        head += [f"{metric} elsewhere" for metric in COMPARED]
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    for name, block in blocks.items():
        cells = [_points(block["mean"][m], block["ci95"][m]) for m in METRICS]
        cells += [_change(block["vs"].get(r, {}).get(metric)) for r in references for metric in COMPARED]
        cells.append(str(len(block["tasks"])))
        if with_oracle:
            share = block.get("recovered", {}).get("exact_match")
            cells.append("" if share is None else f"{100 * share:.0f} %")
        if with_unrelated:
            cells += [_change(block["mean"].get("unrelated", {}).get(metric)) for metric in COMPARED]
        lines.append(f"| {' | '.join([name, *cells])} |")
    return "\n".join(lines)


def _change(found: dict[str, Any] | None) -> str:
    return _points(found["mean"], found["ci95"], sign="+") if found else ""


def _points(mean: float | None, ci95: Sequence[float] | None, *, sign: str = "") -> str:
    if mean is None or ci95 is None:
        return ""
    return f"{100 * mean:{sign}.1f} [{100 * ci95[0]:{sign}.1f}, {100 * ci95[1]:{sign}.1f}]"


def _by_task(units: Sequence[Unit], settings: EvalSettings) -> Table:
    """Scores per task, averaged over the seeds that succeeded; tasks where none did are absent."""
    runs: dict[str, list[Unit]] = {}
    for unit in units:
        if unit.scores is not None:
            runs.setdefault(unit.task, []).append(unit)
    table: Table = {}
    for task, same in runs.items():
        table[task] = {**_averages([u.scores for u in same if u.scores], METRICS), "n": same[0].n}
        if settings.unrelated:
            changes = [u.unrelated for u in same if u.unrelated]
            table[task]["unrelated"] = _averages(changes, COMPARED) if changes else None
    return table


def _averages(scores: Sequence[Scores], metrics: Sequence[str]) -> Scores:
    return {m: _average([s[m] for s in scores]) for m in metrics}


def _average(values: Sequence[float | None]) -> float | None:
    present = [v for v in values if v is not None]
    return sum(present) / len(present) if present else None


def _method_block(table: Table, references: dict[str, Table]) -> dict[str, Any]:
    mean: dict[str, Any] = {}
    ci95: dict[str, Any] = {}
    for metric in METRICS:
        values = [row[metric] for row in table.values() if row[metric] is not None]
        mean[metric], ci95[metric] = mean_ci95(values) if values else (None, None)
    vs = {r: {metric: _difference(table, other, metric) for metric in METRICS} for r, other in references.items()}
    if "base" in vs:
        mean["delta_vs_base"] = {m: d and {"mean": d["mean"], "ci95": d["ci95"]} for m, d in vs["base"].items()}
    if any("unrelated" in row for row in table.values()):
        mean["unrelated"] = {metric: _elsewhere(table, metric) for metric in COMPARED}
    return {"tasks": table, "mean": mean, "ci95": ci95, "vs": vs}


def _compare_rows(tables: dict[str, Table], units: Sequence[Unit]) -> None:
    """Give every task of every other method its paired difference to the base, over its rows (seeds averaged)."""
    rows: dict[tuple[str, str], list[RowScores]] = {}
    for unit in units:
        if unit.rows is not None:
            rows.setdefault((unit.method, unit.task), []).append(unit.rows)
    for (method, task), runs in rows.items():
        if method != "base" and ("base", task) in rows:
            base = rows["base", task][0]
            tables[method][task]["vs_base"] = {metric: _row_difference(runs, base, metric) for metric in COMPARED}


def _row_difference(runs: Sequence[RowScores], base: RowScores, metric: str) -> dict[str, Any] | None:
    before, after = base[metric], [run[metric] for run in runs]
    if before is None or None in after:
        return None
    each = zip(*(values for values in after if values is not None), strict=True)
    return _summary([sum(values) / len(values) - b for values, b in zip(each, before, strict=True)])


def _difference(table: Table, other: Table, metric: str) -> dict[str, Any] | None:
    """Paired: the interval is that of the tasks' own differences."""
    shared = [t for t in table if t in other and table[t][metric] is not None and other[t][metric] is not None]
    return _summary([table[t][metric] - other[t][metric] for t in shared])


def _recovered(table: Table, base: Table, oracle: Table, metric: str) -> float | None:
    """(method - base) / (oracle - base), over the tasks all three have."""
    shared = [t for t in table if t in base and t in oracle]
    rows = [(table[t][metric], base[t][metric], oracle[t][metric]) for t in shared]
    whole = [(m - b, o - b) for m, b, o in rows if None not in (m, b, o)]
    gain = sum(o for _, o in whole)
    return sum(m for m, _ in whole) / gain if gain > 0 else None


def _elsewhere(table: Table, metric: str) -> dict[str, Any] | None:
    rows = [row["unrelated"] for row in table.values() if row.get("unrelated")]
    return _summary([row[metric] for row in rows if row[metric] is not None])


def _summary(values: Sequence[float]) -> dict[str, Any] | None:
    if not values:
        return None
    mean, ci95 = mean_ci95(values)
    return {"mean": mean, "ci95": ci95, "n": len(values)}

"""From the gate's decisions to the report that `dnd bench gate --json` prints, and to tables for people."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from dnd_sdk.evaluation.gate.gate import KNOWN, MISSING, OUTCOMES, SITUATIONS, STORED, UNSEEN, Event, Gate
from dnd_sdk.evaluation.gate.reliability import measure
from dnd_sdk.evaluation.scoring import mean_ci95

SCHEMA_VERSION = 1
KIND = "gate"


def build_gate_report(gate: Gate, events: Sequence[Event], settings: dict[str, Any]) -> dict[str, Any]:
    """JSON-able: what was decided per query size, and how good the probabilities are.

    * `recall` and `false_reuse` are means over tasks; shares in `decisions` and `kept_on_base` likewise, over tasks or
      kinds of noise.
    * `reuse` is P(own | score): each query counts with its own adapter stored and without. `in_distribution` is
      P(a job | support), jobs against noise, both weighing alike. Both are None where no map was measured.
    """
    thresholds = gate.thresholds
    sizes = sorted({e.size for e in events})
    return {
        "schema_version": SCHEMA_VERSION,
        "kind": KIND,
        "generator": gate.generator,
        "encoder": gate.encoder.name.replace("\\", "/").rsplit("/", 1)[-1],  # a folder's path is nobody's business
        "thresholds": {name: getattr(thresholds, name) for name in ("reuse", "reuse_single", "support")},
        "probability": asdict(thresholds.probability),
        "settings": {**settings, "n_tasks": len({e.unit for e in events if e.situation == STORED}), "sizes": sizes},
        "sizes": {str(n): _size_block(gate, [e for e in events if e.size == n]) for n in sizes},
    }


def _size_block(gate: Gate, events: Sequence[Event]) -> dict[str, Any]:
    by_situation = {s: [e for e in events if e.situation == s] for s in SITUATIONS}
    jobs = by_situation[STORED]
    noise = [*by_situation[KNOWN], *by_situation[UNSEEN]]
    return {
        "n_tasks": len({e.unit for e in jobs}),
        "n_queries": len(jobs),
        "recall": _mean(jobs, lambda e: e.outcome == "reuse own"),
        "false_reuse": _mean(by_situation[MISSING], lambda e: e.outcome == "reuse other"),
        "decisions": {s: _decisions(found) for s, found in by_situation.items() if found},
        "kept_on_base": {
            kind: _share([e for e in noise if e.unit == kind], "base") for kind in dict.fromkeys(e.unit for e in noise)
        },
        "reuse": _reuse(gate, [*jobs, *by_situation[MISSING]]),
        "in_distribution": {s: _in_distribution(gate, jobs, by_situation[s]) for s in (KNOWN, UNSEEN)},
    }


def _by_unit(events: Sequence[Event]) -> dict[str, list[Event]]:
    units: dict[str, list[Event]] = {}
    for e in events:
        units.setdefault(e.unit, []).append(e)
    return units


def _mean(events: Sequence[Event], holds: Callable[[Event], bool]) -> dict[str, Any] | None:
    shares = [sum(map(holds, same)) / len(same) for same in _by_unit(events).values()]
    if not shares:
        return None
    mean, interval = mean_ci95(shares)
    return {"mean": mean, "ci95": interval}


def _share(events: Sequence[Event], outcome: str) -> float:
    return sum(e.outcome == outcome for e in events) / len(events)


def _decisions(events: Sequence[Event]) -> dict[str, float]:
    units = _by_unit(events).values()
    return {o: sum(_share(same, o) for same in units) / len(units) for o in OUTCOMES}


def _reuse(gate: Gate, events: Sequence[Event]) -> dict[str, Any] | None:
    maps = gate.thresholds.probability
    probabilities = [maps.own(e.score, "single" if e.size == 1 else "set") for e in events]
    return _measured(probabilities, [e.own for e in events], [e.unit for e in events])


def _in_distribution(gate: Gate, jobs: Sequence[Event], noise: Sequence[Event]) -> dict[str, Any] | None:
    probabilities = [gate.thresholds.probability.in_distribution(e.support) for e in (*jobs, *noise)]
    # a task may be called as a kind of noise is
    units = [("job", e.unit) for e in jobs] + [("noise", e.unit) for e in noise]
    return _measured(probabilities, [True] * len(jobs) + [False] * len(noise), units, even=True)


def _measured(
    probabilities: Sequence[float | None], truth: Sequence[bool], units: Sequence[Any], *, even: bool = False
) -> dict[str, Any] | None:
    known = [p for p in probabilities if p is not None]
    if len(known) < len(probabilities) or len(set(truth)) < 2:
        return None
    numbers = {unit: i for i, unit in enumerate(dict.fromkeys(units))}
    ids = np.array([numbers[u] for u in units], dtype=np.int64)
    return measure(np.array(known), np.array(truth, dtype=np.float64), ids, even=even)


def render_gate(report: dict[str, Any]) -> str:
    """Markdown: rates and quality of the probabilities per query size, then what was decided, then the noise."""
    head = ["prompts", "recall", "false reuse", "probability", "ECE", "Brier", "AUROC"]
    rows = [row for n, block in report["sizes"].items() for row in _quality_rows(n, block)]
    parts = [_table(head, rows), _table(["prompts", "situation", *OUTCOMES], _decision_rows(report))]
    parts.append(_table(["noise kept on the base (%)", *report["sizes"]], _noise_rows(report)))
    return "\n\n".join(parts)


def _quality_rows(n: str, block: dict[str, Any]) -> list[list[str]]:
    named = {"own adapter": block["reuse"], **{f"job, not {k}": m for k, m in block["in_distribution"].items()}}
    rates = [_points(block["recall"], "mean"), _points(block["false_reuse"], "mean")]
    rows = []
    for i, (name, figures) in enumerate((k, m) for k, m in named.items() if m is not None):
        cells = [_number(figures[m]) for m in ("ece", "brier", "auroc")]
        rows.append([n if not i else "", *(rates if not i else ["", ""]), name, *cells])
    return rows or [[n, *rates, "", "", "", ""]]


def _decision_rows(report: dict[str, Any]) -> list[list[str]]:
    return [
        [n, situation, *(f"{100 * shares[o]:.1f}" for o in OUTCOMES)]
        for n, block in report["sizes"].items()
        for situation, shares in block["decisions"].items()
    ]


def _noise_rows(report: dict[str, Any]) -> list[list[str]]:
    blocks = [block["kept_on_base"] for block in report["sizes"].values()]
    kinds = dict.fromkeys(kind for block in blocks for kind in block)
    return [[kind, *(f"{100 * b[kind]:.0f}" if kind in b else "" for b in blocks)] for kind in kinds]


def _points(figures: dict[str, Any] | None, key: str) -> str:
    if figures is None:
        return ""
    low, high = figures["ci95"]
    return f"{100 * figures[key]:.1f} [{100 * low:.1f}, {100 * high:.1f}]"


def _number(figures: dict[str, Any]) -> str:
    low, high = figures["ci95"]
    return f"{figures['value']:.3f} [{low:.3f}, {high:.3f}]"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join([f"| {' | '.join(head)} |", f"|{'---|' * len(head)}", *(f"| {' | '.join(r)} |" for r in rows)])

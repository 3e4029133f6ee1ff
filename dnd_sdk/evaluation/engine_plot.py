"""From the JSON of `dnd bench engine` alone to a picture of its ratios, and a Markdown report."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from dnd_sdk.evaluation.drawn import DrawnReport
from dnd_sdk.evaluation.svg import FAINT, INK, PALETTE, Canvas

_WIDTH, _LEFT, _RIGHT, _ROW, _TOP = 760, 330, 690, 20, 56


class _Ratio(NamedTuple):
    """One bar: how many times faster (above 1) or slower (below) than what it stands beside."""

    name: str
    beside: str
    value: float
    figures: str
    """The absolute ones."""


def engine_texts(report: dict[str, Any]) -> dict[str, str]:
    """The files that make up the report, by name."""
    on, clients = report["machine"], report["clients"]
    rows = [["", "beside", "times as fast", "figures"], ["---", "---", "---:", "---"]]
    rows += [[r.name, r.beside, f"{r.value:.2f}", r.figures] for r in _ratios(report)]
    lines = [
        "# The engine beside plain transformers and peft",
        "",
        f"Base {on['base']} in {on['dtype']} on {on['gpu'] or on['cpu']}, {on['cores']} cores; medians of "
        f"{report['rounds']} rounds that took the rivals in turn. {clients['same_answers']:.0%} of the rivals' answers "
        "are the engine's, word for word.",
        "",
        *(f"| {' | '.join(row)} |" for row in rows),
        "",
        "![Times as fast, a logarithmic scale](engine.svg)",
        "",
    ]
    return {"report.md": "\n".join(lines), "engine.svg": engine_plot(report)}


def engine_plot(report: dict[str, Any]) -> str:
    """A bar for each ratio, to the right where the engine is faster, on a logarithmic scale."""
    ratios = _ratios(report)
    farthest = max(1.0, *(abs(math.log10(r.value)) for r in ratios))
    middle, scale = (_LEFT + _RIGHT) / 2, (_RIGHT - _LEFT) / 2 / farthest
    canvas = Canvas(_WIDTH, _TOP + _ROW * len(ratios) + 16)
    canvas.text(middle, 18, "times as fast as what stands beside it", anchor="middle", bold=True)
    for power in range(-math.floor(farthest), math.floor(farthest) + 1):
        x = middle + scale * power
        canvas.line(x, _TOP - 6, x, _TOP + _ROW * len(ratios), ink=FAINT if power else INK)
        canvas.text(x, _TOP - 12, f"{10.0**power:g}", anchor="middle")
    for i, r in enumerate(ratios):
        y, length = _TOP + _ROW * i, scale * math.log10(r.value)
        canvas.text(_LEFT - 8, y + 12, f"{r.name}, beside {r.beside}", anchor="end")
        canvas.bar(middle, y + 3, length, _ROW - 7, ink=PALETTE[0] if length >= 0 else PALETTE[1], note=r.figures)
        canvas.text(_RIGHT + 8, y + 12, f"{r.value:.2f}")
    return canvas.render()


def _ratios(report: dict[str, Any]) -> list[_Ratio]:
    """Every ratio of the report, as times as fast; a value that is no positive number raises."""
    found = []
    for source, block in report["swap"].items():
        more = block["registered"][-1]
        told = f"{more['ms']:.3f} ms with {more['n']:,} registered, peft {block['peft_ms']:.2f} ms"
        found.append(_Ratio(f"swap from {source}", "peft's hot-swap", block["peft_over_ours"], told))
        name = f"swap from {source}, {more['n']:,} registered"
        found.append(_Ratio(name, "one registered", 1 / more["over_one"], f"{more['ms']:.3f} ms"))
    if not found:
        raise ValueError("no swap was measured")
    for b in report["decode"]:
        if b["adapters"]:
            name = f"{b['batch']} rows, {b['adapters']} adapters"
            found.append(_Ratio(name, "the base", 1 / b["over_base"], f"{b['tokens_s']:.1f} tokens/s"))
    for c in report["clients"]["clients"]:
        for rival in ("peft", "transformers"):
            told = f"{c['tokens_s']:.1f} tokens/s, {rival} {report['clients'][f'{rival}_tokens_s']:.1f}"
            found.append(_Ratio(f"{c['n']} clients", f"{rival} one by one", c[f"over_{rival}"], told))
    shared, first = report["shared_prompts"], report["first_token"]
    for key, how in (("together", "in one call"), ("in_a_row", "in a row")):
        told = f"{shared[key]['shared_s']:.3f} s, with heads of their own {shared[key]['own_s']:.3f} s"
        name = f"{shared['prompts']} prompts with one head {how}"
        found.append(_Ratio(name, "heads of their own", 1 / shared[key]["shared_over_own"], told))
    waits = {"beside_long": f"beside {first['long_tokens']} tokens", "under_rows": f"under {first['rows']} rows"}
    for key, how in waits.items():
        told = f"{first[f'{key}_ms']:.1f} ms, idle {first['idle_ms']:.1f} ms"
        found.append(_Ratio(f"first token {how}", "idle", 1 / first[f"{key}_over_idle"], told))
    return found


ENGINE_REPORT = DrawnReport("engine", 1, "dnd bench engine", engine_texts)

"""The card of a generator folder, written from the JSON files beside the weights and never by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dnd_sdk.errors import GeneratorError
from dnd_sdk.files import write_atomic

_HEAD = """---
license: apache-2.0
base_model: {base}
library_name: dnd_sdk
tags: [lora, drag-and-drop-llm, hypernetwork]
---

# Drag-and-Drop generator for {base}

Turns the unlabeled prompts of one task into a LoRA for `{base}` in one forward pass (arXiv 2506.16406: frozen sentence
encoder, cascaded hyper-convolution decoder). Its adapters are generated, not trained on the task: check them on your
own data.

## Made by
- encoder: `{encoder}`, {prompts} prompts x {tokens} token states at a time
- LoRA: r {r}, alpha {alpha:g}, {modules}; generated: {parts}
- parameters: {parameters:,} ({share:.1f} % of the base), adapter: see config.json
- data: {n_tasks} training tasks (listed below), base products in training: {precision}
{runs}
"""


def write_card(folder: Path) -> None:
    """Write `folder/README.md` from `training.json` and, where it is there, `evaluation.json`."""
    training = json.loads((folder / "training.json").read_text())
    parts = [_head(training)]
    evaluation = folder / "evaluation.json"
    if evaluation.exists():
        parts.append(_figures(json.loads(evaluation.read_text())))
    parts.append(_tasks(training["tasks"]))
    write_atomic(folder / "README.md", "\n".join(parts))


def record_evaluation(folder: Path, report: dict[str, Any]) -> None:
    """Keep what `dnd eval --json` prints as `folder/evaluation.json` and write the card again.

    Raises `GeneratorError` when `folder` holds no `training.json`.
    """
    if not (folder / "training.json").is_file():
        raise GeneratorError(f"{folder} has no training.json to make a card from", fix="pass a folder of dnd train")
    write_atomic(folder / "evaluation.json", json.dumps(report, indent=1) + "\n")
    write_card(folder)


def _head(t: dict[str, Any]) -> str:
    settings, generator = t["settings"], t["generator"]
    return _HEAD.format(
        base=settings["base"],
        encoder=settings["encoder"],
        prompts=generator["n_prompts"],
        tokens=generator["state_tokens"],
        r=settings["lora"]["r"],
        alpha=settings["lora"]["lora_alpha"],
        modules=", ".join(settings["lora"]["target_modules"]),
        parts=", ".join(generator["parts"]),
        parameters=generator["parameters"],
        share=100 * generator["parameters"] / t["base_parameters"],
        n_tasks=len(t["tasks"]),
        precision=t["base_precision"],
        runs="\n".join(f"- run {i}: {_run(r)}" for i, r in enumerate(_runs(t), 1)),
    )


def _runs(t: dict[str, Any]) -> list[dict[str, Any]]:
    """The record of every training run, first to last: each went on from the one before."""
    before = t.get("before")
    return [*(_runs(before) if before else ()), t]


def _run(t: dict[str, Any]) -> str:
    shared, stages = t["settings"]["shared"], t["settings"]["stages"]
    parts = [f"shared adapter {shared['steps']} steps of {shared['rows']} rows"]
    parts += [f"{s['objective']} {s['steps']} steps of {s['tasks']} tasks" for s in stages]
    curves = ["shared", *(f"stage-{i}" for i in range(len(stages)))]
    return f"seed {t['seed']}; " + "; ".join(p + _trend(t["losses"][c]) for p, c in zip(parts, curves, strict=True))


def _trend(curve: list[dict[str, float]]) -> str:
    """Mean loss of the first and of the last quarter: single steps are mostly noise."""
    if not curve:
        return ""
    n = -(-len(curve) // 4)
    first, last = (sum(x["loss"] for x in part) / n for part in (curve[:n], curve[-n:]))
    return f" (loss {first:.2f} to {last:.2f})"


def _figures(e: dict[str, Any]) -> str:
    lines = [
        "## Figures",
        f"Mean over {e['settings']['n_tasks']} tasks it never saw, {e['settings']['limit']} test rows each "
        "(evaluation.json; made by `dnd eval`).",
        "",
        "| method | exact match | option accuracy | valid format |",
        "|---|---|---|---|",
    ]
    for name, m in e["methods"].items():
        mean = m["mean"]
        cells = [_cell(mean.get(k)) for k in ("exact_match", "option_accuracy", "valid_format")]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def _cell(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"


def _tasks(tasks: dict[str, dict[str, str]]) -> str:
    lines = ["## Training tasks and their licences", "", "| task | family | licence |", "|---|---|---|"]
    lines += [f"| {n} | {t['family']} | {t['licence']} |" for n, t in tasks.items()]
    return "\n".join([*lines, ""])

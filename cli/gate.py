"""`dnd bench gate`: how often the choice of reuse, generate or base is right, and what its probabilities are worth."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dnd_sdk.cli.options import ModelOptions, quiet_libraries
from dnd_sdk.cli.output import Output
from dnd_sdk.cli.task_sets import TaskSet


def bench_gate(
    out: Output,
    models: ModelOptions,
    task_set: TaskSet,
    tasks: Annotated[Path, typer.Argument(metavar="TASKS", help="Folder of task files (NAME.jsonl).")],
    seeds: Annotated[int, typer.Option("--seeds", min=1, help="Random splits of each task's prompts.")] = 3,
    run_dir: Annotated[Path | None, typer.Option("--run-dir", help="Keeps embeddings; run again to go on.")] = None,
) -> None:
    """Measure the router on tasks it was not fitted on; needs their prompts and the encoder, no base model."""
    wanted = task_set.checked()
    settings, home = models.settings(out), out.find_home()
    from dnd_sdk.evaluation.gate import Gate, build_gate_report, pooled_noise, pooled_prompts, render_gate, try_gate
    from dnd_sdk.models import pick_device

    quiet_libraries(out)
    asked = task_set.tasks(out, tasks)
    role = wanted if wanted in {t.role for t in asked} else "all"
    with out.step("loading the encoder"):
        device = str(pick_device(settings.device))
        gate = Gate.load(settings.base, settings.generator, settings.encoder, home, device)
    with out.progress("measuring") as report:

        def tell(stage: str, done: int, total: int, _: float) -> None:
            report(done, total, stage, None)

        pooled = pooled_prompts(gate, asked, tell, run_dir)
        events = try_gate(gate, pooled, pooled_noise(gate, tell, run_dir), seeds=seeds, progress=tell)
    result = build_gate_report(gate, events, {"role": role, "seeds": seeds})
    out.emit(result, lambda: render_gate(result))

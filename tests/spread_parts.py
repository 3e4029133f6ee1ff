"""Work in units: a zoo of eight tasks, tasks to evaluate, workers of other kinds, and jobs that go wrong."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from eval_fakes import LABELS
from tiny_world import prompts_of, save_base
from training_parts import config_file

from dnd_sdk.errors import InputError
from dnd_sdk.protocols import Done, Job, Progress, ThisProcess, Work
from dnd_sdk.tasks.reading import Row, Task

NAMES = [f"t{i}" for i in range(8)]
STEPS = 30


def zoo_world(root: Path) -> Path:
    """Base, `tasks` (eight of them) and `train.toml`: one task a group, so that there are eight units of a second."""
    save_base(root / "base")
    (root / "tasks").mkdir()
    for i, name in enumerate(NAMES):
        rows = [{"prompt": f"{p} {name}", "response": LABELS[i % 2], "split": "train"} for p in prompts_of("upper")]
        (root / "tasks" / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (root / "tasks" / "index.json").write_text(json.dumps([{"name": n, "role": "train"} for n in NAMES]))
    config = config_file(root, shared_steps="3", every="60")
    config.write_text(config.read_text().replace("steps = 3\ntasks = 2", f"steps = {STEPS}\ntasks = 1"))
    return root


def zoo_bytes(out: Path) -> dict[str, bytes]:
    """Every adapter, curve and importance of a zoo."""
    files = [p for p in out.rglob("*") if p.suffix in (".safetensors", ".jsonl")]
    return {str(p.relative_to(out)): p.read_bytes() for p in files}


def eval_task(name: str) -> Task:
    """A task of twelve rows to learn from and eight to ask."""
    rows = [Row(p, LABELS[i % 2], "train" if i < 12 else "test") for i, p in enumerate(prompts_of(name))]
    return Task(name, name, "label", LABELS, "exact_match", "validation", "MIT", tuple(rows[:12]), tuple(rows[12:]))


class Backwards:
    """Workers that do the last unit first, every unit twice, and open the job anew for each; `broken` ones fail."""

    def __init__(self, *broken: str) -> None:
        self._broken = broken

    def run(self, job: Job, units: Sequence[str], progress: Progress) -> Iterator[Done]:
        """See `Workers`."""
        for unit in reversed(units):
            if any(name in unit for name in self._broken):
                yield Done(unit, None, InputError("no such luck"))
                continue
            list(ThisProcess().run(job, [unit], progress))
            yield from ThisProcess().run(job, [unit], progress)


def open_troubles(seconds: float = 0.0) -> Work:
    """A job whose units are named after what they do: `bad`, `odd`, `deadly`, or anything else, which is fine."""

    def work(unit: str, progress: Progress) -> tuple[int, int]:
        progress("working", 1, 2, 0.5)
        time.sleep(seconds)
        if unit == "bad":
            raise InputError("a bad row", fix="write a better one")
        if unit == "odd":
            raise AttributeError("no attribute x")
        if unit == "deadly":
            os._exit(1)
        return os.getpid(), torch.get_num_threads()

    return work

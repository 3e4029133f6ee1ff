"""A tiny world to train in: base, encoder, tasks and a recipe of seconds."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from tiny_world import save_base, save_encoder

MAKE_TASKS = Path(__file__).parents[1] / "examples" / "tiny_tasks" / "make.py"


def config_file(root: Path, **changes: str) -> Path:
    """`root/train.toml`: a training of seconds on the tiny world in `root`."""
    values = {"seed": "0", "every": "0", "shared_steps": "6", "stages": "4", "start": "", "width": "8"}
    values |= {"data": "", "check": ""} | changes
    path = root / "train.toml"
    path.write_text(
        f"""
base = "{root / "base"}"
encoder = "{root / "encoder"}"
{values["start"]}
[lora]
r = 4
[data]
max_tokens = 200
max_rows = 40
{values["data"]}
{values["check"]}
[shared]
steps = {values["shared_steps"]}
rows = 4
lr = 1e-2
[per_task]
steps = 3
tasks = 2
rows = 2
checkpoints = 2
[generator]
n_prompts = 4
state_tokens = 8
width = {values["width"]}
pool = 24
[[stages]]
objective = "reconstruction"
steps = {values["stages"]}
tasks = 2
[[stages]]
objective = "end-to-end"
steps = {values["stages"]}
tasks = 2
rows = 2
train_shared = true
[run]
seed = {values["seed"]}
checkpoint_every_s = {values["every"]}
"""
    )
    return path


def silent(*_: object) -> None:
    """A progress that tells nobody."""


def make_world(root: Path) -> Path:
    """Fill `root` with `base`, `encoder`, `tasks` and `train.toml`; returns it."""
    save_base(root / "base")
    save_encoder(root / "encoder")
    make_tasks(root / "tasks")
    config_file(root)
    return root


def make_tasks(folder: Path) -> None:
    """The example's tiny tasks in `folder`."""
    spec = importlib.util.spec_from_file_location("make_tasks", MAKE_TASKS)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.main(["--out", str(folder), "--rows", "60"])

"""A training run's folder: manifest, loss curve, checkpoint; killed at any moment, the same command continues it.

* `checkpoint.safetensors` holds every tensor the loop needs (parameters and optimizer moments) and, in its header, the
  step it belongs to; it is replaced atomically.
* `losses.jsonl` gets one line a step; on resume, lines past the checkpoint are cut, so a resumed curve equals an
  uninterrupted one line by line (every step draws its randomness from `(seed, step)`, never from a running state).
* `manifest.json` says what made the run: settings, data hashes, versions. A different manifest refuses to resume.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from dnd_sdk.errors import ConfigError, StorageError
from dnd_sdk.files import replacing, sweep, write_atomic

_CHECKPOINT = "checkpoint.safetensors"


class RunDir:
    """One stage of training on disk."""

    def __init__(self, path: Path, manifest: dict[str, Any], *, checkpoint_every_s: float = 60.0) -> None:
        self.path = path
        self.checkpoint_every_s = checkpoint_every_s
        self._last_save = time.monotonic()
        try:
            path.mkdir(parents=True, exist_ok=True)
            sweep(path, alone=True)
        except OSError as e:
            raise StorageError(f"cannot create run folder {path}: {e}", fix="choose another run folder") from e
        self._check_manifest(manifest)

    def _check_manifest(self, manifest: dict[str, Any]) -> None:
        file = self.path / "manifest.json"
        manifest = json.loads(json.dumps(manifest))
        if not file.exists():
            write_json(file, manifest)
            return
        before = json.loads(file.read_text())
        changed = sorted(k for k in {*before, *manifest} if k != "versions" and before.get(k) != manifest.get(k))
        if changed:
            raise ConfigError(
                f"{self.path} holds a run with other {', '.join(changed)}",
                fix="give a new run folder, or put the settings and data back as they were",
            )

    def save(self, step: int, tensors: Mapping[str, Tensor]) -> None:
        """Replace the checkpoint; `step` steps are done."""
        write_tensors(self.path / _CHECKPOINT, tensors, metadata={"step": str(step)})
        self._last_save = time.monotonic()

    def due(self) -> bool:
        """Whether it is time for the next checkpoint."""
        return time.monotonic() - self._last_save >= self.checkpoint_every_s

    def load(self) -> tuple[int, dict[str, Tensor]]:
        """The last checkpoint as (steps done, tensors), `(0, {})` for a fresh run; cuts the loss curve to it."""
        file = self.path / _CHECKPOINT
        step, tensors = 0, {}
        if file.exists():
            with safe_open(file, "pt") as f:
                step = int((f.metadata() or {})["step"])
                tensors = {k: f.get_tensor(k) for k in f.keys()}  # noqa: SIM118 - not a mapping
        self._cut_losses(step)
        return step, tensors

    def log(self, step: int, **values: float) -> None:
        """Append one line to the loss curve."""
        with (self.path / "losses.jsonl").open("a") as f:
            f.write(json.dumps({"step": step, **values}) + "\n")

    @staticmethod
    def read_losses(path: Path) -> list[dict[str, float]]:
        """The loss curve in a run folder; a torn last line is ignored."""
        file = path / "losses.jsonl"
        out: list[dict[str, float]] = []
        for line in file.read_text().splitlines() if file.exists() else ():
            try:
                out.append(json.loads(line))
            except json.JSONDecodeError:
                break
        return out

    def _cut_losses(self, step: int) -> None:
        kept = [line for line in self.read_losses(self.path) if line["step"] < step]
        write_atomic(self.path / "losses.jsonl", "".join(json.dumps(line) + "\n" for line in kept))


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write safetensors atomically and durably; `metadata` goes into the header."""
    with replacing(path) as temporary:
        save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, temporary, metadata)


def write_json(path: Path, data: Any) -> None:
    """Write JSON atomically."""
    write_atomic(path, json.dumps(data, indent=2, sort_keys=True) + "\n")


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """AdamW's moments as named tensors (safetensors instead of torch's pickle)."""
    out = {}
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for i, p in enumerate(params):
        for key, value in optimizer.state.get(p, {}).items():
            out[f"optimizer.{i}.{key}"] = torch.as_tensor(value)
    return out


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Inverse of `optimizer_tensors`, in place."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for name, value in tensors.items():
        if name.startswith("optimizer."):
            _, i, key = name.split(".", 2)
            optimizer.state[params[int(i)]][key] = value.clone()

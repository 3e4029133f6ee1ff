"""In which precision this CPU runs a base better: measured once a machine, remembered in the home.

bfloat16 halves what every token reads of the weights; processors with products of their own for it are several times
faster, others many times slower, and no list of them is complete.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dnd_sdk.config import Home
from dnd_sdk.errors import DndError
from dnd_sdk.files import write_atomic
from dnd_sdk.machine import cpu_name

_FORMAT_VERSION = 1
_OUT, _IN, _N_MATRICES = 4864, 896, 16
"""A small base's widest matrices; several, so that the caches do not hold all."""
_PROMPT, _ANSWER = 128, 32
"""Tokens that are read together and tokens that are written one by one: a usual request."""
_ROUNDS = 3
"""By turns, the best of each counts: other work on the machine must not decide."""
_TOLERATED = 1.1
"""How much slower bfloat16 may be for the half of the memory that it saves."""


def faster_dtype(home: Home) -> torch.dtype:
    """`torch.bfloat16` unless this CPU answers a usual request clearly slower in it than in `torch.float32`.

    The measurement takes under a second, longer where bfloat16 is slow; its answer is kept for this processor and
    version of torch.
    """
    file, machine = home.models / "precision.json", {"cpu": cpu_name(), "torch": torch.__version__}
    kept = _read(file)
    if {name: kept.get(name) for name in machine} == machine and kept.get("faster") in ("float32", "bfloat16"):
        return _named(kept["faster"])
    seconds = request_s()
    faster = "bfloat16" if seconds["bfloat16"] < _TOLERATED * seconds["float32"] else "float32"
    _write(file, {"format_version": _FORMAT_VERSION, **machine, "seconds": seconds, "faster": faster})
    return _named(faster)


def request_s() -> dict[str, float]:
    """Seconds that the products of a usual request take, on a few matrices, by the dtype's name."""
    best: dict[str, float] = {}
    for name in ("float32", "bfloat16") * _ROUNDS:
        best[name] = min(_request_s(_named(name)), best.get(name, float("inf")))
    return best


def _request_s(dtype: torch.dtype) -> float:
    with torch.inference_mode():
        matrices = [torch.full((_OUT, _IN), 0.01, dtype=dtype) for _ in range(_N_MATRICES)]
        prompt, token = (torch.ones(n, _IN, dtype=dtype) for n in (_PROMPT, 1))
        _pass_s(token, matrices)  # the first use of a kind of product sets it up
        writing = min(_pass_s(token, matrices) for _ in range(3))
        return _pass_s(prompt, matrices) + _ANSWER * writing


def _pass_s(states: Tensor, matrices: list[Tensor]) -> float:
    started = time.perf_counter()
    for matrix in matrices:
        nn.functional.linear(states, matrix)  # (T, in) -> (T, out)
    return time.perf_counter() - started


def _named(dtype: str) -> torch.dtype:
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[dtype]


def _read(file: Path) -> dict[str, Any]:
    try:
        kept = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return kept if isinstance(kept, dict) else {}


def _write(file: Path, kept: dict[str, Any]) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(file, json.dumps(kept, indent=1) + "\n")
    except (OSError, DndError):  # a home that is read-only, or full: it is measured again
        return

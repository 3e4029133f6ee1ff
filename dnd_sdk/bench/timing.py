"""Timing rivals in turn, so that load that comes and goes slows all of them, and saying on what."""

from __future__ import annotations

import platform
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch

from dnd_sdk.machine import cpu_name, n_cores

WARM_UPS = 2

Timed = tuple[Callable[[], Any], Callable[[], Any]]
"""What is timed, and the clean-up after it, which is not."""


def in_turn(*calls: Timed, repeats: int, clock: Callable[[], float], warm_ups: int = WARM_UPS) -> list[list[float]]:
    """Seconds of each call by round, taken in turn after the rounds that warm up."""
    seconds: list[list[float]] = [[] for _ in calls]
    for turn in range(warm_ups + repeats):
        for own, (timed, clean_up) in zip(seconds, calls, strict=True):
            start = clock()
            timed()
            took = clock() - start
            clean_up()
            if turn >= warm_ups:
                own.append(took)
    return seconds


def ratio(times: Sequence[float], others: Sequence[float]) -> float:
    """The median of the rounds' own ratios."""
    return statistics.median(a / b for a, b in zip(times, others, strict=True))


def host() -> dict[str, Any]:
    """What this machine and its torch are."""
    return {
        "cpu": cpu_name(),
        "cores": n_cores(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torch_threads": torch.get_num_threads(),
    }

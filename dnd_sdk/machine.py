"""What this machine is, and how much of it this process has used; no third-party imports."""

from __future__ import annotations

import hashlib
import os
import platform
import sys
from functools import cache
from pathlib import Path


def cpu_name() -> str:
    """The processor, as far as the platform tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration, IndexError):
        return platform.processor() or platform.machine()


def wait_briefly() -> None:
    """Let torch's threads sleep soon when they wait for each other; without effect once torch is loaded.

    The OpenMP library of GCC has them spin for 300,000 rounds, which on cores that others use, too, takes the time from
    whom they wait for: a token then took 2.3 s instead of 0.3 s. What the user has set stays.
    """
    if "torch" not in sys.modules and "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "30000")


def peak_rss_mb() -> float:
    """The largest resident size this process has had, in MB (10^6 bytes)."""
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e6 if sys.platform == "darwin" else peak * 1024 / 1e6  # macOS counts bytes, Linux KiB


def n_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def told_memory() -> int | None:
    """Bytes that programs can still have, as the platform tells; None: it does not."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8", errors="replace").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration, IndexError, ValueError):
        return None


def available_bytes() -> int:
    """Memory to plan with: what programs can still have; half of all where that is not told, else 4 GiB."""
    told = told_memory()
    if told is not None:
        return told
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    except (AttributeError, OSError, ValueError):
        return 4 * 2**30


@cache
def process_space() -> str:
    """Eight hex digits that all processes have in common whose ids tell them apart: those of a system since its start.

    Containers that do not see each other's processes have others, also on one machine.
    """
    boot = Path("/proc/sys/kernel/random/boot_id")
    try:
        parts = [boot.read_text(encoding="ascii"), str(os.stat("/proc/self/ns/pid").st_ino)]
    except OSError:  # no Linux
        parts = []
    return hashlib.sha256("\n".join([platform.node(), *parts]).encode()).hexdigest()[:8]


def is_alive(pid: int) -> bool:
    """Whether a process of this `process_space` lives; where that cannot be asked, it is taken for alive."""
    if os.name == "nt":  # there, asking would end the process
        return True
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:  # somebody else's, but there
        return True
    return True

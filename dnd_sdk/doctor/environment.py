"""What `dnd env` prints: enough to reproduce a report, and nothing secret.

Of the environment only names are told and, for offline switches, whether they are on; the user's folder is `~`.
"""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import dnd_sdk
from dnd_sdk.config import Home
from dnd_sdk.machine import cpu_name
from dnd_sdk.settings import PREFIX, settings_files

PACKAGES = (
    "torch",
    "transformers",
    "peft",
    "safetensors",
    "faiss-cpu",
    "sentence-transformers",
    "llama-index-core",
    "huggingface_hub",
    "pydantic",
    "typer",
)
OFFLINE_SWITCHES = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
_ON = ("1", "ON", "YES", "TRUE")
_OFF = ("", "0", "OFF", "NO", "FALSE")


def describe(home: Home) -> dict[str, str]:
    """Versions, machine, folders and switches, in the order to print them."""
    switches = {name: switch_state(os.environ.get(name, "")) for name in OFFLINE_SWITCHES}
    variables = sorted(name for name in os.environ if name.startswith(PREFIX))
    return {
        "dnd_sdk": dnd_sdk.__version__,
        "python": f"{platform.python_version()} ({platform.python_implementation()})",
        "platform": platform.platform(),
        **{name: version_of(name) or "not installed" for name in PACKAGES},
        "cpu": f"{cpu_name()}, {os.cpu_count()} cores",
        "gpu": _gpus(),
        "home": tilde(home.root),
        "settings files": ", ".join(tilde(f) for f in settings_files() if f.is_file()) or "none",
        "variables": ", ".join(variables) or "none",
        "offline": ", ".join(f"{name} {state or 'not understood'}" for name, state in switches.items()),
    }


def version_of(package: str) -> str | None:
    """The installed version, None when it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def switch_state(value: str) -> str | None:
    """`on` or `off` as the Hugging Face libraries read a switch; None for a value that none of them knows."""
    return "on" if value.upper() in _ON else "off" if value.upper() in _OFF else None


def tilde(path: Path) -> str:
    """The path with the user's folder as `~`."""
    try:
        return f"~/{path.relative_to(Path.home()).as_posix()}"
    except (ValueError, RuntimeError):
        return str(path)


def _gpus() -> str:
    try:
        import torch

        found = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
        shown = [f"{gpu.name} ({gpu.total_memory / 1e9:.0f} GB)" for gpu in found]
        return ", ".join(shown) or ("mps" if torch.backends.mps.is_available() else "none")
    except Exception as e:  # a broken torch is a thing to report, not a reason to report nothing
        return f"torch fails: {type(e).__name__}: {e}"

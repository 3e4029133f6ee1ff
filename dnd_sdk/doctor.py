"""The checks behind `dnd doctor`: each one looks, changes nothing, and says what to do about what it finds.

A check never raises: what goes wrong while looking is itself the finding.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

from dnd_sdk.config import Home
from dnd_sdk.errors import DndError

TESTED = {
    "torch": ("2.6", "3"),
    "transformers": ("5", "6"),
    "peft": ("0.18", "1"),
    "safetensors": ("0.5", "1"),
    "faiss-cpu": ("1.9", "2"),
    "sentence-transformers": ("5", "7"),
    "llama-index-core": ("0.14", "0.15"),
    "typer": ("0.15", "1"),
}
"""Versions from (included) to (excluded) that the tests cover; the same ranges as the package's dependencies."""

MIN_MEMORY = 3 << 30
"""Bytes of memory the default models need with room to work."""
MIN_DISK = 1 << 30
"""Bytes of disk that fetching and converting the default weights take at their peak, rounded up."""

Status = Literal["ok", "warn", "fail"]


@dataclass(frozen=True)
class Check:
    """One line of the report."""

    name: str
    status: Status
    detail: str
    fix: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form."""
        return asdict(self)


def examine(
    home: Home, base: str | None = None, generator: str | None = None, encoder: str | None = None, device: str = "auto"
) -> list[Check]:
    """Run every check; None means the default model. Fetches nothing; loads what is there."""
    subject = _Subject(home, base, generator, encoder, device)
    return [check for look in _LOOKS for check in _safely(look, subject)]


@dataclass(frozen=True)
class _Subject:
    home: Home
    base: str | None
    generator: str | None
    encoder: str | None
    device: str


def _safely(look: Callable[[_Subject], Iterator[Check]], subject: _Subject) -> list[Check]:
    name = look.__name__.strip("_")
    try:
        return list(look(subject))
    except DndError as e:
        return [Check(name, "fail", e.message, e.fix)]
    except Exception as e:  # a broken environment can raise anything, and reporting that is the point
        return [Check(name, "fail", f"{type(e).__name__}: {e}", "reinstall with: pip install --upgrade dnd-sdk")]


def _python(_: _Subject) -> Iterator[Check]:
    yield Check("python", "ok", sys.version.split()[0])


def _packages(_: _Subject) -> Iterator[Check]:
    for package, (low, high) in TESTED.items():
        try:
            found = version(package)
        except PackageNotFoundError:
            yield Check(package, "fail", "not installed", f'pip install "{package}>={low},<{high}"')
            continue
        if _numbers(low) <= _numbers(found) < _numbers(high):
            yield Check(package, "ok", found)
        else:
            wanted = f"{package}>={low},<{high}"
            yield Check(package, "warn", f"{found}, tested is >={low},<{high}", f'pip install "{wanted}"')


def _numbers(text: str) -> tuple[int, ...]:
    parts = text.split("+")[0].split(".")
    return tuple(int(p) for p in parts if p.isdigit())


def _device(s: _Subject) -> Iterator[Check]:
    import torch

    from dnd_sdk.models import pick_device

    picked = pick_device(s.device)
    threads = f", {torch.get_num_threads()} threads" if picked.type == "cpu" else ""
    yield Check("device", "ok", f"{picked}{threads}")


def _memory(_: _Subject) -> Iterator[Check]:
    free = _available_memory()
    if free is None:
        yield Check("memory", "ok", "free memory is not known on this system")
    elif free < MIN_MEMORY:
        yield Check("memory", "warn", f"{free / 1e9:.1f} GB free", f"have {MIN_MEMORY / 1e9:.1f} GB free")
    else:
        yield Check("memory", "ok", f"{free / 1e9:.1f} GB free")


def _available_memory() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return None


def _home(s: _Subject) -> Iterator[Check]:
    spot = next(p for p in (s.home.root, *s.home.root.parents) if p.exists())
    if not spot.is_dir():
        yield Check("home", "fail", f"{spot} is not a folder", "choose another folder with --home or DND_HOME")
    elif not os.access(spot, os.W_OK | os.X_OK):
        yield Check("home", "fail", f"{spot} is not writable", "choose another folder with --home or DND_HOME")
    else:
        yield Check("home", "ok", f"{s.home.root}" + ("" if spot == s.home.root else " (made when needed)"))


def _disk(s: _Subject) -> Iterator[Check]:
    spot = next(p for p in (s.home.root, *s.home.root.parents) if p.exists())
    free = shutil.disk_usage(spot).free
    if free < MIN_DISK:
        yield Check("disk", "warn", f"{free / 1e9:.1f} GB free", f"free up {MIN_DISK / 1e9:.1f} GB at {spot}")
    else:
        yield Check("disk", "ok", f"{free / 1e9:.1f} GB free")


def _models(s: _Subject) -> Iterator[Check]:
    """Base, encoder and generator: there, whole, and made for each other."""
    from dnd_sdk.embedded import EMBEDDED, is_pulled
    from dnd_sdk.encoder import Encoder
    from dnd_sdk.models import DEFAULT_BASE, DEFAULT_ENCODER, load_base
    from dnd_sdk.session.loading import check_encoder, generator_folder, load_generator

    base_name = s.base or DEFAULT_BASE
    folder = generator_folder(base_name, s.generator)
    if base_name in EMBEDDED and not is_pulled(base_name, s.home):
        yield Check("base", "warn", f"{base_name} is not fetched yet", f"run: dnd models pull {base_name}")
        return
    base = load_base(base_name, s.home, device=s.device)
    size = sum(p.numel() for p in base.model.parameters())
    yield Check("base", "ok", f"{base_name}, {size / 1e6:.1f} M parameters, fingerprint {base.fingerprint[:16]}")
    generator = None
    if folder is None:
        yield Check("generator", "warn", f"none for {base_name}", "train one with: dnd train generator")
    else:
        generator = load_generator(folder, base)
        yield Check("generator", "ok", f"{generator.id} fits the base, r={generator.layout.r}")
    encoder_name = s.encoder or (generator.encoder_name if generator is not None else DEFAULT_ENCODER)
    if encoder_name in EMBEDDED and not is_pulled(encoder_name, s.home):
        yield Check("encoder", "warn", f"{encoder_name} is not fetched yet", f"run: dnd models pull {encoder_name}")
        return
    encoder = Encoder.load(encoder_name, s.home)
    check_encoder(encoder, generator)
    yield Check("encoder", "ok", f"{encoder_name}, width {encoder.width}, fingerprint {encoder.fingerprint[:16]}")


def _adapters(s: _Subject) -> Iterator[Check]:
    """Every stored adapter is whole."""
    from dnd_sdk.adapters import AdapterStore

    store = AdapterStore(s.home)
    problems = store.verify()
    for problem in problems:
        yield Check(f"adapter {problem.name}", "fail", problem.what, problem.fix)
    if not problems:
        yield Check("adapters", "ok", f"{len(store.ls())} stored, all whole")


def _index(s: _Subject) -> Iterator[Check]:
    """Saved indexes can be read; they are a cache that follows the store at the next use."""
    from dnd_sdk.adapters import AdapterStore

    stored = {a.id for a in AdapterStore(s.home).ls()}
    manifests = sorted(s.home.index.glob("*/index.json"))
    for path in manifests:
        try:
            indexed = {entry["adapter_id"] for entry in json.loads(path.read_text(encoding="utf-8"))["adapters"]}
        except (OSError, ValueError, KeyError, TypeError):
            yield Check("index", "warn", f"{path} is damaged, the next adapt makes it again", f"delete {path.parent}")
            continue
        lag = "" if indexed == stored else " (brought up to date at the next use)"
        yield Check("index", "ok", f"{len(indexed & stored)} of {len(stored)} stored adapters indexed{lag}")
    if not manifests:
        yield Check("index", "ok", "not made yet")


_LOOKS = (_python, _packages, _device, _memory, _home, _disk, _models, _adapters, _index)

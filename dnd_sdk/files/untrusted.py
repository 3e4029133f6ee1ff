"""Reading files that may be damaged or hostile.

* Every size is bounded before memory is taken; links that leave the folder, pipes and devices are refused.
* A safetensors header is checked here, entry by entry, so shapes can be judged before the tensors are read.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeGuard

import torch
from torch import Tensor

from dnd_sdk.errors import AdapterCorruptError
from dnd_sdk.files.atomic import storage_errors

MAX_HEADER_BYTES = 8 * 2**20
MAX_DIMS = 8
_MAX_SIZE = 2**48
FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_ITEM_BYTES = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 1),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 2),
    **dict.fromkeys(("U32", "I32", "F32"), 4),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 8),
}


@contextmanager
def open_regular(folder: Path, name: str, max_bytes: int) -> Iterator[tuple[BinaryIO, int]]:
    """Open `folder/name` for reading and yield it with its size.

    Raises `AdapterCorruptError` when it is missing, leaves the folder through a link, is not a plain file or is larger
    than `max_bytes`; `StorageError` when the disk refuses.
    """
    path = folder / name
    with storage_errors("read", path), open(_plain_file(folder, path, max_bytes), "rb") as f:
        yield f, os.fstat(f.fileno()).st_size


def _plain_file(folder: Path, path: Path, max_bytes: int) -> Path:
    try:
        real = path.resolve(strict=True)
    except (FileNotFoundError, NotADirectoryError) as e:
        raise AdapterCorruptError(f"{path} is missing", fix="copy the adapter's folder again, all of it") from e
    except RuntimeError as e:  # how Python before 3.13 reports a loop of links
        raise AdapterCorruptError(f"{path} is a loop of links") from e
    if not real.is_relative_to(folder.resolve()):
        raise AdapterCorruptError(f"{path} is a link that leaves its folder", fix="copy the file into its place")
    # judged before opening: opening a pipe would wait for ever
    status = real.stat()
    if not stat.S_ISREG(status.st_mode):
        raise AdapterCorruptError(f"{path} is not a plain file")
    if status.st_size > max_bytes:
        raise AdapterCorruptError(
            f"{path} has {status.st_size} bytes, at most {max_bytes} are allowed",
            fix="use an adapter made for this base model, saved as plain LoRA",
        )
    return real


def read_json(folder: Path, name: str, max_bytes: int) -> dict[str, Any]:
    """Read a JSON object of bounded size; raises like `open_regular`, and `AdapterCorruptError` on anything else."""
    with open_regular(folder, name, max_bytes) as (f, _):
        raw = f.read(max_bytes + 1)
    try:
        data = json.loads(raw.decode("utf-8"))
    except (ValueError, RecursionError) as e:
        raise AdapterCorruptError(f"{folder / name} is not valid JSON: {str(e)[:200]}") from e
    if not isinstance(data, dict):
        raise AdapterCorruptError(f"{folder / name} holds a JSON {type(data).__name__}, expected an object")
    return data


def is_finite_number(value: object) -> TypeGuard[float]:
    """Whether a value read from JSON is a number that a float can hold."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


class TensorInfo(NamedTuple):
    """One entry of a safetensors header; `start` and `stop` are byte offsets into the data."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


class SafetensorsReader:
    """A safetensors file whose header has been read and checked; the tensors are read on request."""

    def __init__(self, file: BinaryIO, path: Path, header: dict[str, TensorInfo], n_bytes: int) -> None:
        self.path = path
        self.header = header
        self._file = file
        self._n_bytes = n_bytes

    def read(self, names: Iterable[str] | None = None) -> dict[str, Tensor]:
        """Read the tensors of these names (None: all); call only after judging `header`: they must be `FLOATS`."""
        data = bytearray(self._n_bytes)
        if self._file.readinto(data) != self._n_bytes:  # type: ignore[attr-defined]
            raise AdapterCorruptError(f"{self.path} is truncated")
        # one tensor over all bytes; slices of it may be misaligned for a dtype, hence the clone before the cast
        raw = torch.frombuffer(data, dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)
        return {name: _tensor(raw, self.header[name]) for name in (self.header if names is None else names)}

    def sha256(self) -> str:
        """Of the whole file as it is open, in hex; read the tensors before."""
        self._file.seek(0)
        return hashlib.file_digest(self._file, "sha256").hexdigest()  # type: ignore[arg-type]


def _tensor(raw: Tensor, info: TensorInfo) -> Tensor:
    return raw[info.start : info.stop].clone().view(FLOATS[info.dtype]).view(info.shape)


@contextmanager
def open_safetensors(folder: Path, name: str, max_bytes: int) -> Iterator[SafetensorsReader]:
    """Open `folder/name`, read and check its header; raises like `open_regular`, plus on any inconsistent header."""
    path = folder / name
    with open_regular(folder, name, max_bytes) as (f, size):
        first = f.read(8)
        n_header = int.from_bytes(first, "little")
        if len(first) < 8 or n_header > size - 8:
            raise AdapterCorruptError(f"{path} is truncated: {size} bytes do not hold its header")
        if n_header > MAX_HEADER_BYTES:
            raise AdapterCorruptError(f"{path}: header of {n_header} bytes, at most {MAX_HEADER_BYTES} are allowed")
        header = _parse_header(f.read(n_header), path)
        n_bytes = size - 8 - n_header
        _check_offsets(header, n_bytes, path)
        yield SafetensorsReader(f, path, header, n_bytes)


def _parse_header(raw: bytes, path: Path) -> dict[str, TensorInfo]:
    try:
        data = json.loads(raw.decode("utf-8"))
        data.pop("__metadata__", None)
        header = {
            str(name): TensorInfo(str(d["dtype"]), _shape(d["shape"]), *map(_index, d["data_offsets"]))
            for name, d in data.items()
        }
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as e:
        raise AdapterCorruptError(f"{path}: its header is not safetensors ({str(e)[:200]})") from e
    return header


def _shape(value: Any) -> tuple[int, ...]:
    # before anything multiplies them: the product of a million numbers takes minutes
    if len(value) > MAX_DIMS or any(map(_MAX_SIZE.__lt__, shape := tuple(map(_index, value)))):
        raise ValueError(f"a shape of {len(value)} numbers, at most {MAX_DIMS} of at most {_MAX_SIZE} are allowed")
    return shape


def _index(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError(f"{str(value)[:40]} is not a size")
    return value


def _check_offsets(header: dict[str, TensorInfo], n_bytes: int, path: Path) -> None:
    at = 0
    for name, info in sorted(header.items(), key=lambda item: (item[1].start, item[1].stop)):
        if info.dtype not in _ITEM_BYTES:
            raise AdapterCorruptError(f"{path}: tensor {name} has unknown dtype {info.dtype[:20]!r}")
        if info.start != at or info.stop - info.start != math.prod(info.shape) * _ITEM_BYTES[info.dtype]:
            raise AdapterCorruptError(f"{path}: the bytes of tensor {name} do not match its shape {info.shape}")
        at = info.stop
    if at != n_bytes:
        what = "is truncated" if at > n_bytes else "has bytes after its last tensor"
        raise AdapterCorruptError(f"{path} {what}: its header describes {at} bytes of tensors, the file has {n_bytes}")

"""safetensors files that may be damaged or hostile, as numpy arrays of fp32: nothing here needs torch.

* A header is checked entry by entry, so names, dtypes and shapes can be judged before any tensor is read.
* The tensors' bytes are read once, into one buffer; arrays that are fp32 already are views of it.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property, lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from dnd_sdk.errors import AdapterCorruptError
from dnd_sdk.files.untrusted import open_regular

FloatArray = NDArray[np.float32]

MAX_HEADER_BYTES = 8 * 2**20
MAX_DIMS = 8
FLOATS = ("BF16", "F16", "F32")
"""The dtypes that are read."""
_MAX_SIZE = 2**48
_STORED = {"F32": "<f4", "F16": "<f2", "BF16": "<u2"}
_ITEM_BYTES = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 1),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 2),
    **dict.fromkeys(("U32", "I32", "F32"), 4),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 8),
}
_MAX_KEPT_BYTES = 2**18
"""Headers up to this length are parsed once as long as they stay the same: adapters of one base share theirs."""


class TensorInfo(NamedTuple):
    """One entry of a safetensors header; `start` and `stop` are byte offsets into the data."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


class SafetensorsReader:
    """A safetensors file whose header has been read and checked; the tensors are read on request."""

    def __init__(
        self, file: BinaryIO, path: Path, header: Mapping[str, TensorInfo], first: bytes, n_bytes: int
    ) -> None:
        """`file` stands after its `first` bytes, the header and its length; `n_bytes` of tensors follow."""
        self.path = path
        self.header = header
        self._file = file
        self._first = first
        self._n_bytes = n_bytes

    @cached_property
    def data(self) -> NDArray[np.uint8]:
        """The bytes of all tensors as one array, which views of it keep alive; ask only after judging `header`."""
        data = np.empty(self._n_bytes, np.uint8)
        if self._file.readinto(data.data) != self._n_bytes:  # type: ignore[attr-defined]
            raise AdapterCorruptError(f"{self.path} is truncated")
        return data

    def array(self, name: str) -> FloatArray:
        """One tensor as fp32; call only after judging `header`: it must be one of `FLOATS`."""
        info = self.header[name]
        stored = self.data[info.start : info.stop].view(_STORED[info.dtype])
        # offsets may be odd where dtypes are mixed
        return _as_float(np.require(stored, requirements="A"), info.dtype).reshape(info.shape)

    def sha256(self) -> str:
        """Of the whole file as it was read, in hex."""
        digest = hashlib.sha256(self._first)
        digest.update(self.data.data)
        return digest.hexdigest()


@contextmanager
def open_safetensors(folder: Path, name: str, max_bytes: int) -> Iterator[SafetensorsReader]:
    """Open `folder/name`, read and check its header; raises like `open_regular`, plus on any inconsistent header."""
    path = folder / name
    with open_regular(folder, name, max_bytes) as (f, size):
        length = f.read(8)
        n_header = int.from_bytes(length, "little")
        if len(length) < 8 or n_header > size - 8:
            raise AdapterCorruptError(f"{path} is truncated: {size} bytes do not hold its header")
        if n_header > MAX_HEADER_BYTES:
            raise AdapterCorruptError(f"{path}: header of {n_header} bytes, at most {MAX_HEADER_BYTES} are allowed")
        raw, n_bytes = f.read(n_header), size - 8 - n_header
        header = _checked_header(raw, n_bytes, path)
        yield SafetensorsReader(f, path, header, length + raw, n_bytes)


def safetensors_header(tensors: Mapping[str, TensorInfo], metadata: Mapping[str, str]) -> bytes:
    """What a file of these tensors begins with, the same each time (the library orders metadata by chance)."""
    entries = {
        name: {"dtype": info.dtype, "shape": list(info.shape), "data_offsets": [info.start, info.stop]}
        for name, info in tensors.items()
    }
    text = json.dumps({"__metadata__": dict(metadata), **entries}, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the format asks for aligned data
    return len(text).to_bytes(8, "little") + text


def all_finite(array: FloatArray) -> bool:
    """Whether a non-empty array holds neither NaN nor inf."""
    # both reach the extremes: far cheaper than a mask of millions
    return bool(np.isfinite(array.min()) and np.isfinite(array.max()))


def _as_float(stored: NDArray[Any], dtype: str) -> FloatArray:
    if dtype == "BF16":  # the upper half of an fp32
        return (stored.astype(np.uint32) << 16).view(np.float32)
    return stored.astype(np.float32, copy=False)


def _checked_header(raw: bytes, n_bytes: int, path: Path) -> Mapping[str, TensorInfo]:
    try:
        header, described = (_parsed_once if len(raw) <= _MAX_KEPT_BYTES else _parsed)(raw)
    except _Inconsistent as e:
        raise AdapterCorruptError(f"{path}: {e}") from e
    if described != n_bytes:
        what = "is truncated" if described > n_bytes else "has bytes after its last tensor"
        raise AdapterCorruptError(
            f"{path} {what}: its header describes {described} bytes of tensors, the file has {n_bytes}"
        )
    return header


class _Inconsistent(Exception):
    """What is wrong with a header, whatever file it is of."""


def _parsed(raw: bytes) -> tuple[Mapping[str, TensorInfo], int]:
    """The entries, and how many bytes of tensors they describe."""
    try:
        data = json.loads(raw.decode("utf-8"))
        data.pop("__metadata__", None)
        header = {
            str(name): TensorInfo(str(d["dtype"]), _shape(d["shape"]), *map(_index, d["data_offsets"]))
            for name, d in data.items()
        }
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as e:
        raise _Inconsistent(f"its header is not safetensors ({str(e)[:200]})") from e
    return MappingProxyType(header), _described(header)


_parsed_once = lru_cache(maxsize=8)(_parsed)


def _shape(value: Any) -> tuple[int, ...]:
    # before anything multiplies them: the product of a million numbers takes minutes
    if len(value) > MAX_DIMS or any(map(_MAX_SIZE.__lt__, shape := tuple(map(_index, value)))):
        raise ValueError(f"a shape of {len(value)} numbers, at most {MAX_DIMS} of at most {_MAX_SIZE} are allowed")
    return shape


def _index(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError(f"{str(value)[:40]} is not a size")
    return value


def _described(header: Mapping[str, TensorInfo]) -> int:
    at = 0
    for name, info in sorted(header.items(), key=lambda item: (item[1].start, item[1].stop)):
        if info.dtype not in _ITEM_BYTES:
            raise _Inconsistent(f"tensor {name} has unknown dtype {info.dtype[:20]!r}")
        if info.start != at or info.stop - info.start != math.prod(info.shape) * _ITEM_BYTES[info.dtype]:
            raise _Inconsistent(f"the bytes of tensor {name} do not match its shape {info.shape}")
        at = info.stop
    return at

"""`adapter_model.bin`, the pickle that older trainers write, read without trusting it.

* torch's `weights_only` reader builds no objects but tensors. It allows more calls than a state dict needs, some of
  which take any amount of memory, so the pickle's opcodes are listed first, without running them.
* Only archives whose records are stored as they are: such a file cannot grow while it is read. Mapped into memory, so
  that no tensor reaches beyond the file, whatever size it claims.
"""

from __future__ import annotations

import errno
import pickletools
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from dnd_sdk.errors import AdapterCorruptError
from dnd_sdk.files import MAX_HEADER_BYTES, FloatArray, TensorInfo, open_regular

FIX = "save the adapter again with safetensors (peft: save_pretrained(..., safe_serialization=True))"
_IMPORTS = {
    "collections OrderedDict",
    "torch BFloat16Storage",
    "torch FloatStorage",
    "torch HalfStorage",
    "torch._utils _rebuild_parameter",
    "torch._utils _rebuild_tensor_v2",
}
"""All that a state dict of floating-point LoRA matrices imports."""
_IMPORTING = ("GLOBAL", "STACK_GLOBAL", "INST", "EXT1", "EXT2", "EXT4")
_DTYPES = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}


class TorchReader:
    """A state dict that has been opened and checked; like `SafetensorsReader`, with `start` and `stop` unused."""

    def __init__(self, path: Path, tensors: dict[str, Tensor]) -> None:
        self.path = path
        self.header = {
            k: TensorInfo(_DTYPES.get(t.dtype, str(t.dtype)), tuple(t.shape), 0, 0) for k, t in tensors.items()
        }
        self._tensors = tensors

    def array(self, name: str) -> FloatArray:
        """One tensor as fp32, where it is that already still mapped from the file; call only after judging `header`."""
        return self._tensors[name].float().numpy()


@contextmanager
def open_torch(folder: Path, name: str, max_bytes: int) -> Iterator[TorchReader]:
    """Open a `torch.save`d dict of tensors; raises like `open_regular`, and `AdapterCorruptError` on anything else."""
    path = folder / name
    with open_regular(folder, name, max_bytes) as (f, size):
        raw, sizes = _checked_records(f, size, path)
        _check_imports(raw, path)
        tensors = _tensors(_load(f.name, path), path)
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors.values()}
        # torch maps as many bytes as the pickle claims, also when they belong to the next record
        if sorted(storages.values()) != sorted(sizes):
            raise AdapterCorruptError(f"{path}: its tensors do not have the sizes of its records", fix=FIX)
        yield TorchReader(path, tensors)


def _checked_records(file: BinaryIO, size: int, path: Path) -> tuple[bytes, list[int]]:
    """The pickle and the sizes of the tensors' records, once the archive is known to be whole."""
    try:
        with zipfile.ZipFile(file) as archive:
            records = archive.infolist()
            # torch looks records up without regard to case
            pickles = [r for r in records if r.filename.lower().endswith("data.pkl")]
            packed = any(r.compress_type != zipfile.ZIP_STORED for r in records)
            if packed or sum(r.file_size for r in records) > size:
                raise AdapterCorruptError(f"{path} holds packed records, which torch.save never writes", fix=FIX)
            if len(pickles) != 1 or pickles[0].file_size > MAX_HEADER_BYTES:
                raise AdapterCorruptError(
                    f"{path} does not hold one pickle of at most {MAX_HEADER_BYTES} bytes", fix=FIX
                )
            if (damaged := archive.testzip()) is not None:
                raise AdapterCorruptError(f"{path}: record {damaged[:80]!r} is damaged", fix=FIX)
            return archive.read(pickles[0]), [r.file_size for r in records if "/data/" in r.filename]
    except AdapterCorruptError:
        raise
    except (zipfile.BadZipFile, EOFError, NotImplementedError, OverflowError, RuntimeError, ValueError) as e:
        raise AdapterCorruptError(f"{path} is truncated or not a file of torch.save: {str(e)[:200]}", fix=FIX) from e
    except OSError as e:
        if e.errno != errno.EINVAL:  # its directory points before the file's beginning; any other is the disk's
            raise
        raise AdapterCorruptError(f"{path}: the directory of its archive is damaged", fix=FIX) from e


def _check_imports(raw: bytes, path: Path) -> None:
    try:
        found = {str(arg or op.name) for op, arg, _ in pickletools.genops(raw) if op.name in _IMPORTING}
    except (ValueError, OverflowError) as e:
        raise AdapterCorruptError(f"{path}: its pickle is damaged: {str(e)[:200]}", fix=FIX) from e
    foreign = sorted(name.replace(" ", ".")[:80] for name in found - _IMPORTS)
    if foreign:
        raise AdapterCorruptError(
            f"{path} asks for {', '.join(foreign[:4])}, which no LoRA needs: it is no plain file of floating-point "
            "tensors and may be an attack; nothing of it was run",
            fix=FIX,
        )


def _load(real: str | Path, path: Path) -> Any:
    try:
        return torch.load(str(real), map_location="cpu", weights_only=True, mmap=True)
    except OSError:
        raise
    except Exception as e:  # a damaged pickle makes its reader raise nearly anything
        raise AdapterCorruptError(f"{path} cannot be read: {' '.join(str(e).split())[:200]}", fix=FIX) from e


def _tensors(data: Any, path: Path) -> dict[str, Tensor]:
    if not isinstance(data, dict) or not all(isinstance(k, str) and _is_plain(t) for k, t in data.items()):
        raise AdapterCorruptError(f"{path} holds something else than tensors by name", fix=FIX)
    return {k: t.detach() for k, t in data.items()}


def _is_plain(value: object) -> bool:
    return isinstance(value, Tensor) and value.layout == torch.strided and value.device.type == "cpu"

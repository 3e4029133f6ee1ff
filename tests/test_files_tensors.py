"""safetensors read without torch: bit for bit what torch makes of the same bytes, and whatever a header may claim."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from dnd_sdk.errors import AdapterCorruptError
from dnd_sdk.files import TensorInfo, all_finite, open_safetensors, safetensors_header

NAME, LIMIT = "x.safetensors", 2**20
EVERY = torch.arange(-(2**15), 2**15).to(torch.int16)
"""All patterns of 16 bits: every NaN, both infinities, denormals, negative zero."""


def bits(values: torch.Tensor) -> np.ndarray:
    return values.float().numpy().view(np.uint32)


def read(folder: Path) -> dict[str, np.ndarray]:
    with open_safetensors(folder, NAME, LIMIT) as f:
        return {name: f.array(name) for name in f.header}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_half_becomes_the_fp32_that_torch_makes_of_it(tmp_path: Path, dtype: torch.dtype) -> None:
    halves = EVERY.view(dtype).view(2**8, 2**8)
    save_file({"x": halves}, tmp_path / NAME)
    found, expected = read(tmp_path)["x"], bits(halves)
    assert found.shape == (2**8, 2**8) and found.dtype == np.float32
    assert np.array_equal(np.isnan(found), np.isnan(halves.float().numpy()))
    # float16: torch may make a signalling NaN a quiet one, which is a NaN all the same
    same = (found.view(np.uint32) == expected) | (np.isnan(found) & (dtype == torch.float16))
    assert same.all()


def test_fp32_is_a_view_of_what_was_read(tmp_path: Path) -> None:
    patterns = torch.cat([EVERY.int() << 16, EVERY.int() << 16 | 1]).view(torch.float32)
    save_file({"a": patterns, "b": torch.ones(3)}, tmp_path / NAME)
    with open_safetensors(tmp_path, NAME, LIMIT) as f:
        a, b = f.array("a"), f.array("b")
        assert np.shares_memory(a, f.data) and np.shares_memory(b, f.data) and f.array("a").ctypes.data == a.ctypes.data
    assert np.array_equal(a.view(np.uint32), bits(patterns)) and b.tolist() == [1, 1, 1]
    assert torch.from_numpy(b).add_(1).tolist() == [2, 2, 2], "and may be written"


def test_tensors_at_odd_offsets_are_aligned(tmp_path: Path) -> None:
    halves, floats = torch.arange(3).to(torch.bfloat16), torch.arange(4.0) / 3
    infos = {"h": TensorInfo("BF16", (3,), 0, 6), "f": TensorInfo("F32", (2, 2), 6, 22)}
    data = halves.view(torch.int16).numpy().tobytes() + floats.numpy().tobytes()
    (tmp_path / NAME).write_bytes(safetensors_header(infos, {}) + data)
    found = read(tmp_path)
    assert found["f"].flags.aligned and np.array_equal(found["f"].reshape(-1), floats.numpy())
    assert found["h"].tolist() == [0, 1, 2]


def test_the_library_reads_the_header_that_is_written(tmp_path: Path) -> None:
    infos = {"b": TensorInfo("F32", (1, 2), 0, 8), "a": TensorInfo("F32", (), 8, 12)}
    header = safetensors_header(infos, {"format": "pt", "y": "\u00e9", "a": ""})
    assert header == safetensors_header(infos, {"format": "pt", "y": "\u00e9", "a": ""}) and len(header) % 8 == 0
    (tmp_path / NAME).write_bytes(header + np.arange(3, dtype=np.float32).tobytes())
    tensors = load_file(tmp_path / NAME)
    assert tensors["b"].tolist() == [[0, 1]] and tensors["a"].item() == 2
    with safe_open(tmp_path / NAME, "pt") as f:
        assert f.metadata() == {"format": "pt", "y": "\u00e9", "a": ""}


def test_the_hash_is_of_the_file_that_was_read(tmp_path: Path) -> None:
    save_file({"x": torch.ones(5, 7)}, tmp_path / NAME)
    raw = (tmp_path / NAME).read_bytes()
    with open_safetensors(tmp_path, NAME, LIMIT) as f:
        (tmp_path / NAME).unlink()
        assert f.sha256() == hashlib.sha256(raw).hexdigest() and f.array("x").sum() == 35


def test_files_with_the_same_header_have_their_own_tensors(tmp_path: Path) -> None:
    for i in range(3):
        (tmp_path / str(i)).mkdir()
        save_file({"x": torch.full((4,), float(i))}, tmp_path / str(i) / NAME)
    assert [read(tmp_path / str(i))["x"].tolist() for i in range(3)] == [[i] * 4 for i in (0.0, 1.0, 2.0)]
    with open_safetensors(tmp_path / "0", NAME, LIMIT) as one, open_safetensors(tmp_path / "1", NAME, LIMIT) as two:
        assert one.header is two.header, "parsed once"
        with pytest.raises(TypeError):
            one.header["x"] = TensorInfo("F32", (4,), 0, 16)  # type: ignore[index]


def test_a_header_that_was_sound_in_one_file_is_not_in_a_shorter_one(tmp_path: Path) -> None:
    save_file({"x": torch.ones(4)}, tmp_path / NAME)
    read(tmp_path)
    raw = (tmp_path / NAME).read_bytes()
    for data, match in ((raw[:-4], "is truncated: its header describes 16"), (raw + b"1234", "after its last tensor")):
        (tmp_path / NAME).write_bytes(data)
        with pytest.raises(AdapterCorruptError, match=match):
            read(tmp_path)


def test_long_headers_are_not_kept(tmp_path: Path) -> None:
    infos = {f"{i:0100}": TensorInfo("F32", (0,), 0, 0) for i in range(3000)}
    (tmp_path / NAME).write_bytes(safetensors_header(infos, {}))
    with open_safetensors(tmp_path, NAME, LIMIT) as one, open_safetensors(tmp_path, NAME, LIMIT) as two:
        assert one.header == two.header and len(one.header) == 3000 and one.header is not two.header
        assert one.array(f"{0:0100}").shape == (0,)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_all_finite(value: float) -> None:
    array = np.zeros((3, 4), np.float32)
    assert all_finite(array)
    array[1, 2] = value
    assert not all_finite(array)


def test_headers_are_read_as_json_writes_them(tmp_path: Path) -> None:
    header = json.dumps({"x": {"data_offsets": [0, 4], "shape": [1], "dtype": "F32"}}).encode()
    (tmp_path / NAME).write_bytes(len(header).to_bytes(8, "little") + header + np.float32(7).tobytes())
    assert read(tmp_path)["x"].tolist() == [7]

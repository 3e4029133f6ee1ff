"""PEFT folders: equal to plain peft, and every way one can be wrong."""

from __future__ import annotations

import json
import math
import os
import struct
from pathlib import Path

import peft
import pytest
import torch
from adapter_folders import TINY, peft_folder, peft_tensors, read_flat
from helpers import FAMILIES, SAME_MATHS, random_flat, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from dnd_sdk.adapters.peft_config import config_text
from dnd_sdk.adapters.peft_folder import adapter_id, check_flat, write_weights
from dnd_sdk.errors import AdapterCorruptError, LayoutMismatchError
from dnd_sdk.lora.layout import LoraLayout, LoraModule
from dnd_sdk.lora.linear import attach_lora, tables_from_flat, use_lora

WEIGHTS = "adapter_model.safetensors"
A0, B0 = (s.peft_key for s in TINY.segments[:2])
IDS = torch.tensor([[5, 9, 40, 77, 130, 200]])


def delta(layout: LoraLayout, flat: torch.Tensor) -> dict[str, torch.Tensor]:
    return {name: B[0] @ A[0] for name, (A, B) in tables_from_flat(layout, flat[None]).items()}


def hooked_logits(family: str, layout: LoraLayout, flat: torch.Tensor) -> torch.Tensor:
    model = tiny_model(family)
    attach_lora(model, layout)
    with torch.no_grad(), use_lora(tables_from_flat(layout, flat[None]), 0):
        return model(IDS).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_written_folder_loads_in_plain_peft(tmp_path: Path, family: str) -> None:
    model = tiny_model(family)
    layout = LoraLayout.from_model(model, r=3, lora_alpha=7.5)
    flat = random_flat(layout)
    write_weights(tmp_path / WEIGHTS, flat.numpy(), layout)
    (tmp_path / "adapter_config.json").write_text(config_text(layout, "tiny"))
    with torch.no_grad():
        base = model(IDS).logits
        found = peft.PeftModel.from_pretrained(tiny_model(family), tmp_path)(IDS).logits
    assert not torch.allclose(found, base, atol=1e-3)
    torch.testing.assert_close(found, hooked_logits(family, layout, flat), **SAME_MATHS)


@pytest.mark.parametrize("rslora", [False, True])
def test_folder_of_plain_peft_is_read(tmp_path: Path, rslora: bool) -> None:
    config = peft.LoraConfig(
        r=2, lora_alpha=12, target_modules=["q_proj", "down_proj"], use_rslora=rslora, init_lora_weights=False
    )
    model = peft.get_peft_model(tiny_model(), config).eval()
    model.save_pretrained(tmp_path)
    layout = LoraLayout.from_model(tiny_model(), r=5, lora_alpha=3.0)  # larger rank, other alpha, more modules
    with torch.no_grad():
        expected = model(IDS).logits
    torch.testing.assert_close(hooked_logits("llama", layout, read_flat(tmp_path, layout)), expected, **SAME_MATHS)


def test_safetensors_reads_what_we_write(tmp_path: Path) -> None:
    flat = random_flat(TINY)
    write_weights(tmp_path / WEIGHTS, flat.numpy(), TINY)
    tensors = load_file(tmp_path / WEIGHTS)
    assert set(tensors) == {s.peft_key for s in TINY.segments}
    assert all(torch.equal(tensors[s.peft_key], view) for s, view in TINY.views(flat))
    with safe_open(tmp_path / WEIGHTS, "pt") as f:
        assert f.metadata() == {"format": "pt"}
    n_header = struct.unpack("<Q", (tmp_path / WEIGHTS).read_bytes()[:8])[0]
    assert n_header % 8 == 0


widths = st.tuples(st.integers(1, 7), st.integers(1, 7))


@settings(max_examples=25, deadline=None)
@given(st.lists(widths, min_size=1, max_size=4), st.integers(1, 9), st.integers(0, 99))
def test_write_then_read_is_exact(tmp_path_factory: pytest.TempPathFactory, widths: list, r: int, seed: int) -> None:
    modules = tuple(LoraModule(f"m.{i}.x", a, b) for i, (a, b) in enumerate(widths))
    layout = LoraLayout(r, 2.5, ("x",), modules)
    flat = random_flat(layout, seed=seed)
    folder = tmp_path_factory.mktemp("w")
    write_weights(folder / WEIGHTS, flat.numpy(), layout)
    (folder / "adapter_config.json").write_text(json.dumps({"r": r, "lora_alpha": 2.5, "target_modules": ["x"]}))
    assert torch.equal(read_flat(folder, layout), flat)


def test_config_is_what_peft_writes_in_a_stable_order() -> None:
    text = config_text(TINY, "org/base")
    data = json.loads(text)
    assert data["base_model_name_or_path"] == "org/base" and data["task_type"] == "CAUSAL_LM"
    assert data["inference_mode"] is True and data["target_modules"] == ["q_proj", "v_proj"]
    assert (data["r"], data["lora_alpha"], data["peft_type"]) == (4, 8, "LORA")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_float_dtypes_are_accepted(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = {k: t.to(dtype) for k, t in peft_tensors().items()}
    flat = read_flat(peft_folder(tmp_path, tensors), TINY)
    assert flat.dtype == torch.float32
    assert all(torch.equal(view, tensors[s.peft_key].float()) for s, view in TINY.views(flat))


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("r", [1, 3])
def test_smaller_rank_keeps_the_product(tmp_path: Path, r: int, rslora: bool) -> None:
    small = LoraLayout(r, 5.0, TINY.target_modules, TINY.modules)
    tensors = peft_tensors(small)
    flat = read_flat(peft_folder(tmp_path, tensors, small, use_rslora=rslora), TINY)
    scaling = 5.0 / (math.sqrt(r) if rslora else r)
    for name, product in delta(TINY, flat).items():
        A, B = (tensors[f"base_model.model.{name}.{part}.weight"] for part in ("lora_A", "lora_B"))
        torch.testing.assert_close(product, scaling * B @ A, **SAME_MATHS)


def test_modules_left_out_are_zero(tmp_path: Path) -> None:
    tensors = {k: t for k, t in peft_tensors().items() if "q_proj" in k}
    flat = read_flat(peft_folder(tmp_path, tensors, target_modules=["q_proj"]), TINY)
    split = TINY.segments[1].stop
    assert flat[:split].abs().min() > 0 and not flat[split:].any()


def test_layers_left_out_by_the_config_are_zero(tmp_path: Path) -> None:
    layout = LoraLayout(4, 8.0, ("q",), (LoraModule("m.h.0.q", 6, 10), LoraModule("m.h.1.q", 6, 10)))
    tensors = {k: t for k, t in peft_tensors(layout).items() if "m.h.1" in k}
    folder = peft_folder(tmp_path, tensors, layout, layers_to_transform=[1])
    assert not read_flat(folder, layout)[: layout.segments[1].stop].any()
    folder = peft_folder(tmp_path, tensors, layout)
    with pytest.raises(AdapterCorruptError, match=r"2 tensors are missing: .*m\.h\.0\.q\.lora_A"):
        read_flat(folder, layout)


def test_links_inside_the_folder_are_followed(tmp_path: Path) -> None:
    folder = peft_folder(tmp_path)
    (folder / WEIGHTS).rename(folder / "blob")
    (folder / WEIGHTS).symlink_to("blob")
    assert read_flat(folder, TINY).any()


def changed(**tensors: torch.Tensor | None) -> dict[str, torch.Tensor]:
    named = {{"A0": A0, "B0": B0}.get(k, k.replace("__", ".")): t for k, t in tensors.items()}
    return {k: t for k, t in (peft_tensors() | named).items() if t is not None}


def with_value(value: float) -> dict[str, torch.Tensor]:
    tensors = peft_tensors()
    tensors[B0][7, 2] = value
    return tensors


@pytest.mark.parametrize(
    ("tensors", "error", "message"),
    [
        (changed(A0=None), AdapterCorruptError, "1 tensors are missing: .*q_proj.lora_A.weight"),
        (changed(A0=None, B0=None), AdapterCorruptError, "2 tensors are missing: .*q_proj.lora_A.*q_proj.lora_B"),
        ({"x": torch.zeros(1)}, AdapterCorruptError, "not LoRA matrices: x\n"),
        ({}, AdapterCorruptError, "holds no tensors"),
        (changed(extra=torch.zeros(2)), AdapterCorruptError, "not LoRA matrices: extra"),
        (
            changed(base_model__model__m__9__q_proj__lora_A__weight=torch.zeros(4, 6)),
            LayoutMismatchError,
            r"modules this base's layout does not have: m\.9\.q",
        ),
        (
            changed(A0=torch.zeros(4, 7)),
            LayoutMismatchError,
            r"q_proj.lora_A.weight has shape \(4, 7\), expected \(4, 6\)",
        ),
        (changed(B0=torch.zeros(10, 3)), LayoutMismatchError, r"lora_B.weight has shape \(10, 3\), expected \(10, 4\)"),
        (changed(A0=torch.zeros(24)), LayoutMismatchError, r"has shape \(24,\), expected \(4, 6\)"),
        (
            changed(A0=torch.zeros(4, 6, dtype=torch.int32)),
            AdapterCorruptError,
            "lora_A.weight is I32, expected one of",
        ),
        (changed(A0=torch.zeros(4, 6, dtype=torch.float64)), AdapterCorruptError, "is F64, expected one of"),
        (with_value(math.nan), AdapterCorruptError, "tensor .*q_proj.lora_B.weight holds NaN or inf"),
        (with_value(math.inf), AdapterCorruptError, "tensor .*q_proj.lora_B.weight holds NaN or inf"),
        (with_value(-math.inf), AdapterCorruptError, "tensor .*q_proj.lora_B.weight holds NaN or inf"),
    ],
)
def test_wrong_tensors(tmp_path: Path, tensors: dict, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        read_flat(peft_folder(tmp_path, tensors), TINY)


def test_values_that_overflow_when_rescaled(tmp_path: Path) -> None:
    with pytest.raises(AdapterCorruptError, match=r"q_proj\.lora_B\.weight holds NaN or inf"):
        read_flat(peft_folder(tmp_path, with_value(1e38), lora_alpha=1000), TINY)


@pytest.mark.parametrize(
    ("config", "error", "message"),
    [
        ({"use_dora": True}, LayoutMismatchError, "asks for use_dora=True; only plain LoRA"),
        ({"bias": "all"}, LayoutMismatchError, "bias=all"),
        ({"modules_to_save": ["lm_head"]}, LayoutMismatchError, "modules_to_save=.*lm_head"),
        ({"peft_type": "IA3"}, LayoutMismatchError, "peft_type=IA3"),
        ({"init_lora_weights": "pissa"}, LayoutMismatchError, "init_lora_weights=pissa"),
        ({"r": 5}, LayoutMismatchError, "rank 5 is above this base's slots of rank 4|has shape"),
        ({"r": 65}, LayoutMismatchError, "rank r=65 is above 64"),
        ({"r": 10**300}, LayoutMismatchError, "is above 64"),
        ({"r": 0}, AdapterCorruptError, "r is '0'"),
        ({"r": True}, AdapterCorruptError, "r is 'True'"),
        ({"r": None}, AdapterCorruptError, "r is 'None'"),
        ({"lora_alpha": "16"}, AdapterCorruptError, "lora_alpha is '16'"),
        ({"lora_alpha": math.inf}, AdapterCorruptError, "lora_alpha is 'inf'"),
        ({"lora_alpha": 10**400}, AdapterCorruptError, "lora_alpha is '1000"),
        ({"target_modules": [3]}, AdapterCorruptError, "target_modules is not a list of names"),
    ],
)
def test_configs_that_ask_for_more_than_plain_lora(tmp_path: Path, config: dict, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        read_flat(peft_folder(tmp_path, **config), TINY)


def test_rank_above_the_layout(tmp_path: Path) -> None:
    large = LoraLayout(8, 8.0, TINY.target_modules, TINY.modules)
    with pytest.raises(LayoutMismatchError, match="rank 8 is above this base's slots of rank 4"):
        read_flat(peft_folder(tmp_path, layout=large), TINY)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff", b"[" * 100_000, b" " * (2**20 + 1)])
def test_damaged_config(tmp_path: Path, content: bytes) -> None:
    folder = peft_folder(tmp_path)
    (folder / "adapter_config.json").write_bytes(content)
    with pytest.raises(AdapterCorruptError, match=r"adapter_config\.json"):
        read_flat(folder, TINY)


@pytest.mark.parametrize("name", ["adapter_config.json", WEIGHTS])
def test_missing_file(tmp_path: Path, name: str) -> None:
    (peft_folder(tmp_path) / name).unlink()
    with pytest.raises(AdapterCorruptError, match=f"{name} is missing"):
        read_flat(tmp_path, TINY)


def test_pickles_are_never_opened(tmp_path: Path) -> None:
    folder = peft_folder(tmp_path)
    (folder / WEIGHTS).rename(folder / "adapter_model.bin")
    with pytest.raises(AdapterCorruptError, match=r"only as adapter_model\.bin, a pickle, which can run code"):
        read_flat(folder, TINY)


@pytest.mark.parametrize("keep", [0, 5, 100, -1])
def test_truncated_weights(tmp_path: Path, keep: int) -> None:
    path = peft_folder(tmp_path) / WEIGHTS
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(AdapterCorruptError, match="truncated"):
        read_flat(tmp_path, TINY)


def header_file(path: Path, header: object, data: bytes = b"") -> None:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + data)


def entry(dtype: str = "F32", shape: tuple = (4, 6), offsets: tuple = (0, 96)) -> dict:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


@pytest.mark.parametrize(
    ("header", "data", "message"),
    [
        (b"no json", b"", "header is not safetensors"),
        (b"[]", b"", "header is not safetensors"),
        (b"[" * 100_000, b"", "header is not safetensors"),
        ({A0: 3}, b"", "header is not safetensors"),
        ({A0: {"dtype": "F32"}}, b"", "header is not safetensors"),
        ({A0: entry(shape=(-4, -6))}, bytes(96), "-4 is not a size"),
        ({A0: entry(shape=(4.0, 6))}, bytes(96), "4.0 is not a size"),
        ({A0: entry(offsets=(0, 96, 3))}, bytes(96), "header is not safetensors"),
        ({A0: entry(dtype="F1")}, bytes(96), "unknown dtype 'F1'"),
        ({A0: entry(shape=(4, 7))}, bytes(96), "do not match its shape"),
        ({A0: entry(offsets=(8, 104))}, bytes(104), "do not match its shape"),
        ({A0: entry(), B0: entry()}, bytes(96), "do not match its shape"),
        ({A0: entry()}, bytes(100), "has bytes after its last tensor"),
        ({A0: entry(shape=(2**40,), offsets=(0, 2**42))}, bytes(96), "truncated"),
    ],
)
def test_hostile_headers(tmp_path: Path, header: object, data: bytes, message: str) -> None:
    header_file(peft_folder(tmp_path) / WEIGHTS, header, data)
    with pytest.raises(AdapterCorruptError, match=message):
        read_flat(tmp_path, TINY)


def test_header_and_file_sizes_are_bounded_before_reading(tmp_path: Path) -> None:
    path = peft_folder(tmp_path) / WEIGHTS
    with open(path, "wb") as f:
        f.write(struct.pack("<Q", 8 * 2**20 + 1))
        f.truncate(8 * 2**20 + 1000)
    with pytest.raises(AdapterCorruptError, match="header of 8388609 bytes, at most 8388608"):
        read_flat(tmp_path, TINY)
    with open(path, "wb") as f:
        f.truncate(2**40)
    with pytest.raises(AdapterCorruptError, match=f"has {2**40} bytes, at most"):
        read_flat(tmp_path, TINY)


def test_claimed_sizes_are_never_allocated(tmp_path: Path) -> None:
    # a header that is consistent with a large sparse file, but not with the layout
    rows = 2**15
    with open(peft_folder(tmp_path) / WEIGHTS, "wb") as f:
        header = json.dumps({A0: entry(shape=(rows, 6), offsets=(0, rows * 24))}).encode()
        f.write(struct.pack("<Q", len(header)) + header)
        f.truncate(8 + len(header) + rows * 24)
    with pytest.raises(LayoutMismatchError, match=r"has shape \(32768, 6\), expected \(4, 6\)"):
        read_flat(tmp_path, TINY)


@pytest.mark.parametrize("name", ["adapter_config.json", WEIGHTS])
def test_links_that_leave_the_folder(tmp_path: Path, name: str) -> None:
    folder = peft_folder(tmp_path / "in")
    (folder / name).rename(tmp_path / "outside")
    (folder / name).symlink_to(tmp_path / "outside")
    with pytest.raises(AdapterCorruptError, match="is a link that leaves its folder"):
        read_flat(folder, TINY)


def test_loops_pipes_and_folders_are_refused(tmp_path: Path) -> None:
    path = peft_folder(tmp_path) / WEIGHTS
    path.unlink()
    path.symlink_to(path)
    with pytest.raises(AdapterCorruptError, match="loop of links"):
        read_flat(tmp_path, TINY)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(AdapterCorruptError, match="not a plain file"):
        read_flat(tmp_path, TINY)
    path.unlink()
    path.mkdir()
    with pytest.raises(AdapterCorruptError, match="not a plain file"):
        read_flat(tmp_path, TINY)


def test_misaligned_data_is_read(tmp_path: Path) -> None:
    # the format only recommends alignment: a header of odd length is legal
    path = peft_folder(tmp_path) / WEIGHTS
    expected = read_flat(tmp_path, TINY)
    raw = path.read_bytes()
    n = struct.unpack("<Q", raw[:8])[0]
    path.write_bytes(struct.pack("<Q", n + 1) + raw[8 : 8 + n] + b" " + raw[8 + n :])
    assert torch.equal(read_flat(tmp_path, TINY), expected)


@pytest.mark.parametrize(
    ("flat", "error", "message"),
    [
        (torch.zeros(3), LayoutMismatchError, "has 3 values"),
        (torch.zeros(1, TINY.n_parameters), LayoutMismatchError, "one flat vector"),
        (torch.zeros(TINY.n_parameters, dtype=torch.int64), AdapterCorruptError, "must be floating point"),
        (torch.full((TINY.n_parameters,), math.nan), AdapterCorruptError, "q_proj.lora_A.weight holds NaN"),
    ],
)
def test_flat_vectors_are_checked(flat: torch.Tensor, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        check_flat(flat, TINY)


@pytest.mark.parametrize("at", [0, 1, 50, TINY.n_parameters - 1])
def test_a_single_bad_value_anywhere_is_found(at: int) -> None:
    for value in (math.nan, math.inf, -math.inf):
        flat = random_flat(TINY)
        flat[at] = value
        with pytest.raises(AdapterCorruptError, match="holds NaN or inf"):
            check_flat(flat, TINY)


def test_id_depends_on_every_value_and_on_the_layout() -> None:
    flat = random_flat(TINY).numpy()
    other = flat.copy()
    other[-1] += 1e-6
    alpha = LoraLayout(TINY.r, 9.0, TINY.target_modules, TINY.modules)
    assert len({adapter_id(flat, TINY), adapter_id(other, TINY), adapter_id(flat, alpha)}) == 3
    assert adapter_id(flat, TINY) == adapter_id(flat.copy(), TINY)


def test_weights_saved_by_someone_else_hash_the_same(tmp_path: Path) -> None:
    flat = random_flat(TINY)
    save_file({s.peft_key: v.clone() for s, v in TINY.views(flat)}, peft_folder(tmp_path) / WEIGHTS)
    assert adapter_id(read_flat(tmp_path).numpy(), TINY) == adapter_id(flat.numpy(), TINY)

"""Vectors are numpy arrays inside the store: what is on disk and what comes out is bit for bit what torch made."""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from adapter_folders import BASE, TINY, notes_of, peft_folder, peft_tensors, read_flat, store_one
from helpers import random_flat
from safetensors.torch import save

from dnd_sdk.adapters import AdapterStore
from dnd_sdk.adapters.adapter import read_adapter
from dnd_sdk.adapters.exemplars import EXEMPLARS, merged_exemplars
from dnd_sdk.errors import ConfigError
from dnd_sdk.lora.layout import LoraLayout, LoraModule

WEIGHTS = "adapter_model.safetensors"
FLAT = torch.arange(TINY.n_parameters) / 128 - 0.5
STORED = {
    "id": "c6d379259e02f2bd7ebf67e2deb28a26b7575c81e1c5b792e83cf39f1c04ffbc",
    WEIGHTS: "6e744e3a0b2850d428fe315d49d10c3fab79e2c82c43fac3e813a3a6d9adb497",
}
"""Of `FLAT`, as versions that stored it through torch had it."""
ENCODER = {"encoder": "enc", "encoder_fingerprint": "f"}


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_ids_and_files_are_those_of_earlier_versions(store: AdapterStore) -> None:
    kept = torch.eye(3, 5)
    adapter = store_one(store, FLAT, name="one", exemplars=kept, **ENCODER)
    assert adapter.id == STORED["id"] and sha256(adapter.path / WEIGHTS) == STORED[WEIGHTS]
    digest = hashlib.sha256(TINY.digest.encode())
    digest.update(FLAT.numpy().data)
    assert adapter.id == digest.hexdigest()
    metadata = {"format": "pt", "encoder": "enc", "encoder_fingerprint": "f"}
    ours, theirs = (adapter.path / EXEMPLARS).read_bytes(), save({"exemplars": kept}, metadata)
    n = int.from_bytes(theirs[:8], "little")  # the library orders metadata by chance
    assert ours[:8] == theirs[:8] and ours[8 + n :] == theirs[8 + n :]
    assert json.loads(ours[8 : 8 + n]) == json.loads(theirs[8 : 8 + n])


@pytest.mark.parametrize(
    "made",
    [
        FLAT.double(),
        FLAT.bfloat16().float(),
        torch.stack([FLAT, FLAT], dim=1)[:, 0],
        torch.nn.Parameter(FLAT.clone()),
        FLAT.half(),
        FLAT.to(torch.bfloat16),
    ],
    ids=["double", "rounded", "strided", "parameter", "half", "bfloat16"],
)
def test_any_float_tensor_is_stored_as_its_fp32(store: AdapterStore, made: torch.Tensor) -> None:
    adapter = store_one(store, made, exemplars=torch.eye(4, 6, dtype=torch.float64)[:, ::2])
    loaded = store.load(adapter, TINY)
    assert torch.equal(loaded, made.detach().float()) and loaded.dtype == torch.float32 and loaded.is_contiguous()
    assert torch.equal(store.exemplars(adapter), torch.eye(4, 6)[:, ::2]) and store.verify() == []


def test_what_is_loaded_belongs_to_who_asked(store: AdapterStore) -> None:
    adapter = store_one(store, FLAT, exemplars=torch.eye(3, 5))
    store.load(adapter, TINY).zero_()
    exemplars = store.exemplars(adapter)
    assert exemplars is not None
    exemplars.zero_()
    assert torch.equal(store.load(adapter, TINY), FLAT) and torch.equal(store.exemplars(adapter), torch.eye(3, 5))


def old_flat(tensors: dict[str, torch.Tensor], layout: LoraLayout, r: int, scaling: float) -> torch.Tensor:
    """As torch filled the vector before."""
    flat = torch.zeros(layout.n_parameters)
    for segment, view in layout.views(flat):
        tensor = tensors[segment.peft_key]
        if segment.part == "lora_A":
            view[:r].copy_(tensor)
        else:
            view[:, :r].copy_(tensor.float() * (scaling / layout.scaling))
    return flat


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("alpha", [8, 5.3, 1e-3, 1e5])
@pytest.mark.parametrize("r", [1, 3, 4])
def test_rescaled_weights_are_those_of_torch(tmp_path: Path, dtype: torch.dtype, alpha: float, r: int) -> None:
    small = LoraLayout(r, 1.0, TINY.target_modules, TINY.modules)
    tensors = {k: (t * 10 ** torch.randn(t.shape)).to(dtype) for k, t in peft_tensors(small).items()}
    found = read_flat(peft_folder(tmp_path, tensors, small, lora_alpha=alpha, use_rslora=r == 3))
    expected = old_flat(tensors, TINY, r, alpha / (math.sqrt(r) if r == 3 else r))
    assert torch.equal(found.view(torch.int32), expected.view(torch.int32))


def test_what_the_store_wrote_is_read_as_one_piece(store: AdapterStore, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = store_one(store, FLAT)
    monkeypatch.setattr("dnd_sdk.files.tensors.SafetensorsReader.array", None)
    assert torch.equal(store.load(adapter, TINY), FLAT)


def test_the_same_bytes_under_another_config_are_not_the_vector(store: AdapterStore) -> None:
    folder = store_one(store, FLAT, name="one").path
    config = folder / "adapter_config.json"
    said = json.loads(config.read_text())
    for change in ({"lora_alpha": 4}, {"alpha_pattern": {"v_proj": 4}}, {"target_modules": ["q_proj"]}):
        config.write_text(json.dumps(said | change))
        assert not torch.equal(read_flat(folder), FLAT), change
        assert "weights' hash is" in store.verify()[0].what
    config.write_text(json.dumps(said))
    assert store.verify() == [] and torch.equal(read_flat(folder), FLAT)


def test_verify_reads_each_file_once(store: AdapterStore, monkeypatch: pytest.MonkeyPatch) -> None:
    for i in range(2):
        store_one(store, random_flat(TINY, seed=i), name=f"a{i}", exemplars=torch.eye(3, 5))
    opened = opened_files(monkeypatch)
    assert store.verify() == []
    assert set(opened.values()) == {1} and len(opened) == 2 * 4


def opened_files(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Counts how often each file is opened from now on."""
    opened: Counter[str] = Counter()

    def counting(path: Path, mode: str) -> Any:
        opened[str(path)] += 1
        return open(path, mode)

    monkeypatch.setattr("dnd_sdk.files.untrusted.open", counting, raising=False)
    return opened


def test_adapters_of_one_layout_share_it(store: AdapterStore) -> None:
    one, two = (store_one(store, random_flat(TINY, seed=i)) for i in range(2))
    assert read_adapter(one.path)[1] is read_adapter(two.path)[1] == TINY


def test_a_layout_larger_than_its_file_takes_no_memory(store: AdapterStore) -> None:
    folder = store_one(store, FLAT, name="one").path
    manifest = json.loads((folder / "dnd.json").read_text())
    huge = LoraLayout(4, 8.0, ("q_proj",), tuple(LoraModule(f"m.{i}.q_proj", 2**40, 2**40) for i in range(3)))
    changed = manifest | {"layout": huge.to_dict(), "layout_digest": huge.digest}
    (folder / "dnd.json").write_text(json.dumps(changed))
    assert "its layout needs" in store.verify()[0].what


def test_merging_keeps_what_is_new(store: AdapterStore) -> None:
    rng = np.random.default_rng(0)
    old, new = (rng.normal(size=(n, 7)).astype(np.float32) for n in (60, 9))
    near = old[:5] + np.float32(3e-5) / np.sqrt(np.float32(7))
    both = merged_exemplars(old, np.concatenate([near, new]))
    assert both is not None and len(both) == 64 and np.array_equal(both[-9:], new)
    assert np.array_equal(both[:55], old[np.arange(55) * 60 // 55]) and both.dtype == np.float32
    assert merged_exemplars(old, near) is None and merged_exemplars(None, new) is new


# ---- notes


def test_an_import_tells_its_notes_from_one_reading(
    store: AdapterStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    more = {f"base_model.model.vision.fc.lora_{p}.weight": torch.ones(4, 4) for p in "AB"}
    folder = peft_folder(tmp_path / "theirs", peft_tensors() | more, use_magic=1)
    notes: list[str] = []
    with monkeypatch.context() as patch:
        opened = opened_files(patch)
        store.import_folder(folder, TINY, base_fingerprint=BASE, base_name="mine", note=notes.append)
    assert {Path(p).name: n for p, n in opened.items() if p.startswith(str(folder))} == {
        "adapter_config.json": 1,
        WEIGHTS: 1,
    }
    assert len(notes) == 3 and "names the base" in notes[0] and "vision.fc" in notes[1] and "use_magic" in notes[2]
    assert tuple(notes) == notes_of(folder, base_name="mine") and not caplog.records
    store.import_folder(folder, TINY, base_fingerprint=BASE, base_name="mine")
    assert [r.getMessage() for r in caplog.records if r.levelname == "WARNING"] == [f"imported: {n}" for n in notes]


def test_notes_come_after_the_adapter(store: AdapterStore, tmp_path: Path) -> None:
    folder = peft_folder(tmp_path / "theirs", use_magic=1)
    seen: list[list[str]] = []
    store.import_folder(
        folder, TINY, base_fingerprint=BASE, name="one", note=lambda _: seen.append([a.name for a in store.ls()])
    )
    assert seen == [["one"]]
    with pytest.raises(ConfigError, match="note must be a function"):
        store.import_folder(folder, TINY, base_fingerprint=BASE, name="two", note=5)  # type: ignore[arg-type]
    assert [a.name for a in store.ls()] == ["one"]

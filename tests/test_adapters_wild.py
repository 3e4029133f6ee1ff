"""Imports of the wild: what a folder's config says and what its file holds differ; peft is the judge."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from adapter_folders import BASE, TINY, notes_of, peft_folder, peft_tensors, read_flat
from cli_runner import dnd_json
from helpers import SAME_MATHS, tiny_model
from safetensors.torch import load_file, save_file
from tiny_world import World

from dnd_sdk.adapters import AdapterStore
from dnd_sdk.adapters.peft_config import read_config
from dnd_sdk.config import Home
from dnd_sdk.errors import AdapterCorruptError, DndError, LayoutMismatchError
from dnd_sdk.lora.layout import ALL_LINEAR, LoraLayout
from dnd_sdk.lora.linear import attach_lora, tables_from_flat, use_lora

IDS = torch.tensor([[5, 9, 40, 77, 130, 200]])
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
A0 = TINY.segments[0].peft_key
ENDLESS = "(" * 9 + "." + "{1,9})" * 9 + "[!?]"
"""Takes `re` minutes on ten letters."""


def everything(folder: Path, **config: Any) -> Path:
    """A folder of real peft that holds a LoRA on every Linear; its config is changed afterwards."""
    fields = {"r": 3, "lora_alpha": 12, "target_modules": list(ALL_LINEAR), "init_lora_weights": False}
    model = peft.get_peft_model(tiny_model(), peft.LoraConfig(**(fields | config)))
    model.save_pretrained(folder)
    return folder


def say(folder: Path, **config: Any) -> Path:
    path = folder / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    return folder


def peft_logits(folder: Path) -> torch.Tensor:
    with torch.no_grad():
        return peft.PeftModel.from_pretrained(tiny_model(), folder).eval()(IDS).logits


def our_logits(folder: Path, r: int = 4) -> torch.Tensor:
    model = tiny_model()
    layout = LoraLayout.from_model(model, r=r, lora_alpha=5.0)
    attach_lora(model, layout)
    with torch.no_grad(), use_lora(tables_from_flat(layout, read_flat(folder, layout)[None]), 0):
        return model(IDS).logits


NARROWED = [
    {"target_modules": ["q_proj"]},
    {"target_modules": ["self_attn.q_proj", "model.layers.1.mlp.up_proj", "proj"]},
    {"target_modules": r".*\.1\.self_attn\.(q|v)_proj"},
    {"target_modules": "q_proj|.*down_proj"},
    {"layers_to_transform": [1]},
    {"layers_to_transform": 0},
    {"layers_to_transform": [0], "target_modules": ["model.layers.1.self_attn.q_proj", "v_proj"]},
    {"layers_to_transform": [1], "layers_pattern": "layers"},
    {"layers_to_transform": [1], "layers_pattern": ["blocks", "layer."]},
    {"layers_to_transform": [], "exclude_modules": ["q_proj", "0.mlp.up_proj"]},
    {"exclude_modules": r".*self_attn.*"},
    {"exclude_modules": r"self_attn"},
    {"target_modules": "All-Linear", "exclude_modules": ["o_proj"]},
]


@pytest.mark.parametrize("config", NARROWED, ids=str)
def test_only_what_the_config_targets_is_taken_as_peft_does(tmp_path: Path, config: dict[str, Any]) -> None:
    folder = everything(tmp_path)
    everything_on = our_logits(folder)
    torch.testing.assert_close(everything_on, peft_logits(folder), **SAME_MATHS)
    say(folder, **config)
    expected = peft_logits(folder)
    torch.testing.assert_close(our_logits(folder), expected, **SAME_MATHS)
    dropped = [n for n in notes_of(folder, LoraLayout.from_model(tiny_model(), r=4)) if "does not target" in n]
    assert bool(dropped) == (not torch.allclose(everything_on, expected, atol=1e-4))


PATTERNS = [
    {"rank_pattern": {"q_proj": 3}},
    {"rank_pattern": {"q_proj": 1, "model.layers.1.mlp.down_proj": 4}},
    {"alpha_pattern": {"q_proj": 1, ".*v_proj": 7.5}},
    {"rank_pattern": {r"layers.0.*": 2, "up_proj": 4}, "alpha_pattern": {"up_proj": 3}, "use_rslora": True},
    {"rank_pattern": {"proj": 1, "_proj": 2, "self_attn.[qk]_proj": 2}, "alpha_pattern": {"nothing": 9}},
]


@pytest.mark.parametrize("config", PATTERNS, ids=str)
def test_ranks_and_alphas_by_module_are_those_of_peft(tmp_path: Path, config: dict[str, Any]) -> None:
    folder = everything(tmp_path, **config)
    torch.testing.assert_close(our_logits(folder), peft_logits(folder), **SAME_MATHS)


def test_an_import_by_patterns_is_stored_and_answers_like_peft(world: World, tmp_path: Path) -> None:
    folder = everything(tmp_path, rank_pattern={"q_proj": 2}, alpha_pattern={"v_proj": 3})
    dnd = world.session()
    adapter = dnd.import_adapter(say(folder, exclude_modules=["o_proj"]))
    dnd.make_resident(adapter)
    with dnd.engine.running([adapter.id]):
        found = dnd.base.model(input_ids=IDS).logits.clone()
    torch.testing.assert_close(found, peft_logits(folder), **SAME_MATHS)
    assert AdapterStore(world.home).verify() == []


@pytest.mark.parametrize(
    ("config", "match"),
    [
        ({"target_modules": r"(.*)("}, "target_modules is no pattern"),
        ({"target_modules": ENDLESS}, "target_modules takes too long to match"),
        ({"exclude_modules": ENDLESS}, "exclude_modules takes too long to match"),
        ({"target_modules": "q_proj" * 1000}, "target_modules is a pattern of 6000 characters"),
        ({"target_modules": "(q_proj){e<=2}"}, "target_modules is no pattern"),
        ({"target_modules": "[[:alpha:]]*"}, "target_modules is no pattern"),
        ({"target_modules": r".*q_proj", "layers_to_transform": [0]}, "layers_to_transform goes with a list"),
        ({"layers_pattern": "layers"}, "layers_pattern without layers_to_transform"),
        ({"layers_to_transform": ["0"]}, "layers_to_transform is"),
        ({"layers_to_transform": {"0": 1}}, "layers_to_transform is"),
        ({"layers_to_transform": [0], "layers_pattern": [3]}, "layers_pattern is"),
        ({"exclude_modules": 3}, "exclude_modules is"),
        ({"target_modules": []}, "none of the tensors"),
        ({"target_modules": ["gate"]}, "none of the tensors"),
        ({"rank_pattern": ["q_proj"]}, "rank_pattern is"),
        ({"rank_pattern": {"q_proj": "2"}}, "rank_pattern is"),
        ({"rank_pattern": {"q_proj": 0}}, "rank_pattern is"),
        ({"rank_pattern": {"q_proj(": 1}}, "rank_pattern is no pattern"),
        ({"rank_pattern": {f"m{i}": 1 for i in range(3000)}}, "rank_pattern holds 3000 patterns"),
        ({"alpha_pattern": {"q_proj": math.nan}}, "alpha_pattern is"),
        ({"alpha_pattern": {"q_proj": None}}, "alpha_pattern is"),
    ],
    ids=lambda v: str(v)[:50],
)
def test_what_peft_could_not_match_is_refused(tmp_path: Path, config: dict[str, Any], match: str) -> None:
    with pytest.raises(DndError, match=match) as caught:
        read_flat(peft_folder(tmp_path, **config), TINY)
    assert caught.value.fix


@pytest.mark.parametrize("rename", ["", "base_model.model."])
@pytest.mark.parametrize("live", ["", ".default"])
def test_names_without_the_prefix_are_lora_all_the_same(tmp_path: Path, rename: str, live: str) -> None:
    tensors = peft_tensors()
    folder = peft_folder(
        tmp_path,
        {
            rename + k.removeprefix("base_model.model.").replace(".weight", f"{live}.weight"): t
            for k, t in tensors.items()
        },
    )
    flat = read_flat(folder, TINY)
    assert all(torch.equal(view, tensors[s.peft_key]) for s, view in TINY.views(flat))


def test_a_matrix_with_and_without_the_prefix_is_there_twice(tmp_path: Path) -> None:
    folder = peft_folder(tmp_path, peft_tensors() | {A0.removeprefix("base_model.model."): torch.ones(4, 6)})
    with pytest.raises(AdapterCorruptError, match="holds a matrix twice"):
        read_flat(folder, TINY)


def test_tensors_of_unknown_modules_that_no_target_names_are_dropped(tmp_path: Path) -> None:
    more = {f"base_model.model.vision.fc.lora_{p}.weight": torch.ones(4, 4) for p in "AB"}
    folder = peft_folder(tmp_path, peft_tensors() | more)
    assert torch.equal(read_flat(folder, TINY), read_flat(peft_folder(tmp_path / "plain"), TINY))
    [note] = [n for n in notes_of(folder) if "does not target" in n]
    assert "vision.fc" in note


def test_config_keys_nobody_knows_are_named_and_cut(tmp_path: Path) -> None:
    folder = peft_folder(tmp_path, use_magic=True, **{"k" * 5000: 1}, lora_dropout=0.1, corda_config=None)
    [note] = [n for n in notes_of(folder) if "not understood" in n]
    assert "use_magic" in note and "lora_dropout" not in note and len(note) < 500


def test_the_command_passes_the_notes_on(world: World, tmp_path: Path) -> None:
    folder = say(everything(tmp_path), target_modules=["q_proj"], use_magic=1)
    notes = dnd_json("adapters", "import", folder, *world.options)["notes"]
    assert any("does not target" in n for n in notes) and any("use_magic" in n for n in notes)


@pytest.mark.parametrize("name", ["org/\ud800", "x" * 100_000, "\u00e9" * 90_000])
def test_base_names_that_cannot_be_kept_are_left_out_with_a_note(tmp_path: Path, home: Home, name: str) -> None:
    folder = say(peft_folder(tmp_path / "in"), base_model_name_or_path=name)
    store = AdapterStore(home)
    adapter = store.import_folder(folder, TINY, base_fingerprint=BASE, base_name="mine")
    assert json.loads((adapter.path / CONFIG).read_text())["base_model_name_or_path"] == "mine"
    assert store.verify() == [] and any("base_model_name_or_path" in n for n in notes_of(folder, base_name="mine"))


@pytest.mark.parametrize(
    ("r", "fix"), [("8", r'"r": 8'), (" 8 ", r'"r": 8'), ("eight", "rank"), (8.0, '"r": 8'), (None, "rank")]
)
def test_an_r_that_is_no_number_gets_a_fix_that_helps(tmp_path: Path, r: object, fix: str) -> None:
    with pytest.raises(AdapterCorruptError, match="r is ") as caught:
        read_config(say(peft_folder(tmp_path), r=r))
    assert caught.value.fix and fix in caught.value.fix and CONFIG in caught.value.fix


def test_ranks_above_the_slots_are_named_with_a_way_to_more(tmp_path: Path) -> None:
    large = LoraLayout(8, 8.0, TINY.target_modules, TINY.modules)
    with pytest.raises(LayoutMismatchError, match=r"rank 8 is above this base's slots of rank 4") as caught:
        read_flat(peft_folder(tmp_path, peft_tensors(large), large), TINY)
    assert "r=8" in str(caught.value.fix)
    folder = peft_folder(tmp_path / "by-pattern", rank_pattern={"v_proj": 7})
    with pytest.raises(LayoutMismatchError, match=r"rank 7 .*v_proj.* is above this base's slots of rank 4"):
        read_flat(folder, TINY)


def huge(folder: Path, factor: float, **config: Any) -> Path:
    everything(folder, **config)
    save_file({k: t * factor for k, t in load_file(folder / WEIGHTS).items()}, folder / WEIGHTS)
    return folder


@pytest.mark.parametrize("factor", [1e30, 1e9, 1e5])
def test_huge_weights_are_refused_at_import(world: World, tmp_path: Path, factor: float) -> None:
    with pytest.raises(AdapterCorruptError, match=r"tensor .*lora_[AB].weight .* too large") as caught:
        world.session().import_adapter(huge(tmp_path, factor))
    assert caught.value.fix and not list(world.home.adapters.glob("*"))


def test_an_alpha_that_makes_them_huge_is_refused(world: World, tmp_path: Path) -> None:
    with pytest.raises(AdapterCorruptError, match="too large"):
        world.session().import_adapter(everything(tmp_path, lora_alpha=1e12))


def test_whatever_passes_gives_finite_logits(world: World, tmp_path: Path) -> None:
    dnd, accepted = world.session(), 0
    for i, factor in enumerate((1.0, 30.0, 300.0, 1000.0, 3000.0, 10_000.0)):
        try:
            adapter = dnd.import_adapter(huge(tmp_path / str(i), factor))
        except AdapterCorruptError:
            continue
        accepted += 1
        dnd.make_resident(adapter)
        with dnd.engine.running([adapter.id]):
            assert torch.isfinite(dnd.base.model(input_ids=IDS).logits).all(), factor
    assert accepted >= 2


@pytest.mark.parametrize("shape", [[1] * 100_000, [9] * 400_000, [10**4000] * 500, [2**63]])
def test_shapes_of_endless_numbers_are_refused_at_once(tmp_path: Path, shape: list[int]) -> None:
    header = json.dumps({A0: {"dtype": "F32", "shape": shape, "data_offsets": [0, 4]}}).encode()
    (peft_folder(tmp_path) / WEIGHTS).write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    with pytest.raises(AdapterCorruptError, match="shape") as caught:
        read_flat(tmp_path, TINY)
    assert len(str(caught.value).encode()) < 2000

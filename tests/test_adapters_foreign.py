"""Folders of XTuner, LLaMA-Factory, trl and Axolotl, written by real peft, import exactly; hostile ones not at all."""

from __future__ import annotations

import os
import pickle
import zipfile
from collections import OrderedDict
from contextlib import suppress
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from adapter_folders import BASE, TINY, listed, notes_of, peft_folder, peft_tensors, read_flat
from cli_runner import dnd as run_dnd
from cli_runner import dnd_json
from helpers import SAME_MATHS, tiny_model
from safetensors.torch import load_file
from tiny_world import World, prompts_of

from dnd_sdk.adapters import AdapterStore
from dnd_sdk.adapters.foreign import find_adapter
from dnd_sdk.config import Home
from dnd_sdk.errors import AdapterCorruptError, ConfigError, DndError, InputError, LayoutMismatchError
from dnd_sdk.lora import LoraLayout

IDS = torch.tensor([[5, 9, 40, 77, 130, 200]])
A0 = TINY.segments[0].peft_key
LEFTOVERS = ("README.md", "optimizer.pt", "scheduler.pt", "tokenizer.json", "checkpoint-20/optimizer.pt")

LAYOUTS = {  # origin: (folder of the adapter, safetensors?, what the tool leaves beside it)
    "xtuner": ("", False, ("xtuner_config.py",)),
    "xtuner-llava": ("llm_adapter", False, ("xtuner_config.py", "projector/model.bin")),
    "llama-factory": ("", True, (*LEFTOVERS, "training_args.bin", "trainer_log.jsonl", "all_results.json")),
    "axolotl": ("", True, (*LEFTOVERS, "training_args.bin", "config.json")),
    "trl": ("", True, (*LEFTOVERS, "training_args.bin")),
    "peft": ("", True, ("README.md",)),
}


def poison(path: Path) -> None:
    """Something that cannot be opened as a file, so that opening it fails the test."""
    path.mkdir(parents=True)


def peft_model(**config: Any) -> peft.PeftModel:
    fields = {"r": 2, "lora_alpha": 12, "target_modules": ["q_proj", "down_proj"], "init_lora_weights": False}
    return peft.get_peft_model(tiny_model(), peft.LoraConfig(**(fields | config))).eval()


def write_layout(root: Path, layout: str, model: peft.PeftModel) -> Path:
    sub, safe, beside = LAYOUTS[layout]
    model.save_pretrained(root / sub)
    if not safe:
        weights = root / sub / "adapter_model.safetensors"
        torch.save(load_file(weights), root / sub / "adapter_model.bin")
        weights.unlink()
    for name in beside:
        if not (root / name).exists():
            poison(root / name)
    return root


def session_logits(world: World, folder: Path, **options: Any) -> torch.Tensor:
    dnd = world.session()
    adapter = dnd.import_adapter(folder, **options)
    dnd.make_resident(adapter)
    with dnd.engine.running([adapter.id]):
        return dnd.base.model(input_ids=IDS).logits.clone()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_tools_folder_answers_like_plain_peft(world: World, tmp_path: Path, layout: str) -> None:
    model = peft_model()
    folder = write_layout(tmp_path / "out", layout, model)
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    with torch.no_grad():
        expected, plain = model(IDS).logits, tiny_model()(IDS).logits
    assert not torch.allclose(expected, plain, atol=1e-3)
    torch.testing.assert_close(session_logits(world, folder, name="mine"), expected, **SAME_MATHS)
    stored = AdapterStore(world.home).get("mine")
    assert (stored.source, stored.origin) == ("imported", layout.removesuffix("-llava"))
    assert (stored.path / "adapter_model.safetensors").is_file() and not list(stored.path.glob("*.bin"))
    assert AdapterStore(world.home).verify() == []
    assert before == {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize(
    "config",
    [
        {"use_rslora": True},
        {"lora_alpha": 5, "r": 3},
        {"r": 4},
        {"target_modules": ["o_proj"]},
        {"layers_to_transform": [1]},
        {"target_modules": r".*\.(q|v)_proj"},
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_variants_of_plain_lora_are_exact(world: World, tmp_path: Path, config: dict, dtype: torch.dtype) -> None:
    model = peft_model(**config)
    with torch.no_grad():  # what a half-precision file can hold, the comparison holds too
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.copy_(p.to(dtype))
        expected = model(IDS).logits
    model.save_pretrained(tmp_path)
    weights = tmp_path / "adapter_model.safetensors"
    torch.save(OrderedDict((k, t.to(dtype)) for k, t in load_file(weights).items()), tmp_path / "adapter_model.bin")
    weights.unlink()
    torch.testing.assert_close(session_logits(world, tmp_path), expected, **SAME_MATHS)


def test_names_of_a_live_model_and_parameters_are_read(tmp_path: Path) -> None:
    tensors = peft_tensors()
    live = {k.replace(".weight", ".default.weight"): torch.nn.Parameter(t) for k, t in tensors.items()}
    folder = bin_folder(tmp_path, live)
    flat = read_flat(folder, TINY, foreign=True)
    assert all(torch.equal(view, tensors[s.peft_key]) for s, view in TINY.views(flat))
    torch.save({**live, **tensors}, folder / "adapter_model.bin")
    with pytest.raises(AdapterCorruptError, match="holds a matrix twice"):
        read_flat(folder, TINY, foreign=True)


def test_safetensors_win_over_a_pickle_beside_them(tmp_path: Path) -> None:
    folder = peft_folder(tmp_path)
    (folder / "adapter_model.bin").write_bytes(b"never opened")
    assert read_flat(folder, TINY, foreign=True).any()


def test_stored_adapters_are_never_read_from_a_pickle(tmp_path: Path) -> None:
    folder = bin_folder(tmp_path, peft_tensors())
    with pytest.raises(AdapterCorruptError, match="a pickle"):
        read_flat(folder, TINY)


@pytest.mark.parametrize(
    ("config", "field"),
    [
        ({"use_dora": True}, "use_dora=True"),
        ({"bias": "lora_only"}, "bias=lora_only"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save="),
    ],
    ids=str,
)
def test_what_is_more_than_plain_lora_is_refused_by_name(
    world: World, tmp_path: Path, config: dict, field: str
) -> None:
    peft_model(**config).save_pretrained(tmp_path / "in")
    with pytest.raises(LayoutMismatchError, match=field) as caught:
        world.session().import_adapter(tmp_path / "in")
    assert caught.value.fix and not world.home.adapters.exists()


def test_another_base_is_told_by_shapes_and_by_name(world: World, tmp_path: Path) -> None:
    config = peft.LoraConfig(r=2, target_modules=["q_proj"])
    peft.get_peft_model(tiny_model(hidden=16), config).save_pretrained(tmp_path / "small")
    changed = (tmp_path / "small" / "adapter_config.json").read_text().replace('_path": null', '_path": "org/Other-7B"')
    (tmp_path / "small" / "adapter_config.json").write_text(changed)
    with pytest.raises(LayoutMismatchError, match=r"has shape .*; its config names the base 'org/Other-7B', loaded is"):
        world.session().import_adapter(tmp_path / "small")
    fits = write_layout(tmp_path / "fits", "peft", peft_model())
    text = (fits / "adapter_config.json").read_text().replace('_path": null', '_path": "org/Other-7B"')
    (fits / "adapter_config.json").write_text(text)
    answer = dnd_json("adapters", "import", fits, *world.options)
    assert answer["notes"][0].startswith("it fits, but its config names the base 'org/Other-7B'")
    assert notes_of(fits, LoraLayout.from_model(tiny_model()), "/models/other-7b/") == ()


def test_the_command_says_where_it_is_from(world: World, tmp_path: Path) -> None:
    folder = write_layout(tmp_path / "out", "xtuner-llava", peft_model())
    prompts = tmp_path / "p.txt"
    prompts.write_text("\n".join(prompts_of("upper")))
    answer = dnd_json("adapters", "import", folder, "--name", "seen", "--prompts", prompts, *world.options)
    assert (answer["adapter"]["source"], answer["adapter"]["origin"]) == ("imported", "xtuner")
    assert answer["notes"] == ["only the language model's part is taken, not projector"]
    assert world.session().route(prompts_of("upper")).adapter.name == "seen"
    assert "written by: xtuner" in (world.home.adapters / "seen" / "README.md").read_text()


def test_an_xtuner_config_is_never_run(world: World, tmp_path: Path) -> None:
    folder = write_layout(tmp_path / "out", "peft", peft_model())
    (folder / "xtuner_config.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    assert world.session().import_adapter(folder).origin == "xtuner"
    assert not (tmp_path / "ran").exists()


def test_a_folder_of_checkpoints_asks_for_one(tmp_path: Path) -> None:
    for step in (20, 100):
        peft_folder(tmp_path / f"checkpoint-{step}")
    with pytest.raises(InputError, match="2 checkpoints") as caught:
        find_adapter(tmp_path)
    assert caught.value.fix == f"give one: {tmp_path / 'checkpoint-100'}"


# ---- hostile folders


def bin_folder(folder: Path, content: Any, **config: Any) -> Path:
    """A PEFT folder whose weights are `content`, saved by torch."""
    (peft_folder(folder, **config) / "adapter_model.safetensors").unlink()
    torch.save(content, folder / "adapter_model.bin")
    return folder


class WritesFile:
    """Unpickling it writes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


class TakesMemory:
    """Unpickling it takes memory; torch's own safe reader lets it."""

    def __reduce__(self) -> tuple[Any, ...]:
        return bytearray, (2**44,)


def refused(home: Home, folder: Path, match: str) -> None:
    """Importing `folder` is one error in one line, with a fix, and stores nothing."""
    store = AdapterStore(home)
    with pytest.raises(DndError, match=match) as caught:
        store.import_folder(folder, TINY, base_fingerprint=BASE)
    assert caught.value.fix and "\n" not in caught.value.message
    assert store.ls() == [] and (not store.root.exists() or listed(store.root) == [])


def test_code_in_a_pickle_is_not_run(home: Home, tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    folder = bin_folder(tmp_path / "in", {A0: WritesFile(ran)})
    refused(home, folder, r"asks for (posix|nt)\.mkdir, which no LoRA needs")
    assert not ran.exists()
    torch.load(folder / "adapter_model.bin", weights_only=False)  # the same file does run code elsewhere
    assert ran.exists()


def test_code_in_a_bare_pickle_is_not_run(home: Home, tmp_path: Path) -> None:
    folder = bin_folder(tmp_path / "in", {})
    (folder / "adapter_model.bin").write_bytes(pickle.dumps({A0: WritesFile(tmp_path / "ran")}))
    refused(home, folder, "not a file of torch.save")
    assert not (tmp_path / "ran").exists()


def test_a_pickle_that_takes_memory_is_not_run(home: Home, tmp_path: Path) -> None:
    refused(home, bin_folder(tmp_path / "in", {A0: TakesMemory()}), r"asks for .*bytearray")


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ([torch.zeros(1)], "something else than tensors by name"),
        ({"state_dict": peft_tensors()}, "something else than tensors by name"),
        ({3: torch.zeros(1)}, "something else than tensors by name"),
        ({}, "holds no tensors"),
        ({**peft_tensors(), "../../evil": torch.zeros(1)}, r"not LoRA matrices: \.\./\.\./evil"),
        ({**peft_tensors(), "base_model.model.lm_head.weight": torch.zeros(1)}, "not LoRA matrices: .*lm_head"),
        ({**peft_tensors(), A0: torch.full((4, 6), torch.nan)}, "holds NaN or inf"),
        ({**peft_tensors(), A0: torch.zeros(4, 7)}, r"has shape \(4, 7\), expected \(4, 6\)"),
        ({**peft_tensors(), A0: torch.zeros(1).expand(2**40, 2**10)}, "has shape"),
        ({**peft_tensors(), A0: torch.zeros(4, 6, dtype=torch.float64)}, "DoubleStorage"),
        ({**peft_tensors(), A0: torch.zeros(4, 6).to_sparse()}, "which no LoRA needs"),
        ({k: t for k, t in peft_tensors().items() if k != A0}, "1 tensors are missing"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_wrong_contents(home: Home, tmp_path: Path, content: Any, match: str) -> None:
    refused(home, bin_folder(tmp_path / "in", content), match)


@pytest.mark.parametrize("keep", [0, 4, 0.5, 0.9, -1])
def test_truncated_pickles(home: Home, tmp_path: Path, keep: float) -> None:
    path = bin_folder(tmp_path / "in", peft_tensors()) / "adapter_model.bin"
    data = path.read_bytes()
    path.write_bytes(data[: int(keep * len(data)) if isinstance(keep, float) else keep])
    refused(home, path.parent, "truncated or not a file of torch.save")


def rewritten(path: Path, change: Any, compression: int = zipfile.ZIP_STORED) -> None:
    """Write the archive again with `change(name, data)` applied to each record."""
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in records.items():
            archive.writestr(name, change(name, data))


def test_a_bomb_is_refused_by_its_directory(home: Home, tmp_path: Path) -> None:
    path = bin_folder(tmp_path / "in", peft_tensors()) / "adapter_model.bin"
    rewritten(path, lambda name, data: bytes(2**24) if name.endswith("/0") else data, zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 2**17
    refused(home, path.parent, "packed records")


def test_a_tensor_larger_than_its_record_is_refused(home: Home, tmp_path: Path) -> None:
    # the shapes are right, one record is empty: a reader that believed them would read what comes after it
    path = bin_folder(tmp_path / "in", peft_tensors()) / "adapter_model.bin"
    with zipfile.ZipFile(path) as archive:
        last = [n for n in archive.namelist() if "/data/" in n][-1]
    rewritten(path, lambda name, data: b"" if name == last else data)
    refused(home, path.parent, "do not have the sizes of its records")


def test_size_is_bounded_before_reading(home: Home, tmp_path: Path) -> None:
    path = bin_folder(tmp_path / "in", {}) / "adapter_model.bin"
    with open(path, "wb") as f:
        f.truncate(2**40)
    refused(home, path.parent, f"has {2**40} bytes, at most")


def test_damage_anywhere_is_an_error_of_ours_or_harmless(tmp_path: Path) -> None:
    path = bin_folder(tmp_path, peft_tensors()) / "adapter_model.bin"
    data = path.read_bytes()
    for at in range(0, len(data), 17):
        path.write_bytes(data[:at] + bytes([data[at] ^ 0xFF]) + data[at + 1 :])
        with suppress(DndError):
            assert read_flat(tmp_path, TINY, foreign=True).shape == (TINY.n_parameters,)


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.bin"])
def test_half_an_export(home: Home, tmp_path: Path, name: str) -> None:
    folder = bin_folder(tmp_path / "in", peft_tensors())
    (folder / name).unlink()
    (folder / "training_args.bin").write_bytes(b"never opened")
    wanted = "adapter_model.safetensors" if name.endswith("bin") else name
    refused(home, folder, f"{wanted} is missing")


def test_links_out_of_the_folder(home: Home, tmp_path: Path) -> None:
    folder = bin_folder(tmp_path / "in", peft_tensors())
    (folder / "adapter_model.bin").rename(tmp_path / "outside.bin")
    (folder / "adapter_model.bin").symlink_to(tmp_path / "outside.bin")
    refused(home, folder, "is a link that leaves its folder")
    peft_folder(tmp_path / "elsewhere")
    (tmp_path / "llava").mkdir()
    (tmp_path / "llava" / "llm_adapter").symlink_to(tmp_path / "elsewhere")
    refused(home, tmp_path / "llava", "is a link that leaves its folder")


def test_names_that_leave_the_store(home: Home, tmp_path: Path) -> None:
    folder = bin_folder(tmp_path / "in", peft_tensors())
    with pytest.raises(ConfigError, match="is not allowed"):
        AdapterStore(home).import_folder(folder, TINY, base_fingerprint=BASE, name="../evil")
    assert not home.adapters.exists()


def test_the_command_reports_one_line_and_a_fix(world: World, tmp_path: Path) -> None:
    folder = bin_folder(tmp_path / "in", {A0: WritesFile(tmp_path / "ran")})
    result = run_dnd("adapters", "import", folder, *world.options)
    assert result.exit_code == 1 and not (tmp_path / "ran").exists() and result.stdout == ""
    assert [line.split(":")[0] for line in result.stderr.splitlines()[-2:]] == ["error", "fix"]

"""An exported adapter is what a stock vLLM finds, accepts and loads by itself (its `lora_filesystem_resolver`)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from cli_runner import dnd
from safetensors.torch import load_file
from tiny_world import World, prompts_of

from dnd_sdk.adapters import Adapter, AdapterStore


@pytest.fixture
def adapter(world: World) -> Adapter:
    return world.session().adapt(prompts_of("upper"), name="upper").adapter


def resolved(cache: Path, name: str, base: str) -> dict[str, Any] | None:
    """The resolver's own test of `cache/name`, as vLLM documents it: the config if the adapter would be loaded."""
    path = cache / name / "adapter_config.json"
    config = json.loads(path.read_text()) if path.exists() else {}
    accepted = config.get("peft_type") == "LORA" and config.get("base_model_name_or_path") == base
    return config if accepted else None


def test_export_under_its_name_is_what_vllm_resolves(world: World, adapter: Adapter, tmp_path: Path) -> None:
    assert dnd("adapters", "export", "upper", tmp_path / "cache" / "upper", "--home", world.home.root).exit_code == 0
    config = resolved(tmp_path / "cache", "upper", str(world.base))
    assert config is not None and resolved(tmp_path / "cache", "upper", "another/base") is None
    assert isinstance(config["r"], int) and 1 <= config["r"] <= 64
    assert isinstance(config["lora_alpha"], int | float)
    targets = config["target_modules"]
    assert isinstance(targets, list) and targets and all(t.isidentifier() for t in targets)
    # what vLLM's LoRA loader refuses
    assert config["bias"] == "none" and not config["use_dora"] and not config["modules_to_save"]
    assert not config.get("rank_pattern") and not config.get("alpha_pattern") and not config["use_rslora"]
    tensors = load_file(tmp_path / "cache" / "upper" / "adapter_model.safetensors")
    ends = {f"{t}.lora_{part}.weight" for t in targets for part in "AB"}
    assert all(k.startswith("base_model.model.") and ".".join(k.split(".")[-3:]) in ends for k in tensors)
    assert all(t.shape[0 if "lora_A" in k else 1] == config["r"] for k, t in tensors.items())


def test_the_store_itself_is_such_a_cache(world: World, adapter: Adapter) -> None:
    assert resolved(AdapterStore(world.home).root, adapter.name, str(world.base)) is not None

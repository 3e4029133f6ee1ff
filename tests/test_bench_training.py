"""`dnd bench train`: what it times, and that any base and the paper's own sizes can be measured."""

from __future__ import annotations

import json
import runpy
import sys
from itertools import count
from pathlib import Path

import pytest
import torch
from cli_runner import dnd, dnd_json
from stand_in import install
from training_parts import make_tasks, make_world, silent
from transformers import AutoModelForCausalLM, Qwen2Config

from dnd_sdk.bench.training import bench_train
from dnd_sdk.config import Home
from dnd_sdk.errors import ConfigError
from dnd_sdk.generator.generator import GeneratorConfig, decoder_shapes
from dnd_sdk.generator.hyperconv import HyperConvDecoder
from dnd_sdk.generator.weight_tokenizer import WeightTokenizer
from dnd_sdk.lora.layout import LoraLayout
from dnd_sdk.training.settings import read_settings

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_world(tmp_path_factory.mktemp("bench_train"))


def test_report_is_of_this_recipe(world: Path) -> None:
    settings = read_settings(world / "train.toml")
    ticks = count()
    report = bench_train(
        world / "tasks", settings, Home(world / "home"), silent, repeats=2, clock=lambda: float(next(ticks)) ** 2
    )
    # squares: the k-th interval is 4k + 1; the first of each kind warms up and does not count
    assert report["step_s"] == (5 + 9) / 2 and report["generate_s"] == (17 + 21) / 2
    assert report["step"] == {"tasks": 2, "rows": 4}
    base = sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(world / "base").parameters())
    assert report["base"]["parameters"] == base
    assert report["generator"]["share_of_base"] == report["generator"]["parameters"] / base
    assert report["peak_mb"] > 50
    json.dumps(report)


def test_a_recipe_without_an_end_to_end_stage_is_refused(world: Path) -> None:
    settings = read_settings(world / "train.toml")
    only = settings.model_copy(update={"stages": settings.stages[:1]})
    with pytest.raises(ConfigError, match="no end-to-end stage"):
        bench_train(world / "tasks", only, Home(world / "home"), silent)


def test_command(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DND_HOME", str(world / "home"))
    arguments = ["bench", "train", world / "tasks", "--config", world / "train.toml", "--repeats", 1]
    shown = dnd(*arguments)
    assert shown.exit_code == 0 and "training step" in shown.stdout
    assert dnd_json(*arguments)["adapter"]["r"] == 4


def test_the_example_of_another_base_is_made_and_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As its header says, with a smaller shape; both recipes find it where the script puts it."""
    monkeypatch.setenv("DND_HOME", str(install(tmp_path, monkeypatch).root))
    monkeypatch.chdir(tmp_path)
    example = runpy.run_path(str(EXAMPLES / "qwen_shaped.py"))
    assert example["SHAPE"]["hidden_size"] == 896 and example["SHAPE"]["vocab_size"] == 151936
    example["SHAPE"].update(hidden_size=56, intermediate_size=76, vocab_size=600)
    monkeypatch.setattr(sys, "argv", ["qwen_shaped.py", "--layers", "1"])
    example["main"]()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "runs" / "qwen_shaped")
    assert model.config.model_type == "qwen2" and model.config.num_key_value_heads == 2
    make_tasks(tmp_path / "tasks")
    reports = [
        dnd_json("bench", "train", "tasks", "--config", EXAMPLES / name, "--repeats", 1)
        for name in ("qwen_shaped.toml", "qwen_shaped_paper.toml")
    ]
    small, paper = (r["generator"]["shapes"] for r in reports)
    assert small[0][:2] == [16, 64] and paper[0][:2] == [128, 384]
    assert all(r["base"]["parameters"] == model.num_parameters() for r in reports)


def test_the_papers_sizes_for_its_smallest_base_can_be_expressed() -> None:
    """Qwen2.5-0.5B, r 8, all linears, 128 prompts of 384 tokens: 4.40 M weights, as the paper's adapter."""
    config = Qwen2Config(
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=24,
        num_attention_heads=14,
        num_key_value_heads=2,
        vocab_size=151936,
        tie_word_embeddings=True,
    )
    with torch.device("meta"):
        layout = LoraLayout.from_model(AutoModelForCausalLM.from_config(config), r=8)
    sizes = GeneratorConfig(encoder_width=384, n_prompts=128, state_tokens=384, parts=("lora_A", "lora_B"))
    tokens = WeightTokenizer(layout, sizes.parts)
    shapes = decoder_shapes(sizes, (tokens.T, tokens.H, tokens.W))
    with torch.device("meta"):
        decoder = HyperConvDecoder(shapes, sizes.kernel_size)
    assert round(layout.n_parameters / 1e6, 2) == 4.4
    assert shapes[0] == (128, 384, 384) and sum(p.numel() for p in decoder.parameters()) < 49.4e6

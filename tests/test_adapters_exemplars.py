"""Exemplars belong to their adapter: recorded, checked, replaced whole, kept when the same weights come again."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from adapter_folders import BASE, TINY, everything, exemplars, listed, peft_folder, seen, store_one
from helpers import random_flat
from safetensors.torch import save_file

from dnd_sdk.adapters import Adapter, AdapterStore, exporting, pending
from dnd_sdk.adapters.adapter import read_manifest
from dnd_sdk.adapters.exemplars import (
    EXEMPLARS,
    exemplars_files,
    exemplars_path,
    read_exemplars,
    replacement_name,
)
from dnd_sdk.config import Home
from dnd_sdk.errors import AdapterCorruptError, AdapterNotFoundError
from dnd_sdk.files.atomic import STALE_S
from dnd_sdk.lora.layout import LoraLayout
from dnd_sdk.machine import process_space

WEIGHTS = "adapter_model.safetensors"
LARGE = LoraLayout(6, 3.0, TINY.target_modules, TINY.modules)


def flip(folder: Path) -> None:
    """A bit of an exponent: one weight becomes huge, finite still."""
    raw = bytearray((folder / WEIGHTS).read_bytes())
    raw[-1] ^= 0x40
    (folder / WEIGHTS).write_bytes(raw)


def test_a_flipped_bit_is_found_in_an_adapter_of_smaller_rank(store: AdapterStore, tmp_path: Path) -> None:
    adapter = store_one(store, name="small")
    copy = Path(shutil.copytree(adapter.path, tmp_path / "copy"))
    store.load(adapter, LARGE)
    for folder in (adapter.path, copy):
        flip(folder)
    with pytest.raises(AdapterCorruptError, match="weights' hash is"):
        store.load(adapter, LARGE)
    with pytest.raises(AdapterCorruptError, match="weights' hash is"):
        store.import_folder(copy, LARGE, base_fingerprint=BASE, name="again")


HARMS = {
    "deleted": (lambda f: (f / EXEMPLARS).unlink(), "is missing"),
    "other rows": (lambda f: save_file({"exemplars": exemplars(3, seed=9)}, f / EXEMPLARS), "hash"),
    "other size": (lambda f: save_file({"exemplars": exemplars(2, 7)}, f / EXEMPLARS), "hash"),
}


@pytest.mark.parametrize("kind", HARMS)
def test_verify_tells_what_was_done_to_exemplars(store: AdapterStore, kind: str, tmp_path: Path) -> None:
    store_one(store, random_flat(TINY, seed=1), name="good", exemplars=exemplars())
    bad = store_one(store, name="bad", exemplars=exemplars())
    harm, what = HARMS[kind]
    harm(bad.path)
    (problem,) = store.verify()
    assert problem.name == "bad" and EXEMPLARS in problem.what and what in problem.what and problem.fix
    with pytest.raises(AdapterCorruptError, match=what):
        store.exemplars(bad)
    with pytest.raises(AdapterCorruptError, match=what):
        store.import_folder(bad.path, TINY, base_fingerprint=BASE, name="copy")
    with pytest.raises(AdapterCorruptError, match=what):
        store.export("bad", tmp_path / "out")
    assert torch.equal(store.load(bad, TINY), random_flat(TINY)), "its weights are whole"
    store.set_exemplars(bad, exemplars(4))
    assert store.verify() == []


def test_exemplars_that_came_from_nowhere_are_told(store: AdapterStore) -> None:
    bare = store_one(store, name="bare")
    save_file({"exemplars": exemplars()}, bare.path / EXEMPLARS)
    (problem,) = store.verify()
    assert "does not record" in problem.what


def older(adapter: Adapter) -> None:
    """As an earlier version wrote it: nothing recorded of the exemplars."""
    manifest = adapter.path / "dnd.json"
    data = json.loads(manifest.read_text())
    data.pop("exemplars_sha256")
    manifest.write_text(json.dumps(data))


def test_adapters_of_earlier_versions_stay_valid(home: Home, store: AdapterStore) -> None:
    for name, kept in (("with", exemplars()), ("without", None)):
        older(store_one(store, name=name, exemplars=kept))
    assert AdapterStore(home).verify() == []
    assert torch.equal(store.exemplars(store.get("with")), exemplars())
    assert store.exemplars(store.get("without")) is None
    store.set_exemplars(store.get("with"), exemplars(4))
    assert not (store.get("with").path / EXEMPLARS).exists()
    exemplars_path(store.get("with").path, store.get("with").exemplars_sha256).unlink()
    assert [p.name for p in store.verify()] == ["with"]


def imported(store: AdapterStore, folder: Path, kept: torch.Tensor | None, encoder: str = "f", **more: str) -> Adapter:
    return store.import_folder(
        folder, TINY, base_fingerprint=BASE, exemplars=kept, encoder="enc", encoder_fingerprint=encoder, **more
    )


def test_prompts_of_a_later_import_are_kept(store: AdapterStore, tmp_path: Path) -> None:
    folder = peft_folder(tmp_path / "theirs")
    first = store.import_folder(folder, TINY, base_fingerprint=BASE, name="one")
    before = seen(store)
    second = imported(store, folder, exemplars(3))
    assert second.name == "one" and second.id == first.id and seen(store) != before
    assert (second.encoder, second.encoder_fingerprint) == ("enc", "f") and store.get("one") == second
    assert torch.equal(store.exemplars(second), exemplars(3)) and store.verify() == []
    assert "enc" in (second.path / "README.md").read_text()


def test_prompts_of_two_imports_are_merged(store: AdapterStore, tmp_path: Path) -> None:
    folder = peft_folder(tmp_path / "theirs")
    first = imported(store, folder, exemplars(3))
    assert imported(store, folder, exemplars(3)) == first, "the same prompts change nothing"
    both = store.exemplars(imported(store, folder, torch.cat([exemplars(3)[1:], exemplars(2, seed=2)])))
    assert both is not None and torch.equal(both, torch.cat([exemplars(3), exemplars(2, seed=2)]))
    many = store.exemplars(imported(store, folder, exemplars(60, seed=3)))
    assert many is not None and len(many) == 64 and torch.equal(many[-60:], exemplars(60, seed=3))
    other = imported(store, folder, exemplars(2, 9), encoder="g")
    assert other.encoder_fingerprint == "g" and torch.equal(store.exemplars(other), exemplars(2, 9))
    assert store.import_folder(folder, TINY, base_fingerprint=BASE) == other, "no prompts take none away"


def killed_at(monkeypatch: pytest.MonkeyPatch, n: int) -> None:
    """The n-th move of a file ends the process: nothing cleans up after it."""
    left = [n]
    real = pending.Opened.take

    def move_or_die(self: pending.Opened, source: Path) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise SystemExit
        real(self, source)

    monkeypatch.setattr(pending.Opened, "take", move_or_die)
    monkeypatch.setattr("dnd_sdk.adapters.folders.shutil.rmtree", lambda *a, **k: None)


@pytest.mark.parametrize("n", [0, 1, 2])
def test_exemplars_half_replaced_are_those_before(
    home: Home, store: AdapterStore, monkeypatch: pytest.MonkeyPatch, n: int
) -> None:
    adapter = store_one(store, name="one", exemplars=exemplars())
    running = AdapterStore(home)
    with monkeypatch.context() as patch:
        killed_at(patch, n)
        with pytest.raises(SystemExit):
            store.set_exemplars(adapter, exemplars(6))
    monkeypatch.setattr(pending, "is_alive", lambda pid: False)
    for other in (running, AdapterStore(home)):
        assert torch.equal(other.exemplars(other.get("one")), exemplars()) and other.verify() == []
    assert listed(store.root) == ["one"]
    for path in exemplars_files(adapter.path):
        os.utime(path, (1, 1))
    store.set_exemplars(adapter, exemplars(5))
    assert torch.equal(store.exemplars(adapter), exemplars(5)) and len(list(exemplars_files(adapter.path))) == 1


def test_the_same_exemplars_again_get_a_file_of_their_own(store: AdapterStore) -> None:
    adapter = store_one(store, name="one", exemplars=exemplars())
    paths = {
        exemplars_path(a.path, a.exemplars_sha256) for a in (store.set_exemplars(adapter, exemplars()) for _ in "ab")
    }
    assert len(paths) == 2 and store.verify() == []


def test_exemplars_come_into_the_folder_that_was_read_or_nowhere(
    store: AdapterStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = store_one(store, name="one", exemplars=exemplars())
    real = pending.Opened.take

    def another_first(self: pending.Opened, source: Path) -> None:
        if source.name == "dnd.json":
            os.rename(self.path, store.root / "two")
            shutil.copytree(store.root / "three", self.path)
        real(self, source)

    store_one(store, random_flat(TINY, seed=1), name="three")
    before = everything(store.root / "three")
    monkeypatch.setattr(pending.Opened, "take", another_first)
    with pytest.raises(AdapterNotFoundError):
        store.set_exemplars(adapter, exemplars(6))
    assert everything(store.root / "one") == before


def test_replacing_keeps_what_somebody_else_is_about_to_record(store: AdapterStore) -> None:
    adapter = store_one(store, name="one", exemplars=exemplars())
    theirs = adapter.path / replacement_name("f" * 64)
    theirs.write_bytes(b"on its way")
    store.set_exemplars(adapter, exemplars(4))
    assert theirs.exists() and store.verify() == []


def test_an_export_while_exemplars_are_replaced_is_of_one_moment(
    store: AdapterStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = store_one(store, name="one", exemplars=exemplars())
    store.set_exemplars(adapter, exemplars(4))
    stale = replace(adapter, path=store.root / "one")
    out = exporting.copy_out(stale, tmp_path / "out")
    assert torch.equal(torch.from_numpy(read_exemplars(out, read_manifest(out).exemplars_sha256)), exemplars(4))
    with pytest.raises(AdapterNotFoundError, match="was replaced"):
        exporting.copy_out(replace(stale, id="f" * 64), tmp_path / "other")
    assert not (tmp_path / "other").exists()


def dead_pid() -> int:
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    return child.pid


def test_what_a_living_process_or_another_machine_has_unfinished_is_not_swept(home: Home, store: AdapterStore) -> None:
    store_one(store, name="kept")
    space, state = process_space(), store.root / ".store"
    names = [f"put-{space}-{os.getpid()}-a", f"put-{space}-{dead_pid()}-b", "rm-00000000-1-c", "put-1-earlier"]
    for name in names:
        (state / name).mkdir()
    assert [a.name for a in AdapterStore(home).ls()] == ["kept"]
    assert [name for name in names if (state / name).exists()] == [names[0], names[2], names[3]]
    past = time.time() - STALE_S - 60
    for name in names:
        if (state / name).exists():
            os.utime(state / name, (past, past))
    AdapterStore(home).ls()
    assert [name for name in names if (state / name).exists()] == [names[0]]

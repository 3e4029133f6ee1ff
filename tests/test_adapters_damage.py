"""What a full disk, an interrupted process and damaged folders do to a store: nothing that is not told."""

from __future__ import annotations

import errno
import json
import logging
import math
import os
import resource
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from adapter_folders import BASE, TINY, everything, exemplars, listed, peft_folder, store_one
from helpers import random_flat
from safetensors.torch import load_file, save_file

from dnd_sdk.adapters import AdapterStore, folders
from dnd_sdk.adapters.exemplars import EXEMPLARS
from dnd_sdk.adapters.peft_config import config_text
from dnd_sdk.config import Home
from dnd_sdk.errors import (
    AdapterCorruptError,
    StorageError,
)
from dnd_sdk.lora.layout import LoraLayout, LoraModule

WEIGHTS = "adapter_model.safetensors"


@contextmanager
def file_size_limit(n: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_write_that_fails_half_way_leaves_nothing(store: AdapterStore) -> None:
    store_one(store, name="kept")
    before = everything(store.root)
    layout = LoraLayout(4, 8.0, ("x",), (LoraModule("m.x", 3000, 3000),))
    config_text(layout, "tiny")
    with file_size_limit(50_000), pytest.raises(StorageError, match=r"cannot store an adapter in .*: File too large"):
        store_one(store, layout=layout)
    assert everything(store.root) == before and listed(store.root) == ["kept"]


@pytest.mark.parametrize(
    ("code", "fix"),
    [
        (errno.ENOSPC, "free some disk space"),
        (errno.EROFS, "read-only: choose a writable home"),
        (errno.EACCES, "no permission"),
    ],
)
def test_disk_trouble_says_what_helps(
    store: AdapterStore, monkeypatch: pytest.MonkeyPatch, code: int, fix: str
) -> None:
    adapter = store_one(store, name="kept")

    def refuse(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        patch.setattr(folders.os, "rename", refuse)
        with pytest.raises(StorageError, match=f"(?s)cannot store an adapter in .*{os.strerror(code)}.*fix: .*{fix}"):
            store_one(store, random_flat(TINY, seed=1))
        with pytest.raises(StorageError, match=f"(?s)cannot remove .*kept.*{fix}"):
            store.rm("kept")
        with pytest.raises(StorageError, match="cannot write"):
            store.export("kept", store.root.parent / "out")
    assert listed(store.root) == ["kept"] and store.ls() == [adapter] and store.verify() == []


def test_home_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    store = AdapterStore(Home(tmp_path / "file"))
    for put in (lambda: store_one(store), lambda: store_one(store, name="named")):
        with pytest.raises(StorageError, match="Not a directory"):
            put()
    with pytest.raises(StorageError, match="cannot list"):
        store.ls()
    with pytest.raises(StorageError, match="cannot list"):
        store.changes(0)


def test_ctrl_c_leaves_nothing(store: AdapterStore, monkeypatch: pytest.MonkeyPatch) -> None:
    store_one(store, name="kept")

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    for where in ("dnd_sdk.adapters.writing.manifest_text", "dnd_sdk.adapters.folders.os.rename"):
        with monkeypatch.context() as patch:
            patch.setattr(where, interrupt)
            with pytest.raises(KeyboardInterrupt):
                store_one(store, random_flat(TINY, seed=1))
        assert listed(store.root) == ["kept"]


def test_folders_left_by_killed_processes_are_swept(home: Home, store: AdapterStore) -> None:
    store_one(store, name="kept")
    left = [store.root / ".store" / "put-1-x", store.root / ".store" / "rm-2-x"]
    for folder in left:
        folder.mkdir()
        (folder / WEIGHTS).write_bytes(b"x")
        os.utime(folder, (1, 1))
    assert [a.name for a in store.ls()] == ["kept"] and store.verify() == []
    assert [a.name for a in AdapterStore(home).ls()] == ["kept"]
    assert not any(folder.exists() for folder in left)


def damage(folder: Path, kind: str) -> None:
    weights, manifest = folder / WEIGHTS, folder / "dnd.json"
    if kind == "truncated":
        weights.write_bytes(weights.read_bytes()[:-9])
    elif kind == "bit":
        raw = bytearray(weights.read_bytes())
        raw[-2] ^= 1
        weights.write_bytes(raw)
    elif kind == "nan":
        tensors = load_file(weights)
        tensors[TINY.segments[2].peft_key][0, 0] = math.nan
        save_file(tensors, weights)
    elif kind == "alpha":
        config = json.loads((folder / "adapter_config.json").read_text())
        (folder / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 4}))
    elif kind == "pickle":
        weights.rename(folder / "adapter_model.bin")
    elif kind == "manifest":
        manifest.write_text(manifest.read_text()[:-20])
    elif kind == "layout":
        data = json.loads(manifest.read_text())
        data["layout"]["modules"][0][1] = 2**40
        manifest.write_text(json.dumps(data))
    elif kind == "digest":
        data = json.loads(manifest.read_text())
        data["layout"]["lora_alpha"] = 1.0
        manifest.write_text(json.dumps(data))
    elif kind == "exemplars":
        (folder / EXEMPLARS).write_bytes((folder / EXEMPLARS).read_bytes()[:-1])
    elif kind == "empty":
        for path in folder.iterdir():
            path.unlink()
    else:
        raise ValueError(kind)


DAMAGES = {
    "truncated": "is truncated",
    "bit": "weights' hash is",
    "nan": "v_proj.lora_A.weight holds NaN",
    "alpha": "weights' hash is",
    "pickle": "a pickle",
    "manifest": "dnd.json is not valid JSON",
    "empty": "is missing",
}


@pytest.mark.parametrize("kind", [*DAMAGES, "layout", "digest", "exemplars"])
def test_verify_finds_and_reports_all_damage(store: AdapterStore, kind: str) -> None:
    store_one(store, name="good", exemplars=exemplars())
    bad = store_one(store, random_flat(TINY, seed=1), name="bad", exemplars=exemplars())
    damage(bad.path, kind)
    problems = store.verify()
    assert [p.name for p in problems] == ["bad"] and problems == store.verify("bad")
    assert problems[0].what and problems[0].fix and store.verify("good") == []
    expected = DAMAGES | {"layout": "its layout", "digest": "layout_digest does not match", "exemplars": "truncated"}
    assert expected[kind] in problems[0].what


@pytest.mark.parametrize("kind", DAMAGES)
def test_load_and_import_refuse_damage(store: AdapterStore, kind: str, tmp_path: Path) -> None:
    adapter = store_one(store, name="bad")
    copy = Path(shutil.copytree(adapter.path, tmp_path / "copy"))
    damage(adapter.path, kind)
    damage(copy, kind)
    with pytest.raises(AdapterCorruptError, match=DAMAGES[kind]):
        store.load(adapter, TINY)
    with pytest.raises(AdapterCorruptError, match=DAMAGES[kind]):
        store.import_folder(copy, TINY, base_fingerprint=BASE, name="new")
    with pytest.raises(AdapterCorruptError, match=DAMAGES[kind]):
        store.export("bad", tmp_path / "out")
    assert listed(store.root) == ["bad"] and not (tmp_path / "out").exists()


def test_listing_steps_over_damaged_folders_and_warns_once(
    store: AdapterStore, caplog: pytest.LogCaptureFixture
) -> None:
    good = store_one(store, name="good")
    damage(store_one(store, random_flat(TINY, seed=1), name="bad").path, "manifest")
    peft_folder(store.root / "plain-peft")
    (store.root / "Bad Name").mkdir()
    (store.root / "file").write_text("")
    with caplog.at_level(logging.WARNING, logger="dnd_sdk"):
        assert store.ls() == store.ls() == [good]
    assert len(caplog.records) == 4
    assert {p.name for p in store.verify()} == {"bad", "plain-peft", "Bad Name", "file"}


def test_a_damaged_folder_is_never_taken_for_the_same_adapter(store: AdapterStore) -> None:
    damage(store_one(store, name="one").path, "manifest")
    with pytest.raises(AdapterCorruptError, match=r"not valid JSON.*\n  fix: .*rm one"):
        store_one(store, name="one")


def test_damaged_exemplars(store: AdapterStore) -> None:
    adapter = store_one(store, exemplars=exemplars())
    save_file({"exemplars": torch.full((2, 2), math.nan)}, adapter.path / EXEMPLARS)
    with pytest.raises(AdapterCorruptError, match=r"exemplars\.safetensors: exemplars hold NaN"):
        store.exemplars(adapter)
    for tensors in (
        {"exemplars": torch.zeros(4)},
        {"other": torch.zeros(2, 2)},
        {"exemplars": torch.zeros(2, 2).int()},
    ):
        save_file(tensors, adapter.path / EXEMPLARS)
        with pytest.raises(AdapterCorruptError, match="must hold one 2-D F32 tensor"):
            store.exemplars(adapter)

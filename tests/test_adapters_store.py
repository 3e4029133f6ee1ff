"""AdapterStore: content addressing, several processes, importing and exporting; see `test_adapters_damage`."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import shutil
import threading
from collections.abc import Callable
from dataclasses import replace
from multiprocessing.connection import Connection
from multiprocessing.synchronize import Barrier
from pathlib import Path

import pytest
import torch
from adapter_folders import BASE, TINY, everything, exemplars, listed, peft_folder, peft_tensors, seen, store_one
from helpers import random_flat

from dnd_sdk.adapters import Adapter, AdapterStore, folders
from dnd_sdk.adapters.adapter import default_name
from dnd_sdk.adapters.exemplars import EXEMPLARS
from dnd_sdk.adapters.peft_config import config_text
from dnd_sdk.config import Home
from dnd_sdk.errors import (
    AdapterCorruptError,
    AdapterNotFoundError,
    ConfigError,
    InputError,
    LayoutMismatchError,
)
from dnd_sdk.lora.layout import LoraLayout

WEIGHTS = "adapter_model.safetensors"


def test_put_then_load_is_exact(store: AdapterStore) -> None:
    flat = random_flat(TINY)
    fields = {
        "prompt_hash": "p" * 64,
        "n_prompts": 7,
        "generator": "g1",
        "encoder": "enc",
        "encoder_fingerprint": "f1",
        "scores": {"margin": 0.25},
    }
    adapter = store_one(store, flat, exemplars=exemplars(), **fields)
    assert adapter.name == f"dnd-{adapter.id[:16]}" and adapter.path == store.root / adapter.name
    assert store.get(adapter.name) == store.get(adapter.id) == adapter
    assert {k: getattr(adapter, k) for k in fields} == fields
    assert torch.equal(store.load(adapter, TINY, base_fingerprint=BASE), flat)
    assert torch.equal(store.exemplars(adapter), exemplars())
    assert store.ls() == [adapter] and store.verify() == []
    assert sorted(p.name for p in adapter.path.iterdir()) == sorted(
        ["README.md", "adapter_config.json", WEIGHTS, "dnd.json", EXEMPLARS]
    )
    assert listed(store.root) == [adapter.name], "no temporary folder is left"


def test_same_weights_again_are_the_same_adapter(store: AdapterStore) -> None:
    first = store_one(store, name="mine")
    assert store_one(store, name="mine") == store_one(store) == first
    assert store_one(store, random_flat(TINY).double()) == first, "fp32 bytes decide"
    assert len(store.ls()) == 1
    assert store_one(store, name="second").id == first.id
    assert [a.name for a in store.ls()] == ["mine", "second"]


def test_a_taken_name_keeps_its_weights(store: AdapterStore) -> None:
    first = store_one(store, name="mine")
    before = everything(store.root)
    with pytest.raises(
        ConfigError, match=r"'mine' with other weights exists\n  fix: choose another --name or `dnd adapters rm mine`"
    ):
        store_one(store, random_flat(TINY, seed=1), name="mine")
    assert everything(store.root) == before and store.ls() == [first]


@pytest.mark.parametrize("name", ["../escape", "a/b", "..", "", "UP", "a___b", "/abs"])
def test_names_cannot_leave_the_folder(store: AdapterStore, name: str, tmp_path: Path) -> None:
    (tmp_path / "dnd-home").mkdir()
    (tmp_path / "dnd-home" / "escape").mkdir()
    with pytest.raises(ConfigError, match="is not allowed"):
        store_one(store, name=name)
    for use in (store.get, store.find, store.rm, store.verify):
        with pytest.raises(AdapterNotFoundError, match="no adapter"):
            use(name)
    assert (tmp_path / "dnd-home" / "escape").is_dir()


@pytest.mark.parametrize(
    ("flat", "more", "error", "message"),
    [
        (torch.zeros(3), {}, LayoutMismatchError, "has 3 values"),
        (torch.full((TINY.n_parameters,), math.nan), {}, AdapterCorruptError, "holds NaN or inf"),
        (None, {"source": "stolen"}, ConfigError, "source must be one of"),
        (None, {"exemplars": torch.zeros(3)}, InputError, r"must have shape \(k, width\), got \(3,\)"),
        (None, {"exemplars": torch.zeros(0, 3)}, InputError, r"got \(0, 3\)"),
        (None, {"exemplars": torch.full((2, 3), math.inf)}, InputError, "exemplars hold NaN or inf"),
    ],
)
def test_bad_input_stores_nothing(
    store: AdapterStore, flat: torch.Tensor, more: dict, error: type, message: str
) -> None:
    with pytest.raises(error, match=message):
        store_one(store, flat, **more)
    assert not store.root.exists()


def test_unknown_adapter_names_the_nearest(store: AdapterStore) -> None:
    with pytest.raises(AdapterNotFoundError, match=r"no adapter 'x' .*\n  fix: `dnd adapters ls`"):
        store.get("x")
    store_one(store, name="tickets")
    with pytest.raises(AdapterNotFoundError, match="did you mean 'tickets'"):
        store.get("ticket")
    with pytest.raises(AdapterNotFoundError, match="no adapter 'ffff"):
        store.get("f" * 64)


def test_rm_removes_sound_and_damaged_folders(store: AdapterStore) -> None:
    adapter = store_one(store, name="one")
    (store.root / "broken").mkdir()
    (store.root / "link").symlink_to(adapter.path)
    assert [store.find(n) for n in ("broken", adapter.id)] == ["broken", "link"], "the first of two with that id"
    for name in ("broken", "link", adapter.id):
        store.rm(name)
    assert listed(store.root) == [] and store.ls() == []
    for use in (lambda: store.rm("one"), lambda: store.load(adapter, TINY), lambda: store.exemplars(adapter)):
        with pytest.raises(AdapterNotFoundError, match="no adapter 'one'"):
            use()


def test_a_replaced_adapter_is_not_mistaken_for_the_old_one(store: AdapterStore) -> None:
    old = store_one(store, name="one", exemplars=exemplars())
    store.rm("one")
    new = store_one(store, random_flat(TINY, seed=1), name="one")
    with pytest.raises(AdapterNotFoundError, match="'one' was replaced"):
        store.load(old, TINY)
    assert store.ls() == [new] and store.exemplars(new) is None


def test_wrong_base(store: AdapterStore) -> None:
    adapter = store_one(store)
    with pytest.raises(
        LayoutMismatchError, match=r"another base model, tiny: got fingerprint b{16}, expected c{16}\n.*--base tiny"
    ):
        store.load(adapter, TINY, base_fingerprint="c" * 64)


def test_load_into_a_larger_rank(store: AdapterStore) -> None:
    adapter = store_one(store)
    large = LoraLayout(6, 3.0, TINY.target_modules, TINY.modules)
    A, B = (view for _, view in list(large.views(store.load(adapter, large)))[:2])
    A0, B0 = (view for _, view in list(TINY.views(random_flat(TINY)))[:2])
    torch.testing.assert_close(large.scaling * B @ A, TINY.scaling * B0 @ A0)


def test_weights_are_found_by_their_id_whatever_the_adapter_is_called(store: AdapterStore) -> None:
    flats = [random_flat(TINY, seed=i) for i in range(2)]
    first, second = (store_one(store, flat, name=f"number-{i}") for i, flat in enumerate(flats))
    os.rename(second.path, store.root / first.id)  # now one is called what the other one is
    assert torch.equal(store.load_by_id(first.id, TINY, base_fingerprint=BASE), flats[0])
    assert torch.equal(store.load_by_id(second.id, TINY), flats[1])
    with pytest.raises(LayoutMismatchError, match="another base"):
        store.load_by_id(first.id, TINY, base_fingerprint="c" * 64)
    store.rm("number-0")
    with pytest.raises(AdapterNotFoundError):
        store.load_by_id(first.id, TINY)


def test_every_change_is_told_whoever_makes_it(home: Home, store: AdapterStore) -> None:
    now = store.changes(0).now

    def told(act: Callable[[], object], *names: str) -> None:
        nonlocal now
        act()
        changes = store.changes(now)
        assert set(changes.adapters) == set(names) and changes.everything == (now == 0)
        assert changes.now > now and store.changes(changes.now).adapters == {}
        assert {n: a for n in names if (a := by_name(store).get(n))} == {n: a for n, a in changes.adapters.items() if a}
        now = changes.now

    other = AdapterStore(home)
    told(lambda: store_one(other, name="one"), "one")
    told(lambda: store_one(store, random_flat(TINY, seed=1), name="two", exemplars=exemplars()), "two")
    told(lambda: other.set_exemplars(other.get("two"), exemplars(6)), "two")
    told(lambda: other.rm("one"), "one")
    told(lambda: (other.rm("two"), store_one(other, name="two")), "two")
    told(lambda: os.rename(store.root / "two", store.root / "three"), "two", "three")
    told(lambda: shutil.copytree(store.root / "three", store.root / "four"), "four")
    told(lambda: shutil.rmtree(store.root / "three"), "three")


def by_name(store: AdapterStore) -> dict[str, Adapter]:
    return {a.name: a for a in store.ls()}


def test_exemplars_are_replaced_and_nothing_else(home: Home, store: AdapterStore) -> None:
    fields = {"encoder": "enc", "encoder_fingerprint": "f", "prompt_hash": "p", "n_prompts": 3}
    adapter = store_one(store, name="one", exemplars=exemplars(), **fields)
    other = AdapterStore(home)
    assert other.ls() == [adapter]
    before = seen(other)
    refined = store.set_exemplars(adapter, exemplars(6))
    assert seen(other) != before and other.ls() == [refined] == [store.get("one")]
    unchanged = replace(refined, refined=None, exemplars_sha256=adapter.exemplars_sha256)
    assert refined.refined is not None and unchanged == adapter
    assert torch.equal(other.exemplars(refined), exemplars(6)) and store.verify() == []
    assert torch.equal(other.load(refined, TINY, base_fingerprint=BASE), random_flat(TINY))
    again = seen(store)
    assert store.set_exemplars(adapter, exemplars(4)).refined != refined.refined and seen(store) != again
    assert not [p for p in adapter.path.iterdir() if p.name.startswith(".")]


def test_exemplars_of_what_is_gone_or_unusable(store: AdapterStore) -> None:
    adapter = store_one(store, name="one", exemplars=exemplars())
    with pytest.raises(InputError, match="must have shape"):
        store.set_exemplars(adapter, torch.ones(3))
    assert torch.equal(store.exemplars(store.get("one")), exemplars())
    store.rm("one")
    with pytest.raises(AdapterNotFoundError):
        store.set_exemplars(adapter, exemplars())
    assert listed(store.root) == []
    store_one(store, random_flat(TINY, seed=1), name="one")
    with pytest.raises(AdapterNotFoundError, match="was replaced"):
        store.set_exemplars(adapter, exemplars())


def test_a_folder_removed_while_its_exemplars_are_replaced_stays_removed(
    store: AdapterStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = store_one(store, name="one", exemplars=exemplars())
    real = folders._write_files

    def remove_first(files: dict[str, bytes], staged: Path) -> None:
        shutil.rmtree(adapter.path)
        real(files, staged)

    monkeypatch.setattr(folders, "_write_files", remove_first)
    with pytest.raises(AdapterNotFoundError):
        store.set_exemplars(adapter, exemplars())
    assert listed(store.root) == []


def test_changes_by_hand_are_seen_even_within_one_tick_of_the_clock(store: AdapterStore) -> None:
    store_one(store, name="a0")
    store.changes(0)
    for i in range(30):
        os.rename(store.root / f"a{i}", store.root / f"a{i + 1}")
        assert set(store.changes(0).adapters) == {f"a{i + 1}"}


def test_listing_sees_what_another_process_replaced(home: Home, store: AdapterStore) -> None:
    assert [store_one(store, name="one")] == store.ls()
    other = AdapterStore(home)
    other.rm("one")
    new = store_one(other, random_flat(TINY, seed=1), name="one")
    assert store.ls() == [new]


def test_a_folder_replaced_while_it_is_read_is_read_again(store: AdapterStore) -> None:
    store_one(store, name="one")
    seen = []

    def reader(folder: Path) -> int:
        seen.append(folder)
        if len(seen) == 1:
            store.rm("one")
            store_one(store, name="one")
            raise AdapterCorruptError("half of the old folder")
        return len(seen)

    def damaged(_: Path) -> None:
        raise AdapterCorruptError("truly damaged")

    reading = folders.AdapterFolders(store.root)
    assert reading.read("one", reader) == 2
    with pytest.raises(AdapterCorruptError, match="truly damaged"):
        reading.read("one", damaged)
    store.rm("one")
    assert reading.read("one", reader) is None


def put_many(home: Home, barrier: Barrier, out: Connection) -> None:
    store = AdapterStore(home)
    barrier.wait(timeout=60)
    out.send([store_one(store, random_flat(TINY, seed=i), exemplars=exemplars()).id for i in range(30)])


def test_processes_store_the_same_weights_at_once(home: Home, store: AdapterStore) -> None:
    config_text(TINY, "tiny")  # peft is imported before the fork, not in every child
    context = multiprocessing.get_context("fork")
    barrier, pipes = context.Barrier(3), [context.Pipe(duplex=False) for _ in range(3)]
    processes = [context.Process(target=put_many, args=(home, barrier, send)) for _, send in pipes]
    for process in processes:
        process.start()
    assert all(receive.poll(timeout=60) for receive, _ in pipes)
    ids = [receive.recv() for receive, _ in pipes]
    for process in processes:
        process.join(timeout=60)
    assert ids[0] == ids[1] == ids[2] and sorted(a.id for a in store.ls()) == sorted(ids[0])
    assert len(listed(store.root)) == 30, "no temporary folder is left"
    assert store.verify() == []


def test_threads_store_list_and_remove_together(store: AdapterStore) -> None:
    errors: list[BaseException] = []

    def work() -> None:
        try:
            for i in range(40):
                adapter = store_one(store, random_flat(TINY, seed=i % 5))
                try:
                    assert torch.equal(store.load(adapter, TINY), random_flat(TINY, seed=i % 5))
                    if i % 7 == 0:
                        store.rm(adapter.name)
                except AdapterNotFoundError:
                    pass  # removed by another thread
                store.ls()
        except BaseException as e:
            errors.append(e)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert errors == [] and store.verify() == []


def test_import_of_a_foreign_folder(store: AdapterStore, tmp_path: Path) -> None:
    small = LoraLayout(2, 8.0, TINY.target_modules, TINY.modules)
    folder = peft_folder(tmp_path / "theirs", peft_tensors(small), small)
    adapter = store.import_folder(
        folder, TINY, base_fingerprint=BASE, name="theirs", exemplars=exemplars(), encoder="enc"
    )
    assert (adapter.source, adapter.encoder, adapter.generator) == ("imported", "enc", None)
    assert json.loads((adapter.path / "adapter_config.json").read_text())["base_model_name_or_path"] == "someone/base"
    assert store.verify() == [] and torch.equal(store.exemplars(adapter), exemplars())
    A, B = (view for _, view in list(TINY.views(store.load(adapter, TINY)))[:2])
    tensors = list(peft_tensors(small).values())
    torch.testing.assert_close(TINY.scaling * B @ A, small.scaling * tensors[1] @ tensors[0])


def test_import_refuses_what_does_not_fit(store: AdapterStore, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is not a folder"):
        store.import_folder(tmp_path / "gone", TINY, base_fingerprint=BASE)
    folder = peft_folder(tmp_path / "dora", use_dora=True)
    with pytest.raises(LayoutMismatchError, match="use_dora"):
        store.import_folder(folder, TINY, base_fingerprint=BASE)
    exported = store_one(store).path
    with pytest.raises(LayoutMismatchError, match="another base model"):
        store.import_folder(exported, TINY, base_fingerprint="c" * 64)


def test_export_then_import_elsewhere_keeps_everything(store: AdapterStore, tmp_path: Path) -> None:
    adapter = store_one(
        store, name="one", exemplars=exemplars(), encoder="enc", encoder_fingerprint="f", prompt_hash="p", n_prompts=3
    )
    out = store.export("one", tmp_path / "new" / "out")
    assert everything(out) == everything(adapter.path)
    other = AdapterStore(Home(tmp_path / "other"))
    copy = other.import_folder(out, TINY, base_fingerprint=BASE)
    assert copy.id == adapter.id and copy.prompt_hash == "p" and copy.encoder_fingerprint == "f"
    assert torch.equal(other.exemplars(copy), exemplars()) and torch.equal(other.load(copy, TINY), random_flat(TINY))


def test_export_never_overwrites(store: AdapterStore, tmp_path: Path) -> None:
    store_one(store, name="one")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("x")
    (tmp_path / "file").write_text("x")
    for target in ("full", "file"):
        with pytest.raises(ConfigError, match="exists and is not an empty folder"):
            store.export("one", tmp_path / target)
    assert everything(tmp_path / "full") == {"mine": b"x"} and (tmp_path / "file").read_text() == "x"
    (tmp_path / "empty").mkdir()
    assert store.export("one", tmp_path / "empty") == tmp_path / "empty"


def test_the_same_weights_for_two_bases(store: AdapterStore) -> None:
    flat, other = random_flat(TINY), "c" * 64
    one = store_one(store, flat)
    with pytest.raises(ConfigError, match=r"with another base, tiny, exists\n.*use that one with --base tiny or `dnd"):
        store_one(store, flat, base_fingerprint=other, name=one.name)
    two = store_one(store, flat, base_fingerprint=other)
    assert two.name != one.name == default_name(one.id) and two.name == default_name(one.id, None, other)
    assert store_one(store, flat) == one and store_one(store, flat, base_fingerprint=other) == two
    for adapter in (one, two):
        assert torch.equal(store.load_by_id(one.id, TINY, base_fingerprint=adapter.base_fingerprint), flat)


def test_weights_of_several_names_are_found_while_one_is_sound(store: AdapterStore) -> None:
    flat = random_flat(TINY)
    one, two = store_one(store, flat, name="one"), store_one(store, flat, name="two")
    (one.path / "adapter_model.safetensors").write_bytes(b"")
    assert torch.equal(store.load_by_id(two.id, TINY), flat)
    (two.path / "adapter_model.safetensors").write_bytes(b"")
    with pytest.raises(AdapterCorruptError, match="one"):
        store.load_by_id(two.id, TINY)

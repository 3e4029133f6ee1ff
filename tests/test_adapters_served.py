"""Adapters as an engine elsewhere reads them: folders of a content, whatever becomes of the store's names."""

from __future__ import annotations

from pathlib import Path

import pytest
from adapter_folders import TINY, store_one
from helpers import random_flat

from dnd_sdk.adapters import AdapterStore, find_served, prune_served, served_folder, served_name
from dnd_sdk.adapters import served as served_module
from dnd_sdk.errors import AdapterNotFoundError


def test_a_folder_holds_the_same_files_and_outlives_the_name(store: AdapterStore, tmp_path: Path) -> None:
    made = store_one(store, random_flat(TINY, seed=1), name="task")
    folder = served_folder(made, tmp_path / "served")
    assert folder.name == served_name(made.id) == f"dnd-{made.id[:16]}"
    assert {p.name for p in folder.iterdir()} == {"adapter_config.json", "adapter_model.safetensors", "dnd.json"}
    assert (folder / "adapter_model.safetensors").samefile(made.path / "adapter_model.safetensors")
    before = (folder / "adapter_model.safetensors").read_bytes()
    store.rm("task")
    other = store_one(store, random_flat(TINY, seed=2), name="task")
    assert served_folder(made, tmp_path / "served") == folder
    assert (folder / "adapter_model.safetensors").read_bytes() == before
    assert served_folder(other, tmp_path / "served") != folder


def test_files_are_copied_where_links_cannot_be(
    store: AdapterStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_links(*_: object) -> None:
        raise OSError("no links here")

    monkeypatch.setattr(served_module.os, "link", no_links)
    made = store_one(store, random_flat(TINY, seed=1), name="task")
    file = served_folder(made, tmp_path / "served") / "adapter_model.safetensors"
    wanted = made.path / "adapter_model.safetensors"
    assert file.read_bytes() == wanted.read_bytes() and not file.samefile(wanted)


def test_what_is_gone_or_replaced_is_not_served(store: AdapterStore, tmp_path: Path) -> None:
    first = store_one(store, random_flat(TINY, seed=1), name="task")
    store.rm("task")
    with pytest.raises(AdapterNotFoundError, match="was removed"):
        served_folder(first, tmp_path / "served")
    store_one(store, random_flat(TINY, seed=2), name="task")
    with pytest.raises(AdapterNotFoundError, match="was replaced"):
        served_folder(first, tmp_path / "served")
    assert not list((tmp_path / "served").glob("dnd-*"))


def test_names_are_found_by_content_first(store: AdapterStore) -> None:
    a = store_one(store, random_flat(TINY, seed=1), name="task")
    b = store_one(store, random_flat(TINY, seed=2), name=served_name(a.id))  # a name that claims another's content
    assert find_served(store, served_name(a.id)) == a and find_served(store, "task") == a
    assert find_served(store, served_name(b.id)) == b
    assert find_served(store, "dnd-" + "0" * 16) is None and find_served(store, "../task") is None


def test_folders_of_removed_adapters_go(store: AdapterStore, tmp_path: Path) -> None:
    root = tmp_path / "served"
    prune_served(root, store)
    a, b = (store_one(store, random_flat(TINY, seed=i), name=f"task{i}") for i in (1, 2))
    kept, gone = served_folder(a, root), served_folder(b, root)
    (root / "mine").mkdir()
    store.rm("task2")
    prune_served(root, store)
    assert kept.is_dir() and not gone.exists() and (root / "mine").is_dir()

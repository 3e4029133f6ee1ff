"""Files of strangers: what lies in the folder is opened, what only seems to is not."""

from __future__ import annotations

from pathlib import Path

import pytest

from dnd_sdk.errors import AdapterCorruptError
from dnd_sdk.files import read_json


def test_links_are_followed_inside_the_folder_only(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    (folder / "sub").mkdir(parents=True)
    (folder / "sub" / "real").write_text('{"a": 1}')
    (tmp_path / "outside").write_text('{"a": 2}')
    (folder / "inside").symlink_to(folder / "sub" / "real")
    (folder / "chain").symlink_to("inside")
    (folder / "leaves").symlink_to(tmp_path / "outside")
    (folder / "leaves-later").symlink_to("leaves")
    (folder / "dangling").symlink_to("nothing")
    assert read_json(folder, "inside", 99) == read_json(folder, "chain", 99) == {"a": 1}
    for name in ("leaves", "leaves-later"):
        with pytest.raises(AdapterCorruptError, match="is a link that leaves its folder"):
            read_json(folder, name, 99)
    with pytest.raises(AdapterCorruptError, match="dangling is missing"):
        read_json(folder, "dangling", 99)


def test_a_folder_that_is_a_link_itself_is_read(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "x").write_text("{}")
    (tmp_path / "real" / "y").symlink_to("x")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    assert read_json(tmp_path / "link", "x", 9) == read_json(tmp_path / "link", "y", 9) == {}


def test_sizes_are_bounded_also_behind_a_link(tmp_path: Path) -> None:
    (tmp_path / "x").write_text('{"a": 1}')
    (tmp_path / "y").symlink_to("x")
    for name in ("x", "y"):
        assert read_json(tmp_path, name, 8) == {"a": 1}
        with pytest.raises(AdapterCorruptError, match="has 8 bytes, at most 7"):
            read_json(tmp_path, name, 7)

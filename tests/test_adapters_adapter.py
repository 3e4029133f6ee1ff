"""Names and dnd.json."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from adapter_folders import BASE, TINY
from hypothesis import given
from hypothesis import strategies as st

from dnd_sdk.adapters.adapter import (
    SOURCES,
    Adapter,
    check_name,
    default_name,
    is_name,
    manifest_text,
    read_layout,
    read_manifest,
)
from dnd_sdk.adapters.card import card_text
from dnd_sdk.errors import AdapterCorruptError, ConfigError


def adapter(folder: Path) -> Adapter:
    return Adapter(
        name=folder.name,
        id="a" * 64,
        path=folder,
        source="generated",
        created="2026-01-02T03:04:05+00:00",
        base_fingerprint=BASE,
        layout_digest=TINY.digest,
        prompt_hash="c" * 64,
        n_prompts=64,
        generator="gen1",
        encoder="all-minilm-l6-v2",
        scores={"best": 0.5},
        encoder_fingerprint="e" * 64,
    )


def written(tmp_path: Path, **changes: object) -> Path:
    folder = tmp_path / "one"
    folder.mkdir()
    data = json.loads(manifest_text(adapter(folder), TINY)) | changes
    (folder / "dnd.json").write_text(json.dumps(data))
    return folder


@pytest.mark.parametrize("name", ["a", "dnd-0123456789abcdef", "9.x_y-z", "a__b", "a" * 64])
def test_good_names(name: str) -> None:
    assert check_name(name) == name


@pytest.mark.parametrize(
    "name",
    ["", ".", "..", "../x", "a/b", "a\\b", ".hidden", "-a", "_a", "A", "a b", "a\n", "a\0", "é", "a___b", "a" * 65],
)
def test_bad_names(name: str) -> None:
    with pytest.raises(ConfigError, match=r"is not allowed\n  fix: use 1-64"):
        check_name(name)


@given(st.text(max_size=80))
def test_no_accepted_name_leaves_the_folder(name: str) -> None:
    if is_name(name):
        assert Path("/x", name).resolve().parent == Path("/x").resolve()


def test_default_name_is_a_name() -> None:
    names = {default_name("0123456789abcdef" * 4, role) for role in (None, "# Role: A", "# Role: B")}
    assert len(names) == 3 and all(map(is_name, names))


def test_manifest_round_trip(tmp_path: Path) -> None:
    folder = written(tmp_path)
    assert read_manifest(folder) == adapter(folder)
    assert read_layout(folder) == TINY


def test_a_manifest_of_an_earlier_version_says_nothing_of_origin_parents_and_role(tmp_path: Path) -> None:
    folder = written(tmp_path)
    data = json.loads((folder / "dnd.json").read_text())
    (folder / "dnd.json").write_text(json.dumps({k: data[k] for k in data.keys() - {"origin", "parents", "role"}}))
    found = read_manifest(folder)
    assert (found.origin, found.parents, found.role) == (None, {}, None)


def test_the_folder_names_the_adapter(tmp_path: Path) -> None:
    moved = written(tmp_path).rename(tmp_path / "two")
    assert read_manifest(moved) == replace(adapter(moved), name="two", path=moved)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"id": "short"}, "id is 'short'"),
        ({"id": None}, "id is 'None'"),
        ({"source": "found"}, "source is 'found'"),
        ({"created": "yesterday"}, "created is"),
        ({"created": "2026-01-01T00:00:00"}, "created is"),
        ({"base_fingerprint": ""}, "base_fingerprint is"),
        ({"layout_digest": 3}, "layout_digest is"),
        ({"refined": "yesterday"}, "refined is"),
        ({"n_prompts": -1}, "n_prompts is"),
        ({"n_prompts": True}, "n_prompts is"),
        ({"generator": ["x"]}, "generator is"),
        ({"scores": {"a": "high"}}, "scores is"),
        ({"scores": {"a": float("nan")}}, "scores is"),
        ({"scores": {"a": 10**400}}, "scores is"),
        ({"origin": "somewhere"}, "origin is 'somewhere'"),
        ({"parents": None}, "parents is 'None'"),
        ({"parents": {"upper": 0.5}}, "parents is"),
        ({"parents": {"a" * 64: "half"}}, "parents is"),
        ({"role": ""}, "role is ''"),
        ({"role": 3}, "role is '3'"),
        ({"role": "x" * 100_000}, "role is 'xxx"),
        ({"role": "\ud800"}, "role is"),
        ({"format_version": 2}, r"format_version is 2, this version reads 1\n  fix: upgrade"),
        ({"format_version": None}, "format_version is None"),
    ],
)
def test_damaged_manifest(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    with pytest.raises(AdapterCorruptError, match=message):
        read_manifest(written(tmp_path, **changes))


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b"[" * 100_000, b" " * (5 * 2**20)])
def test_unreadable_manifest(tmp_path: Path, content: bytes) -> None:
    folder = written(tmp_path)
    (folder / "dnd.json").write_bytes(content)
    with pytest.raises(AdapterCorruptError, match=r"dnd\.json"):
        read_manifest(folder)


@pytest.mark.parametrize(
    "layout",
    [
        None,
        [],
        {"r": 4},
        TINY.to_dict() | {"r": 1000},
        TINY.to_dict() | {"r": float("inf")},
        TINY.to_dict() | {"modules": [["m", -3, 3]]},
        TINY.to_dict() | {"modules": [["m"]]},
    ],
)
def test_damaged_layout(tmp_path: Path, layout: object) -> None:
    with pytest.raises(AdapterCorruptError, match=r"dnd\.json"):
        read_layout(written(tmp_path, layout=layout))


@pytest.mark.parametrize("source", SOURCES)
def test_card_states_its_fields(tmp_path: Path, source: str) -> None:
    card = card_text(replace(adapter(tmp_path / "one"), source=source), TINY, 'odd "base"')
    assert "More Information Needed" not in card and "None" not in card
    assert ("generated, not trained" in card) == (source == "generated")
    for piece in (
        'odd \\"base\\"',
        BASE,
        "64 (set hash `" + "c" * 64,
        "gen1",
        "all-minilm-l6-v2",
        "## Limits",
        "best 0.5",
    ):
        assert piece in card

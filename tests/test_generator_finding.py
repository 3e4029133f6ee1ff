"""Which generator a base gets: the named folder, the shipped one by name, by fingerprint, or none."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from tiny_world import World, make_world

from dnd_sdk.doctor import examine
from dnd_sdk.errors import GeneratorError
from dnd_sdk.generator import finding
from dnd_sdk.generator.finding import bases_with_generator, generator_folder, shipped_folder
from dnd_sdk.models import DEFAULT_BASE, DEFAULT_ENCODER, EMBEDDED, SMALL_BASE, embedded_base
from dnd_sdk.session import DnD


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"))


def test_the_shipped_ones_are_found_by_what_they_were_made_for() -> None:
    own = shipped_folder(base_name=DEFAULT_BASE)
    assert own is not None and own == generator_folder(DEFAULT_BASE, None)
    assert bases_with_generator() == [DEFAULT_BASE, SMALL_BASE]
    for base in bases_with_generator():  # by either they find each other
        assert shipped_folder(base_fingerprint=EMBEDDED[base].fingerprint) == shipped_folder(base_name=base)
        assert embedded_base(EMBEDDED[base].fingerprint) == base
    assert embedded_base("") is None and embedded_base("f" * 64) is None
    assert shipped_folder(encoder_name=DEFAULT_ENCODER) is not None
    assert shipped_folder(base_name="nobody's") is None and generator_folder("nobody's", None) is None


def test_a_folder_that_is_named_wins_and_must_be_there(tmp_path: Path) -> None:
    assert generator_folder(DEFAULT_BASE, tmp_path) == tmp_path
    with pytest.raises(GeneratorError, match="no generator folder"):
        generator_folder(DEFAULT_BASE, tmp_path / "none")


@pytest.fixture
def renamed(world: World, tmp_path: Path) -> str:
    """The base under another name: only its weights say what it is."""
    return str(shutil.copytree(world.base, tmp_path / "copy"))


def test_a_shipped_generators_base_is_known_under_another_name(
    world: World, renamed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = {"encoder": str(world.encoder), "home": world.home}
    assert DnD.load(renamed, **known).generator is None
    monkeypatch.setattr(finding, "SHIPPED", world.generator.parent)
    assert generator_folder(renamed, None) is None
    found = DnD.load(renamed, **known).generator
    assert found is not None and found.base_fingerprint


def test_doctor_looks_for_it_as_a_session_does(world: World, renamed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    known = {"base": renamed, "encoder": str(world.encoder)}
    assert {c.name: c.status for c in examine(world.home, **known)}["generator"] == "warn"
    monkeypatch.setattr(finding, "SHIPPED", world.generator.parent)
    assert {c.name: c.status for c in examine(world.home, **known)}["generator"] == "ok"

"""`DnD` loads from folders, refuses what does not fit, shares a store, and closes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers import random_flat
from session_parts import logits
from tiny_world import World, prompts_of, save_base

from dnd_sdk.adapters import AdapterStore
from dnd_sdk.errors import GeneratorError, LayoutMismatchError
from dnd_sdk.session import DnD


@pytest.fixture
def dnd(world: World) -> DnD:
    return world.session()


def test_close_empties_the_slots_and_the_context_manager_closes(dnd: DnD) -> None:
    with dnd:
        dnd.adapt(prompts_of("upper"))
        assert dnd.engine.bank.resident()
    assert dnd.engine.bank.resident() == []


def test_load_makes_a_session_from_folders(world: World) -> None:
    dnd = DnD.load(str(world.base), world.generator, home=world.home)
    assert (dnd.layout, dnd.encoder.name, dnd.home) == (dnd.generator.layout, str(world.encoder), world.home)
    assert dnd.adapt(prompts_of("upper")).decision == "generate"
    assert dnd.adapt(prompts_of("upper")).decision == "reuse"
    bare = DnD.load(str(world.base), encoder=str(world.encoder), home=world.home)
    assert bare.generator is None and bare.layout.r == 8


def test_load_refuses_what_does_not_fit(world: World, tmp_path: Path) -> None:
    other = save_base(tmp_path / "other", seed=5)
    with pytest.raises(LayoutMismatchError, match="same shapes, other weights"):
        DnD.load(str(other), world.generator, home=world.home)
    with pytest.raises(GeneratorError, match="no generator folder"):
        DnD.load(str(world.base), tmp_path / "nothing", home=world.home)
    (tmp_path / "empty").mkdir()
    with pytest.raises(GeneratorError, match=r"no config\.json"):
        DnD.load(str(world.base), tmp_path / "empty", home=world.home)
    assert not world.home.root.exists()


def test_an_adapter_of_another_base_is_refused(world: World) -> None:
    dnd = world.session()
    flat = random_flat(dnd.layout)
    dnd.store.put(flat, dnd.layout, base_name="x", base_fingerprint="other", source="trained", name="foreign")
    before = logits(dnd)
    with pytest.raises(LayoutMismatchError, match="made for another base model"):
        dnd.complete("hello", adapter="foreign")
    assert dnd.engine.bank.resident() == [] and torch.equal(logits(dnd), before)


def test_a_store_shared_by_two_sessions_stays_in_step(world: World) -> None:
    one, two = world.session(), world.session()
    made = one.adapt(prompts_of("upper"), name="shared")
    assert two.complete("hello", adapter="shared", max_new_tokens=4).adapter == "shared"
    assert two.adapt(prompts_of("upper")).adapter == made.adapter
    AdapterStore(world.home).rm("shared")
    assert two.route(prompts_of("upper")).decision == "generate"
    assert two.adapt(prompts_of("upper")).decision == "generate"

"""`adapt(mode="merge")`: the nearest stored adapters become one, with its parents on record."""

from __future__ import annotations

from pathlib import Path

import pytest
from cli_runner import dnd_json
from helpers import random_flat
from tiny_world import World, prompts_of

from dnd_sdk.adaptation import Limits
from dnd_sdk.adapters import Adapter
from dnd_sdk.errors import ConfigError, StorageError
from dnd_sdk.lora.merge import merge_flats
from dnd_sdk.session import DnD

MIXED = prompts_of("upper", 6) + prompts_of("lower", 6) + prompts_of("digits", 2)


@pytest.fixture
def dnd(world: World) -> DnD:
    return world.session()


@pytest.fixture
def parents(dnd: DnD) -> dict[str, Adapter]:
    return {task: dnd.adapt(prompts_of(task), name=task).adapter for task in ("upper", "lower", "digits")}


def test_merging_the_nearest(dnd: DnD, parents: dict[str, Adapter]) -> None:
    result = dnd.adapt(MIXED, mode="merge", top_k=2, name="mixed")
    made = result.adapter
    assert result.decision == "merge" and made == dnd.store.get("mixed") and made.source == "merged"
    assert result.score == result.neighbours[0][1] and "x 0." in result.reason and "rank 4 keeps" in result.reason
    chosen = [parents[name] for name, _ in result.neighbours]
    scores = [score for _, score in result.neighbours]
    assert len(chosen) == 2 and made.parents == pytest.approx(
        {a.id: s / sum(scores) for a, s in zip(chosen, scores, strict=True)}
    )
    flats = [dnd.store.load(a, dnd.layout) for a in chosen]
    expected, _ = merge_flats(flats, [s / sum(scores) for s in scores], dnd.layout)
    assert (dnd.store.load(made, dnd.layout) - expected).abs().max() < 1e-6
    assert made.id in dnd.engine.bank.resident() and dnd.store.verify() == []
    card = (made.path / "README.md").read_text()
    assert all(f"`{a.id[:16]}` x" in card for a in chosen) and "generator:" not in card
    assert dnd.complete("hello", "mixed", max_new_tokens=2).adapter == "mixed"


def test_a_merged_adapter_is_reused_but_never_merged_again(dnd: DnD, parents: dict[str, Adapter]) -> None:
    made = dnd.adapt(MIXED, mode="merge", top_k=2).adapter
    assert dnd.adapt(MIXED).adapter == made
    again = dnd.adapt(MIXED, mode="merge", top_k=2)
    assert again.adapter == made and again.adapter.parents == made.parents
    assert len(dnd.store.ls()) == len(parents) + 1


def test_nothing_to_merge_and_only_one(dnd: DnD) -> None:
    nothing = dnd.adapt(MIXED, mode="merge")
    assert (nothing.decision, nothing.adapter) == ("base", None) and "no stored adapter" in nothing.reason
    only = dnd.adapt(prompts_of("upper")).adapter
    other = dnd.adapt(prompts_of("lower"), role="# Role: Clerk").adapter
    found = dnd.adapt(MIXED, mode="merge")
    assert (found.decision, found.adapter) == ("reuse", only) and other.role is not None


def test_the_same_weights_under_two_names_are_one_parent(dnd: DnD, parents: dict[str, Adapter], tmp_path: Path) -> None:
    expected = dnd.adapt(MIXED, mode="merge", top_k=2, name="mixed").adapter
    nearest = max(expected.parents, key=expected.parents.get)  # type: ignore[arg-type]
    twin = dnd.store.export(nearest, tmp_path / "twin")
    dnd.import_adapter(twin, name="twin", prompts=prompts_of("upper", 3))
    again = dnd.adapt(MIXED, mode="merge", top_k=2)
    assert again.decision == "merge" and set(again.adapter.parents) == set(expected.parents)
    for name in dnd.store.ls():
        if name.id != nearest:
            dnd.store.rm(name.name)
    assert dnd.adapt(MIXED, mode="merge").decision == "reuse", "two names, one adapter to merge"


def test_merging_needs_no_generator(world: World, parents: dict[str, Adapter]) -> None:
    assert world.session(generator=False).adapt(MIXED, mode="merge").decision == "merge"


@pytest.mark.parametrize("top_k", [0, -1, 17])
def test_top_k_is_bounded(dnd: DnD, top_k: int) -> None:
    with pytest.raises(ConfigError, match="top_k must be"):
        dnd.adapt(MIXED, mode="merge", top_k=top_k)


def test_a_failed_merge_leaves_nothing(dnd: DnD, parents: dict[str, Adapter], monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise StorageError("disk full")

    before = [a.name for a in dnd.store.ls()]
    monkeypatch.setattr(dnd.engine, "hold", full)
    with pytest.raises(StorageError):
        dnd.adapt(MIXED, mode="merge")
    assert [a.name for a in dnd.store.ls()] == before


def test_weights_that_derail_the_base_are_not_kept(world: World) -> None:
    dnd = world.session(vetting=Limits(max_kl=0.0))
    for i, task in enumerate(("upper", "lower")):
        dnd.store.put(
            random_flat(dnd.layout, seed=i, std=3.0),
            dnd.layout,
            base_name=dnd.base.name,
            base_fingerprint=dnd.base.fingerprint,
            source="imported",
            exemplars=dnd.encoder.encode(prompts_of(task), with_states=False).pooled,
            encoder=dnd.encoder.name,
            encoder_fingerprint=dnd.encoder.fingerprint,
        )
    found = dnd.adapt(MIXED, mode="merge")
    assert found.decision == "base" and "derail" in found.reason and len(dnd.store.ls()) == 2


def test_merge_on_the_command_line(world: World, parents: dict[str, Adapter]) -> None:
    found = dnd_json(
        "adapt", "-", "--mode", "merge", "--top-k", 3, "--name", "m", "--explain", *world.options,
        stdin="\n".join(MIXED),
    )  # fmt: skip
    assert (found["decision"], found["adapter"]["source"]) == ("merge", "merged")
    assert len(found["neighbours"]) == 3
    shown = dnd_json("adapters", "show", "m", "--home", world.home.root)["adapter"]
    assert sum(shown["parents"].values()) == pytest.approx(1.0) and set(shown["parents"]) == {
        a.id for a in parents.values()
    }

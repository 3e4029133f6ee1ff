"""Slots of a larger rank than the generator's: imports of that rank, and adapters that any session can use."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from adapter_folders import peft_folder, peft_tensors
from cli_runner import dnd as command
from cli_runner import dnd_json
from tiny_world import World, prompts_of

from dnd_sdk.errors import ConfigError, LayoutMismatchError
from dnd_sdk.lora import LoraLayout, widened
from dnd_sdk.session import DnD

OPTIONS = {"max_new_tokens": 6}


def session(world: World, r: int | None = None, *, generator: bool = True) -> DnD:
    folder = str(world.generator) if generator else None
    return DnD.load(str(world.base), folder, encoder=str(world.encoder), home=world.home, r=r)


def large_import(world: World, folder: Path, r: int = 6) -> Path:
    with session(world, generator=False) as plain:
        layout = LoraLayout.from_model(plain.base.model, r=r, lora_alpha=2.0 * r)
    return peft_folder(folder, peft_tensors(layout), layout)


def test_an_adapter_above_the_slots_rank_says_how_to_have_larger_ones(world: World, tmp_path: Path) -> None:
    folder = large_import(world, tmp_path / "theirs")
    with session(world) as usual, pytest.raises(LayoutMismatchError, match=r"rank 6 .* slots of rank 4") as caught:
        usual.import_adapter(folder, name="theirs")
    assert caught.value.fix == "use slots of rank 6: DnD.load(r=6), --r 6 or r = 6 in dnd.toml"
    with session(world, 6) as wide:
        wide.import_adapter(folder, name="theirs", prompts=prompts_of("upper"))
        assert wide.complete("hello", adapter="theirs", **OPTIONS).adapter == "theirs"
        assert [name for name, _ in wide.route(prompts_of("upper")).neighbours] == ["theirs"]
    with session(world) as usual:  # too large for these slots: by name an error, in routing not there
        assert usual.route(prompts_of("upper")).neighbours == []
        with pytest.raises(LayoutMismatchError, match="slots of rank 4"):
            usual.complete("hello", adapter="theirs", **OPTIONS)


def test_what_is_generated_is_the_same_adapter_at_any_rank(world: World) -> None:
    with session(world) as usual:
        made = usual.adapt(prompts_of("digits"), name="made", mode="generate").adapter
        answers = [usual.complete(text, adapter="made", **OPTIONS).text for text in ("hello", "1 + 1")]
        flat = usual.store.load(made, usual.layout)
    with session(world, 10) as wide:
        assert wide.layout.r == 10 and wide.layout.scaling == usual.layout.scaling
        again = wide.adapt(prompts_of("digits"), mode="generate").adapter
        assert again == made, "stored at the generator's own rank"
        assert [wide.complete(text, adapter="made", **OPTIONS).text for text in ("hello", "1 + 1")] == answers
        assert torch.equal(wide.store.load(made, wide.layout), widened(flat, usual.layout, wide.layout))
        assert wide.adapt(prompts_of("digits")).adapter == made
        near = wide.route([p + "!" for p in prompts_of("digits")])
        assert [name for name, _ in near.neighbours] == ["made"], "found by routing, too"
        merged = wide.adapt(prompts_of("upper"), name="new", mode="generate").adapter
        assert merged is not None and wide.store.verify() == []
    with session(world) as usual:
        assert usual.complete("hello", adapter="new", **OPTIONS).adapter == "new"


def test_an_import_is_stored_at_its_own_rank_whatever_the_slots_have(world: World, tmp_path: Path) -> None:
    small, large = large_import(world, tmp_path / "small", r=2), large_import(world, tmp_path / "large", r=6)
    with session(world, 10) as wide:
        first = wide.import_adapter(small, name="small")
        theirs = wide.import_adapter(large, name="large", prompts=prompts_of("upper"))
        answer = wide.complete("hello", adapter="small", **OPTIONS).text
    with session(world, 8) as wide:
        assert wide.import_adapter(large, name="large", prompts=prompts_of("upper")).id == theirs.id
    with session(world) as usual:
        assert usual.complete("hello", adapter="small", **OPTIONS).text == answer
        assert usual.import_adapter(small, name="small") == first and usual.store.verify() == []


def test_merges_have_the_slots_rank(world: World) -> None:
    with session(world, 8) as wide:
        for task in ("upper", "digits"):
            wide.adapt(prompts_of(task), name=task, mode="generate")
        merged = wide.adapt(prompts_of("upper", 10), name="both", mode="merge")
        assert merged.decision == "merge" and "rank 8 keeps 100%" in merged.reason
        assert wide.complete("hello", adapter="both", **OPTIONS).adapter == "both" and wide.store.verify() == []


def test_without_a_generator_the_rank_is_free(world: World) -> None:
    with session(world, 3, generator=False) as small:
        assert small.layout.r == 3
    with session(world, generator=False) as usual:
        assert usual.layout.r == 8


@pytest.mark.parametrize("r", [0, -1, 65, 10**9, 1.5, "x", float("nan"), True])
def test_ranks_that_are_none(world: World, r: object) -> None:
    with pytest.raises(ConfigError, match="r must be"):
        session(world, r)  # type: ignore[arg-type]


def test_a_rank_below_the_generators_is_refused(world: World) -> None:
    with pytest.raises(ConfigError, match="r must be at least 4, the rank of the generator's adapters, got 2"):
        session(world, 2)


def test_the_command_and_the_settings(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = large_import(world, tmp_path / "theirs")
    failed = command("adapters", "import", folder, "--name", "theirs", *world.options)
    assert failed.exit_code == 1 and "--r 6" in failed.stderr
    assert dnd_json("adapters", "import", folder, "--name", "theirs", "--r", "6", *world.options)["adapter"]["name"]
    monkeypatch.setenv("DND_R", "6")
    assert dnd_json("run", "hello", "-a", "theirs", "--max-new-tokens", "4", *world.options)["adapter"] == "theirs"

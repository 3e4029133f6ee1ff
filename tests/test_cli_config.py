"""`dnd config`, `dnd env`, settings in force behind the commands, completion, and help that is there everywhere."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cli_runner import dnd, dnd_json
from tiny_world import World, prompts_of
from typer.main import get_command
from typer.testing import CliRunner

import dnd_sdk
from dnd_sdk.cli.main import app
from dnd_sdk.cli.output import table
from dnd_sdk.config import Home


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder."""
    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


def commands(command: Any = None, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every command that does something, with the words that call it."""
    command = get_command(app) if command is None else command
    if not hasattr(command, "commands"):
        yield path, command
    for name, child in getattr(command, "commands", {}).items():
        yield from commands(child, (*path, name))


def test_show_tells_values_and_where_they_stand(work: Path, home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    (work / "dnd.toml").write_text('n_slots = 3\nstop = ["[x]", ":+1:"]')
    monkeypatch.setenv("DND_DEVICE", "cpu")
    shown = dnd_json("config", "show", "--temperature", "0.5")["settings"]
    assert shown["n_slots"] == {"value": 3, "from": "dnd.toml"}
    assert shown["device"] == {"value": "cpu", "from": "DND_DEVICE"}
    assert shown["temperature"] == {"value": 0.5, "from": "--temperature"}
    assert shown["home"] == {"value": str(home.root), "from": "DND_HOME"}
    assert shown["generator"] == {"value": None, "from": "default"}
    lines = [line.split() for line in dnd("config", "show").stdout.splitlines()]
    assert ["n_slots", "3", "dnd.toml"] in lines and ["stop", '["[x]",', '":+1:"]', "dnd.toml"] in lines


def test_path(work: Path) -> None:
    files = dnd_json("config", "path")["files"]
    assert files[0] == {"path": str(work / "dnd.toml"), "exists": False}
    assert files[1]["path"].endswith("config.toml")
    assert f"{work / 'dnd.toml'}  not there" in dnd("config", "path").stdout
    (work / "dnd.toml").write_text("= broken")
    assert dnd_json("config", "path")["files"][0]["exists"]
    assert str(work / "dnd.toml") in dnd("config", "path", "-q").stdout.splitlines()


def test_schema_is_a_json_schema(work: Path) -> None:
    printed = json.loads(dnd("config", "schema").stdout)
    assert printed == dnd_json("config", "schema")["schema"]
    assert printed["additionalProperties"] is False and printed["properties"]["n_slots"]["anyOf"][0]["minimum"] == 1


def test_init_writes_once(work: Path) -> None:
    file = work / "dnd.toml"
    assert dnd_json("config", "init")["path"] == str(file)
    written = file.read_text()
    assert "# temperature = 0.0" in written and tomllib.loads(written) == {}
    file.write_text("n_slots = 2")
    assert "--force" in dnd_json("config", "init", code=1)["error"]["fix"] and file.read_text() == "n_slots = 2"
    assert dnd("config", "init", "--force").exit_code == 0 and file.read_text() == written
    file.unlink()
    file.mkdir()
    assert dnd_json("config", "init", "--force", code=1)["error"]["type"] == "StorageError"


def test_a_broken_file_stops_commands_but_not_those_that_mend_it(work: Path) -> None:
    (work / "dnd.toml").write_text("tempreature = 1")
    result = dnd("adapters", "ls")
    assert result.exit_code == 1 and result.stdout == ""
    assert result.stderr == "error: dnd.toml: 'tempreature' is not a setting\nfix: did you mean 'temperature'?\n"
    assert dnd_json("run", "hi", code=1)["error"]["type"] == "ConfigError"
    for command in (
        ("config", "path"),
        ("config", "schema"),
        ("env",),
        ("config", "init", "--force"),
        ("config", "show"),
    ):
        assert dnd(*command).exit_code == 0, command


def test_settings_reach_the_model(world: World, work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (work / "dnd.toml").write_text(
        f"base = {str(world.base)!r}\ngenerator = {str(world.generator)!r}\nmax_new_tokens = 3\nn_slots = 2"
    )
    assert dnd_json("run", "hi", "-a", "base")["usage"]["completion_tokens"] == 3
    monkeypatch.setenv("DND_MAX_NEW_TOKENS", "2")
    assert dnd_json("run", "hi", "-a", "base")["usage"]["completion_tokens"] == 2
    assert dnd_json("run", "hi", "-a", "base", "--max-new-tokens", 1)["usage"]["completion_tokens"] == 1
    monkeypatch.setenv("DND_DTYPE", "int4")
    assert "DND_DTYPE: dtype" in dnd_json("run", "hi", code=1)["error"]["message"]


def test_the_home_in_a_file_holds_the_adapters(world: World, work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    world.session().adapt(prompts_of("lower"), name="mine")
    monkeypatch.delenv("DND_HOME")
    (work / "dnd.toml").write_text(f"home = {str(world.home.root)!r}")
    assert dnd("adapters", "ls", "-q").stdout == "mine\n"
    monkeypatch.setenv("DND_HOME", str(work / "other"))
    assert dnd("adapters", "ls", "-q").stdout == ""
    assert dnd("adapters", "ls", "-q", "--home", world.home.root).stdout == "mine\n"


def complete(line: str, **env: str) -> list[str]:
    """What a shell is offered at the end of `line`."""
    words = {"_DND_COMPLETE": "complete_bash", "COMP_WORDS": line, "COMP_CWORD": str(len(line.split(" ")) - 1)}
    return CliRunner().invoke(app, [], env={**words, **env}).stdout.split()


def test_completion_offers_adapter_names(home: Home, work: Path) -> None:
    for name in ("tickets", "travel", ".put-1"):
        (home.adapters / name).mkdir(parents=True)
        (home.adapters / name / "dnd.json").write_text("damaged")
    (home.adapters / "no-adapter").mkdir()
    for command in ("adapters show", "adapters rm", "adapters export", "adapters verify"):
        assert complete(f"dnd {command} ") == ["tickets", "travel"], command
    assert complete("dnd adapters rm tic") == ["tickets"]
    assert complete("dnd run hi -a ") == ["auto", "base", "tickets", "travel"]
    assert complete("dnd chat -a t") == ["tickets", "travel"]
    assert complete(f"dnd adapters show --home {work} ") == []
    assert complete(f"dnd adapters show --home {home.root} tr") == ["travel"]


def test_completion_never_fails(home: Home, work: Path) -> None:
    (work / "dnd.toml").write_text("= broken")
    assert complete("dnd run hi -a ") == ["auto", "base"]
    assert complete("dnd adapters show ") == []
    (work / "dnd.toml").unlink()
    home.root.mkdir(parents=True)
    home.adapters.write_text("a file")
    assert complete("dnd adapters show ") == []


def test_completion_loads_no_torch(home: Home) -> None:
    (home.adapters / "tickets").mkdir(parents=True)
    (home.adapters / "tickets" / "dnd.json").write_text("{}")
    code = (
        "import sys, atexit; sys.argv = ['dnd']; from dnd_sdk.cli.main import main\n"
        "atexit.register(lambda: print(sorted({'torch', 'numpy', 'faiss'} & sys.modules.keys()), file=sys.stderr))\n"
        "main()"
    )
    words = {"_DND_COMPLETE": "complete_bash", "COMP_WORDS": "dnd run hi -a t", "COMP_CWORD": "4"}
    done = subprocess.run([sys.executable, "-c", code], env={**os.environ, **words}, capture_output=True, text=True)
    assert (done.stdout.split(), done.stderr.strip()) == (["tickets"], "[]")


def test_env_is_a_block_to_paste(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(work))
    monkeypatch.setenv("DND_HOME", str(work / "mine"))
    monkeypatch.setenv("DND_API_KEY", "s3cret")
    monkeypatch.setenv("TRANSFORMERS_OFFLINE", "perhaps")
    found = dnd_json("env")["environment"]
    assert found["dnd_sdk"] == dnd_sdk.__version__ and found["python"].startswith(sys.version.split()[0])
    assert {"torch", "transformers", "peft", "faiss-cpu", "platform", "cpu", "gpu", "settings files"} <= found.keys()
    assert found["home"] == "~/mine" and "DND_API_KEY" in found["variables"]
    assert found["offline"] == "HF_HUB_OFFLINE on, TRANSFORMERS_OFFLINE not understood"
    printed = dnd("env").stdout
    assert printed.splitlines() == [f"- {name}: {value}" for name, value in found.items()]
    assert "s3cret" not in printed and str(work) not in printed


def test_env_survives_a_broken_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    def broken() -> int:
        raise RuntimeError("driver too old")

    monkeypatch.setattr(torch.cuda, "device_count", broken)
    assert dnd_json("env")["environment"]["gpu"] == "torch fails: RuntimeError: driver too old"


@pytest.mark.parametrize(("path", "command"), [pytest.param(p, c, id=" ".join(p)) for p, c in commands()])
def test_every_command_has_examples_of_itself_and_json(path: tuple[str, ...], command: Any) -> None:
    lines = command.epilog.splitlines()
    assert command.help and lines[0] == "Examples:"
    assert any(" ".join(("dnd", *path)) in line for line in lines[1:])
    assert {"--json", "--quiet", "--home", "--debug"} <= {o for p in command.params for o in p.opts}


def test_usage_errors_are_two_lines_with_the_nearest_name() -> None:
    for args, near, fix in (
        (("adpat",), "'adapt'", "dnd --help"),
        (("adapters", "shwo"), "'show'", "dnd adapters --help"),
        (("run", "hi", "--tempreature", "1"), "--temperature", "dnd run --help"),
    ):
        result = dnd(*args)
        assert (result.exit_code, result.stdout) == (2, "")
        what, how = result.stderr.splitlines()
        assert what.startswith("error: ") and near in what and how == f"fix: try: {fix}"
        assert dnd_json(*args, code=2)["error"]["fix"] == f"try: {fix}"


@pytest.mark.parametrize("args", [(), ("adapters",), ("config",)])
def test_without_a_command_the_help_is_printed(args: tuple[str, ...]) -> None:
    result = dnd(*args)
    assert result.exit_code == 2 and "Commands" in result.output and "error" not in result.output


def test_version() -> None:
    result = dnd("--version")
    assert (result.exit_code, result.stdout) == (0, f"dnd {dnd_sdk.__version__}\n")


def test_no_color_is_honoured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert "\x1b[" in table(("name",), [("a",)])
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b[3" not in table(("name",), [("a",)])


def test_it_runs_as_a_module() -> None:
    done = subprocess.run([sys.executable, "-m", "dnd_sdk.cli", "--version"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, f"dnd {dnd_sdk.__version__}\n")

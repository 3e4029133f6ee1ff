"""Every bad input of the command line: two lines, the right exit code, JSON on request, an unchanged home."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from cli_runner import dnd, dnd_json
from tiny_world import World, prompts_of, save_base

from dnd_sdk.cli.output import Output, error_exit, sized, table
from dnd_sdk.errors import AdapterNotFoundError, ConfigError
from dnd_sdk.models import Fetching


@pytest.fixture
def adapted(world: World) -> World:
    world.session().adapt(prompts_of("lower"), name="kept")
    return world


def whole(world: World) -> bool:
    """The store holds `kept` alone, undamaged."""
    return (
        dnd_json("adapters", "verify", "--home", world.home.root)
        == {
            "schema_version": 1,
            "ok": True,
            "checked": 1,
            "problems": [],
        }
        and dnd("adapters", "ls", "-q", "--home", world.home.root).stdout == "kept\n"
    )


BAD_PROMPTS = {
    "empty": ("p.txt", b"", "holds no prompts"),
    "blank": ("p.txt", b"\n  \n", "holds no prompts"),
    "binary": ("p.txt", bytes(range(256)), "NUL byte"),
    "latin-1": ("p.txt", "caf\xe9 cr\xe8me".encode("latin-1"), "not UTF-8"),
    "no prompt in a line": ("p.jsonl", b'{"prompt": "a"}\n{"text": "b"}\n', "line 2"),
    "broken JSON": ("p.jsonl", b'{"prompt": "a"}\n{"prom', "line 2 is not JSON"),
    "no such column": ("p.csv", b"a,b\n1,2\n", "no column 'prompt'"),
    "unknown suffix": ("p.exe", b"a\n", "unknown suffix"),
}


@pytest.mark.parametrize("kind", BAD_PROMPTS)
def test_bad_prompt_files(adapted: World, tmp_path: Path, kind: str) -> None:
    name, content, match = BAD_PROMPTS[kind]
    (tmp_path / name).write_bytes(content)
    error = dnd_json("adapt", tmp_path / name, *adapted.options, code=1)["error"]
    assert error["type"] == "InputError" and match in error["message"] and error["fix"]
    assert whole(adapted)


def test_huge_prompt_files_are_refused_by_their_size(adapted: World, tmp_path: Path) -> None:
    path = tmp_path / "huge.txt"
    with path.open("wb") as f:
        f.truncate(3 * 2**30)  # sparse
    error = dnd_json("adapt", path, *adapted.options, code=1)["error"]
    assert "larger than" in error["message"] and whole(adapted)


def test_a_hundred_thousand_prompts_are_sampled_and_said_so(adapted: World, tmp_path: Path) -> None:
    path = tmp_path / "many.txt"
    path.write_text("\n".join(f"prompt {i}" for i in range(100_000)))
    result = dnd("adapt", path, "--mode", "reuse", *adapted.options)
    assert result.exit_code == 0 and "read 100000 prompts, sampled 512" in result.stderr


def test_one_prompt_is_enough(adapted: World) -> None:
    assert dnd_json("adapt", "-", *adapted.options, stdin="just one")["n_prompts"] == 1


@pytest.mark.parametrize("name", ["../evil", "/etc/passwd", "a/../b", "UPPER", "a___b"])
def test_names_cannot_leave_the_store(adapted: World, tmp_path: Path, name: str) -> None:
    path = tmp_path / "p.txt"
    path.write_text("\n".join(prompts_of("upper")))
    assert dnd_json("adapt", path, "--name", name, *adapted.options, code=1)["error"]["type"] == "ConfigError"
    for command in (("show", name), ("rm", name), ("export", name, tmp_path / "out"), ("verify", name)):
        assert dnd_json("adapters", *command, "--home", adapted.home.root, code=4)["error"]["fix"]
    assert not (tmp_path / "out").exists() and whole(adapted)


@pytest.mark.parametrize(
    "command",
    [("run", "hi", "-a", "nope"), ("chat", "-a", "nope"), ("adapters", "show", "nope"), ("adapters", "rm", "nope")],
)
def test_an_unknown_adapter_is_exit_code_4(adapted: World, command: tuple[str, ...]) -> None:
    options = adapted.options if command[0] != "adapters" else ["--home", adapted.home.root]
    error = dnd_json(*command, *options, code=4)["error"]
    assert error["type"] == "AdapterNotFoundError" and "nope" in error["message"]
    assert whole(adapted)


def test_an_adapter_of_another_base(adapted: World, tmp_path: Path) -> None:
    other = save_base(tmp_path / "other", seed=9)
    options = ["--base", other, "--encoder", adapted.encoder, "--home", adapted.home.root]
    error = dnd_json("run", "hi", "-a", "kept", *options, code=1)["error"]
    assert error["type"] == "LayoutMismatchError" and "another base" in error["message"]
    assert dnd_json("run", "hi", "-a", "base", "--max-new-tokens", 2, *options)["decision"] == "base"
    fit = dnd_json("run", "hi", "--base", other, "--generator", adapted.generator, code=1)["error"]
    assert fit["type"] == "LayoutMismatchError" and "same shapes, other weights" in fit["message"]


BAD_REQUESTS = {
    "no such base": (("run", "hi", "--base", "no/such/folder/here"), 1, "WeightsUnavailableError"),
    "no such generator": (("run", "hi", "--generator", "nothing-here"), 1, "GeneratorError"),
    "no such device": (("run", "hi", "--device", "abacus"), 1, "ConfigError"),
    "empty text": (("run", "  "), 1, "InputError"),
    "temperature": (("run", "hi", "--temperature", "-3"), 1, "ConfigError"),
    "compare": (("run", "hi", "--compare", "all"), 1, "ConfigError"),
    "missing file": (("adapt", "missing.txt"), 1, "InputError"),
    "missing import": (("adapters", "import", "missing-folder"), 1, "InputError"),
    "missing tasks": (("eval", "missing-folder"), 1, "InputError"),
    "bad set": (("eval", ".", "--set", "boss"), 1, "ConfigError"),
    "bad set under its old name": (("bench", "gate", ".", "--role", "boss"), 1, "ConfigError"),
    "missing config": (("train", "zoo", ".", "--config", "missing.toml"), 1, "InputError"),
    "missing zoo": (("train", "generator", ".", "--zoo", "missing-zoo"), 1, "InputError"),
    "unknown command": (("fly",), 2, None),
    "unknown option": (("run", "hi", "--fast"), 2, None),
    "missing argument": (("adapt",), 2, None),
    "not a number": (("run", "hi", "--seed", "x"), 2, None),
}


@pytest.mark.parametrize("kind", BAD_REQUESTS)
def test_bad_requests(world: World, kind: str) -> None:
    command, code, error_type = BAD_REQUESTS[kind]
    given = {"--base": world.base, "--generator": world.generator, "--home": world.home.root}
    takes_models = command[0] in ("run", "adapt") or command[:2] == ("adapters", "import")
    own = [str(x) for k, v in given.items() if takes_models and k not in command for x in (k, v)]
    error = dnd_json(*command, *own, code=code)["error"]
    assert error["message"] and error["fix"]
    assert error_type is None or error["type"] == error_type
    shown = dnd(*command, *own)
    assert shown.exit_code == code and shown.stdout == ""
    if code != 2:
        assert [line.split(":")[0] for line in shown.stderr.splitlines()[-2:]] == ["error", "fix"]


def test_debug_shows_the_traceback(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    command = ("adapters", "show", "nope", "--home", world.home.root)
    assert "Traceback" not in dnd(*command).stderr
    assert "Traceback" in dnd(*command, "--debug").stderr
    monkeypatch.setenv("DND_DEBUG", "1")
    assert "Traceback" in dnd(*command).stderr


def test_ctrl_c_is_130(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    from dnd_sdk.adapters import AdapterStore

    def interrupt(self: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(AdapterStore, "ls", interrupt)
    for flags in ((), ("--json",)):
        result = dnd("adapters", "ls", *flags)
        assert (result.exit_code, result.stdout, result.stderr.strip()) == (130, "", "interrupted")


def test_an_unexpected_error_is_two_lines_too(monkeypatch: pytest.MonkeyPatch) -> None:
    from dnd_sdk.adapters import AdapterStore

    def explode(self: Any) -> None:
        raise RuntimeError("out of\nmemory")

    monkeypatch.setattr(AdapterStore, "ls", explode)
    result = dnd("adapters", "ls")
    assert result.exit_code == 1
    assert result.stderr.splitlines()[0] == "error: RuntimeError: out of memory"
    assert dnd_json("adapters", "ls", code=1)["error"]["type"] == "RuntimeError"


def test_exit_codes_of_errors(capsys: pytest.CaptureFixture[str]) -> None:
    assert error_exit(AdapterNotFoundError("x"), []) == 4
    assert error_exit(ConfigError("x", fix="y"), []) == 1
    assert capsys.readouterr().err == "error: x\nfix: try: dnd doctor\nerror: x\nfix: y\n"


def test_a_closed_pipe_is_quiet(world: World) -> None:
    environment = {**os.environ, "DND_HOME": str(world.home.root)}
    command = [sys.executable, "-c", "from dnd_sdk.cli.main import main; main()", "--help"]
    reader = subprocess.Popen(["true"], stdin=subprocess.PIPE)
    assert reader.stdin is not None
    reader.wait()
    done = subprocess.run(command, stdout=reader.stdin, stderr=subprocess.PIPE, text=True, env=environment)
    assert "Traceback" not in done.stderr and "BrokenPipe" not in done.stderr


def test_output_pieces(capsys: pytest.CaptureFixture[str]) -> None:
    assert [sized(n) for n in (0, 999, 1000, 9_800_000, 2_500_000_000_000)] == [
        "0 B",
        "999 B",
        "1.0 KB",
        "9.8 MB",
        "2500.0 GB",
    ]
    drawn = table(("name", "size"), [("a", None), ("b" * 150, 3)])
    assert "b" * 150 in drawn and "\x1b" not in drawn
    out = Output(quiet=True)
    out.note("hidden")
    with out.step("hidden"), out.progress("hidden") as report:
        report(1, 2, "x", None)
    assert capsys.readouterr() == ("", "")
    with Output().progress("work") as report:
        for done in range(1, 4):
            report(done, 3, "x", 200.0)
    assert capsys.readouterr().err == "work 1/3 x, 3 min left\nwork 3/3 x, 3 min left\n"
    with Output().step("work") as tell:
        tell("a note")
        for done in range(0, 301, 100):
            tell(Fetching.of("m", done * 10**6, 300 * 10**6))
    first, last = ("fetching m with pip: 0 of 300 MB", "fetching m with pip: 300 of 300 MB")
    assert capsys.readouterr().err.splitlines() == ["work ...", "a note", first, last]

"""The recorded terminal: it shows what ran, escaped and without this machine's paths, and the README documents it."""

from __future__ import annotations

import importlib.util
import itertools
import json
import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from test_readme import ROOT, TEXT, commands

from dnd_sdk.config import Home

DOCS = ROOT / "docs"
SVG = "{http://www.w3.org/2000/svg}"


def load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("docs_record", DOCS / "record.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


recorder = load()


def says(*lines: str) -> recorder.Runner:
    """A runner that says the same for every command."""
    return lambda command: iter(lines)


def recorded(*lines: str) -> list[tuple[float, str]]:
    return recorder.record(says(*lines), ["/home/someone"], clock=itertools.count().__next__)


def cast_lines(text: str) -> list[str]:
    """What a terminal shows after replaying a cast; the cast must be a valid asciicast v2."""
    header, *events = [json.loads(line) for line in text.splitlines()]
    assert header["version"] == 2 and isinstance(header["width"], int) and isinstance(header["height"], int)
    times = [at for at, _, _ in events]
    assert times == sorted(times) and times[0] >= 0 and len(set(times)) > 1
    assert all(
        kind == "o" and isinstance(said, str) and "\n" not in said.replace("\r\n", "") for _, kind, said in events
    )
    shown = "".join(said for _, _, said in events).split("\r\n")
    assert len(shown) <= header["height"] and max(map(len, shown)) <= header["width"]
    return shown


def svg_lines(text: str) -> list[str]:
    """The lines that an SVG shows, empty ones left out; it must be complete in itself."""
    assert not re.search(r"@font-face|@import|<script|<image|foreignObject|\bon\w+=|url\((?!#)", text)
    assert re.findall(r"\w+://[^\s\"]+", text) == ["http://www.w3.org/2000/svg"]
    rows: dict[float, str] = {}
    matrix = [g for g in ET.fromstring(text).iter(f"{SVG}g") if str(g.get("class")).endswith("-matrix")]
    for piece in matrix[0].iter(f"{SVG}text"):
        y = float(piece.attrib["y"])
        rows[y] = rows.get(y, "") + (piece.text or "").replace("\xa0", " ").rstrip("\n")
    return [row.rstrip() for _, row in sorted(rows.items()) if row.strip()]


def not_empty(lines: list[str]) -> list[str]:
    return [line.rstrip() for line in lines if line.strip()]


def test_both_files_show_the_commands_and_their_output() -> None:
    events = recorded("decision: generate\n", "adapter:  x\n")
    shown = cast_lines(recorder.to_cast(events))
    wanted = [[f"$ {command}", "decision: generate", "adapter:  x", ""] for command in recorder.COMMANDS]
    assert shown == [*itertools.chain(*wanted), ""]
    assert svg_lines(recorder.to_svg(events)) == not_empty(shown)


def test_what_a_model_says_stays_text() -> None:
    said = "</text><script>alert(\"&amp;\")</script> [bold]x[/bold] 'é' 漢"
    events = recorded(f"\x1b[31m{said}\x1b[0m\x07\x00\t|\n")
    svg = recorder.to_svg(events)
    assert "&lt;script&gt;" in svg and "\x1b" not in svg
    assert svg_lines(svg) == not_empty(cast_lines(recorder.to_cast(events)))
    assert any(line.startswith(said) and line.endswith("|") for line in svg_lines(svg))


def test_long_lines_are_folded_alike() -> None:
    events = recorded("x" * (2 * recorder.WIDTH + 5) + "\n")
    shown = cast_lines(recorder.to_cast(events))
    assert [len(line) for line in shown[1:4]] == [recorder.WIDTH, recorder.WIDTH, 5]
    assert svg_lines(recorder.to_svg(events)) == not_empty(shown)


@pytest.mark.parametrize(
    "line", ["see /home/someone/x\n", "\x1b[1m/home/\x1b[0msomeone\n", "x" * 116 + "/home/someone\n"]
)
def test_a_path_of_this_machine_stops_the_recording(line: str) -> None:
    with pytest.raises(recorder.RecordingError, match="this machine") as e:
        recorded("fine\n", line)
    assert "/home/someone" not in str(e.value)


def test_folders_and_secrets_of_this_machine_are_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_API_TOKEN", "tok-12345678")
    monkeypatch.setenv("HOME", "/home/someone")
    assert {"tok-12345678", "/home/someone", str(ROOT)} <= set(recorder.of_this_machine())


def test_commands_run_in_a_home_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A program in place of `dnd` tells what it can see."""
    program = tmp_path / "bin" / "dnd"
    program.parent.mkdir()
    program.write_text(
        '#!/bin/sh\necho "$HOME|$DND_HOME|$SECRET_KEY|$1|$2"\nls "$DND_HOME/models" >&2\n[ "$1" != fail ]\n'
    )
    program.chmod(0o755)
    (tmp_path / "weights" / "models" / "tiny").mkdir(parents=True)
    (tmp_path / "folder").mkdir()
    monkeypatch.setattr(recorder.sys, "executable", str(program.with_name("python")))
    monkeypatch.setenv("SECRET_KEY", "tok-12345678")
    run = recorder.in_home(tmp_path / "folder", tmp_path / "weights")
    assert list(run('dnd run "a b"')) == ["~|~/.dnd||run|a b\n", "tiny\n"]
    with pytest.raises(recorder.RecordingError, match="exited with 1"):
        list(run("dnd fail"))


def test_nothing_is_written_when_a_command_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(command: str) -> Iterator[str]:
        yield "so far\n"
        raise recorder.RecordingError("it broke")

    (tmp_path / "models").mkdir()
    out = tmp_path / "out"
    out.mkdir()
    arguments = ["--weights", str(tmp_path), "--out", str(out)]
    monkeypatch.setattr(recorder, "in_home", lambda folder, weights: fails)
    assert recorder.main(arguments) == 1 and not list(out.iterdir())
    monkeypatch.setattr(recorder, "in_home", lambda folder, weights: says("ok\n"))
    assert recorder.main(arguments) == 0
    assert {path.name for path in out.iterdir()} == {"terminal.svg", "terminal.cast"}


def test_without_weights_it_says_where_they_come_from(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as e:
        recorder.main(["--weights", str(tmp_path), "--out", str(tmp_path)])
    assert e.value.code == 2 and "make demo" in capsys.readouterr().err


def test_the_committed_recording_is_what_the_readme_documents() -> None:
    shown = cast_lines((DOCS / "terminal.cast").read_text("utf-8"))
    ran = [line.removeprefix("$ ") for line in shown if line.startswith("$ ")]
    assert ran == list(recorder.COMMANDS) and set(ran) <= set(commands())
    assert shown.count("decision: generate") == 1 and shown.count("decision: reuse") == 1
    assert "(docs/terminal.svg)" in TEXT and "docs/terminal.cast" in TEXT and "python docs/record.py" in TEXT


def test_the_committed_picture_shows_the_committed_recording() -> None:
    shown = cast_lines((DOCS / "terminal.cast").read_text("utf-8"))
    assert svg_lines((DOCS / "terminal.svg").read_text("utf-8")) == not_empty(shown)


@pytest.mark.parametrize("name", ["terminal.svg", "terminal.cast"])
def test_the_committed_files_name_no_machine(name: str) -> None:
    text = (DOCS / name).read_text("utf-8")
    assert not re.search(r"(/home/\w|/root\b|/Users/|/tmp/|/work\b|[A-Z]:\\\\)", text)
    assert all(
        path.startswith("~/.dnd/adapters/") for path in re.findall(r"path:\s+([^\s\\]+)", text.replace("&#160;", " "))
    )


@pytest.mark.real
def test_the_recording_can_be_made(warm_home: Home, tmp_path: Path) -> None:
    """Elsewhere than in the repository, and with the weights that the tests keep."""
    options = ["--weights", str(warm_home.root), "--out", str(tmp_path)]
    done = subprocess.run([sys.executable, "docs/record.py", *options], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    shown = "\n".join(cast_lines((tmp_path / "terminal.cast").read_text("utf-8")))
    assert re.findall(r"decision: (\w+)", shown) == ["generate", "reuse"] and (tmp_path / "terminal.svg").is_file()

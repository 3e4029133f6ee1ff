"""The README tells the truth: its Python calls what exists, its `dnd` commands parse, its links resolve."""

from __future__ import annotations

import ast
import inspect
import re
import shlex
import tomllib
from pathlib import Path
from typing import Any

import pytest

import dnd_sdk
from dnd_sdk.config import Home

ROOT = Path(dnd_sdk.__file__).parents[1]
TEXT = (ROOT / "README.md").read_text("utf-8")
LATER = ("/v1/responses", 'engine="vllm-local"')
"""Not in this release."""


def blocks(language: str) -> list[str]:
    """The fenced blocks of one language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)


def commands() -> list[str]:
    """Every `dnd ...` command: lines of shell blocks, and code spans in the text."""
    shell = [*blocks("sh"), *blocks("console")]
    lines = [line.removeprefix("$ ") for block in shell for line in block.splitlines()]
    spans = re.findall(r"(?<!`)`(dnd [^`]+)`", re.sub(r"^```.*?^```$", "", TEXT, flags=re.MULTILINE | re.DOTALL))
    return [c for c in (*lines, *spans) if c.startswith("dnd ")]


def complaint(line: str) -> str | None:
    """Why a command line does not fit the real `dnd`, or None."""
    from typer.main import get_command

    from dnd_sdk.cli.main import app

    command: Any = get_command(app)
    words = shlex.split(line, comments=True)[1:]
    while words and hasattr(command, "commands"):
        pair = " ".join(words[:2])  # a command may be named by two words: eval paper
        name = pair if pair in command.commands else words[0]
        words = words[len(name.split()) :]
        if name not in command.commands:
            return f"{command.name} has no command {name!r}"
        command = command.commands[name]
    if hasattr(command, "commands"):
        return f"{command.name} needs a sub-command"
    known = {o for p in command.params for o in (*p.opts, *p.secondary_opts)} | {"--help", "-h"}
    unknown = [w for w in words if w.startswith("-") and w != "-" and w.split("=")[0] not in known]
    return f"no such options: {unknown}" if unknown else None


def test_there_is_something_to_check() -> None:
    assert len(blocks("python")) == 3 and len(commands()) >= 12


@pytest.mark.parametrize("line", commands())
def test_commands_exist_with_their_options(line: str) -> None:
    assert complaint(line) is None


@pytest.mark.parametrize("line", ["dnd fly", "dnd adapt x --fast", "dnd adapters", "dnd adapters fly"])
def test_the_command_check_can_fail(line: str) -> None:
    assert complaint(line) is not None


def test_the_help_of_every_named_command_works() -> None:
    from typer.testing import CliRunner

    from dnd_sdk.cli.main import app

    for path in {tuple(re.match(r"dnd((?: [a-z]+)+)", c + " ")[1].split()[:2]) for c in commands()}:  # type: ignore[index]
        plain = path if path[0] in ("adapters", "train", "models", "bench") else path[:1]
        assert CliRunner().invoke(app, [*plain, "--help"]).exit_code == 0, plain


@pytest.mark.parametrize("source", blocks("python"))
def test_python_blocks_use_what_exists(source: str) -> None:
    """Names come from `__all__`; every call on `DnD` or `dnd` has a method that accepts its arguments."""
    from dnd_sdk import DnD

    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module == "dnd_sdk":
            assert {a.name for a in node.names} <= set(dnd_sdk.__all__)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            owner = getattr(node.func.value, "id", None)
            if owner in ("dnd", "DnD"):
                given = [None] * (len(node.args) + (owner == "dnd"))
                inspect.signature(getattr(DnD, node.func.attr)).bind(*given, **{k.arg: None for k in node.keywords})


def test_the_library_example_has_six_lines() -> None:
    assert len([line for line in blocks("python")[0].splitlines() if line.strip()]) == 6


def test_the_llamaindex_lines_are_the_three_added_ones_of_the_example() -> None:
    [block] = [b for b in blocks("python") if "llamaindex" in b]
    example = (ROOT / "examples" / "three_lines.py").read_text("utf-8")
    added = [line.removesuffix("  # +").strip() for line in example.splitlines() if line.endswith("  # +")]
    assert [line.split("  # ")[0] for line in block.splitlines() if line.strip()] == added and len(added) == 3


@pytest.mark.real
def test_the_library_example_runs(
    real_home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from dnd_sdk.models.loading import DEFAULT_BASE, DEFAULT_ENCODER, pull

    for name in (DEFAULT_BASE, DEFAULT_ENCODER):
        pull(name, real_home)
    home = Home(tmp_path / "readme")
    home.root.mkdir()
    home.models.symlink_to(real_home.models, target_is_directory=True)
    monkeypatch.setenv("DND_HOME", str(home.root))
    monkeypatch.chdir(ROOT)
    names: dict[str, Any] = {}
    exec(compile(blocks("python")[0], "README.md", "exec"), names)
    assert capsys.readouterr().out.startswith("generate ")
    assert names["dnd"].adapt(names["prompts"]).decision == "reuse"


def test_the_settings_example_is_accepted(tmp_path: Path) -> None:
    from dnd_sdk.training.settings import read_settings

    [block] = blocks("toml")
    path = tmp_path / "recipe.toml"
    path.write_text(block, "utf-8")
    settings = read_settings(path)
    wanted = tomllib.loads(block)
    assert settings.lora.r == wanted["lora"]["r"]
    assert [s.objective for s in settings.stages] == [s["objective"] for s in wanted["stages"]]


@pytest.mark.parametrize("path", sorted((ROOT / "examples").rglob("*.toml")), ids=lambda p: p.name)
def test_every_recipe_in_the_examples_is_accepted(path: Path) -> None:
    from dnd_sdk.training.settings import read_settings

    assert read_settings(path).stages


def test_relative_links_resolve() -> None:
    links = [target for target in re.findall(r"\]\(([^)]+)\)", TEXT) if "://" not in target]
    assert links and all((ROOT / target).exists() for target in links)


def test_files_named_in_commands_exist_or_are_made_by_one() -> None:
    named = set(re.findall(r"examples/[\w/.]+\w", TEXT))
    assert {"examples/tiny_tasks/make.py", "examples/support_tickets/prompts.jsonl"} <= named
    assert all((ROOT / name).exists() for name in named)


def test_nothing_of_a_later_release_is_promised() -> None:
    assert not [words for words in LATER if words.lower() in TEXT.lower()]


def test_results_are_where_they_are_measured() -> None:
    """The section exists and points at the measured figures."""
    section = re.search(r"^## Results\n(.*?)^## ", TEXT, re.MULTILINE | re.DOTALL)
    assert section and "docs/LOG.md" in section[1]

"""Import weight and import direction: what may load torch, and which module may import which."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

import dnd_sdk

ROOT = Path(dnd_sdk.__file__).parents[1]
HEAVY = ("torch", "transformers", "peft", "faiss", "sentence_transformers", "llama_index", "numpy", "pydantic_settings")

ROWS = {
    **dict.fromkeys(("errors", "protocols"), 0),
    **dict.fromkeys(
        (
            "config",
            "decision_log",
            "disk",
            "embedded",
            "lora_layout",
            "models",
            "prompts",
            "roles",
            "tasks",
            "wheel_fetch",
        ),
        1,
    ),
    **dict.fromkeys(
        ("adapters", "bare_prompts", "encoder", "hyperconv", "lora_linear", "settings", "weight_tokenizer"), 2
    ),
    **dict.fromkeys(("environment", "generator", "generator_card", "routing"), 3),
    **dict.fromkeys(("engine", "observe", "stream_state", "training"), 4),
    **dict.fromkeys(("bench", "doctor", "evaluation", "session"), 5),
    **dict.fromkeys(("cli", "integrations"), 6),
}
"""The row of each module or package: an import goes to a lower row, or to a neighbour that SIDEWAYS names."""

SIDEWAYS = {
    ("embedded", "config"),
    ("embedded", "wheel_fetch"),
    ("models", "config"),
    ("models", "embedded"),
    ("models", "wheel_fetch"),
    ("stream_state", "observe"),
    ("bench", "session"),
    ("doctor", "session"),
    ("evaluation", "session"),
}

SERVING = ("session", "engine", "routing", "generator", "adapters", "encoder")


def loaded_after(code: str) -> set[str]:
    """The heavy packages a fresh interpreter holds after running `code`."""
    report = f"import sys, json; print(json.dumps([m for m in {HEAVY} if m in sys.modules]), file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", f"{code}\n{report}"], capture_output=True, text=True, check=True)
    return set(json.loads(done.stderr.strip().splitlines()[-1]))


EVERY_HELP = """
from typer.main import get_command
from typer.testing import CliRunner
from dnd_sdk.cli.main import app

def paths(command, path=()):
    yield path
    for name, child in getattr(command, "commands", {}).items():
        yield from paths(child, (*path, name))

for path in paths(get_command(app)):
    result = CliRunner().invoke(app, [*path, "--help"])
    assert result.exit_code == 0 and "Usage" in result.output, (path, result.output)
"""


@pytest.mark.parametrize("code", ["import dnd_sdk; dir(dnd_sdk); dnd_sdk.DndError", EVERY_HELP], ids=["import", "help"])
def test_nothing_heavy_is_loaded(code: str) -> None:
    assert loaded_after(code) == set()


def test_the_dnd_script_loads_no_torch_for_help() -> None:
    call = "try: main()\nexcept SystemExit as e: assert not e.code"
    assert loaded_after(f"import sys; sys.argv = ['dnd', '--help']\nfrom dnd_sdk.cli.main import main\n{call}") == set()


def test_the_check_above_can_fail() -> None:
    assert {"torch", "numpy"} <= loaded_after("import dnd_sdk, torch")


def test_all_is_sorted_and_resolves() -> None:
    assert list(dnd_sdk.__all__) == sorted(dnd_sdk.__all__)
    for name in dnd_sdk.__all__:
        assert getattr(dnd_sdk, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        _ = dnd_sdk.Nothing


def module_of(path: Path) -> str:
    """`dnd_sdk/engine/slots.py` and `cli/run.py` -> `engine`, `cli`."""
    first, *rest = path.relative_to(ROOT).parts
    return first if first in ("cli", "integrations") else rest[0].removesuffix(".py")


def imported(source: str, *, package: str) -> set[str]:
    """The dnd_sdk modules (first name below the package) that `source` imports, anywhere in the file."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {a.name.split(".")[1] for a in node.names if a.name.startswith("dnd_sdk.")}
        elif isinstance(node, ast.ImportFrom) and node.level == 1 and package:
            found.add(package)
        elif isinstance(node, ast.ImportFrom) and (node.module or "") == "dnd_sdk":
            found |= {a.name for a in node.names if a.name in ROWS} | {
                dnd_sdk._HOMES[a.name] for a in node.names if a.name in dnd_sdk._HOMES
            }
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("dnd_sdk."):
            found.add(str(node.module).split(".")[1])
    return found


@cache
def graph() -> dict[str, set[str]]:
    """Every module's imports of its neighbours."""
    arrows: dict[str, set[str]] = {}
    for tree in ("dnd_sdk", "cli", "integrations"):
        for path in (ROOT / tree).rglob("*.py"):
            if path != ROOT / "dnd_sdk" / "__init__.py":
                name = module_of(path)
                arrows.setdefault(name, set()).update(imported(path.read_text("utf-8"), package=name) - {name})
    return arrows


def violations(arrows: dict[str, set[str]]) -> list[str]:
    """Arrows that go up, or sideways without leave."""
    return [
        f"{a} (row {ROWS[a]}) imports {b} (row {ROWS[b]})"
        for a in sorted(arrows)
        for b in sorted(arrows[a])
        if ROWS[b] >= ROWS[a] and (a, b) not in SIDEWAYS
    ]


def reachable(start: str, arrows: dict[str, set[str]]) -> set[str]:
    """Everything `start` imports, directly or through others."""
    seen: set[str] = set()
    todo = [start]
    while todo:
        new = arrows.get(todo.pop(), set()) - seen
        seen |= new
        todo.extend(new)
    return seen


def test_every_module_has_a_row() -> None:
    named = {*graph(), *(b for targets in graph().values() for b in targets)}
    assert named <= ROWS.keys(), f"give these a row: {sorted(named - ROWS.keys())}"


def test_imports_go_down_only() -> None:
    assert violations(graph()) == []


def test_serving_never_imports_training() -> None:
    for module in SERVING:
        assert "training" not in reachable(module, graph()), module


def test_the_checks_on_arrows_can_fail() -> None:
    assert violations({"engine": {"session"}, "session": {"engine"}}) == ["engine (row 4) imports session (row 5)"]
    assert "training" in reachable("session", {"session": {"engine"}, "engine": {"training"}})
    assert imported("def f():\n    from dnd_sdk.training.zoo import x", package="engine") == {"training"}
    assert imported("from dnd_sdk import DnD\nimport dnd_sdk.engine.slots", package="cli") == {"session", "engine"}


def test_relative_imports_stay_inside_their_package() -> None:
    """Two dots or a bare `import cli` would make a second copy of a module under another name."""
    for tree in ("dnd_sdk", "cli", "integrations"):
        for path in (ROOT / tree).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text("utf-8"))):
                if isinstance(node, ast.ImportFrom):
                    assert node.level <= 1, f"{path}:{node.lineno}"
                    assert (node.module or "").split(".")[0] not in ("cli", "integrations") or node.level, path

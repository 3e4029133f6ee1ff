"""Import weight and import direction: what may load torch, which room may import which, and by which door."""

from __future__ import annotations

import ast
import importlib
import json
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import torch
from adapter_folders import TINY, store_one
from helpers import random_flat

import dnd_sdk
from dnd_sdk.adapters import AdapterStore
from dnd_sdk.config import Home

ROOT = Path(dnd_sdk.__file__).parents[1]
TREES = ("dnd_sdk", "cli", "integrations")
HEAVY = ("torch", "transformers", "peft", "faiss", "sentence_transformers", "llama_index", "numpy", "dnd_sdk.settings")

ROWS = {
    room: row
    for row, rooms in enumerate(
        (
            "errors protocols machine",
            "config files lora prompts tasks",
            "chat models adapters",
            "generator settings",
            "engine routing",
            "adaptation training",
            "observing",
            "session",
            "evaluation bench doctor client",
            "server",
            "integrations",
            "cli",
        )
    )
    for room in rooms.split()
}
"""The row of each room: an import goes to a lower row. There are no exceptions."""

SERVING = ("session", "engine", "routing", "generator", "adapters", "models")


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


FAKE = """
from dnd_sdk.engine import CompletionRequest, FakeBackend
from dnd_sdk.lora import LoraLayout
from dnd_sdk.lora.layout import LoraModule

layout = LoraLayout(2, 4.0, ("x",), (LoraModule("x", 3, 3),))
[answer] = FakeBackend(layout).complete([CompletionRequest("hello")])
assert answer.text == "base: hello"
"""


@pytest.mark.parametrize(
    "code",
    ["import dnd_sdk; dir(dnd_sdk); dnd_sdk.DndError", EVERY_HELP, FAKE],
    ids=["import", "help", "fake"],
)
def test_nothing_heavy_is_loaded(code: str) -> None:
    assert loaded_after(code) == set()


def test_the_dnd_script_loads_no_torch_for_help() -> None:
    call = "try: main()\nexcept SystemExit as e: assert not e.code"
    assert loaded_after(f"import sys; sys.argv = ['dnd', '--help']\nfrom dnd_sdk.cli.main import main\n{call}") == set()


READING_THE_STORE = """
from typer.testing import CliRunner
from dnd_sdk.cli.main import app
from dnd_sdk.config import Home
from dnd_sdk.doctor.checks import _Subject, _adapters

for words in {commands}:
    result = CliRunner().invoke(app, [*words, "--home", {home!r}])
    assert result.exit_code == 0, (words, result.output)
assert [c.status for c in _adapters(_Subject(Home.find({home!r}), None, None, None, "auto"))] == ["ok"]
"""


def test_what_only_reads_the_store_loads_no_torch(home: Home, tmp_path: Path) -> None:
    store, out = AdapterStore(home), tmp_path / "out"
    for i, name in enumerate(("one", "two", "three")):
        store_one(store, random_flat(TINY, seed=i), name=name, exemplars=torch.eye(3, 5), encoder="e")
    commands = [["ls"], ["ls", "--json"], ["ls", "--base", "tiny"], ["show", "one"], ["verify"], ["verify", "two"]]
    commands += [["export", "two", str(out)], ["rm", "one", "three"], ["ls", "-q"]]
    commands = [*(["adapters", *words] for words in commands), ["models", "ls"]]
    loaded = loaded_after(READING_THE_STORE.format(commands=commands, home=str(home.root)))
    assert loaded <= {"numpy", "dnd_sdk.settings"}
    assert [a.name for a in store.ls()] == ["two"] and (out / "dnd.json").is_file()


def test_the_check_above_can_fail() -> None:
    assert {"torch", "numpy"} <= loaded_after("import dnd_sdk, torch")


def test_all_is_sorted_and_resolves() -> None:
    assert list(dnd_sdk.__all__) == sorted(dnd_sdk.__all__)
    for name in dnd_sdk.__all__:
        assert getattr(dnd_sdk, name).__name__ == name
    with pytest.raises(AttributeError, match="dnd_sdk attribute Nothing"):
        _ = dnd_sdk.Nothing


@cache
def modules() -> dict[str, Path]:
    """Every module of the three trees by its installed name: `cli/run.py` is `dnd_sdk.cli.run`."""
    found = {}
    for path in (p for tree in TREES for p in (ROOT / tree).rglob("*.py")):
        parts = [p for p in path.relative_to(ROOT).with_suffix("").parts if p != "__init__"]
        found[".".join(parts if parts[0] == "dnd_sdk" else ["dnd_sdk", *parts])] = path
    return found


def room_of(module: str) -> str:
    """`dnd_sdk.engine.bank` -> `engine`; the package itself has none."""
    return [*module.split("."), ""][1]


def imports(source: str) -> Iterator[tuple[str, str]]:
    """(module, name) of what `source` imports from dnd_sdk, anywhere in the file, also for types alone."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((a.name, "") for a in node.names if a.name.split(".")[0] == "dnd_sdk")
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "dnd_sdk":
            yield from ((str(node.module), a.name) for a in node.names)


@cache
def faces() -> dict[tuple[str, str], str]:
    """(package, name) -> the module that a face takes the name from."""
    return {
        (package, alias.name): f"{package}.{node.module}"
        for package, path in modules().items()
        if (stub := path.with_suffix(".pyi")).exists()
        for node in ast.parse(stub.read_text("utf-8")).body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }


def target_of(module: str, name: str) -> str:
    """The module an import ends at, through faces."""
    while (module, name) in faces():
        module = faces()[module, name]
    return f"{module}.{name}" if f"{module}.{name}" in modules() else module


@cache
def graph() -> dict[str, set[str]]:
    """Every module's imports of other modules."""
    return {
        module: {target_of(*found) for found in imports(path.read_text("utf-8"))} - {module}
        for module, path in modules().items()
    }


def by_room(arrows: dict[str, set[str]]) -> dict[str, set[str]]:
    """The same between rooms."""
    rooms: dict[str, set[str]] = {}
    for module, targets in arrows.items():
        if room := room_of(module):
            rooms.setdefault(room, set()).update({room_of(t) for t in targets} - {room, ""})
    return rooms


def violations(arrows: dict[str, set[str]]) -> list[str]:
    """Arrows that go up or sideways."""
    return [
        f"{a} (row {ROWS[a]}) imports {b} (row {ROWS[b]})"
        for a in sorted(arrows)
        for b in sorted(arrows[a])
        if ROWS[b] >= ROWS[a]
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


def circles(arrows: dict[str, set[str]]) -> list[str]:
    """What imports itself through others."""
    return sorted(m for m in arrows if m in reachable(m, arrows))


def past_faces(module: str, source: str) -> list[str]:
    """Imports that go to another room by another way than its face."""
    mine = room_of(module)
    return [
        f"{module} imports {name} from {found}"
        for found, name in imports(source)
        if (room := room_of(found)) and room != mine and room not in ("cli", "integrations")
        if modules().get(found, Path()).name != "__init__.py" and len(found.split(".")) > 2
    ]


def test_every_room_has_a_row() -> None:
    named = {room_of(m) for m in modules()} - {""}
    assert named == ROWS.keys()


def test_imports_go_down_only() -> None:
    assert violations(by_room(graph())) == []


def test_no_module_imports_itself_through_others() -> None:
    assert circles(graph()) == []


def test_rooms_are_entered_by_their_face() -> None:
    assert [p for m, path in modules().items() for p in past_faces(m, path.read_text("utf-8"))] == []


def test_every_room_has_a_face_that_keeps_its_word() -> None:
    for package in (m for m, path in modules().items() if path.name == "__init__.py" and path.parts[-3] == "dnd_sdk"):
        loaded = importlib.import_module(package)
        assert loaded.__doc__ and (ROOT / package.replace(".", "/") / "__init__.pyi").exists(), package
        for name in loaded.__all__:
            getattr(loaded, name)


KEPT = {
    "adapters": "Adapter AdapterStore Problem",
    "engine": "Engine Generation OptionScores SlotBank TextStream option_logprobs",
    "evaluation": "EvalSettings MAX_PROMPTS METHODS Parts TaskTrainer Zoo default_methods evaluate render",
    "generator": "FORMAT_VERSION Generator GeneratorConfig",
    "models": "DEFAULT_BASE DEFAULT_ENCODER EMBEDDED Base ModelInfo fingerprint list_models load_base load_encoder",
    "prompts": "MAX_FILE_BYTES MAX_LINE_BYTES MAX_PROMPTS PromptSet clean_prompts prompt_set_hash read_prompts",
    "routing": "AdapterIndex Calibration Hit MAX_EXEMPLARS Probabilities RouteDecision Router ScoreMap Support",
    "session": "AdaptResult Completion CompletionStream DnD Limits ObserveResult",
    "tasks": "ANSWER_TYPES MAX_INFERRED_LABELS Row Task data_hash read_tasks task_names",
    "training": "run_generator run_zoo",
}
"""What programs imported from here before the rooms were made."""


@pytest.mark.parametrize("room", KEPT)
def test_a_face_keeps_the_names_that_programs_import(room: str) -> None:
    assert set(KEPT[room].split()) <= set(importlib.import_module(f"dnd_sdk.{room}").__all__)


def test_the_root_holds_six_modules() -> None:
    names = {path.stem for path in (ROOT / "dnd_sdk").glob("*.py")}
    assert names == {"__init__", "config", "errors", "machine", "protocols", "settings"}


def test_serving_never_imports_training() -> None:
    for room in SERVING:
        assert "training" not in reachable(room, by_room(graph())), room


def test_the_checks_on_arrows_can_fail() -> None:
    both = {"engine": {"session"}, "session": {"engine"}}
    assert violations(both) == ["engine (row 4) imports session (row 7)"]
    assert circles(both) == ["engine", "session"] and circles({"session": {"engine"}}) == []
    assert "training" in reachable("session", {"session": {"engine"}, "engine": {"training"}})
    typed = "if TYPE_CHECKING:\n    from dnd_sdk.training.zoo import x"
    assert list(imports(typed)) == [("dnd_sdk.training.zoo", "x")]
    assert past_faces("dnd_sdk.engine.bank", typed) == ["dnd_sdk.engine.bank imports x from dnd_sdk.training.zoo"]
    assert past_faces("dnd_sdk.training.check", typed) == []
    assert past_faces("dnd_sdk.cli.run", "from dnd_sdk.session import DnD\nfrom dnd_sdk.errors import DndError") == []
    assert target_of("dnd_sdk", "DnD") == "dnd_sdk.session.session"


def test_relative_imports_stay_inside_their_package() -> None:
    """Two dots or a bare `import cli` would make a second copy of a module under another name."""
    for path in modules().values():
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.ImportFrom):
                assert node.level <= 1, f"{path}:{node.lineno}"
                assert (node.module or "").split(".")[0] not in ("cli", "integrations") or node.level, path

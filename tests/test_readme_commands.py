"""Every command of the README and of the examples' headers is run, as it is written, and does what is said of it.

* The default base, encoder and generator are tiny stand-ins under the default names, so no command needs more options.
* What the texts leave open (TASKS, RUN, DIR, role.md, ...) is a file or folder of that very name where they are run.
* A command that a text gains fails here until RUNS says what it must do; one that no text has any more fails, too.
"""

from __future__ import annotations

import ast
import io
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import pytest
from cli_runner import dnd
from documented import header_commands, markdown_commands, typed_lines
from stand_in import furnish, install
from test_readme import ROOT, TEXT, blocks

from dnd_sdk.config import Home
from dnd_sdk.models.catalogue import DEFAULT_BASE, DEFAULT_ENCODER, SMALL_BASE
from dnd_sdk.training import settings as training_settings

EXAMPLES = ROOT / "examples"
CLIENTS = EXAMPLES / "clients"  # other packages' programs, see test_real_clients
HEADED = sorted(p for p in EXAMPLES.rglob("*.*") if p.suffix in (".py", ".toml") and CLIENTS not in p.parents)
CONSOLE, RECIPE = blocks("console")[0], blocks("toml")[0]
TRAINING = next(block for block in blocks("sh") if "dnd train" in block)


@dataclass(frozen=True)
class Run:
    """How a command is run, and what must come of it besides exit code 0."""

    says: str
    """A pattern that its output must have."""
    more: str = ""
    """What a command that is only named needs behind it."""
    leaves: str = ""
    """A file or folder that must be there then; one that must be gone with `!` before it."""
    typed: str | None = None


def rows(*names: str) -> str:
    """A table's rows, or lines, that begin with these names, one after the other."""
    return "".join(rf"^\W*{re.escape(name)}\b.*\n" for name in names)


MEASURED = ("base", "zero", "generated")
ADAPTED = r"^decision: generate\nadapter:  [\w-]+\n"
ANSWERS = r"[\s\S]*base: [\s\S]*adapted: "
RUNS = {
    # the README's console block and its four lines of training, each block in order
    "dnd adapt examples/support_tickets/prompts.jsonl --name tickets": Run("^decision: generate\nadapter:  tickets\n"),
    "dnd adapt examples/support_tickets/prompts.jsonl": Run("^decision: reuse\nadapter:  tickets\n"),
    "python examples/tiny_tasks/make.py --out runs/tiny_tasks --rows 200": Run("6 tasks", leaves="runs/tiny_tasks"),
    "dnd train zoo runs/tiny_tasks --out runs/zoo": Run("^done: runs/zoo$", leaves="runs/zoo/shared.safetensors"),
    "dnd train generator runs/tiny_tasks --zoo runs/zoo --config recipe.toml --out runs/generator": Run(
        "^done: runs/generator/generator$", leaves="runs/generator/generator/model.safetensors"
    ),
    "dnd eval runs/tiny_tasks --generator runs/generator/generator --methods base,generated,shuffled --limit 20 "
    "--run-dir runs/eval": Run(rows("base", "generated", "shuffled")),
    "dnd eval runs/tiny_tasks --limit 20 --run-dir runs/eval --answered": Run(rows("base", "generated", "shuffled")),
    # the README's table and text
    "dnd adapt PROMPTS --mode auto --explain --json": Run(r'"decision": "generate".*"reason": '),
    "dnd adapt PROMPTS --field prompt": Run(ADAPTED),
    "dnd adapt PROMPTS --role role.md": Run(ADAPTED),
    "dnd adapt PROMPTS --no-calibrate": Run(ADAPTED),
    "dnd adapt PROMPTS --mode merge --top-k 3": Run("^decision: merge\n"),
    'dnd run "Which queue: billing, login or shipping? I cannot sign in since the update." '
    "-a tickets --compare base": Run(r"^--- tickets\n[\s\S]*^--- base\n"),
    """dnd run "Is 7 odd?" -a base --schema '{"enum": ["yes", "no"]}'""": Run('^"(yes|no)"$'),
    "dnd chat -a tickets": Run(".+\n.+", typed="Hello\n/base\nHello\n/adapter handbook\n/exit\n"),
    'dnd route "My card was charged twice" --explain': Run(r"^base\nreason: .*\nnear:   \w+  \d"),
    "dnd adapters ls": Run(rows("handbook", "tickets")),
    "dnd adapters show": Run(r"^name +tickets\n", "tickets"),
    "dnd adapters rm": Run("^removed tickets$", "tickets", "!home/adapters/tickets"),
    "dnd adapters import": Run("^imported other$", "DIR --name other", "home/adapters/other"),
    "dnd adapters import DIR": Run(r"^imported \w+"),
    "dnd adapters export": Run("^exported to out$", "tickets out", "out/adapter_model.safetensors"),
    "dnd adapters verify": Run("^2 adapters are whole$"),
    "dnd train zoo": Run("^done: runs/zoo$", "TASKS --config recipe.toml", "runs/zoo/importance.safetensors"),
    "dnd train generator": Run(
        "^done: runs/generator/generator$", "TASKS --zoo ZOO --config recipe.toml", "runs/generator"
    ),
    "dnd train": Run("^done: runs/zoo$", "zoo TASKS --config recipe.toml"),
    "dnd eval": Run(rows("base", "instruction", "generated"), "TASKS --limit 2"),
    "dnd eval TASKS --methods base,icl-3,generated,multitask --zoo RUN --against multitask": Run(
        rows("base", "icl-3", "generated", "multitask")
    ),
    f"dnd eval TASKS --methods {','.join(MEASURED)} --against zero --limit 50": Run(rows(*MEASURED)),
    "dnd eval TASKS --bare": Run(rows("base", "instruction", "generated", "shuffled", "zero")),
    "dnd eval TASKS --part 1/2 --run-dir DIR": Run(
        rows("base", "instruction", "generated", "shuffled", "zero"), leaves="DIR/results.jsonl"
    ),
    "dnd plot eval.json --out plots": Run("^plots/report.md$", leaves="plots/report.md"),
    "dnd bench adapt": Run("adapt"),
    "dnd bench gate": Run("recall", "TASKS"),
    "dnd bench gate TASKS": Run("recall"),
    "dnd bench train TASKS --config recipe.toml": Run("^training step "),
    "dnd bench tiers --adapters 200 --jobs 20000": Run("^found in +slots .*"),
    "dnd bench store --sizes 10,100": Run("^ +100 .*"),
    "dnd bench serve": Run(r"^8 clients .*\nfirst token ", "--rounds 1 --tokens 4"),
    "dnd ps": Run("^no server runs for "),
    "dnd stop": Run("^no server runs for "),
    "dnd bench engine --quick": Run("^swap from disk [\\s\\S]*^first token "),
    "dnd models ls": Run(rows(DEFAULT_BASE, SMALL_BASE, DEFAULT_ENCODER)),
    "dnd models pull": Run(rows(DEFAULT_BASE, DEFAULT_ENCODER)),
    "dnd config show": Run(f"^ base +{DEFAULT_BASE} +default"),
    "dnd config path": Run("dnd.toml  not there\n"),
    "dnd config schema": Run('"title": "dnd.toml"'),
    "dnd config init": Run("dnd.toml", leaves="dnd.toml"),
    "dnd logs --since 2h": Run("adapt .*generate .*tickets "),
    "dnd logs --replay": Run(r"^0 of \d+ decisions by score would change, \d in the log$"),
    "dnd doctor": Run(f"^ok    base: {DEFAULT_BASE}"),
    "dnd env": Run("^- python: "),
    # the examples
    "dnd adapt": Run(ADAPTED, "PROMPTS"),
    "dnd train zoo TASKS --config examples/train_cpu.toml --out runs/zoo": Run("^done: runs/zoo$"),
    "dnd train generator TASKS --config examples/train_cpu.toml --zoo runs/zoo --out runs/generator": Run(
        "^done: runs/generator/generator$", leaves="runs/generator/generator"
    ),
    "dnd train zoo TASKS --config examples/train_gpu.toml --out runs/zoo_gpu": Run("^done: runs/zoo_gpu$"),
    "dnd train generator TASKS --config examples/train_gpu.toml --zoo runs/zoo_gpu --out runs/generator_gpu": Run(
        "^done: runs/generator_gpu/generator$", leaves="runs/generator_gpu/generator"
    ),
    "dnd eval paper TASKS --run-dir runs/paper --config examples/paper_cpu.toml": Run(
        rf"{rows('constant', 'base')}[\s\S]*{rows('generated')}", leaves="runs/paper"
    ),
    "python examples/quickstart.py": Run(f"^reuse: tickets for 90 prompts\n{ANSWERS}"),
    "python examples/quickstart.py --task meeting_deadlines --questions 10": Run(f"^generate: {ANSWERS}"),
    "python examples/three_lines.py": Run("'decision': 'reuse'"),
    "python examples/llamaindex_agent.py": Run(rf"^prompt +\d+: tickets answers {ANSWERS}"),
    "python examples/llamaindex_agent.py --prompts 40 --questions 2": Run(rf"^prompt +\d+: tickets answers {ANSWERS}"),
    "python examples/llamaindex_rag.py": Run(f"^generate: {ANSWERS}"),
    "python examples/llamaindex_rag.py --questions 3 --prompts 12": Run(f"^generate: {ANSWERS}"),
    "python examples/llamaindex_structured.py": Run(r"^  Ticket\(queue='"),
    "python examples/smolagents_agent.py": Run(f"^reuse: tickets{ANSWERS}"),
    "python examples/smolagents_agent.py --prompts 40 --questions 2": Run(f"^reuse: tickets{ANSWERS}"),
    "python examples/simulate_agent.py TASKS_FOLDER --tasks 20 --prompts 64 --seed 0 --json out.json": Run(
        '"purity": ', leaves="out.json"
    ),
}
SERVER_CALLS = [line for line in markdown_commands(TEXT) if line.startswith("curl ")]
_COMMITTED = "test_the_committed_recording_is_what_the_readme_documents"
ELSEWHERE = {
    "make demo": "test_examples.test_demo_runs_twice_with_the_same_decisions",
    "make test": "test_readme_commands.test_make_runs_what_it_says",
    "python docs/record.py": "test_docs_recording.test_the_recording_can_be_made",
    "asciinema play docs/terminal.cast": f"test_docs_recording.{_COMMITTED}",
    "source .venv/bin/activate": "test_readme_commands.test_the_environment_can_be_activated",
    **dict.fromkeys(
        (
            "python examples/qwen_shaped.py --out runs/qwen_shaped",
            "dnd bench train TASKS --config examples/qwen_shaped.toml",
            "dnd bench train TASKS --config examples/qwen_shaped_paper.toml",
        ),
        "test_bench_training.test_the_example_of_another_base_is_made_and_timed",
    ),
    "dnd serve": "test_server_leaving.test_the_command_listens_answers_and_ends",
    **dict.fromkeys(
        SERVER_CALLS,
        "test_readme_server.test_the_calls_of_the_readme_are_answered",
    ),
    **dict.fromkeys(  # needs a base whose template renders tools
        ("python examples/langchain_agent.py", "python examples/langchain_agent.py --prompts 40 --questions 2"),
        "test_langchain_example.test_the_agent_asks_its_adapted_specialist",
    ),
    **dict.fromkeys(
        (
            'pip install "dnd-sdk[smolagents]"',
            'pip install "dnd-sdk[langchain]"',
            'pip install "dnd-sdk[langchain]" langchain',
            'pip install "dnd-sdk[llm]"',
            'pip install "dnd-sdk[server]"',
        ),
        "test_readme_commands.test_the_extras_that_are_named_exist",
    ),
}
"""Commands of other programs, and those that need the real weights: the test that stands for each."""


class Ran(NamedTuple):
    """What a command said, and where it ran."""

    code: int
    stdout: str
    stderr: str
    place: Path


def documented() -> list[str]:
    """Every command that the README or an example's header names."""
    found = [*markdown_commands(TEXT), *(command for path in HEADED for command in header_commands(path))]
    return list(dict.fromkeys(found))


def run(command: str, typed: str | None = None) -> Ran:
    """Run a command line here: `dnd` and `python` in this process, where torch is imported already."""
    program, *words = shlex.split(command)
    if program == "dnd":
        done = dnd(*words, stdin=typed)
        return Ran(done.exit_code, done.stdout, done.stderr, Path.cwd())
    assert program == "python"
    out, err, code = io.StringIO(), io.StringIO(), 0
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setattr(sys, "argv", words)
        try:
            runpy.run_path(words[0], run_name="__main__")
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
    return Ran(code, out.getvalue(), err.getvalue(), Path.cwd())


class ShortTraining(training_settings.TrainSettings):
    """`dnd train` without a recipe, in two steps in place of hundreds."""

    shared: training_settings.SharedSettings = training_settings.SharedSettings(steps=2)


class Workshop(NamedTuple):
    """Where the blocks of several commands ran, each in its order and in a folder of its own."""

    home: Home
    root: Path
    ran: dict[str, Ran]
    """What the commands of the blocks said."""


def paper_tasks(folder: Path) -> Path:
    """Tiny tasks under the names of three of the paper's common-sense sets."""
    folder.mkdir()
    for name, made in {"arc_c": "longer_word", "boolq": "even_number", "piqa": "first_word"}.items():
        shutil.copy(EXAMPLES / "tiny_tasks" / "tasks" / f"{made}.jsonl", folder / f"{name}.jsonl")
    return folder


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workshop]:
    """The stand-ins are in force as long as this lasts."""
    root, ran = tmp_path_factory.mktemp("workshop"), {}
    with pytest.MonkeyPatch.context() as patch:
        home = install(root, patch)
        patch.setenv("DND_HOME", str(home.root))
        patch.setenv("XDG_CONFIG_HOME", str(root / "config"))
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setattr(training_settings, "TrainSettings", ShortTraining)
        recipe = header_commands(EXAMPLES / "train_cpu.toml")
        stories = {"console": typed_lines(CONSOLE), "trained": typed_lines(TRAINING), "recipe": recipe}
        for name, commands in stories.items():
            patch.chdir(furnish(root / name, EXAMPLES, EXAMPLES / "tiny_tasks" / "tasks", RECIPE))
            ran |= {command: run(command) for command in commands}
        # where the recipe for a CPU ended, the one for a GPU goes on from what it made as from the shipped generator
        Path("dnd_sdk/generator/shipped").mkdir(parents=True)
        Path("dnd_sdk/generator/shipped", DEFAULT_BASE).symlink_to(Path("runs/generator/generator").absolute())
        ran |= {command: run(command) for command in header_commands(EXAMPLES / "train_gpu.toml")}
        run("dnd adapt examples/handbook/prompts.txt --name handbook")
        Path(root / "eval.json").write_text(run("dnd eval TASKS --limit 2 --json").stdout, "utf-8")
        # the paper's data sets, as far as their names go
        patch.chdir(furnish(root / "paper", EXAMPLES, paper_tasks(root / "paper_tasks"), RECIPE))
        ran |= {command: run(command) for command in header_commands(EXAMPLES / "paper_cpu.toml")}
        yield Workshop(home, root, ran)


@pytest.fixture
def place(workshop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder of this test's own, in it a home with the adapters of the README's console block."""
    made = workshop.root / "trained" / "runs"
    place = furnish(tmp_path / "place", EXAMPLES, made / "tiny_tasks", RECIPE)
    shutil.copytree(workshop.home.root, place / "home", ignore=shutil.ignore_patterns("models"))
    shutil.copytree(workshop.home.adapters / "handbook", place / "DIR")
    links = {"home/models": workshop.home.models, "ZOO": made / "zoo", "RUN": made / "generator"}
    for name, target in (links | {"eval.json": workshop.root / "eval.json"}).items():
        (place / name).symlink_to(target)
    monkeypatch.setenv("DND_HOME", str(place / "home"))
    monkeypatch.chdir(place)
    return place


@pytest.mark.parametrize("command", [c for c in documented() if c not in ELSEWHERE], ids=str)
def test_it_does_what_is_said_of_it(command: str, workshop: Workshop, place: Path) -> None:
    assert command in RUNS, "say in RUNS what it must do"
    wanted = RUNS[command]
    done = workshop.ran.get(command) or run(f"{command} {wanted.more}", wanted.typed)
    assert done.code == 0, done
    assert re.search(wanted.says, done.stdout, re.MULTILINE), done
    assert (done.place / wanted.leaves.lstrip("!")).exists() != wanted.leaves.startswith("!")


def test_every_command_has_its_run_and_every_run_its_command() -> None:
    assert RUNS.keys() | ELSEWHERE.keys() == set(documented()) and not RUNS.keys() & ELSEWHERE.keys()


def test_commands_are_found_wherever_a_text_names_them() -> None:
    text = "```sh\nmake fly  # up\n\n```\n```console\n$ dnd fly\nhigh\n```\nRun `dnd a\nb` or `dnd`, not `fly b`.\n"
    table = "| `dnd a b --c`, `--d` | as in `python x.py` |\n| `dnd e f`, `g` | `h` |\n"
    both = ["make fly", "dnd fly", "dnd a b", "dnd a b --c", "dnd a b --d", "python x.py", "dnd e f", "dnd e g"]
    assert markdown_commands(text + table) == both


def test_every_example_program_is_named_by_a_command() -> None:
    named = {word for command in documented() for word in command.split()}
    programs = {p.relative_to(ROOT).as_posix() for p in HEADED if p.suffix == ".py"}
    assert programs - named == {"examples/demo.py"} and "python examples/demo.py" in made_by("demo")[-1]


@pytest.mark.parametrize("where", ELSEWHERE.values())
def test_the_tests_elsewhere_exist(where: str) -> None:
    module, name = where.split(".")
    tree = ast.parse((ROOT / "tests" / f"{module}.py").read_text("utf-8"))
    assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_the_console_block_shows_what_is_printed(workshop: Workshop) -> None:
    """Its `...` are figures; a step that took no time is left out of the last line."""
    shown = re.split(r"(?m)^\$ (.*)\n", CONSOLE)[1:]
    for command, text in zip(shown[::2], shown[1::2], strict=True):
        pattern = re.escape(text).replace("<home>", re.escape(str(workshop.home.root)))
        pattern = re.sub(r"(\w+)\\ \\\.\\\.\\\.\\ ms(\\ )*", r"(\1 \\d+ ms *)?", pattern)
        assert re.fullmatch(pattern, workshop.ran[command].stdout), (pattern, workshop.ran[command].stdout)


def made_by(target: str, *variables: str) -> list[str]:
    """What `make` would run for a target."""
    env = {k: v for k, v in os.environ.items() if not k.startswith("MAKE")}
    done = subprocess.run(["make", "-n", target, *variables], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_make_runs_what_it_says() -> None:
    """The demo itself, and every test: nothing is selected."""
    assert made_by("demo")[-1] == ".venv/bin/python examples/demo.py"
    home, program, *options = shlex.split(made_by("test")[-1])
    assert home.startswith("DND_TEST_HOME=") and program == ".venv/bin/pytest"
    assert options == ["-n", "auto", "--maxprocesses", "4", "--dist", "loadfile"]
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["pytest"]["ini_options"]
    assert settings["testpaths"] == ["tests"] and " -m" not in settings["addopts"] and " -k" not in settings["addopts"]


def test_the_environment_can_be_activated(tmp_path: Path) -> None:
    folder = tmp_path / ".venv"
    assert any(f"-m venv {folder}" in line for line in made_by("demo", f"VENV={folder}"))
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    line = "source .venv/bin/activate && command -v python"
    done = subprocess.run(["bash", "-c", line], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert Path(done.stdout.strip()) == folder / "bin" / "python"


def test_the_extras_that_are_named_exist() -> None:
    """The package is on no index yet, so that pip itself has nothing to install."""
    named = {extra for command in documented() for extra in re.findall(r"dnd-sdk\[(\w+)\]", command)}
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["optional-dependencies"]
    assert named and named <= extras.keys()

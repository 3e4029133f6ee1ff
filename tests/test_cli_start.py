"""How a command starts: what it loads before its first word, what it says meanwhile, and who collects garbage."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
from pathlib import Path

import pytest

from dnd_sdk.cli.options import ModelOptions, uncollected
from dnd_sdk.cli.output import Output

NOT_FOR_LIGHT = (
    *("torch", "transformers", "tokenizers", "safetensors", "huggingface_hub", "peft", "accelerate", "faiss", "numpy"),
    *("scipy", "sympy", "sentence_transformers", "llama_index", "jinja2", "dnd_sdk.session", "dnd_sdk.engine.engine"),
    "http.client",
)
RUN = """
import json, sys
from dnd_sdk.cli.main import main
sys.argv = ["dnd", *sys.argv[1:]]
try:
    main()
except SystemExit as e:
    print(json.dumps([e.code, [m for m in {names} if m in sys.modules]]), file=sys.stderr)
"""


@pytest.mark.parametrize(
    ("command", "more"),
    [
        ("--help", ()),
        ("doctor --help", ()),
        ("config show", ()),
        ("config show --json", ("rich",)),
        ("config path", ("rich",)),
        ("config schema", ("rich",)),
        ("logs", ("rich",)),
        ("models ls --json", ("rich",)),
        ("models ls", ()),
    ],
)
def test_a_light_command_loads_nothing_heavy(command: str, more: tuple[str, ...]) -> None:
    script = RUN.format(names=(*NOT_FOR_LIGHT, *more))
    done = subprocess.run([sys.executable, "-c", script, *command.split()], capture_output=True, text=True, check=True)
    assert json.loads(done.stderr.splitlines()[-1]) == [0, []], done.stderr


PAUSED = """
import gc, sys, json
from dnd_sdk.cli.options import uncollected
try:
    with uncollected():
        inside = gc.isenabled()
        if sys.argv[1] == "fails":
            raise ValueError
except ValueError:
    pass
print(json.dumps([inside, gc.isenabled(), gc.get_freeze_count() > 1000]))
"""


@pytest.mark.parametrize("how", ["ends", "fails"])
def test_the_first_load_is_not_collected_and_collecting_goes_on_after_it(how: str) -> None:
    done = subprocess.run([sys.executable, "-c", PAUSED, how], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == [False, True, True]


def test_in_a_program_that_has_the_libraries_collecting_goes_on() -> None:
    import transformers  # noqa: F401

    before = gc.get_freeze_count()
    with uncollected():
        assert gc.isenabled()
    assert gc.isenabled() and gc.get_freeze_count() == before


def test_a_person_is_told_before_the_libraries_are_imported(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    said: list[str] = []

    def load(**_: object) -> None:
        said.append(capsys.readouterr().err)

    def quiet(_: Output) -> None:
        said.append(capsys.readouterr().err)

    monkeypatch.setattr("dnd_sdk.cli.options.quiet_libraries", quiet)
    monkeypatch.setattr("dnd_sdk.session.DnD.load", load)
    ModelOptions().load(Output(home=Path("unused")))
    assert said == ["loading the base model ...\n", ""]

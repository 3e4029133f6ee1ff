"""The LlamaIndex examples run: on a tiny base here, and marked `real` on the embedded one."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

import pytest
from llama_index.core import Settings
from llamaindex_parts import roomy
from test_examples import EXAMPLES, load
from test_observing_observer import tell_apart
from tiny_world import World

from dnd_sdk.config import Home
from dnd_sdk.observing.prompt_stream import StreamSettings
from dnd_sdk.session import DnD

SMALL = ["--prompts", "6", "--questions", "1"]


@pytest.fixture(autouse=True)
def own_settings() -> Iterator[None]:
    """LlamaIndex's settings are global."""
    yield
    Settings._llm = None


@pytest.fixture
def tiny(world: World, monkeypatch: pytest.MonkeyPatch) -> DnD:
    """What `DnD.load` gives to the examples: a session that adapts after four prompts of a task."""
    dnd = roomy(world.session(stream=StreamSettings(min_prompts=4)))
    monkeypatch.setattr(DnD, "load", lambda *a, **k: dnd)
    return dnd


def shown(text: str, label: str) -> list[str]:
    """The answers printed behind a label."""
    return re.findall(rf"^ *{label}: +(['\"].*)$", text, re.MULTILINE)


def test_rag_prints_both_answers(tiny: DnD, capsys: pytest.CaptureFixture[str]) -> None:
    assert load("llamaindex_rag.py").main([*SMALL[:3], "2"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("generate: ") and shown(out, "reference") == ["'30 days'", "'60 euros'"]
    assert len(shown(out, "base")) == 2 and shown(out, "base") != shown(out, "adapted")


def test_agent_gets_an_adapter_on_the_way(
    tiny: DnD, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tell_apart(tiny, monkeypatch)  # both jobs' prompts begin with a capital letter: one task to this encoder
    assert load("llamaindex_agent.py").main(SMALL) == 0
    out = capsys.readouterr().out
    (name,) = (a.name for a in tiny.store.ls())
    assert f"prompt   4: {name} answers" in out
    assert len(shown(out, "base")) == 2 and all(f"({name})" in line for line in shown(out, "adapted"))


def test_three_lines_are_three_and_the_script_stands_without_them() -> None:
    lines = (EXAMPLES / "three_lines.py").read_text(encoding="utf-8").splitlines()
    added = [line for line in lines if line.endswith("# +")]
    assert len(added) == 3
    without = "\n".join(line for line in lines if line not in added)
    assert "dnd" not in without.lower().replace("answer.raw['dnd']", "")
    ast.parse(without)


def test_three_lines_reach_an_adapter(tiny: DnD, capsys: pytest.CaptureFixture[str]) -> None:
    script = load("three_lines.py")
    script.main(2)
    (name,) = (a.name for a in tiny.store.ls())
    assert capsys.readouterr().out.count("'adapter': ") == 2 and name


def test_structured_answers_are_filled_in(tiny: DnD, capsys: pytest.CaptureFixture[str]) -> None:
    load("llamaindex_structured.py").main()
    ticket = r"^  Ticket\(queue='\w+', urgent=(?:True|False), order=(?:None|\d+)\)$"
    assert len(re.findall(ticket, capsys.readouterr().out, re.MULTILINE)) == 3


@pytest.mark.real
def test_examples_run_on_the_embedded_base(
    warm_home: Home, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("DND_HOME", str(warm_home.root))
    load("three_lines.py").main(2)
    assert capsys.readouterr().out.count("'decision': 'reuse'") == 2
    load("llamaindex_structured.py").main()
    assert capsys.readouterr().out.count("Ticket(queue='") == 3
    assert load("llamaindex_rag.py").main(["--questions", "1"]) == 0
    out = capsys.readouterr().out
    assert re.match("generate|reuse", out) and len(shown(out, "adapted")) == 1
    agent = load("llamaindex_agent.py")
    monkeypatch.setattr(agent, "ANSWER_TOKENS", 3)
    assert agent.main(["--prompts", "40", "--questions", "1"]) == 0
    assert capsys.readouterr().out.count("answers") >= 2

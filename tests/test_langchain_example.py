"""The LangChain example runs: on a scripted base here, and marked `real` on the embedded one."""

from __future__ import annotations

import re

import pytest
from test_examples import load
from test_llamaindex_examples import shown
from tiny_world import World
from tool_parts import hermes_call

from dnd_sdk.config import Home
from dnd_sdk.engine import CompletionRequest
from dnd_sdk.session import DnD

pytest.importorskip("langchain")


def an_agent(request: CompletionRequest) -> str:
    """Calls its tool with the ticket; the specialist says a queue."""
    if not request.tools:
        return "billing"
    return hermes_call("queue_of", ticket=request.chat[-1]["content"].split("\n\n", 1)[1])


def test_the_agent_asks_its_adapted_specialist(
    world: World, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    dnd = world.elsewhere(an_agent)
    monkeypatch.setattr(DnD, "load", lambda **k: dnd)
    assert load("langchain_agent.py").main(["--prompts", "6", "--questions", "2"]) == 0
    out = capsys.readouterr().out
    [adapter] = dnd.store.ls()
    assert out.startswith(f"generate: {adapter.name}\n") and len(shown(out, "reference")) == 2
    assert shown(out, "agent") == ["'billing' (its specialist)"] * 2
    who = [r.adapter_id for r in dnd.engine.requests]  # type: ignore[attr-defined]
    assert who == [None, adapter.id] * 2
    first, by_specialist, *_ = dnd.engine.requests  # type: ignore[attr-defined]
    assert [t["function"]["name"] for t in first.tools] == ["queue_of"]
    assert re.match(r".+\n\n.+", by_specialist.chat[0]["content"]), "an instruction and a ticket"


@pytest.mark.real
def test_the_example_runs_on_the_embedded_base(warm_home: Home, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--home", str(warm_home.root), "--prompts", "40", "--questions", "1"]
    assert load("langchain_agent.py").main(arguments) == 0
    out = capsys.readouterr().out
    assert re.match("generate: ", out) and len(shown(out, "agent")) == 1
    # which queue it names is the evaluation's business; that it calls its tool for one is what the agent is for
    assert out.count("(its specialist)") == 1, out

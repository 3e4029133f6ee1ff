"""The plugin of `llm`: its models answer as the session does, in process and on the command line."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from llamaindex_parts import roomy
from paced import Pace, endless, generating, put_adapter, wait_until
from tiny_world import World, prompts_of
from tool_parts import hermes_call

import dnd_sdk
from dnd_sdk.errors import ConfigError, InputError
from dnd_sdk.models import DEFAULT_BASE, EMBEDDED
from dnd_sdk.session import DnD

pytest.importorskip("llm")

from llm.parts import AttachmentPart, Message, TextPart
from pydantic import BaseModel, Field

from dnd_sdk.integrations import llm_plugin
from dnd_sdk.integrations.llm_plugin import DnDAsyncModel, DnDModel, to_chat


class Turn(BaseModel):
    """Bounded, so that a random base comes to an end."""

    by: int = Field(ge=1, le=9)


def resident(dnd: DnD, monkeypatch: pytest.MonkeyPatch) -> DnD:
    """Have the models answer with this session."""
    monkeypatch.setattr(llm_plugin, "_loaded", lambda: dnd)
    return dnd


@pytest.fixture
def dnd(world: World, monkeypatch: pytest.MonkeyPatch) -> DnD:
    return resident(roomy(world.session()), monkeypatch)


async def aread(response: Any) -> Any:
    """The response once it is whole, with what can be asked for at once."""
    text, usage = await response.text(), await response.usage()
    return SimpleNamespace(
        text=lambda: text,
        usage=lambda: usage,
        resolved_model=response.resolved_model,
        response_json=response.response_json,
    )


WAYS: dict[str, Callable[..., Any]] = {
    "stream": lambda adapter, text, **o: DnDModel("dnd/x", adapter).prompt(text, **o),
    "at once": lambda adapter, text, **o: DnDModel("dnd/x", adapter).prompt(text, stream=False, **o),
    "async": lambda adapter, text, **o: asyncio.run(aread(DnDAsyncModel("dnd/x", adapter).prompt(text, **o))),
}


@pytest.mark.parametrize("way", WAYS)
def test_an_answer_is_the_sessions_with_its_usage(dnd: DnD, way: str) -> None:
    put_adapter(dnd, "mine", seed=1)
    expected = dnd.complete("hello", "mine", max_new_tokens=8)
    got = WAYS[way]("mine", "hello", max_tokens=8)
    assert got.text() == expected.text != dnd.complete("hello", max_new_tokens=8).text
    assert (got.usage().input, got.usage().output) == tuple(expected.usage.values())
    assert got.resolved_model == "dnd/mine"
    assert got.response_json == {"adapter": "mine", "decision": "reuse", "finish_reason": expected.finish_reason}
    base = WAYS[way](None, "hello", max_tokens=8)
    assert base.text() and base.resolved_model == "dnd/base"


@pytest.mark.parametrize("way", WAYS)
def test_options_system_and_schema_reach_the_engine(dnd: DnD, way: str) -> None:
    warm = {"temperature": 2.0, "seed": 3, "top_k": 5}
    expected = dnd.complete("hello", role="Be brief.", max_new_tokens=9, **warm)
    assert WAYS[way](None, "hello", system="Be brief.", max_tokens=9, **warm).text() == expected.text
    whole = WAYS[way](None, "hello", max_tokens=12).text()
    assert WAYS[way](None, "hello", max_tokens=12, stop=whole[2:4]).text() == whole.split(whole[2:4])[0]
    for schema in (Turn, Turn.model_json_schema(), {"type": "object", "properties": {"by": {"enum": [1, 2]}}}):
        assert json.loads(WAYS[way](None, "hello", schema=schema).text()).keys() <= {"by"}
    with pytest.raises(InputError, match="max_new_tokens=2 cut the answer"):
        WAYS[way](None, "hello", schema=Turn, max_tokens=2).text()
    with pytest.raises(ConfigError, match="temperature must"):
        WAYS[way](None, "hello", temperature=-3).text()


def test_a_conversation_is_remembered(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    dnd = resident(world.elsewhere(), monkeypatch)
    talk = DnDModel("dnd/base", None).conversation()
    assert talk.prompt("one", system="Be brief.").text() == "base: one"
    assert talk.prompt("two").text() == "base: two"
    assert [(m["role"], m["content"]) for m in dnd.engine.requests[-1].chat] == [  # type: ignore[attr-defined]
        ("system", "Be brief."),
        ("user", "one"),
        ("assistant", "base: one"),
        ("user", "two"),
    ]
    with pytest.raises(InputError, match="a user message has a AttachmentPart, the base reads text only"):
        to_chat([Message("user", [TextPart("x"), AttachmentPart()])])


@pytest.mark.parametrize("way", ["chain", "achain"])
def test_tools_are_called(world: World, monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    said = [f"I add. {hermes_call(a=2, b=3)}", "It is 5."]
    dnd = resident(world.elsewhere(lambda request: said.pop(0)), monkeypatch)

    def add(a: int, b: int) -> int:
        """Add two numbers."""
        return a + b

    async def run() -> str:
        return await DnDAsyncModel("dnd", "auto").chain("2 + 3?", tools=[add]).text()

    text = DnDModel("dnd", "auto").chain("2 + 3?", tools=[add]).text() if way == "chain" else asyncio.run(run())
    assert "It is 5." in text
    first, second = dnd.engine.requests  # type: ignore[attr-defined]
    [tool] = first.tools
    assert tool["function"]["name"] == "add" and tool["function"]["description"] == "Add two numbers."
    question, called, result = second.chat
    assert called["tool_calls"][0]["function"] == {"name": "add", "arguments": {"a": 2, "b": 3}}
    assert (question["content"], called["content"], result["content"]) == ("2 + 3?", "I add.", "5")


def test_leaving_a_stream_stops_within_a_token(dnd: DnD) -> None:
    pace = Pace(endless(dnd).base.model)
    pace.allow(3)
    for _ in DnDModel("dnd/base", None).prompt("hello", max_tokens=5_000):
        break
    pace.allow()
    wait_until(lambda: not generating(), "the engine still generates")
    assert pace.tokens <= 4


def registered() -> dict[str, Any]:
    found: dict[str, Any] = {}
    llm_plugin.register_models(lambda model, other, aliases=(): found.update({model.model_id: (model, other, aliases)}))
    return found


def test_each_stored_adapter_of_the_base_is_a_model(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    dnd = resident(world.session(), monkeypatch)
    for i, name in enumerate(("mine", "base", "other")):
        put_adapter(dnd, name, seed=i)
    monkeypatch.setenv("DND_BASE", "tiny")
    assert list(registered()) == ["dnd", "dnd/base", "dnd/mine", "dnd/other"]
    assert registered()["dnd"][2] == ("dnd/auto",) and registered()["dnd/base"][0]._adapter is None
    monkeypatch.setenv("DND_BASE", DEFAULT_BASE)
    assert list(registered()) == ["dnd", "dnd/base"] and DEFAULT_BASE in EMBEDDED
    monkeypatch.setenv("DND_N_SLOTS", "many")
    assert list(registered()) == ["dnd", "dnd/base"], "what is wrong there, a prompt will tell"
    with pytest.raises(ConfigError, match="n_slots"):
        DnDModel("dnd", "auto").prompt("hello").text()


def test_auto_is_routed(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    dnd = resident(roomy(world.session(reuse=0.98)), monkeypatch)
    dnd.adapt(prompts_of("lower"), name="cats")
    assert WAYS["stream"]("auto", "the cat 7 sat on it").text() is not None
    resolved = {
        p: WAYS["async"]("auto", p, max_tokens=2).response_json["adapter"] for p in ("the cat 7 sat on it", "0 ** 9")
    }
    assert list(resolved.values()) == ["cats", None]


def command(*words: str, cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    """`llm` in a process of its own, with this package's plugin alone."""
    heavy = "print(sorted({'torch', 'transformers', 'faiss', 'peft'} & sys.modules.keys()), file=sys.stderr)"
    code = f"import sys\nfrom llm.cli import cli\ntry: cli()\nfinally: {heavy}"
    own = {"LLM_USER_PATH": str(cwd), "LLM_LOAD_PLUGINS": "dnd-sdk", **env}
    return subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, env=os.environ | own)


def test_the_command_answers_and_loads_the_models_only_then(world: World, tmp_path: Path) -> None:
    dnd = world.session()
    put_adapter(dnd, "mine", seed=1)
    set_to = {"DND_BASE": str(world.base), "DND_GENERATOR": str(world.generator), "DND_HOME": str(world.home.root)}
    listed = command("models", "list", cwd=tmp_path, **set_to)
    assert "DnDModel: dnd (aliases: dnd/auto)" in listed.stdout and listed.stderr == "[]\n", listed.stderr
    said = command("-m", "dnd/base", "hello", "-o", "max_tokens", "6", cwd=tmp_path, **set_to)
    assert said.stdout == dnd.complete("hello", max_new_tokens=6).text + "\n", said.stderr
    wrong = command("-m", "dnd/base", "hello", "-o", "temperature", "-3", cwd=tmp_path, **set_to)
    assert wrong.returncode and "temperature must be within 0..10, got -3.0" in wrong.stderr


def test_the_package_names_its_plugin() -> None:
    root = Path(dnd_sdk.__file__).parents[1]
    points = tomllib.loads((root / "pyproject.toml").read_text("utf-8"))["project"]["entry-points"]
    assert points["llm"] == {"dnd": llm_plugin.__name__}

"""Real clients against a server in this process, what servers that are not started here would send, and their table."""

from __future__ import annotations

import json
import runpy
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import common
import environments
import pytest
from common import ENCODER, EXAMPLES, MODEL, QUESTION, SAYS, TEXTS, WIDTH
from environments import TABLE, CannotRunError, Client, python_of, read_clients
from helpers import tiny_tokenizer
from scripted_base import scripted_base
from server_parts import Served, serving, streamed
from stand_in import install
from tiny_world import prompts_of
from works_with import PAGE, read_passed

from dnd_sdk.session import DnD

KEY = "sk-of-a-real-client"
CHAT = "/v1/chat/completions"
IN_PROCESS = ("openai", "smolagents")
"""Those that the development environment has."""
SERVERS = {"ragflow", "taskingai"}
"""Clients that are servers themselves."""
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather in a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        home = install(tmp_path_factory.mktemp("clients"), patch, scripted_base(), encoder_width=WIDTH)
        with DnD.load(home=home) as dnd:
            for name in ("upper", "digits"):
                dnd.adapt(prompts_of(name), name=name)
            with serving(dnd, api_keys=[KEY]) as now:
                now.http.headers["Authorization"] = f"Bearer {KEY}"
                yield now


@pytest.mark.parametrize("text", TEXTS)
def test_the_scripted_base_says_each_of_its_texts(text: str) -> None:
    model, tokenizer = scripted_base()
    ids = tokenizer(f"asked anything<|{text}|>", return_tensors="pt").input_ids
    said = model.generate(ids, max_new_tokens=80, do_sample=True, temperature=1.0)[0, ids.shape[1] :]
    assert tokenizer.decode(said) == TEXTS[text] + tokenizer.eos_token
    assert tokenizer.encode("Straße 7: {}\n") == tiny_tokenizer().encode("Straße 7: {}\n")


@pytest.mark.parametrize("client", IN_PROCESS)
def test_a_client_of_this_environment_works(
    client: str, served: Served, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("openai")
    monkeypatch.setattr(common, "URL", f"{served.now.url}/v1")
    monkeypatch.setattr(common, "KEY", KEY)
    monkeypatch.setenv("DND_URL", common.URL)  # for the example, which runs in a process of its own
    monkeypatch.setenv("DND_API_KEY", KEY)
    runpy.run_path(str(TABLE.with_name(f"check_{client}.py")), run_name="__main__")


def credentials(path: str) -> dict[str, Any]:
    fields: dict[str, Any] = json.loads((EXAMPLES / path).read_text("utf-8"))
    return fields


def ragflow_model() -> str:
    """As RAGFlow keeps and reads its name."""
    fields = credentials("ragflow/model.json")
    assert fields["api_base"].endswith(":8000/v1") and fields["llm_factory"] == "OpenAI-API-Compatible"
    return str((fields["llm_name"] + "___OpenAI-API").split("___")[0])


RAGFLOW_HISTORY = [{"role": "system", "content": "You are helpful."}, {"role": "user", "content": QUESTION}]


def test_ragflow_adds_a_model(served: Served) -> None:
    """What it asks of a chat model and of an embedding model before it takes them."""
    hello = [{"role": "user", "content": "Hello! How are you doing!"}]
    answer = served.post(CHAT, {"model": ragflow_model(), "messages": hello, "temperature": 0.9})
    assert answer["choices"][0]["message"]["content"].strip() == SAYS and answer["usage"]["total_tokens"] > 0
    body = {"model": ENCODER, "input": ["Test if the api key is available"], "encoding_format": "float"}
    vectors = served.post("/v1/embeddings", {**body, "drop_params": True})
    assert len(vectors["data"][0]["embedding"]) == WIDTH and vectors["usage"]["total_tokens"] > 0


def test_ragflow_streams_a_chat(served: Served) -> None:
    """With an assistant's settings; it counts the usage that comes with choices."""
    fields = {"temperature": 0.1, "top_p": 0.3, "presence_penalty": 0.4, "frequency_penalty": 0.7}
    body = {"model": ragflow_model(), "messages": RAGFLOW_HISTORY, **fields, "stop": ["\nUser:"]}
    *chunks, done = streamed(served, CHAT, {**body, "enable_thinking": False})
    assert done == "[DONE]" and "".join(c["choices"][0]["delta"].get("content") or "" for c in chunks) == SAYS
    totals = [c["usage"]["total_tokens"] for c in chunks if c["choices"] and c.get("usage")]
    assert len(totals) == 1 and totals[0] > 0


def test_ragflow_runs_its_loop_of_tools(served: Served) -> None:
    """Both ways: it sends the calls back without a content, and the results without the tool's name."""
    body = {"model": ragflow_model(), "messages": RAGFLOW_HISTORY, "tools": [WEATHER], "tool_choice": "auto"}
    call = served.post(CHAT, body)["choices"][0]["message"]["tool_calls"][0]
    *chunks, _ = streamed(served, CHAT, body)
    calls = [c for chunk in chunks for choice in chunk["choices"] for c in choice["delta"].get("tool_calls") or []]
    assert [(c["index"], c["function"]) for c in calls] == [(0, call["function"])]
    assert json.loads(call["function"]["arguments"]) == {"city": "Paris"}
    made = {"index": 0, "id": call["id"], "function": call["function"], "type": "function"}
    history = [
        *RAGFLOW_HISTORY,
        {"role": "assistant", "tool_calls": [made]},
        {"role": "tool", "tool_call_id": call["id"], "content": json.dumps({"weather": "sunny"})},
    ]
    told = served.post(CHAT, {**body, "messages": history})["choices"][0]["message"]
    assert told["content"] == TEXTS["told"] and not told.get("tool_calls")


def taskingai(served: Served) -> tuple[str, dict[str, Any]]:
    """Path and model of its `custom_host` credentials, whose URL is the endpoint's."""
    fields = credentials("taskingai/custom_host.json")
    base, path = fields["CUSTOM_HOST_ENDPOINT_URL"].split(":8000")
    assert base == "http://127.0.0.1" and path == CHAT and fields["CUSTOM_HOST_MODEL_ID"] == MODEL
    return path, {"model": fields["CUSTOM_HOST_MODEL_ID"], "temperature": 0.8, "top_p": 0.9, "max_tokens": 64}


def test_taskingai_asks_and_streams(served: Served) -> None:
    path, body = taskingai(served)
    body |= {"messages": [{"role": "user", "content": QUESTION}], "stop": ["###"]}
    choice = served.post(path, {**body, "stream": False})["choices"][0]
    assert (choice["message"]["content"], choice["finish_reason"]) == (SAYS, "stop")
    *chunks, _ = streamed(served, path, body)
    assert not any(chunk.get("error") for chunk in chunks)
    choices = [chunk["choices"][0] for chunk in chunks if chunk.get("choices")]
    assert "".join(c["delta"].get("content") or "" for c in choices) == SAYS
    assert [c["finish_reason"] for c in choices if c["finish_reason"]] == ["stop"]


def test_taskingai_calls_a_tool(served: Served) -> None:
    """It sends the calls back with a content of null, and names the tool to call in a form of its own."""
    path, body = taskingai(served)
    asked = [{"role": "user", "content": [{"type": "text", "text": QUESTION}]}]
    call = served.post(path, {**body, "messages": asked, "tools": [WEATHER], "tool_choice": "auto", "stream": False})
    made = call["choices"][0]["message"]["tool_calls"][0]
    assert call["choices"][0]["finish_reason"] == "tool_calls" and made["function"]["name"] == "weather"
    history = [
        *asked,
        {"role": "assistant", "tool_calls": [made], "content": None},
        {"role": "tool", "content": "sunny", "tool_call_id": made["id"]},
    ]
    told = served.post(path, {**body, "messages": history, "tools": [WEATHER]})["choices"][0]["message"]
    assert told["content"] == TEXTS["told"]
    named = served.post(path, {**body, "messages": asked, "tools": [WEATHER], "tool_choice": {"name": "weather"}})
    assert named["choices"][0]["message"]["tool_calls"][0]["function"]["name"] == "weather"


def test_each_client_has_a_check_an_example_and_a_line() -> None:
    passed = read_passed(PAGE.read_text("utf-8"))
    clients = read_clients()
    assert passed.keys() == clients.keys() and len(clients) >= 10
    for client in clients.values():
        assert client.script.is_file() and client.packages
        assert passed[client.name].version[0].isdigit() and passed[client.name].date.startswith("20")
    folders = {client.check or client.name for client in clients.values()} | SERVERS
    assert {path.name for path in EXAMPLES.iterdir()} == folders
    assert {path.stem for path in TABLE.parent.glob("check_*.py")} == {c.script.stem for c in clients.values()}


@pytest.mark.parametrize("path", sorted(p for p in EXAMPLES.rglob("*") if p.is_file()), ids=lambda p: p.parent.name)
def test_an_example_is_run_by_its_check_and_names_the_server(path: Path) -> None:
    text = path.read_text("utf-8")
    assert "http://127.0.0.1:8000/v1" in text
    if path.parent.name not in SERVERS:
        check = TABLE.with_name(f"check_{path.parent.name}.py").read_text("utf-8")
        assert f'"{path.name}"' in check or f"{path.parent.name}/{path.name}" in check


def test_an_environment_is_kept_until_its_row_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[list[str]] = []

    def pretend(command: list[str]) -> str:
        ran.append(command)
        (tmp_path / "one").mkdir(exist_ok=True)
        return ""

    monkeypatch.setattr(environments, "_run", pretend)
    row = Client("one", packages=["package>=1"], shows="package", says="something")
    for row_now, n_commands in ((row, 2), (row, 2), (replace(row, packages=["package>=2"]), 4)):
        assert python_of(row_now, tmp_path) == tmp_path / "one" / "bin" / "python"
        assert len(ran) == n_commands
    assert ran[-1][-1] == "package>=2" and "venv" in ran[-2]


def test_an_interpreter_that_is_not_here_is_a_reason(tmp_path: Path) -> None:
    with pytest.raises(CannotRunError, match=r"needs Python 9\.9"):
        python_of(Client("one", packages=[], shows="", says="", python="9.9"), tmp_path)

"""Commands whose base a vLLM server (a stub) runs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from cli_runner import dnd, dnd_json
from fake_vllm import FakeVllm
from stub_vllm import StubVllm, stub_vllm
from tiny_world import World, prompts_of


@pytest.fixture
def stub(world: World) -> Iterator[StubVllm]:
    with stub_vllm(root=str(world.base)) as running:
        running.key = "secret"
        yield running


def test_adapt_and_run(world: World, stub: StubVllm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("\n".join(prompts_of("upper")), encoding="utf-8")
    options = [*world.options, "--engine", "vllm", "--url", stub.url]
    assert "refuses the key" in dnd_json("run", "hi", *options, code=1)["error"]["message"]
    monkeypatch.setenv("DND_KEY", "secret")
    made = dnd_json("adapt", file, "--name", "mine", *options)
    assert (made["decision"], made["adapter"]["name"]) == ("generate", "mine")
    said = dnd("run", "hi you", "-a", "mine", *options)
    assert said.exit_code == 0 and said.stdout.strip().endswith(": hi you")
    assert "from the folder that holds" in said.stderr and "secret" not in said.stderr
    assert dnd_json("run", "hi you", *options)["text"] == "base: hi you"
    stub.stop()
    failed = dnd_json("run", "hi", *options, code=1)["error"]
    assert failed["type"] == "BackendError" and "cannot be reached" in failed["message"]


def test_run_with_vllm_in_this_process(world: World, stub: StubVllm, monkeypatch: pytest.MonkeyPatch) -> None:
    fake, stub.key = FakeVllm(stub), None
    fake.install(monkeypatch)
    options = [*world.options, "--engine", "vllm-local", "--vllm-args", "--max-model-len 99"]
    said = dnd("run", "hi you", *options)
    assert said.exit_code == 0 and said.stdout.strip() == "base: hi you" and "starting vLLM" in said.stderr
    assert fake.options[0].max_model_len == 99
    failed = dnd_json("run", "hi", *world.options, "--vllm-args", "--x", code=1)["error"]
    assert "--vllm-args is for the engine vllm-local" in failed["message"]


def test_a_url_alone_is_refused(world: World, stub: StubVllm) -> None:
    failed = dnd_json("run", "hi", *world.options, "--url", stub.url, code=1)["error"]
    assert "--url is for the engine vllm" in failed["message"] and "--engine vllm" in failed["fix"]


def test_what_needs_the_base_here_says_so(world: World, stub: StubVllm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DND_KEY", "secret")
    options = [*world.options, "--engine", "vllm", "--url", stub.url]
    failed = dnd_json("bench", "engine", "--quick", *options, code=1)["error"]
    assert "needs the base in this process" in failed["message"]

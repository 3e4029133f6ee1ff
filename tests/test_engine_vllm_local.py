"""`LocalVllmBackend` over a stand-in for vLLM's modules: how it is started and ended, and that requests get through."""

from __future__ import annotations

import gc
import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from engine_parts import soon
from fake_vllm import FakeVllm
from stub_vllm import StubVllm
from vllm_parts import CHAT, LAYOUT, answer, ask, hold, said_by

from dnd_sdk.engine import LocalVllmBackend
from dnd_sdk.errors import BackendError, ConfigError, MissingExtraError

pytest_plugins = ["vllm_fixtures"]


@pytest.fixture
def fake(stub: StubVllm, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeVllm]:
    made = FakeVllm(stub)
    made.install(monkeypatch)
    yield made
    gc.collect()
    assert soon(lambda: made.n_running == 0)


def local(tmp_path: Path, **more: object) -> LocalVllmBackend:
    return LocalVllmBackend("folder/of base", LAYOUT, tmp_path / "served", **more)  # type: ignore[arg-type]


def test_it_is_told_the_base_and_how_many_adapters(fake: FakeVllm, tmp_path: Path) -> None:
    backend = local(tmp_path, dtype="float32", args="--max-model-len 512 --max-loras '3'", max_loaded=20)
    [options] = fake.options
    assert (options.model, options.dtype, options.max_model_len) == ("folder/of base", "float32", 512)
    assert (options.max_lora_rank, options.max_loras, options.max_cpu_loras) == (8, 3, 20)
    assert options.enable_lora and options.disable_log_stats
    assert os.environ["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] == "1"
    assert os.environ["VLLM_WORKER_MULTIPROC_METHOD"] == "spawn"
    assert backend.served_base.root == "folder/of base" and fake.apps[0].state.server.started


def test_fewer_adapters_than_fit_into_a_batch(fake: FakeVllm, tmp_path: Path) -> None:
    backend = local(tmp_path, max_loaded=2)
    assert (fake.options[0].max_loras, fake.options[0].max_cpu_loras) == (2, 2)
    assert backend.resident() == []


def test_requests_get_through(fake: FakeVllm, tmp_path: Path, stub: StubVllm) -> None:
    backend = local(tmp_path)
    adapter = hold(backend, 1)
    assert stub.loaded == {f"dnd-{adapter.id[:16]}": str(backend.served / f"dnd-{adapter.id[:16]}")}
    got = answer(backend, ask(adapter, stop=("there",), logprobs=1))
    assert (got.text, got.finish_reason) == (f"{said_by(adapter)}: hello ", "stop") and got.logprobs
    stream = backend.stream(ask(chat="one two"))
    assert list(stream) == ["base:", " one", " two"]
    assert stub.paths(CHAT)[0]["stop"] == ["there"]
    backend.close()
    assert stub.loaded == {} and answer(backend, ask()).text == "base: hello there"


def test_a_cancelled_request_is_given_up(fake: FakeVllm, tmp_path: Path, stub: StubVllm) -> None:
    stub.delay_s, stub.words = 0.01, [f"word{i} " for i in range(1000)]
    backend, cancel, pieces = local(tmp_path), threading.Event(), list[str]()
    future = backend.submit(ask(cancel=cancel, max_new_tokens=1000), pieces.append)
    assert soon(lambda: bool(pieces))
    cancel.set()
    got = future.result(10)
    assert got.text == "".join(pieces) and got.finish_reason == "cancelled"
    assert soon(lambda: stub.hung_up == 1)


def test_it_ends_with_the_backend(fake: FakeVllm, tmp_path: Path) -> None:
    backend = local(tmp_path)
    socket, threads = backend._running.socket, {t for t in threading.enumerate() if t.name == "dnd-vllm-local"}
    assert fake.n_running == 1 and socket.is_socket() and len(threads) == 1
    assert socket.parent.stat().st_mode & 0o077 == 0  # nobody else gets at it
    answer(backend, ask())
    del backend
    gc.collect()
    assert soon(lambda: fake.n_running == 0) and soon(lambda: not threads & set(threading.enumerate()))
    assert soon(lambda: not socket.parent.exists())


def test_what_has_ended_says_so(fake: FakeVllm, tmp_path: Path) -> None:
    backend = local(tmp_path)
    fake.apps[0].state.server.should_exit = True  # as vLLM's front end does when its engine has died
    assert soon(lambda: fake.n_running == 0)
    with pytest.raises(BackendError, match="cannot be reached") as caught:
        answer(backend, ask())
    assert "load the session again" in str(caught.value.fix)


def test_whose_engine_has_died_says_so(fake: FakeVllm, tmp_path: Path, stub: StubVllm) -> None:
    backend = local(tmp_path)
    stub.refuse = (500, {"error": {"message": "EngineCore encountered an issue.", "code": 500}})
    with pytest.raises(BackendError, match="failed: EngineCore") as caught:
        answer(backend, ask())
    assert "load the session again" in str(caught.value.fix)


def test_without_vllm_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(MissingExtraError, match="needs vLLM") as caught:
        local(tmp_path)
    assert "pip install vllm" in str(caught.value.fix)


def test_a_vllm_of_another_build_says_which_is_known(fake: FakeVllm, tmp_path: Path) -> None:
    del sys.modules["vllm.entrypoints.launchers.app"].build_app  # type: ignore[attr-defined]
    with pytest.raises(MissingExtraError, match=r"vLLM 0\.fake is not built as 0\.32") as caught:
        local(tmp_path)
    assert "vllm==0.32" in str(caught.value.fix)


@pytest.mark.parametrize(
    ("args", "words"), [("--no-such-option", "does not take"), ("--max-loras x", "does not take"), ("'", "words")]
)
def test_options_that_it_does_not_take(fake: FakeVllm, tmp_path: Path, args: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        local(tmp_path, args=args)
    assert caught.value.fix and fake.options == []


def test_one_that_does_not_start_says_why(fake: FakeVllm, tmp_path: Path) -> None:
    fake.fails = RuntimeError("Engine core initialization failed")
    with pytest.raises(BackendError, match="did not start: Engine core initialization failed") as caught:
        local(tmp_path)
    assert "stderr" in str(caught.value.fix)

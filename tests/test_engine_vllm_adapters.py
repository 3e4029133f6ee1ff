"""`VllmBackend` over a stub: which adapters the server has from us, under which names, also after a restart."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from engine_parts import soon
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from stub_vllm import StubVllm, stub_vllm
from vllm_parts import LAYOUT, answer, ask, hold, said_by, stored

from dnd_sdk.engine import VllmBackend, vllm_adapters
from dnd_sdk.errors import (
    AdapterNotFoundError,
    BankFullError,
    ConfigError,
    LayoutMismatchError,
)

pytest_plugins = ["vllm_fixtures"]


def test_an_adapter_is_loaded_once_under_a_name_of_its_content(backend: VllmBackend, stub: StubVllm) -> None:
    adapter = stored(backend.served.parent / "store", 1)
    reads: list[int] = []

    def load() -> None:
        reads.append(1)
        time.sleep(0.05)

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda _: backend.hold(adapter, load), range(16)))  # type: ignore[arg-type]
    name = f"dnd-{adapter.id[:16]}"
    assert stub.loads == [name] and len(reads) == 1 and backend.resident() == [adapter.id]
    assert stub.loaded[name] == str(backend.served / name)
    assert answer(backend, ask(adapter)).text.startswith(said_by(adapter))


def test_what_load_raises_is_raised_and_nothing_is_loaded(backend: VllmBackend, stub: StubVllm) -> None:
    adapter = stored(backend.served.parent / "store", 1)

    def damaged() -> Any:
        raise LayoutMismatchError("no")

    with pytest.raises(LayoutMismatchError, match="no"):
        backend.hold(adapter, damaged)
    assert stub.loads == [] and backend.resident() == []
    backend.hold(adapter, lambda: None)  # type: ignore[arg-type, return-value]
    assert backend.resident() == [adapter.id]


def test_the_server_finds_the_folder_elsewhere(stub: StubVllm, tmp_path: Path) -> None:
    backend = VllmBackend(stub.url, LAYOUT, tmp_path / "served", seen_at="/mnt/dnd/served")
    with pytest.raises(ConfigError, match="does not find /mnt/dnd/served/dnd-") as caught:
        hold(backend, 1)
    assert "shared" in str(caught.value.fix)
    stub.sees["/mnt/dnd"] = str(tmp_path)
    assert answer(backend, ask(hold(backend, 1))).text.startswith(said_by(stored(tmp_path / "x", 1)))


def test_the_servers_own_reason_is_told(backend: VllmBackend, stub: StubVllm) -> None:
    stub.max_rank = 2
    with pytest.raises(LayoutMismatchError, match=r"LoRA rank 4 is greater than max_lora_rank 2") as caught:
        hold(backend, 1)
    assert "--max-lora-rank" in str(caught.value.fix) and backend.resident() == []
    stub.runtime_loading = False
    with pytest.raises(ConfigError, match="takes no adapters at run time") as refused:
        hold(backend, 1)
    assert "VLLM_ALLOW_RUNTIME_LORA_UPDATING" in str(refused.value.fix)


def test_the_least_recently_used_gives_way(backend: VllmBackend, stub: StubVllm) -> None:
    a, b, c = (hold(backend, i) for i in (1, 2, 3))
    hold(backend, 1)
    d = hold(backend, 4)
    assert backend.resident() == [c.id, a.id, d.id] and set(stub.loaded) == {f"dnd-{x.id[:16]}" for x in (a, c, d)}
    with pytest.raises(AdapterNotFoundError, match="not held"):
        answer(backend, ask(b))
    backend.pin(c.id, True)
    hold(backend, 5)
    assert c.id in backend.resident() and a.id not in backend.resident()
    backend.pin(d.id, True)
    with pytest.raises(BankFullError, match="pinned"):
        backend.pin(f"{5:x}".ljust(64, "a"), True)
    with pytest.raises(AdapterNotFoundError):
        backend.pin(a.id, True)


def test_one_that_answers_does_not_give_way(
    backend: VllmBackend, stub: StubVllm, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vllm_adapters, "WAIT_S", 0.1)
    stub.gate = threading.Event()
    held = [hold(backend, i) for i in (1, 2, 3)]
    running = [backend.submit(ask(a)) for a in held]
    assert soon(lambda: backend.n_running == 3)
    with pytest.raises(BankFullError, match="in use or pinned"):
        hold(backend, 4)
    with pytest.raises(BankFullError, match="running request"):
        backend.forget(held[0].id)
    stub.gate.set()
    assert [f.result(10).text.split(":")[0] for f in running] == [said_by(a) for a in held]
    hold(backend, 4)
    assert backend.n_running == backend.n_waiting == 0


def test_holding_does_not_wait_for_a_place_who_asks_does(stub: StubVllm, tmp_path: Path) -> None:
    a, b = (stored(tmp_path / "store", i) for i in (1, 2))
    known = {x.id: x for x in (a, b)}
    backend = VllmBackend(stub.url, LAYOUT, tmp_path / "served", find=known.__getitem__, max_loaded=1)
    stub.gate = threading.Event()
    running = backend.submit(ask(a))
    assert soon(lambda: backend.n_running == 1)
    backend.hold(b, lambda: None)  # type: ignore[arg-type, return-value]
    assert backend.resident() == [a.id]
    waiting = backend.submit(ask(b))
    stub.gate.set()
    assert [f.result(10).text.split(":")[0] for f in (running, waiting)] == [said_by(a), said_by(b)]


def test_one_that_is_not_held_is_found(stub: StubVllm, tmp_path: Path) -> None:
    adapter = stored(tmp_path / "store", 1)
    known = {adapter.id: adapter}
    backend = VllmBackend(stub.url, LAYOUT, tmp_path / "served", find=known.__getitem__)
    assert answer(backend, ask(adapter)).text.startswith(said_by(adapter)) and backend.resident() == [adapter.id]


def test_a_server_started_anew_gets_the_adapter_again(backend: VllmBackend, stub: StubVllm) -> None:
    adapter = hold(backend, 1)
    stub.restart()
    with ThreadPoolExecutor(6) as threads:
        texts = list(threads.map(lambda _: answer(backend, ask(adapter)).text, range(6)))
    assert set(texts) == {f"{said_by(adapter)}: hello there"} and len(stub.loads) == 2


def test_a_pin_outlives_a_restart_of_the_server(backend: VllmBackend, stub: StubVllm) -> None:
    kept = hold(backend, 1)
    backend.pin(kept.id, True)
    stub.restart()
    answer(backend, ask(kept))
    for i in (2, 3, 4, 5):
        hold(backend, i)
    assert kept.id in backend.resident() and len(backend.resident()) == 3


def test_many_adapters_for_one_place_all_get_their_turn(stub: StubVllm, tmp_path: Path) -> None:
    adapters = [stored(tmp_path / "store", i) for i in range(1, 7)]
    known = {a.id: a for a in adapters}
    backend = VllmBackend(stub.url, LAYOUT, tmp_path / "served", find=known.__getitem__, max_loaded=1)
    wanted = adapters * 5
    answers = backend.complete([ask(a) for a in wanted])
    assert [g.text.split(":")[0] for g in answers] == [said_by(a) for a in wanted] and len(stub.loaded) == 1


def test_an_adapter_that_somebody_loaded_is_taken_as_it_is(
    backend: VllmBackend, stub: StubVllm, tmp_path: Path
) -> None:
    other = VllmBackend(stub.url, LAYOUT, tmp_path / "served")
    adapter = hold(other, 1)
    assert answer(backend, ask(hold(backend, 1))) == answer(other, ask(adapter))
    other.close()
    assert stub.loaded == {} and answer(backend, ask(adapter)).text.startswith(said_by(adapter))


def test_other_weights_under_the_same_name_are_not_served_for_it(backend: VllmBackend, stub: StubVllm) -> None:
    root = backend.served.parent / "store"
    first = stored(root, 1, "task")
    backend.hold(first, lambda: None)  # type: ignore[arg-type, return-value]
    second = stored(root, 2, "task")  # replaced in the store, in the same folder
    assert answer(backend, ask(first)).text.startswith(said_by(first))
    backend.hold(second, lambda: None)  # type: ignore[arg-type, return-value]
    assert answer(backend, ask(second)).text.startswith(said_by(second))
    backend.close()
    for folder in backend.served.iterdir():
        for file in folder.iterdir():
            file.unlink()
        folder.rmdir()
    with pytest.raises(AdapterNotFoundError, match="was replaced"):
        backend.hold(first, lambda: None)  # type: ignore[arg-type, return-value]


STEPS = st.lists(
    st.tuples(st.sampled_from(["ask", "hold", "forget", "restart", "unload", "close", "replace"]), st.integers(1, 5)),
    min_size=3,
    max_size=25,
)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(STEPS)
def test_no_request_ever_goes_out_under_anothers_name(tmp_path_factory: pytest.TempPathFactory, steps: Any) -> None:
    """Whatever is held, dropped, replaced and restarted in between: who answers is who was asked."""
    root = tmp_path_factory.mktemp("home")
    adapters = [stored(root / "store", i) for i in range(6)]
    known = {a.id: a for a in adapters}
    with stub_vllm() as stub, ThreadPoolExecutor(4) as threads:
        backend = VllmBackend(stub.url, LAYOUT, root / "served", find=known.__getitem__, max_loaded=2)
        running = []
        for n, (step, i) in enumerate(steps):
            adapter = adapters[i]
            if step == "ask":
                running.append((adapter, threads.submit(answer, backend, ask(adapter, f"hello {n}"))))
            elif step == "hold":
                threads.submit(backend.hold, adapter, lambda: None)
            elif step == "forget":
                threads.submit(backend.forget, adapter.id)
            elif step == "unload":
                stub.loaded.pop(f"dnd-{adapter.id[:16]}", None)
            elif step == "replace":  # one name, other weights
                shared = stored(root / "store", 10 + n, "shared")
                known[shared.id] = shared
                running.append((shared, threads.submit(answer, backend, ask(shared))))
                running[-1][1].exception()
            elif step == "close":
                backend.close()
            else:
                stub.loaded.clear()
        for adapter, future in running:
            if future.exception() is None:
                assert future.result().text.startswith(f"{said_by(adapter)}:")
            else:  # unloaded by the other steps twice in a row
                assert isinstance(future.exception(), AdapterNotFoundError)
        for model, speaker in stub.answered:
            assert model == f"dnd-{speaker[:16]}"

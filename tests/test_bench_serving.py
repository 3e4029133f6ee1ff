"""`dnd bench engine`: a small run on tiny models, the sums behind its figures, its table and picture, and refusals."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cli_runner import dnd, dnd_json
from engine_parts import peft_model, strong, tiny_base, tiny_layout

from dnd_sdk.adapters import AdapterStore
from dnd_sdk.bench import FULL, QUICK, Sizes, answering, bench_engine, first_token, render_engine, rivals, swapping
from dnd_sdk.bench.stand_in import stand_in
from dnd_sdk.bench.workload import N_ADAPTERS, Workload
from dnd_sdk.config import Home
from dnd_sdk.engine import Engine
from dnd_sdk.errors import ConfigError, InputError
from dnd_sdk.evaluation import read_report, write_plots
from dnd_sdk.lora import Packing, tables_from_flat, use_lora
from dnd_sdk.session import DnD

TINY = Sizes(
    registered=5,
    swap_rounds=2,
    rounds=1,
    decode_tokens=4,
    batches=(1, 8),
    answer_tokens=4,
    clients=(1, 3),
    rival_requests=2,
    sharing=2,
    head_tokens=40,
    long_tokens=80,
)


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DnD]:
    with stand_in(Home(tmp_path_factory.mktemp("home"))) as made:
        yield made


@pytest.fixture(scope="module")
def report(session: DnD) -> dict[str, Any]:
    told: list[tuple[int, int, str]] = []
    made = bench_engine(session, TINY, progress=lambda *step: told.append(step))
    assert told[0] == (0, 5, "swap") and told[-1] == (5, 5, "done") and len(told) == 6
    return json.loads(json.dumps(made, allow_nan=False))


@pytest.fixture
def work(session: DnD) -> Iterator[Workload]:
    work = Workload(session, TINY, lambda: 0.0)
    with work.resident():
        yield work


def test_the_report_holds_every_measurement(report: dict[str, Any], session: DnD) -> None:
    assert (report["schema_version"], report["kind"], report["rounds"]) == (1, "engine", 1)
    assert {"cpu", "cores", "torch", "device", "dtype", "base", "gpu"} <= set(report["machine"])
    assert list(report["swap"]) == ["kept", "host", "disk"], "on a CPU the device's memory is the host's"
    for block in report["swap"].values():
        assert [b["n"] for b in block["registered"]] == [1, 5] and block["registered"][0]["over_one"] == 1.0
        assert block["peft_ms"] > 0 and block["peft_over_ours"] > 0
    assert [(b["batch"], b["adapters"]) for b in report["decode"]] == [(1, 0), (1, 1), (8, 0), (8, 1), (8, 8)]
    assert [b["over_base"] for b in report["decode"] if b["adapters"] == 0] == [1.0, 1.0]
    assert [c["n"] for c in report["clients"]["clients"]] == [1, 3]
    assert report["shared_prompts"]["prompts"] == 2 and report["first_token"]["long_tokens"] == 80
    assert session.store.ls() == [] and session.engine.bank.resident() == []


def test_rivals_do_the_same_work(report: dict[str, Any]) -> None:
    assert report["clients"]["same_answers"] == 1.0


def test_the_table_names_every_figure(report: dict[str, Any]) -> None:
    text = render_engine(report)
    for words in (
        "swap from kept",
        "swap from host",
        "swap from disk",
        "hot-swap",
        "8 rows, 8 adapters",
        "3 clients",
        "one by one",
    ):
        assert words in text
    assert "in one call" in text and "beside a long prompt" in text and "under 8 decoding rows" in text
    on_gpu = report | {"machine": report["machine"] | {"gpu": "Big GPU"}}
    assert "Big GPU" in render_engine(on_gpu)


class FakeEngine:
    """An engine on its own clock: a step takes what its adapters say, and a prompt what its length says."""

    def __init__(self) -> None:
        self.now = 0.0

    def clock(self) -> float:
        return self.now

    def answer(self, requests: Sequence[Any]) -> int:
        n = max(r.options.max_new_tokens for r in requests)
        different = len({r.adapter_id for r in requests} - {None})
        self.now += 5.0 * len(requests) + (n - 1) * (1.0 + 0.25 * different)
        return len(requests) * n


def test_a_decoding_step_is_without_reading_the_prompts(work: Workload, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeEngine()
    monkeypatch.setattr(work, "answer", fake.answer)
    monkeypatch.setattr(work, "clock", fake.clock)
    found = {(b["batch"], b["adapters"]): b for b in answering.time_decoding(work)}
    assert found[1, 0]["step_ms"] == pytest.approx(1000) and found[8, 0]["tokens_s"] == pytest.approx(8)
    assert found[8, 1]["over_base"] == pytest.approx(1.25) and found[8, 8]["over_base"] == pytest.approx(3.0)


def test_the_rates_of_clients_are_of_the_tokens_that_were_made(work: Workload, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeEngine()
    monkeypatch.setattr(work, "answer", fake.answer)
    monkeypatch.setattr(work, "clock", fake.clock)

    def by_rival(self: Any, chat: str, n_tokens: int) -> tuple[int, str]:
        fake.now += 10.0
        return n_tokens // 2, "x"

    monkeypatch.setattr(answering.Plain, "answer", by_rival)
    found = answering.time_clients(work)
    assert found["peft_tokens_s"] == pytest.approx(2 / 10) == pytest.approx(found["transformers_tokens_s"])
    per_request = 4 / (5 + 3 * 1.25)  # the made-up engine has no two at once
    assert [c["tokens_s"] for c in found["clients"]] == pytest.approx([per_request] * 2)
    assert found["clients"][0]["over_peft"] == pytest.approx(per_request * 5)
    assert found["same_answers"] == 0.0


def test_an_error_in_a_client_is_no_speed(work: Workload, monkeypatch: pytest.MonkeyPatch) -> None:
    def answer(requests: Sequence[Any]) -> int:
        raise InputError("too long")

    monkeypatch.setattr(work, "answer", answer)
    with pytest.raises(InputError, match="too long"):
        answering._Clients(work, 2).ask()
    reader = first_token._Reader(work)
    with pytest.raises(InputError, match="too long"), reader.reading():
        pass


def test_heads_are_shared_only_where_that_is_measured(work: Workload, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def answer(requests: Sequence[Any]) -> int:
        asked.extend(r.chat.partition("\n")[0] for r in requests)
        return len(requests)

    monkeypatch.setattr(work, "answer", answer)
    monkeypatch.setattr(work, "clock", lambda: float(len(asked) + 1))
    answering.time_shared_prompts(work)
    own, shared = asked[0:2] + asked[4:6], asked[2:4] + asked[6:8]  # of the first round
    assert len(set(own)) == 4 and shared[0] == shared[1] != shared[2] == shared[3]
    assert len(set(asked)) == 2 * (4 + 2), "no round asks what an earlier one asked"
    assert all(40 <= len(head) <= 60 for head in asked), "one token a byte"


def test_rows_decode_while_the_first_token_is_waited_for(work: Workload) -> None:
    rows = first_token._Rows(work)
    with rows.decoding():
        assert first_token._first(work) == 0.0  # on this clock
    assert rows.running[0] >= N_ADAPTERS - 2, "made-up models may end an answer early"


def test_a_swap_does_the_work_of_its_source(work: Workload, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stored = swapping._Registered(work, work.weights(), tmp_path, 2, None)
    assert [a.name for a in AdapterStore(Home(tmp_path)).ls()] == ["other-1", "swapped"]
    packed, read = counted(monkeypatch, Packing, "pack"), counted(monkeypatch, AdapterStore, "load")
    for source, n_packed, n_read in (("host", 1, 0), ("disk", 1, 1), ("device", 1, 0), ("kept", 1, 1), ("kept", 0, 0)):
        packed.clear()
        read.clear()
        stored.swap(source)
        assert (len(packed), len(read)) == (n_packed, n_read), source
        assert stored.bank.resident() == [stored.adapter.id]
        stored.free(source)
    with pytest.raises(RuntimeError, match="not in a slot"):
        stored.free("host")


def counted(monkeypatch: pytest.MonkeyPatch, owner: type, method: str) -> list[object]:
    """A list with an entry for each call of a method from now on."""
    calls, plain = list[object](), getattr(owner, method)

    def counting(*args: Any, **kwargs: Any) -> Any:
        calls.append(None)
        return plain(*args, **kwargs)

    monkeypatch.setattr(owner, method, counting)
    return calls


def test_the_rivals_share_the_bases_weights_and_nothing_else() -> None:
    base = tiny_base()
    layout = tiny_layout(base)
    ids = torch.tensor([[5, 6, 7]])
    plain = base.model(ids).logits
    Engine(base, layout)
    twin = rivals.sharing_weights(base.model)
    assert torch.equal(twin(ids).logits, plain)
    own, theirs = dict(twin.named_parameters()), dict(base.model.named_parameters())
    assert own.keys() == theirs.keys() and all(own[n].data_ptr() == theirs[n].data_ptr() for n in own)
    with use_lora(tables_from_flat(layout, strong(layout, 0)[None]), 0):
        assert not any("forward" in vars(m) for m in twin.modules())


def test_the_rival_is_plain_peft_before_and_after_a_hot_swap(tmp_path: Path) -> None:
    base = tiny_base()
    layout, ids = tiny_layout(base), torch.tensor([[5, 6, 7]])
    a, b, c = (strong(layout, seed) for seed in (1, 2, 3))
    want = {name: peft_model(base, layout, flat)(ids).logits for name, flat in {"a": a, "b": b, "c": c}.items()}
    rival = rivals.Peft(base, layout, {"one": a, "two": b})
    for name, expected in (("one", want["a"]), ("two", want["b"]), ("one", want["a"])):
        rival.set_adapter(name)
        torch.testing.assert_close(rival.model(ids).logits, expected)
    rival.hotswap("one", rivals.state_of(layout, c, "one"))
    torch.testing.assert_close(rival.model(ids).logits, want["c"])
    about = {"base_name": "x", "base_fingerprint": base.fingerprint, "source": "generated"}
    stored = AdapterStore(Home(tmp_path)).put(a, layout, name="a", **about)
    rival.hotswap_folder("one", stored.path)
    torch.testing.assert_close(rival.model(ids).logits, want["a"])


def test_sizes_fit_a_short_context() -> None:
    assert FULL.within(512) == replace(FULL, head_tokens=170, long_tokens=256)
    assert FULL.within(1 << 20) == FULL and QUICK.within(8192) == QUICK


def test_too_few_slots_are_told_and_leave_nothing(session: DnD) -> None:
    base = tiny_base(layers=1)
    work = Workload(SimpleNamespace(engine=Engine(base, tiny_layout(base), n_slots=3)), TINY, lambda: 0.0)
    with pytest.raises(ConfigError, match="8 adapters do not fit"), work.resident():
        pass
    assert work.engine.bank.resident() == []


def test_the_command_and_its_picture(report: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Sizes] = []

    def measure(dnd: object, sizes: Sizes, **_: object) -> dict[str, Any]:
        asked.append(sizes)
        return report

    monkeypatch.setattr("dnd_sdk.bench.bench_engine", measure)
    monkeypatch.setattr("dnd_sdk.session.DnD.load", lambda **_: SimpleNamespace(__enter__=None))
    monkeypatch.setattr("dnd_sdk.cli.options.ModelOptions.load", lambda *_: _Loaded())
    assert dnd_json("bench", "engine", "--quick", "--registered", "7")["kind"] == "engine"
    assert "swap from" in dnd("bench", "engine").stdout
    assert asked == [replace(QUICK, registered=7), FULL]
    path = tmp_path / "engine.json"
    path.write_text(json.dumps(report))
    files = write_plots(read_report(path), tmp_path / "out")
    assert [f.name for f in files] == ["report.md", "engine.svg"]
    text, picture = (f.read_text() for f in files)
    assert "| 8 rows, 8 adapters |" in text and "8 rows, 8 adapters" in picture and "3 clients" in picture


class _Loaded:
    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...


@pytest.mark.parametrize("harm", [{"schema_version": 9}, {"swap": {}}, {"decode": [{"batch": 1}]}, {"machine": None}])
def test_a_report_that_cannot_be_drawn_is_refused(report: dict[str, Any], tmp_path: Path, harm: dict[str, Any]) -> None:
    path = tmp_path / "engine.json"
    path.write_text(json.dumps(report | harm))
    with pytest.raises(InputError, match="engine report"):
        read_report(path)

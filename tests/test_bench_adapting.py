from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dnd_sdk.bench import adapting as bench
from dnd_sdk.bench import timing
from dnd_sdk.errors import ConfigError, GeneratorError, InputError

ADAPT_S, PLAIN_S, ENCODE_S, REUSE_S, TOKEN_S, ADAPTER_TOKEN_S = 0.3, 0.25, 0.2, 0.004, 0.01, 0.0105
LOAD_S = 2.5


@dataclass
class FakeSession:
    """A session whose every call takes a known time on its own clock; the first two encodings are slow."""

    now: float = 0.0
    stored: list[str] = field(default_factory=lambda: ["older"])
    added: list[str] = field(default_factory=list)
    resident: dict[str, torch.Tensor] = field(default_factory=dict)
    decision: str | None = None
    generator: Any = field(default_factory=lambda: SimpleNamespace(mean=lambda: torch.ones(3)))

    def __post_init__(self) -> None:
        model = SimpleNamespace(device=torch.device("cpu"), dtype=torch.float32)
        self.base = SimpleNamespace(model=model, name="tiny")
        self.store = SimpleNamespace(ls=lambda: [SimpleNamespace(name=n) for n in self.stored], rm=self.stored.remove)
        bank = SimpleNamespace(load=self.resident.__setitem__, evict=lambda i: self.resident.pop(i, None))
        self.engine = SimpleNamespace(bank=bank, complete=self.complete, forget=bank.evict, base=self.base)
        self.engine.local = self.engine
        self.home, self.cold = "home", 2

    def clock(self) -> float:
        return self.now

    def encode(self, prompts: list[str]) -> None:
        self.now += ENCODE_S if self.cold == 0 else 5.0
        self.cold = max(0, self.cold - 1)

    def adapt(self, prompts: list[str], *, mode: str, calibrate: bool | None) -> SimpleNamespace:
        fresh = mode == "generate"
        assert not fresh or "new" not in self.stored, "generation was timed on a store that had the adapter"
        assert not fresh or "id-new" not in self.resident, "the swap was timed on a bank that had the adapter"
        self.now += (ADAPT_S if calibrate is None else PLAIN_S) if fresh else REUSE_S
        if fresh:
            self.stored.append("new")
            self.added.append("new")
            self.resident["id-new"] = torch.ones(3)
        decision = self.decision or ("generate" if fresh else "reuse")
        adapter = None if decision == "base" else SimpleNamespace(name="new", id="id-new")
        return SimpleNamespace(
            adapter=adapter, decision=decision, reason="why", timings_s={"encode": 0.1, "total": 0.3}
        )

    def complete(self, requests: Any) -> list[SimpleNamespace]:
        [request] = requests
        if request.adapter_id is not None:
            assert 0 < float(self.resident[request.adapter_id].abs().max()) < 1e-3
        n = request.options.max_new_tokens - (request.adapter_id is not None)  # the adapter ends one token earlier
        self.now += n * (ADAPTER_TOKEN_S if request.adapter_id else TOKEN_S)
        return [SimpleNamespace(completion_tokens=n)]


def run(session: FakeSession, monkeypatch: pytest.MonkeyPatch, **changes: Any) -> dict[str, Any]:
    def load(name: str, home: str, *, device: str, dtype: str) -> None:
        assert (name, home, device, dtype) == ("tiny", "home", "cpu", "float32")
        session.now += LOAD_S

    monkeypatch.setattr(bench, "load_base", load)
    monkeypatch.setattr(bench, "_sentence_encoder", lambda dnd: SimpleNamespace(encode=dnd.encode))
    return bench.bench_adapt(session, **{"repeats": 3, "clock": session.clock} | changes)


def test_ratios_are_of_warm_medians(monkeypatch: pytest.MonkeyPatch) -> None:
    report = json.loads(json.dumps(run(FakeSession(), monkeypatch, repeats=1), allow_nan=False))
    assert report["adapt_over_encode"] == pytest.approx(ADAPT_S / ENCODE_S)
    assert report["uncalibrated_over_encode"] == pytest.approx(PLAIN_S / ENCODE_S)
    assert (report["load_s"], report["uncalibrated_s"]) == pytest.approx((LOAD_S, PLAIN_S))
    assert report["reuse_ms"] == pytest.approx(1e3 * REUSE_S)
    assert report["decode_over_base"] == pytest.approx(ADAPTER_TOKEN_S / TOKEN_S)
    assert report["decode_base_tokens_s"] == pytest.approx(1 / TOKEN_S)
    assert report["adapt_steps_s"] == {"encode": 0.1, "total": 0.3}
    assert (report["schema_version"], report["n_prompts"], report["repeats"]) == (1, 64, 1)
    assert {"cpu", "cores", "torch", "torch_threads", "device", "dtype", "base"} <= set(report["machine"])
    text = bench.render_adapting(report)
    assert "1.50 x  (1.25 x, 250 ms, without calibration)" in text and "1.050 x time per token" in text


def test_a_ratio_is_taken_round_by_round() -> None:
    """A machine that gets ten times slower half-way: the medians come from other rounds on each side."""
    times, others = [1.1, 1.1, 11.0, 11.0, 11.0], [1.0, 1.0, 10.0, 10.0, 1.0]
    assert timing.ratio(times, others) == pytest.approx(1.1)


def test_the_store_and_the_engine_are_left_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    session = FakeSession()
    run(session, monkeypatch)
    assert session.stored == ["older"] and session.resident == {}
    assert len(session.added) == 2 * (2 + 3) + 1


def test_a_failure_leaves_no_adapter_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    session = FakeSession()
    session.encode = lambda prompts: (_ for _ in ()).throw(KeyboardInterrupt) if session.added else None
    with pytest.raises(KeyboardInterrupt):
        run(session, monkeypatch)
    assert session.added and session.stored == ["older"]


def test_what_did_not_go_as_asked_is_not_reported_as_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(GeneratorError, match="expected to generate, the session decided 'base': why"):
        run(FakeSession(decision="base"), monkeypatch)
    with pytest.raises(GeneratorError, match="no generator to measure"):
        run(FakeSession(generator=None), monkeypatch)
    with pytest.raises(InputError, match="one or more prompts"):
        run(FakeSession(), monkeypatch, prompts=[])
    with pytest.raises(ConfigError, match="at least 1, got 0"):
        run(FakeSession(), monkeypatch, n_prompts=0)


def test_sample_prompts_differ() -> None:
    prompts = bench.sample_prompts(200)
    assert len(set(prompts)) == 200
    assert all(15 <= len(p.split()) <= 60 for p in prompts)


def test_peak_memory_is_what_the_system_says_in_megabytes() -> None:
    status = Path("/proc/self/status")
    if not status.exists():
        pytest.skip("the system's own figure is read from /proc")
    peak_kib = next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    assert bench.peak_rss_mb() == pytest.approx(peak_kib * 1024 / 1e6, rel=0.02)

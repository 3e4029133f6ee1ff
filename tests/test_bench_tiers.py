"""`dnd bench tiers`: the simulation finds adapters where the real engine does, its sums, its table, and refusals."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from adapter_folders import BASE
from cli_runner import dnd, dnd_json
from engine_parts import tiny_base, tiny_layout
from helpers import random_flat

from dnd_sdk.adapters import AdapterStore
from dnd_sdk.bench import Deployment, render_tiers, simulate
from dnd_sdk.bench.tiers import TIERS, replay, size, trace
from dnd_sdk.config import Home, SamplingOptions
from dnd_sdk.engine import CompletionRequest, Engine
from dnd_sdk.errors import ConfigError

N_ADAPTERS, N_SLOTS, N_KEPT, N_JOBS = 40, 4, 9, 500
ONE_TOKEN = SamplingOptions(max_new_tokens=1)


def real_rates(home: Home, asked: list[int]) -> dict[str, float]:
    """Where a real engine over a real store finds the adapter of each job."""
    base = tiny_base(layers=1)
    layout, store = tiny_layout(base), AdapterStore(home)
    more: dict[str, Any] = {"base_name": base.name, "base_fingerprint": BASE, "source": "generated"}
    ids = [store.put(random_flat(layout, seed=i), layout, name=f"a{i}", **more).id for i in range(N_ADAPTERS)]
    n_bytes = layout.n_parameters * 4  # float32 on the CPU
    engine = Engine(
        base,
        layout,
        n_slots=N_SLOTS,
        kept_bytes=N_KEPT * n_bytes + n_bytes // 2,
        fetch=lambda adapter_id: store.load_by_id(adapter_id, layout),
    )
    for adapter in asked:
        engine.complete([CompletionRequest("hi", ids[adapter], ONE_TOKEN)])
    host, disk = engine.bank.brought_in
    return {"slot": 1 - (host + disk) / len(asked), "host": host / len(asked), "disk": disk / len(asked)}


@pytest.mark.parametrize("zipf", [0.6, 1.1])
def test_a_real_engine_finds_adapters_where_the_simulation_does(tmp_path: Path, zipf: float) -> None:
    asked = trace(N_ADAPTERS, N_JOBS, zipf, seed=3).tolist()
    found = Counter(replay(asked, N_SLOTS, N_KEPT))
    ours = {tier: found[i] / N_JOBS for i, tier in enumerate(TIERS)}
    assert min(ours.values()) > 0.1, "every tier must matter for the comparison to tell anything"
    assert real_rates(Home(tmp_path), asked) == pytest.approx(ours, abs=1e-9)


def test_slots_and_host_memory_are_one_list_by_last_use() -> None:
    asked = trace(200, 3000, 0.9, seed=1).tolist()
    recent: list[int] = []
    for adapter, tier in zip(asked, replay(asked, 8, 20), strict=True):
        depth = recent.index(adapter) if adapter in recent else 200
        assert tier == (0 if depth < 8 else 1 if depth < 28 else 2)
        recent = [adapter, *(a for a in recent if a != adapter)]


def test_a_trace_asks_as_zipf_says() -> None:
    asked = trace(50, 200_000, 1.0, seed=0)
    shares = np.bincount(asked, minlength=50) / len(asked)
    wanted = 1 / np.arange(1, 51)
    assert np.allclose(shares, wanted / wanted.sum(), atol=0.004)
    assert np.array_equal(asked, trace(50, 200_000, 1.0, seed=0))
    assert np.bincount(trace(50, 5000, 0.0, seed=0), minlength=50).min() > 50


def test_an_adapter_on_one_replica_is_found_more_often_than_one_on_any() -> None:
    several = {"adapters": 2000, "jobs": 20_000, "warm_up": 5000, "replicas": 8, "slots": 8, "host_bytes": 10**9}
    one, any_ = (simulate(Deployment(**several, affinity=affinity)) for affinity in (True, False))
    assert one["hit_rates"]["disk"] < any_["hit_rates"]["disk"] - 0.1
    assert one["busiest_replica"]["jobs_over_mean"] > any_["busiest_replica"]["jobs_over_mean"]


def test_the_sums_of_a_report() -> None:
    report = simulate(Deployment(adapters=100, jobs=1000, slots=2, host_bytes=10**9, jobs_s=0.001))
    n = {tier: round(rate * 1000) for tier, rate in report["hit_rates"].items()}
    assert sum(n.values()) == 1000 and n["disk"] == report["asked_for"]  # host memory holds them all: each is read once
    d = report["deployment"]
    assert report["moved_bytes"]["disk_to_host"] == n["disk"] * d["stored_bytes"]
    assert report["moved_bytes"]["host_to_slots"] == (n["host"] + n["disk"]) * d["adapter_bytes"]
    assert report["wait_ms"]["max"] == pytest.approx(28.0) and report["wait_ms"]["p50"] == pytest.approx(0.3)
    queued = simulate(Deployment(adapters=100, jobs=1000, slots=2, host_bytes=0, jobs_s=100))
    assert queued["wait_ms"]["p99"] > 1000 and queued["busiest_replica"]["loading_share"] > 1
    lines = render_tiers(json.loads(json.dumps(report, allow_nan=False))).splitlines()
    assert [line.split()[0] for line in lines] == ["jobs", "found", "wait", "moved", "busiest", "holds"]
    assert [size(n) for n in (0, 999, 1000, 17_700_000, 17_700_000_000_000)] == [
        "0 B",
        "999 B",
        "1 kB",
        "17.7 MB",
        "17.7 TB",
    ]


@pytest.mark.parametrize(
    "wrong", [{"slots": 0}, {"jobs": 0}, {"replicas": -1}, {"zipf": -1.0}, {"jobs": 10**9}, {"jobs_s": 0.0}]
)
def test_what_is_out_of_range_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        Deployment(**wrong)


def test_the_command_prints_the_report(tmp_path: Path) -> None:
    line = ["bench", "tiers", "--adapters", "100", "--jobs", "500", "--slots", "4", "--host-gb", "0.2"]
    assert (
        dnd_json(*line)["hit_rates"]
        == simulate(Deployment(adapters=100, jobs=500, slots=4, host_bytes=200_000_000, adapter_bytes=8_800_000))[
            "hit_rates"
        ]
    )
    assert "found in" in dnd(*line).stdout
    assert dnd("bench", "tiers", "--host-gb", "-1").exit_code == 1


def test_a_simulation_loads_no_torch() -> None:
    code = "import sys; from dnd_sdk.bench import simulate, Deployment; simulate(Deployment(adapters=9, jobs=9)); "
    subprocess.run([sys.executable, "-c", code + "assert 'torch' not in sys.modules"], check=True)

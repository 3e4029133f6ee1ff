"""Thresholds: measured on made-up tasks whose truth is known, saved, loaded and refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from routing_parts import FakeStore, adapter, task_vectors, unit

from dnd_sdk.errors import ConfigError, GeneratorError, InputError
from dnd_sdk.routing import Router, RouterData, Support, Thresholds, fit_thresholds, noise_prompts
from dnd_sdk.routing.similarity import set_similarity
from dnd_sdk.routing.support import centres_of
from dnd_sdk.routing.thresholds import SUPPORT_FILE, THRESHOLDS_FILE, compare_tasks, threshold_for

N_TASKS = 12
WIDTH = 64


def tasks(n: int = N_TASKS, size: int = 40, *, seed: int = 0, twins: float = 0.0) -> dict[str, torch.Tensor]:
    """Tasks in one half of the space; task 0 and 1 share `twins` of their direction."""
    found = {f"t{t}": task_vectors(t, size, seed=seed, width=WIDTH) for t in range(n)}
    for v in found.values():
        v[:, WIDTH // 2 :] *= 0.3
    shared = torch.zeros(WIDTH)
    shared[0] = 3 * twins
    return {k: unit(v + shared if k in ("t0", "t1") else v) for k, v in found.items()}


def families(n: int = N_TASKS) -> dict[str, str]:
    return {f"t{t}": f"f{t // 2}" for t in range(n)}


def test_a_fitted_router_tells_tasks_apart() -> None:
    calibration, report = fit_thresholds(tasks(), families())
    assert report["sets"][8]["recall"] > 0.9 and report["sets"][16]["false_reuse"] <= 0.02
    store = FakeStore()
    for name, v in tasks().items():
        store.put(adapter(name), v)
    r = Router(store, "mini", "e" * 64, "b" * 64, calibration.thresholds, support=calibration.support)
    for name, v in tasks(seed=1).items():
        found = r.route(v)
        assert (found.decision, found.adapter and found.adapter.name) == ("reuse", name)
    unseen = unit(tasks(N_TASKS + 1, seed=2)[f"t{N_TASKS}"])
    assert r.route(unseen).decision == "generate"


def test_thresholds_keep_false_reuse_within_bounds_and_no_higher_than_needed() -> None:
    calibration, report = fit_thresholds(tasks(twins=1.0), families(), max_false_reuse=0.05, max_false_single=0.1)
    sets = report["sets"].values()
    assert sum(s["false_reuse"] for s in sets) / len(sets) <= 0.05 and report["single"]["false_reuse"] <= 0.1
    easy, _ = fit_thresholds(tasks(), families(), max_false_reuse=0.05, max_false_single=0.1)
    assert easy.thresholds.reuse < calibration.thresholds.reuse  # twins are what the threshold has to hold against
    assert easy.thresholds.reuse_single < calibration.thresholds.reuse_single
    strict, _ = fit_thresholds(tasks(twins=1.0), families(), max_false_reuse=0.0)
    assert strict.thresholds.reuse >= calibration.thresholds.reuse


def test_threshold_lets_through_the_allowed_share_exactly() -> None:
    scores = torch.arange(100) / 100
    for share in (0.0, 0.01, 0.05, 0.5):
        assert (scores >= threshold_for(scores, share)).float().mean() == pytest.approx(share)
    assert (torch.ones(10) >= threshold_for(torch.ones(10), 0.2)).sum() == 0  # ties are never split


def test_trials_equal_comparing_sets_one_by_one() -> None:
    given = {k: v[:8] for k, v in tasks(4).items()}
    trials = compare_tasks(given, families(), 4, n_draws=1, rng=torch.Generator().manual_seed(5))
    rng, halves = torch.Generator().manual_seed(5), []
    for v in given.values():
        order = torch.randperm(8, generator=rng)
        halves.append((v[order[:4]], v[order[4:]]))
    scores = torch.tensor([[set_similarity(ask, kept) for kept, _ in halves] for _, ask in halves])
    assert torch.allclose(trials.own, scores.diagonal(), atol=1e-5)
    assert torch.allclose(trials.other, (scores - 9 * torch.eye(4)).max(dim=1).values, atol=1e-5)
    assert torch.allclose(trials.family, scores[[0, 1, 2, 3], [1, 0, 3, 2]], atol=1e-5)
    alone = compare_tasks(given, {k: k for k in given}, 4, n_draws=1, rng=rng)
    assert torch.isinf(alone.family).all()


def test_support_lets_unseen_families_pass_and_noise_not() -> None:
    noise = unit(torch.randn(60, WIDTH, generator=torch.Generator().manual_seed(3)).abs())
    calibration, report = fit_thresholds(tasks(), families(), noise=noise)
    limit = calibration.thresholds.support
    assert report["support"]["threshold"] == limit < report["support"]["min"]
    held_out = unit(torch.randn(20, WIDTH, generator=torch.Generator().manual_seed(4)).abs())
    assert calibration.support.score(held_out) < limit
    assert calibration.support.score(tasks(N_TASKS + 1)[f"t{N_TASKS}"]) >= limit
    plain, _ = fit_thresholds(tasks(), families())
    assert plain.support.noise is None


def test_same_seed_same_thresholds() -> None:
    a, b = fit_thresholds(tasks(), families()), fit_thresholds(tasks(), families())
    assert a[0].thresholds == b[0].thresholds and a[1] == b[1]
    assert fit_thresholds(tasks(), families(), seed=9)[0].thresholds != a[0].thresholds


def test_few_prompts_tasks_and_one_family_will_do() -> None:
    small = {k: v[:5] for k, v in tasks(2).items()}
    calibration, report = fit_thresholds(small, dict.fromkeys(small, ""))
    assert list(report["sets"]) == [3] and calibration.thresholds.fitted_on["n_families"] == 1
    json.dumps(report)


@pytest.mark.parametrize(
    ("given", "kinds", "error", "match"),
    [
        (tasks(1), families(), ConfigError, "at least 2 tasks, got 1"),
        (tasks(3), {"t0": "f"}, ConfigError, r"without a family: \['t1', 't2'\]"),
        ({k: v[:3] for k, v in tasks(3).items()}, families(), ConfigError, "'t0' has 3 prompts"),
        ({"t0": tasks()["t0"], "t1": tasks()["t1"][:, :9]}, families(), InputError, r"expected \(n, 64\)"),
        ({"t0": tasks()["t0"], "t1": tasks()["t1"] * 2}, families(), InputError, "not L2-normalised"),
    ],
)
def test_unusable_tasks_are_refused(given, kinds, error, match) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(error, match=match):
        fit_thresholds(given, kinds)


@pytest.mark.parametrize("noise", [None, task_vectors(8, width=WIDTH)])
def test_saved_and_loaded_is_the_same(tmp_path: Path, noise: torch.Tensor | None) -> None:
    made, _ = fit_thresholds(tasks(), families(), noise=noise, fitted_on={"encoder": "mini"})
    made.save(tmp_path)
    again = RouterData.load(tmp_path)
    assert again.thresholds == made.thresholds and again.thresholds.fitted_on["encoder"] == "mini"
    assert torch.equal(again.support.tasks, made.support.tasks) and again.support.tasks.shape == (4 * N_TASKS, WIDTH)
    assert (again.support.noise is None) == (noise is None)
    assert noise is None or torch.equal(again.support.noise, made.support.noise)
    assert sorted(p.name for p in tmp_path.iterdir()) == [THRESHOLDS_FILE, SUPPORT_FILE]


@pytest.mark.parametrize(
    ("file", "content", "match"),
    [
        (THRESHOLDS_FILE, None, "no usable routing thresholds"),
        (THRESHOLDS_FILE, b"{", "no usable routing thresholds"),
        (THRESHOLDS_FILE, b"[]", "no usable routing thresholds"),
        (THRESHOLDS_FILE, b'{"format_version": 2}', "format_version is not 1"),
        (THRESHOLDS_FILE, b'{"format_version": 1, "reuse": 0.9}', "reuse_single"),
        (
            THRESHOLDS_FILE,
            b'{"format_version": 1, "reuse": NaN, "reuse_single": 0.5, "support": 0, "fitted_on": {}}',
            "threshold reuse must be",
        ),
        (SUPPORT_FILE, None, "no usable support"),
        (SUPPORT_FILE, b"torn", "no usable support"),
    ],
)
def test_damaged_files_are_refused(tmp_path: Path, file: str, content: bytes | None, match: str) -> None:
    fit_thresholds(tasks(3), families())[0].save(tmp_path)
    (tmp_path / file).unlink() if content is None else (tmp_path / file).write_bytes(content)
    with pytest.raises(GeneratorError, match=match):
        RouterData.load(tmp_path)


def test_support_vectors_are_checked() -> None:
    with pytest.raises(InputError, match="not L2-normalised"):
        Support(torch.ones(2, 4))
    with pytest.raises(InputError, match=r"expected \(n, 64\)"):
        Support(task_vectors(0, width=WIDTH), task_vectors(0, width=8))


def test_thresholds_out_of_range_are_refused() -> None:
    with pytest.raises(ConfigError, match="reuse_single must be a number"):
        Thresholds(0.9, 7.0, 0.0)


def test_centres_find_the_groups() -> None:
    groups = [task_vectors(t, 20, spread=0.2) for t in range(3)]
    centres = centres_of(torch.cat(groups), 3)
    assert torch.allclose(centres.norm(dim=1), torch.ones(3))
    nearest = [(g @ centres.T).argmax(dim=1) for g in groups]
    assert all(len(set(n.tolist())) == 1 for n in nearest) and len({int(n[0]) for n in nearest}) == 3
    assert len(centres_of(groups[0][:2], 5)) == 2


def test_noise_is_varied_and_always_the_same() -> None:
    first = noise_prompts(5)
    assert first == noise_prompts(5) != noise_prompts(5, seed=1)
    assert len(first) == len(set(first)) == 14 * 5 and all(p.strip() for p in first)

"""Score maps: fitted against a slow grid, monotone, kept with the thresholds, absent where nothing was measured."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from routing_parts import FakeStore, adapter, task_vectors
from torch import Tensor

from dnd_sdk.errors import ConfigError, GeneratorError
from dnd_sdk.routing import Probabilities, Router, RouterData, ScoreMap, Support, Thresholds, fit_thresholds
from dnd_sdk.routing.probability import fit_map, reuse_map, support_map
from dnd_sdk.routing.support import centres_of
from dnd_sdk.routing.thresholds import THRESHOLDS_FILE

MANY = (10**9, 10**9)
"""So many independent sources that nothing is smoothed."""


def logistic_data(slope: float, offset: float, n: int = 20_000) -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(0)
    x = torch.rand(n, generator=rng)
    return x, (torch.rand(n, generator=rng) < torch.sigmoid(slope * x + offset)).float()


def loss(x: Tensor, targets: Tensor, slope: float, offset: float, weights: Tensor | None = None) -> float:
    """Cross-entropy, written out."""
    p = torch.sigmoid(slope * x.double() + offset)
    each = -(targets * p.log() + (1 - targets) * (1 - p).log())
    return float((each * (1 if weights is None else weights)).mean())


def test_the_fit_finds_what_made_the_data() -> None:
    found = fit_map(*logistic_data(9.0, -4.0), MANY)
    assert found is not None and found.link == "identity"
    assert found.slope == pytest.approx(9.0, rel=0.05) and found.offset == pytest.approx(-4.0, rel=0.05)


def test_no_point_of_a_grid_is_better() -> None:
    x, y = logistic_data(6.0, -2.0, 500)
    found = fit_map(x, y, (3, 5))
    assert found is not None
    targets = torch.where(y > 0.5, 4 / 5, 1 / 7)
    best = loss(x, targets, found.slope, found.offset)
    for i in range(-20, 21):
        for j in range(-20, 21):
            assert loss(x, targets, found.slope + i / 20, found.offset + j / 20) >= best - 1e-12


def test_even_weighs_ones_and_zeros_alike() -> None:
    x, y = logistic_data(8.0, -7.0, 4000)
    found = fit_map(x, y, MANY, even=True)
    assert found is not None
    p = torch.tensor([found(v) for v in x.tolist()])
    ones, zeros = y > 0.5, y < 0.5
    # at the optimum the mean probability is the share of ones, which is a half when both weigh alike
    assert (p[ones].mean() + p[zeros].mean()) / 2 == pytest.approx(0.5, abs=1e-4)
    assert p.mean() > y.mean() + 0.1


def test_few_sources_keep_a_separable_map_from_certainty() -> None:
    x, y = torch.cat([torch.zeros(500), torch.ones(500)]), torch.cat([torch.zeros(500), torch.ones(500)])
    found = fit_map(x, y, (8, 3))
    assert found is not None
    assert found(1.0) == pytest.approx(9 / 10, abs=1e-6) and found(0.0) == pytest.approx(1 / 5, abs=1e-6)


@pytest.mark.parametrize("labels", [torch.ones(9), torch.arange(9).flip(0) > 4, torch.zeros(9)])
def test_nothing_is_made_of_scores_that_do_not_rise_with_the_truth(labels: Tensor) -> None:
    assert fit_map(torch.arange(9) / 9, labels, (3, 3)) is None
    assert fit_map(torch.full((9,), 0.4), torch.arange(9) > 4, (3, 3)) is None


@pytest.mark.parametrize("link", ["identity", "logit"])
def test_maps_never_fall(link: str) -> None:
    made = ScoreMap(3.0, -1.0, link)  # type: ignore[arg-type]
    values = [made(s / 50) for s in range(-60, 110)]
    assert values == sorted(values) and all(0 < v < 1 for v in values)
    assert made(0.5) == pytest.approx(1 / (1 + math.exp(-(3 * (0.5 if link == "identity" else 0.0) - 1))))
    assert ScoreMap(1e6, 0.0)(-1.0) == 0.0 and ScoreMap(1e6, 0.0)(1.0) == 1.0  # no overflow


@pytest.mark.parametrize("bad", [(0.0, 0.0), (-1.0, 0.0), (math.nan, 0.0), (1.0, math.inf), (True, 0.0), ("1", 0.0)])
def test_maps_that_are_none_are_refused(bad: tuple[float, float]) -> None:
    with pytest.raises(ConfigError, match="score map needs"):
        ScoreMap(*bad)
    with pytest.raises(ConfigError, match="identity or logit"):
        ScoreMap(1.0, 0.0, "probit")  # type: ignore[arg-type]


def test_reuse_counts_each_trial_with_the_own_adapter_and_without() -> None:
    own, other = torch.tensor([0.9, 0.8, 0.3]), torch.tensor([0.1, 0.2, 0.5])
    by_hand = fit_map(
        torch.tensor([0.9, 0.8, 0.5, 0.1, 0.2, 0.5]), torch.tensor([1, 1, 0, 0, 0, 0]), (7, 7), link="logit"
    )
    assert reuse_map(own, other, 7) == by_hand != reuse_map(own, other, 70)


def test_support_tells_tasks_from_kinds_of_noise_left_out() -> None:
    vectors = {f"t{t}": task_vectors(t, 16) for t in range(6)}
    noise = torch.cat([task_vectors(50 + k, 6) for k in range(14)])
    centres = torch.cat([centres_of(v, 1) for v in vectors.values()])
    unseen = {name: Support(centres, noise) for name in vectors}
    rng = torch.Generator().manual_seed(0)
    made = support_map(vectors, unseen, centres, noise, (8,), n_draws=3, rng=rng)
    assert made is not None
    near = made(unseen["t0"].score(task_vectors(0, 8, seed=4)))
    far = made(unseen["t0"].score(task_vectors(55, 8, seed=4)))
    assert near > 0.8 and far < 0.2
    # a kind left out is as far from the other kinds as from the tasks, so its scores lie about 0 and not far below
    assert -made.offset / made.slope > 0.1
    assert support_map(vectors, unseen, centres, noise[:1], (8,), n_draws=3, rng=rng) is None


def test_a_fitted_calibration_keeps_its_maps(tmp_path: Path) -> None:
    vectors = {f"t{t}": task_vectors(t, 32) for t in range(8)}
    noise = torch.cat([task_vectors(50 + k, 6) for k in range(14)])
    made, _ = fit_thresholds(vectors, {n: n for n in vectors}, noise=noise)
    maps = made.thresholds.probability
    assert maps.reuse and maps.reuse_single and maps.support and maps.reuse.link == "logit"
    made.save(tmp_path)
    assert RouterData.load(tmp_path).thresholds == made.thresholds
    assert fit_thresholds(vectors, {n: n for n in vectors})[0].thresholds.probability.support is None


def test_a_file_of_before_loads_without_maps_and_a_damaged_one_does_not(tmp_path: Path) -> None:
    path = tmp_path / THRESHOLDS_FILE
    old = {"format_version": 1, "reuse": 0.9, "reuse_single": 0.5, "support": 0.0, "fitted_on": {}}
    path.write_text(json.dumps(old))
    assert Thresholds.load(path) == Thresholds(0.9, 0.5, 0.0) and Thresholds.load(path).probability == Probabilities()
    for bad in ([], {"reuse": 3}, {"reuse": {"slope": -1, "offset": 0}}, {"support": {"slope": 1, "other": 0}}):
        path.write_text(json.dumps({**old, "probability": bad}))
        with pytest.raises(GeneratorError, match="no usable routing thresholds"):
            Thresholds.load(path)


def test_decisions_carry_probabilities() -> None:
    store, maps = FakeStore(), Probabilities(ScoreMap(2.0, 0.0), ScoreMap(3.0, 0.0), ScoreMap(4.0, 0.0))
    store.put(adapter("a", prompt_hash="h"), task_vectors(0))
    thresholds = Thresholds(0.9, 0.5, -2.0 / 2, {}, maps)
    router = Router(store, "mini", "e" * 64, "b" * 64, thresholds, support=Support(task_vectors(1)))
    found = router.route(task_vectors(0, 8, seed=3))
    assert found.score is not None and found.support is not None
    assert found.probability == 1 / (1 + math.exp(-2 * found.score))
    assert found.in_distribution == pytest.approx(1 / (1 + math.exp(-4 * found.support)))
    one = router.route_one(task_vectors(0, 1, seed=3))
    assert one.score is not None and one.in_distribution is None
    assert one.probability == 1 / (1 + math.exp(-3 * one.score))
    assert router.route(task_vectors(0), prompt_hash="h").probability == 1.0
    assert {"probability", "in_distribution"} <= found.to_dict().keys()
    plain = Router(store, "mini", "e" * 64, "b" * 64, replace(thresholds, probability=Probabilities()))
    assert plain.route(task_vectors(0)).probability is None and asdict(Probabilities())["reuse"] is None

"""The encoder's opinion of labels: when it is heard, what is fitted to it, and how it fits into a LoRA's rank."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dnd_sdk.engine.label_reading import MIN_AGREEMENT, agreement, both_opinions, lower_rank, readout


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def choices(*picked: int, n: int = 3) -> Tensor:
    return torch.nn.functional.one_hot(torch.tensor(picked), n).float()


def test_agreement_is_cohens_kappa() -> None:
    assert agreement(choices(0, 1, 2, 0), choices(0, 1, 2, 0)) == pytest.approx(1.0)
    # 3 of 4 alike; by chance (2 * 2 + 2 * 1 + 0 * 1) / 16
    assert agreement(choices(0, 0, 1, 1), choices(0, 0, 1, 2)) == pytest.approx((3 / 4 - 6 / 16) / (1 - 6 / 16))
    assert agreement(choices(0, 0, 1, 1), choices(0, 1, 0, 1)) == pytest.approx(0.0)
    assert agreement(choices(0, 0, 1, 1), choices(1, 1, 0, 0)) < 0
    assert agreement(choices(0, 0), choices(0, 0)) == 0  # who always says the same agrees by chance alone


def test_a_reader_that_agrees_is_heard_and_one_that_does_not_is_not() -> None:
    own = noise(32, 3)
    alike = own + 0.5 * noise(32, 3, seed=1)
    assert agreement(own, noise(32, 3, seed=2)) < MIN_AGREEMENT
    assert both_opinions(own, noise(32, 3, seed=2)) is None
    heard = both_opinions(own, 0.01 * alike + 5.0)  # neither the level nor the scale of a similarity says anything
    assert heard is not None
    opinion, size = heard
    assert opinion.mean(0).abs().max() < 1e-6 and opinion.sum(1).abs().max() < 1e-5
    assert size == pytest.approx(float((own - own.mean(1, keepdim=True)).std()), rel=1e-5)
    sides = (own / own.std() + alike / alike.std()).argmax(1)
    assert ((opinion + 1 / 3).argmax(1) == sides).float().mean() > 0.8


@pytest.mark.parametrize("flat", ["own", "similarity"])
def test_an_opinion_that_is_the_same_everywhere_is_none(flat: str) -> None:
    same = torch.ones(16, 2)
    assert both_opinions(*((same, noise(16, 2)) if flat == "own" else (noise(16, 2), same))) is None


def test_the_readout_says_the_opinion_where_answers_begin_and_little_elsewhere() -> None:
    x, elsewhere = noise(32, 64) + 3.0, 3 * noise(200, 20, seed=1) @ noise(20, 64, seed=4)
    hidden_truth = noise(64, seed=2)
    side = ((x - x.mean(0)) @ hidden_truth).sign()
    opinion = torch.stack([side, -side], 1) * 0.4
    inner = readout(x, elsewhere, opinion, size=2.0)
    said, away = (x - x.mean(0)) @ inner.T, elsewhere @ inner.T
    assert inner.shape == (2, 64)
    assert float(said.std()) == pytest.approx(2.0, rel=1e-4)
    assert (said[:, 0].sign() == side).float().mean() > 0.95
    alone = elsewhere @ readout(x, elsewhere[:0], opinion, size=2.0).T
    assert (x @ inner.T).mean(0).abs().max() < 0.3 and away.abs().mean() < 0.4 * alone.abs().mean()
    new = noise(400, 64, seed=3) + 3.0  # what it was not fitted to
    truth = ((new - x.mean(0)) @ hidden_truth).sign()
    assert (((new - x.mean(0)) @ inner.T)[:, 0].sign() == truth).float().mean() > 0.6


def test_factors_that_fit_the_rank_keep_their_product() -> None:
    left, right, samples = noise(12, 3), noise(3, 20, seed=1), noise(40, 20, seed=2)
    A, B = lower_rank(left, right, 4, samples)
    assert A.shape == (4, 20) and B.shape == (12, 4)
    torch.testing.assert_close(B @ A, left @ right, atol=1e-4, rtol=1e-4)


def test_what_matters_to_the_samples_is_kept() -> None:
    left, right = noise(12, 6), noise(6, 20, seed=1)
    samples = noise(40, 3, seed=2) @ noise(3, 20, seed=3)  # they see three directions only
    A, B = lower_rank(left, right, 3, samples)
    torch.testing.assert_close(samples @ A.T @ B.T, samples @ right.T @ left.T, atol=1e-3, rtol=1e-3)
    full, best = left @ right, torch.linalg.svdvals(left @ right)[3:]
    assert torch.linalg.norm(B @ A - full) > 1.01 * best.norm()  # the nearest matrix would be another

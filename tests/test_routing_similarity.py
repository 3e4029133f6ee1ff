"""The measure: against a loop, its scale, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from routing_parts import task_vectors, unit

from dnd_sdk.errors import InputError
from dnd_sdk.routing.similarity import MIN_COHERENCE, check_vectors, choose_exemplars, coherence, kernel, set_similarity


def loop_coherence(vectors: torch.Tensor) -> float:
    pairs = [float(a @ b) for i, a in enumerate(vectors) for j, b in enumerate(vectors) if i != j]
    return (sum(p * abs(p) for p in pairs) + 1) / (len(pairs) + 1)


def test_equals_a_loop_over_pairs() -> None:
    a, b = task_vectors(0, 5), task_vectors(1, 7)
    mean = sum(float(x @ y) * abs(float(x @ y)) for x in a for y in b) / 35
    low = max(loop_coherence(a), MIN_COHERENCE) * max(loop_coherence(b), MIN_COHERENCE)
    assert set_similarity(a, b) == pytest.approx(mean / low**0.5, rel=1e-4)
    assert set_similarity(a, b) == pytest.approx(set_similarity(b, a))
    known = set_similarity(a, b, coherence_a=coherence(a), coherence_b=coherence(b))
    assert known == pytest.approx(set_similarity(a, b))


@pytest.mark.parametrize("spread", [0.2, 0.6, 1.0])
def test_samples_of_one_task_score_about_one_however_alike_its_prompts_are(spread: float) -> None:
    same = set_similarity(task_vectors(0, 48, spread=spread), task_vectors(0, 48, seed=1, spread=spread))
    assert 0.9 < same < 1.1
    assert set_similarity(task_vectors(0, 48, spread=spread), task_vectors(1, 48, spread=spread)) < 0.5


def test_one_prompt_agrees_with_itself_and_noise_is_not_amplified() -> None:
    assert coherence(task_vectors(0, 1)) == 1.0
    assert coherence(torch.eye(48)[:40]) == MIN_COHERENCE
    whole = task_vectors(0, 32)
    assert set_similarity(task_vectors(0, 1), whole) < set_similarity(task_vectors(0, 8), whole)


def test_opposite_prompts_are_not_alike() -> None:
    assert kernel(torch.tensor([-0.5, 0.5])).tolist() == [-0.25, 0.25]


def test_exemplars_are_an_even_sample_of_their_own() -> None:
    v = task_vectors(0, 10)
    chosen = choose_exemplars(v, 4)
    assert torch.equal(chosen, v[[0, 3, 6, 9]])
    chosen.zero_()
    assert v[0].norm() > 0 and torch.equal(choose_exemplars(v), v)


@pytest.mark.parametrize(
    ("vectors", "match"),
    [
        (torch.zeros(0, 4), "shape"),
        (torch.zeros(4), "shape"),
        (unit(torch.ones(2, 5)), r"\(2, 5\), expected \(n, 4\)"),
        (torch.tensor([[1.0, 0, 0, float("nan")]]), "NaN"),
        (torch.tensor([[float("inf"), 0, 0, 0]]), "NaN or inf"),
        (torch.ones(1, 4), "not L2-normalised"),
        (torch.zeros(1, 4), "not L2-normalised"),
    ],
)
def test_unusable_vectors_are_refused(vectors: torch.Tensor, match: str) -> None:
    with pytest.raises(InputError, match=match):
        check_vectors(vectors, 4)


def test_half_precision_is_taken() -> None:
    assert check_vectors(task_vectors(0, 3).half()).dtype == torch.float32

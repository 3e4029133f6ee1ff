"""What each objective begins with, moves and is judged by; the names of the table are those a recipe may give."""

from __future__ import annotations

from types import SimpleNamespace
from typing import get_args

import pytest
import torch
from helpers import random_flat, tiny_model

from dnd_sdk.generator.generator import Generator, GeneratorConfig
from dnd_sdk.generator.weight_tokenizer import WeightTokenizer
from dnd_sdk.lora.layout import LoraLayout
from dnd_sdk.training.objectives import OBJECTIVES, Lesson, masked_mse, token_weights
from dnd_sdk.training.settings import ObjectiveName, Stage

NO_PARTS = SimpleNamespace(base=None, curriculum=None)
"""No step is taken."""


def test_every_name_of_a_recipe_has_its_objective() -> None:
    assert set(OBJECTIVES) == set(get_args(ObjectiveName))


@pytest.mark.parametrize(
    ("stage", "first_gain", "still", "is_checked"),
    [
        (Stage(objective="reconstruction", steps=1, first_gain=0.3, train_shared=True), 1.0, {"gain", "shared"}, False),
        (Stage(objective="end-to-end", steps=1, first_gain=0.3), 0.3, {"shared"}, True),
        (Stage(objective="end-to-end", steps=1, train_shared=True), 0.0, set(), True),
    ],
)
def test_an_objective_says_where_it_begins_and_what_it_moves(
    stage: Stage, first_gain: float, still: set[str], is_checked: bool
) -> None:
    layout = LoraLayout.from_model(tiny_model(), r=4)
    generator = Generator(GeneratorConfig(encoder_width=32, n_prompts=4, state_tokens=8, width=8), layout)
    lesson = Lesson(NO_PARTS, None, {}, torch.ones(layout.n_parameters))  # type: ignore[arg-type]
    objective = OBJECTIVES[stage.objective](generator, lesson, stage)
    assert objective.first_gain == first_gain and objective.is_checked is is_checked
    moved = {id(p) for p in objective.trainable()}
    assert {n for n, p in generator.named_parameters() if id(p) not in moved} == still
    assert all(p.requires_grad == (n not in still) for n, p in generator.named_parameters())


def test_masked_mse_equals_a_loop() -> None:
    layout = LoraLayout.from_model(tiny_model(), r=3)
    tokenizer = WeightTokenizer(layout, ("lora_B",))
    target = tokenizer.tokenise(random_flat(layout))
    tokens = torch.randn_like(target)
    weights = token_weights(tokenizer, random_flat(layout, seed=5).abs())
    assert weights.mean() == pytest.approx(1.0, rel=1e-5)
    total, n = 0.0, 0
    for t in range(tokenizer.T):
        for want, got in zip(target[t].flatten().tolist(), tokens[t].flatten().tolist(), strict=True):
            if want == want:
                total, n = total + float(weights[t]) * (got - want) ** 2, n + 1
    assert masked_mse(tokens, target, weights).item() == pytest.approx(total / n, rel=1e-4)

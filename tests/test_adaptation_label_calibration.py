"""Taking the label prior out of an adapter: what counts as a label, what is added where, and when nothing is."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import random_flat, tiny_model, tiny_tokenizer
from torch import Tensor

from dnd_sdk.adaptation import LabelCalibration
from dnd_sdk.adaptation.answer_start import AnswerStart
from dnd_sdk.adaptation.label_calibration import MAX_READ, MIN_PROMPTS, PSEUDO_COUNT, read_out, shifts
from dnd_sdk.chat.template import prompt_ids
from dnd_sdk.engine import Resident
from dnd_sdk.lora.layout import LoraLayout
from dnd_sdk.lora.linear import attach_lora, tables_from_flat, use_lora
from dnd_sdk.models.loading import Base

PROMPTS = [f"Is {7 * i % 13} more than {5 * i % 11}? Say y or n. {'Think. ' * (i % 3)}" for i in range(40)]
LABELS = {"y": 9.0, "n": 7.0}


@pytest.fixture(scope="module")
def base() -> Base:
    """Begins most answers to `PROMPTS` with "y" or "n", and far more often with "y"."""
    model: Any = tiny_model()
    rng = torch.Generator().manual_seed(0)
    tokenizer = tiny_tokenizer()
    with torch.no_grad():
        ids = torch.tensor([prompt_ids(tokenizer, PROMPTS[0])])
        end = model.base_model(input_ids=ids).last_hidden_state[0, -1]
        for text, size in LABELS.items():
            own = torch.randn(len(end), generator=rng)
            own -= own @ end / end.square().sum() * end
            model.get_output_embeddings().weight[token_of(text)] += size * end / end.square().sum() + 0.3 * own
    return Base(model, tokenizer, "tiny", "f" * 64)


@pytest.fixture(scope="module")
def marking(base: Base) -> Base:
    """Answers as `base` does, but only after a bracket, with which it begins every answer."""
    model: Any = tiny_model()
    head, stack, rng = model.get_output_embeddings().weight, model.base_model, torch.Generator().manual_seed(0)
    with torch.no_grad():
        ids = prompt_ids(base.tokenizer, PROMPTS[0])
        at, after = (stack(input_ids=torch.tensor([i])).last_hidden_state[0, -1] for i in (ids, [*ids, token_of("[")]))
        after = after - after @ at / at.square().sum() * at
        head[token_of("[")] = 14 * at / at.square().sum() - 9 * after / after.square().sum()
        for text, size in LABELS.items():
            own = 0.3 * torch.randn(len(at), generator=rng)
            head[token_of(text)] = own + size * after / after.square().sum() - 9 * at / at.square().sum()
    return Base(model, base.tokenizer, "marking", "f" * 64)


@pytest.fixture(scope="module")
def layout(base: Base) -> LoraLayout:
    made = LoraLayout.from_model(base.model, r=8)
    attach_lora(base.model, made)
    return made


@pytest.fixture(scope="module")
def flat(layout: LoraLayout) -> Tensor:
    return random_flat(layout, std=0.02)


def token_of(text: str) -> int:
    [token] = tiny_tokenizer()(text, add_special_tokens=False)["input_ids"]
    return int(token)


@torch.no_grad()
def next_token(base: Base, layout: LoraLayout, flat: Tensor, prompts: list[str], begun: str = "") -> Tensor:
    """(n, V) log-probabilities where the answer begins, or goes on after `begun`, one plain forward a prompt."""
    start = [token_of(begun)] if begun else []
    out = []
    for prompt in prompts:
        with use_lora(tables_from_flat(layout, flat[None]), 0):
            logits = base.model(input_ids=torch.tensor([prompt_ids(base.tokenizer, prompt) + start])).logits
        out.append(logits[0, -1].log_softmax(-1))
    return torch.stack(out)


def label_shares(logprobs: Tensor) -> Tensor:
    return torch.stack([logprobs[:, token_of(label)].exp().mean() for label in LABELS])


def test_the_labels_are_said_evenly_afterwards(base: Base, layout: LoraLayout, flat: Tensor) -> None:
    done = LabelCalibration(Resident(base, layout)).calibrate(flat, PROMPTS, PROMPTS)
    before, after = (label_shares(next_token(base, layout, f, PROMPTS)) for f in (flat, done.flat))
    assert set(done.shares) == set(LABELS)
    assert done.shares["y"] == pytest.approx(float(before[0]), abs=0.05)
    assert before[0] > 4 * before[1] and 0.8 * after[1] < after[0] < 2 * after[1]
    assert float(after.sum()) == pytest.approx(float(before.sum()), abs=0.1)


def test_labels_are_evened_out_after_the_mark_that_all_answers_begin_with(marking: Base, flat: Tensor) -> None:
    layout = LoraLayout.from_model(marking.model, r=8)
    done = LabelCalibration(Resident(marking, layout)).calibrate(flat, PROMPTS, PROMPTS)
    old, new = (next_token(marking, layout, f, PROMPTS, "[") for f in (flat, done.flat))
    before, after = label_shares(old), label_shares(new)
    assert next_token(marking, layout, flat, PROMPTS)[:, token_of("[")].exp().mean() > 0.8
    assert set(done.shares) == set(LABELS)
    assert before.max() > 4 * before.min() and after.max() < 2 * after.min() and after.sum() > 0.8 * before.sum()


def test_other_tokens_keep_their_order(base: Base, layout: LoraLayout, flat: Tensor) -> None:
    done = LabelCalibration(Resident(base, layout)).calibrate(flat, PROMPTS, PROMPTS)
    old, new = (next_token(base, layout, f, PROMPTS) for f in (flat, done.flat))
    others = [t for t in range(260) if t not in map(token_of, LABELS)]
    moved = (new - old)[:, others]
    spread = (moved - moved.mean(1, keepdim=True)).abs().mean()
    labels = (new - old)[:, [token_of("n")]].mean() - (new - old)[:, [token_of("y")]].mean()
    assert spread < 0.15 * labels


def test_only_b_of_the_last_down_projection_changes(base: Base, layout: LoraLayout, flat: Tensor) -> None:
    before = flat.clone()
    done = LabelCalibration(Resident(base, layout)).calibrate(flat, PROMPTS, PROMPTS)
    changed = [
        (segment.module, segment.part)
        for (segment, old), (_, new) in zip(layout.views(flat), layout.views(done.flat), strict=True)
        if not torch.equal(old, new)
    ]
    assert changed == [("model.layers.1.mlp.down_proj", "lora_B")]
    assert torch.linalg.matrix_rank(next(b - a for a, b in changed_views(layout, flat, done.flat))) == 1
    assert torch.equal(flat, before)


def changed_views(layout: LoraLayout, old: Tensor, new: Tensor) -> list[tuple[Tensor, Tensor]]:
    pairs = zip(layout.views(old), layout.views(new), strict=True)
    return [(a, b) for (_, a), (_, b) in pairs if not torch.equal(a, b)]


def test_the_order_of_the_prompts_does_not_matter(base: Base, layout: LoraLayout, flat: Tensor) -> None:
    prior = LabelCalibration(Resident(base, layout))
    assert torch.equal(
        prior.calibrate(flat, PROMPTS, PROMPTS).flat, prior.calibrate(flat, PROMPTS[::-1], PROMPTS[::-1]).flat
    )


def test_nothing_is_taken_out_without_labels_prompts_or_a_fitting_base(
    base: Base, layout: LoraLayout, flat: Tensor
) -> None:
    prior = LabelCalibration(Resident(base, layout))
    free = [f"{i} tell me a story about {i * i}" for i in range(12)]
    long = [f"{p} {'and on ' * 400}" for p in PROMPTS]
    few = PROMPTS[: MIN_PROMPTS - 1]
    queries = LoraLayout.from_model(base.model, r=8, target_modules=("q_proj",))
    small = random_flat(queries)
    for done, given, why in [
        (prior.calibrate(flat, free, free), flat, "show no labels"),
        (prior.calibrate(flat, long, long), flat, "only 0 short enough"),
        (prior.calibrate(flat, few, few), flat, "only 7 short enough"),
        (
            LabelCalibration(Resident(base, queries)).calibrate(small, PROMPTS, PROMPTS),
            small,
            "no LoRA on a last MLP",
        ),
    ]:
        assert done.flat is given and not done.shares and why in done.reason


def test_of_free_answers_a_few_are_read_and_of_labels_all(
    base: Base, layout: LoraLayout, flat: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, sizes = AnswerStart._read, list[int]()
    monkeypatch.setattr(
        AnswerStart, "_read", lambda self, f, rows, *a: sizes.append(len(rows)) or read(self, f, rows, *a)
    )
    free = [f"{i} tell me a story about {i * i}" for i in range(40)]
    LabelCalibration(Resident(base, layout)).calibrate(flat, free, free)
    assert sizes == [MIN_PROMPTS]
    LabelCalibration(Resident(base, layout)).calibrate(flat, PROMPTS, PROMPTS)
    assert sizes[1:] == [MIN_PROMPTS, MAX_READ - MIN_PROMPTS]


def test_a_base_of_another_build_is_left_alone() -> None:
    """Gemma 3 normalises what its MLP adds."""
    model = tiny_model("gemma3_text")
    layout = LoraLayout.from_model(model, r=4)
    flat = random_flat(layout)
    done = LabelCalibration(Resident(Base(model, tiny_tokenizer(), "gemma", "f" * 64), layout)).calibrate(
        flat, PROMPTS, PROMPTS
    )
    assert done.flat is flat and "final norm" in done.reason


def test_no_hook_stays(base: Base, layout: LoraLayout, flat: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    def hooks() -> int:
        return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in base.model.modules())

    before = hooks()
    LabelCalibration(Resident(base, layout)).calibrate(flat, PROMPTS, PROMPTS)
    monkeypatch.setattr("dnd_sdk.adaptation.answer_start._cut", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        LabelCalibration(Resident(base, layout)).calibrate(flat, PROMPTS, PROMPTS)
    assert hooks() == before


@pytest.mark.parametrize("n", [8, 16, 1000])
def test_shifts_divide_by_the_smoothed_shares(n: int) -> None:
    before = torch.tensor([0.6, 0.2, 0.05])
    shift = shifts(before, n)
    smoothed = [n * s / 0.85 + PSEUDO_COUNT for s in (0.6, 0.2, 0.05)]
    for i in range(3):
        assert float(shift[i] - shift[0]) == pytest.approx(
            float(torch.tensor(smoothed[0] / smoothed[i]).log()), rel=1e-4
        )
    assert float((before * shift.exp()).sum()) == pytest.approx(0.85, rel=1e-5)
    assert not shifts(torch.tensor([0.4, 0.4]), n).abs().gt(1e-6).any()


def test_the_gate_is_one_where_it_should_be_and_near_zero_elsewhere() -> None:
    rng = torch.Generator().manual_seed(0)
    here = torch.randn(16, 8, generator=rng) * 0.1 + torch.tensor([1.0, 0, 0, 2.0, 0, 0, 0, 0])
    away = torch.randn(400, 8, generator=rng) * 0.5 * torch.tensor([1.0, 1, 1, 0.1, 1, 1, 1, 1])
    combine = read_out(here, away)
    assert float((here @ combine).mean()) == pytest.approx(1.0, rel=1e-4)
    assert (here @ combine).std() < 0.15 and (away @ combine).abs().mean() < 0.15
    # as an ordinary least-squares fit of ones and zeros, but for the ridge and the final scale
    rows = torch.cat([here / 4, away / 20]).double()
    ones = torch.cat([torch.ones(16) / 4, torch.zeros(400)]).double()
    plain = torch.linalg.lstsq(rows, ones[:, None]).solution[:, 0]
    assert torch.cosine_similarity(plain, combine.double(), dim=0) > 0.99

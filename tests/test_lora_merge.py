"""Merged adapters against plain peft's `add_weighted_adapter`, and against the sum written out."""

from __future__ import annotations

import warnings
from pathlib import Path

import peft
import pytest
import torch
from adapter_folders import TINY
from helpers import SAME_MATHS, random_flat, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st

from dnd_sdk.adapters.peft_config import config_text
from dnd_sdk.adapters.peft_folder import write_weights
from dnd_sdk.errors import ConfigError
from dnd_sdk.lora.layout import LoraLayout
from dnd_sdk.lora.linear import attach_lora, tables_from_flat, use_lora
from dnd_sdk.lora.merge import merge_flats, merge_sharing_a

IDS = torch.tensor([[5, 9, 40, 77, 130, 200]])
WEIGHTS = [0.5, 0.3, 0.2]


def with_shared_a(layout: LoraLayout, n: int = 3) -> list[torch.Tensor]:
    """Adapters that differ in B only."""
    flats = [random_flat(layout, seed=i) for i in range(n)]
    for flat in flats[1:]:
        for (s, view), (_, first) in zip(layout.views(flat), layout.views(flats[0]), strict=True):
            if s.part == "lora_A":
                view.copy_(first)
    return flats


def deltas(layout: LoraLayout, flat: torch.Tensor) -> list[torch.Tensor]:
    return [B[0] @ A[0] for A, B in tables_from_flat(layout, flat[None]).values()]


def logits(layout: LoraLayout, flat: torch.Tensor) -> torch.Tensor:
    model = tiny_model()
    attach_lora(model, layout)
    with torch.no_grad(), use_lora(tables_from_flat(layout, flat[None]), 0):
        return model(IDS).logits


def peft_logits(folder: Path, layout: LoraLayout, flats: list[torch.Tensor], how: str) -> torch.Tensor:
    for i, flat in enumerate(flats):
        (folder / str(i)).mkdir()
        write_weights(folder / str(i) / "adapter_model.safetensors", flat.numpy(), layout)
        (folder / str(i) / "adapter_config.json").write_text(config_text(layout, "tiny"))
    model = peft.PeftModel.from_pretrained(tiny_model(), folder / "0", adapter_name="0")
    for i in range(1, len(flats)):
        model.load_adapter(folder / str(i), adapter_name=str(i))
    names = [str(i) for i in range(len(flats))]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.add_weighted_adapter(names, WEIGHTS[: len(flats)], "merged", combination_type=how, svd_rank=layout.r)
    model.set_adapter("merged")
    with torch.no_grad():
        return model(IDS).logits


# peft's "linear" multiplies the sum of all A by the sum of all B; its "cat" is the exact sum of the changes
@pytest.mark.parametrize(("shared", "how"), [(True, "cat"), (True, "svd"), (False, "svd")])
def test_merging_is_what_peft_does(tmp_path: Path, shared: bool, how: str) -> None:
    layout = LoraLayout.from_model(tiny_model(), r=3, lora_alpha=7.5)
    flats = with_shared_a(layout) if shared else [random_flat(layout, seed=i) for i in range(3)]
    merged, kept = merge_flats(flats, WEIGHTS, layout)
    assert kept == pytest.approx(1.0) if shared else 0.3 < kept < 0.99
    found = logits(layout, merged)
    assert not torch.allclose(found, logits(layout, flats[0]), atol=1e-3)
    torch.testing.assert_close(found, peft_logits(tmp_path, layout, flats, how), rtol=1e-4, atol=1e-5)


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 4), st.integers(0, 50), st.booleans())
def test_the_change_is_the_weighted_sum_of_changes(n: int, seed: int, shared: bool) -> None:
    flats = with_shared_a(TINY, n) if shared else [random_flat(TINY, seed=seed + i) for i in range(n)]
    weights = [1 / (i + 1) for i in range(n)]
    merged, kept = merge_flats(flats, weights, TINY)
    changes = [deltas(TINY, f) for f in flats]
    sums = [sum(w * d[i] for w, d in zip(weights, changes, strict=True)) for i in range(len(TINY.modules))]
    best = [_rank(s, TINY.r) for s in sums]
    for found, expected in zip(deltas(TINY, merged), best, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    norms = [sum(float(m.square().sum()) for m in ms) for ms in (best, sums)]
    assert kept == pytest.approx(norms[0] / norms[1], rel=1e-4)


def _rank(matrix: torch.Tensor, r: int) -> torch.Tensor:
    u, s, vh = torch.linalg.svd(matrix)
    return u[:, :r] * s[:r] @ vh[:r]


def test_one_adapter_is_itself_and_zeros_stay_zeros() -> None:
    flat = random_flat(TINY)
    merged, kept = merge_flats([flat], [1.0], TINY)
    assert torch.equal(merged, flat) and kept == 1.0
    assert merge_flats([torch.zeros_like(flat)] * 2, [0.5, 0.5], TINY)[1] == 1.0


@pytest.mark.parametrize("n", [0, 2])
def test_weights_pair_up(n: int) -> None:
    with pytest.raises(ConfigError, match="one weight per adapter"):
        merge_flats([random_flat(TINY)] * n, [1.0], TINY)


def test_the_inputs_are_left_alone() -> None:
    flats = [random_flat(TINY, seed=i) for i in range(2)]
    before = [f.clone() for f in flats]
    merge_flats(flats, [0.5, 0.5], TINY)
    torch.testing.assert_close(flats, before, **SAME_MATHS)


def test_adapters_of_one_a_are_merged_by_name_one_at_a_time() -> None:
    flats = dict(zip("xyz", with_shared_a(TINY), strict=True))
    loaded: list[str] = []

    def load(name: str) -> torch.Tensor:
        loaded.append(name)
        return flats[name]

    merged = merge_sharing_a(load, dict(zip("xyz", WEIGHTS, strict=True)), TINY)
    torch.testing.assert_close(merged, merge_flats(list(flats.values()), WEIGHTS, TINY)[0], **SAME_MATHS)
    assert set(loaded) == set("xyz") and all(
        torch.equal(A, a)
        for (segment, A), (_, a) in zip(TINY.views(merged), TINY.views(flats["x"]), strict=True)
        if segment.part == "lora_A"
    )
    with pytest.raises(ConfigError, match="'x' and 'w' have different A"):
        merge_sharing_a(lambda n: flats["x"] if n == "x" else random_flat(TINY, seed=9), {"x": 1.0, "w": 1.0}, TINY)

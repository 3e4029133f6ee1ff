"""The LoRA layout: what it reads off a model, how it cuts the flat vector, and what it refuses."""

from __future__ import annotations

import itertools
import json

import pytest
import torch
from helpers import FAMILIES, random_flat, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import nn

from dnd_sdk.errors import ConfigError, LayoutMismatchError
from dnd_sdk.lora.layout import ALL_LINEAR, MAX_RANK, LoraLayout, LoraModule


class OddModel(nn.Module):
    """Odd widths, and a layer that is tied to another."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(7, 13)
        self.up_proj = nn.Linear(13, 5, bias=False)
        self.head = nn.Linear(5, 11, bias=False)
        self.embed = nn.Embedding(11, 5)
        self.head.weight = self.embed.weight


def layout_of(widths: list[tuple[int, int]], r: int) -> LoraLayout:
    modules = tuple(LoraModule(f"m{i}", a, b) for i, (a, b) in enumerate(widths))
    return LoraLayout(r, 16.0, ("m",), modules)


@pytest.mark.parametrize("family", FAMILIES)
def test_same_matrices_as_peft(family: str) -> None:
    model = tiny_model(family)
    layout = LoraLayout.from_model(model, r=3)
    peft_model = get_peft_model(model, LoraConfig(r=3, target_modules=list(ALL_LINEAR)))
    expected = {n.replace(".default", ""): tuple(p.shape) for n, p in peft_model.named_parameters() if "lora_" in n}
    assert {s.peft_key: s.shape for s in layout.segments} == expected
    assert layout.n_parameters == sum(a * b for a, b in expected.values())


def test_grouped_query_attention_gives_narrower_keys() -> None:
    shapes = {
        m.name.rsplit(".", 1)[-1]: (m.in_features, m.out_features) for m in LoraLayout.from_model(tiny_model()).modules
    }
    assert shapes["q_proj"] == (32, 32) and shapes["k_proj"] == (32, 16) and shapes["down_proj"] == (48, 32)


def test_reads_a_model_without_memory() -> None:
    with torch.device("meta"):
        meta = tiny_model()
    assert LoraLayout.from_model(meta).digest == LoraLayout.from_model(tiny_model()).digest


@pytest.mark.parametrize("r", [1, 5, MAX_RANK])
def test_odd_widths_at_any_rank(r: int) -> None:
    layout = LoraLayout.from_model(OddModel(), r=r, target_modules=("q_proj", "up_proj"))
    assert [s.shape for s in layout.segments] == [(r, 7), (13, r), (r, 13), (5, r)]
    assert layout.n_parameters == r * (7 + 13 + 13 + 5)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 17), st.integers(1, 17)), min_size=1, max_size=5),
    st.integers(1, MAX_RANK),
    st.sampled_from([(), (1,), (3,), (2, 2)]),
)
def test_views_are_an_exact_inverse(widths: list[tuple[int, int]], r: int, lead: tuple[int, ...]) -> None:
    layout = layout_of(widths, r)
    flat = torch.arange(layout.n_parameters, dtype=torch.float64).expand(*lead, -1).clone()
    parts = list(layout.views(flat))
    assert [tuple(v.shape) for _, v in parts] == [(*lead, *s.shape) for s in layout.segments]
    assert torch.equal(torch.cat([v.flatten(-2) for _, v in parts], -1), flat)
    parts[-1][1].fill_(-1)  # a view, not a copy
    assert (flat[..., layout.segments[-1].start :] == -1).all()


def test_segments_follow_each_other() -> None:
    segments = LoraLayout.from_model(tiny_model(), r=2).segments
    assert segments[0].start == 0
    assert all(a.stop == b.start for a, b in itertools.pairwise(segments))
    assert [s.part for s in segments[:2]] == ["lora_A", "lora_B"]


def test_wrong_size_is_refused() -> None:
    layout = LoraLayout.from_model(tiny_model())
    with pytest.raises(LayoutMismatchError, match=rf"{layout.n_parameters + 1} values, this base at r=8 needs"):
        list(layout.views(torch.zeros(layout.n_parameters + 1)))


def test_dict_round_trip_through_json() -> None:
    layout = LoraLayout.from_model(tiny_model("qwen2"), r=5, lora_alpha=7.5)
    again = LoraLayout.from_dict(json.loads(json.dumps(layout.to_dict())))
    assert again == layout and again.digest == layout.digest and again.scaling == 1.5


@pytest.mark.parametrize("damage", ["r", "modules", "target_modules"])
def test_damaged_dict_is_refused(damage: str) -> None:
    data = LoraLayout.from_model(tiny_model()).to_dict()
    with pytest.raises(LayoutMismatchError, match="not a LoRA layout"):
        LoraLayout.from_dict({**data, damage: None})


def test_digest_tells_layouts_apart_and_equal_ones_together() -> None:
    base = LoraLayout.from_model(tiny_model())
    others = [
        LoraLayout.from_model(tiny_model(), r=4),
        LoraLayout.from_model(tiny_model(), lora_alpha=8),
        LoraLayout.from_model(tiny_model(), target_modules=("q_proj",)),
        LoraLayout.from_model(tiny_model(hidden=48)),
    ]
    assert len({base.digest, *(o.digest for o in others)}) == 5
    assert LoraLayout.from_model(tiny_model(seed=9)).digest == base.digest  # shapes, not weights


def test_target_without_a_linear_names_it_and_the_choices() -> None:
    with pytest.raises(LayoutMismatchError, match=r"no Linear named \['c_attn'\].*its Linears are .*'q_proj'"):
        LoraLayout.from_model(tiny_model(), target_modules=("q_proj", "c_attn"))


def test_target_that_is_no_linear_is_named() -> None:
    with pytest.raises(LayoutMismatchError, match=r"'model.embed_tokens' is Embedding"):
        LoraLayout.from_model(tiny_model(), target_modules=("embed_tokens",))


def test_tied_module_is_named_with_its_twin() -> None:
    with pytest.raises(LayoutMismatchError, match=r"'head' shares its weight with \['head.weight', 'embed.weight'\]"):
        LoraLayout.from_model(OddModel(), target_modules=("q_proj", "head"))


@pytest.mark.parametrize("r", [0, -1, MAX_RANK + 1])
def test_rank_out_of_range(r: int) -> None:
    with pytest.raises(ConfigError, match=f"r must be 1..{MAX_RANK}, got {r}"):
        LoraLayout.from_model(tiny_model(), r=r)


@pytest.mark.parametrize("alpha", [0.0, -2.0, float("nan")])
def test_alpha_must_be_positive(alpha: float) -> None:
    with pytest.raises(ConfigError, match="lora_alpha must be positive"):
        LoraLayout.from_model(tiny_model(), lora_alpha=alpha)


def test_random_flat_has_the_layouts_length() -> None:
    layout = LoraLayout.from_model(tiny_model())
    assert random_flat(layout).shape == (layout.n_parameters,)

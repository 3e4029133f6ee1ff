"""Sampling options: whatever is passed, a value of the right kind or a `ConfigError` that names the field."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dnd_sdk.config import SAMPLING, SamplingOptions
from dnd_sdk.errors import ConfigError

NUMBERS = st.one_of(st.booleans(), st.integers(), st.floats(), st.complex_numbers(), st.just(np.float32("nan")))
OTHERS = st.one_of(st.none(), st.text(), st.binary(), st.lists(st.text()), st.tuples(st.integers()), st.just(object()))
ANYTHING = st.one_of(NUMBERS, OTHERS, st.dictionaries(st.text(), st.integers()))


@given(st.sampled_from(SAMPLING), ANYTHING)
@settings(max_examples=500, deadline=None)
def test_any_value_of_any_option_is_right_or_refused_by_name(name: str, value: object) -> None:
    try:
        options = SamplingOptions(**{name: value})
    except ConfigError as e:
        assert name in e.message and len(e.message) < 300
        return
    assert type(options.max_new_tokens) is int and options.max_new_tokens >= 1
    assert type(options.temperature) is float and 0.0 <= options.temperature <= 10.0
    assert type(options.top_p) is float and 0.0 < options.top_p <= 1.0
    assert type(options.top_k) is int and options.top_k >= 0
    assert type(options.min_p) is float and 0.0 <= options.min_p <= 1.0
    assert type(options.repetition_penalty) is float and 0.0 < options.repetition_penalty <= 10.0
    assert options.seed is None or type(options.seed) is int
    assert type(options.stop) is tuple and all(type(s) is str and s for s in options.stop)


def test_what_stands_for_the_right_kind_is_taken() -> None:
    options = SamplingOptions(np.int64(3), 1, np.float32(0.5), torch.tensor(4), np.int32(-1), "END")
    assert options == SamplingOptions(3, 1.0, 0.5, 4, -1, ("END",))
    assert SamplingOptions(stop=["a", "b"]).stop == ("a", "b")


@pytest.mark.parametrize(
    ("name", "value"),
    [("max_new_tokens", math.nan), ("seed", "a"), ("top_k", 2.5), ("stop", [5]), ("temperature", None), ("top_p", "1")],
)
def test_what_does_not_is_named(name: str, value: object) -> None:
    with pytest.raises(ConfigError, match=f"{name} must be"):
        SamplingOptions(**{name: value})

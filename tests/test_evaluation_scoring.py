from __future__ import annotations

from functools import cache

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dnd_sdk.evaluation.scoring import AnswerFormat, lcs_length, mean_ci95, normalise, rouge_l
from dnd_sdk.tasks.reading import Row, Task

WORDS = st.lists(st.sampled_from("abcd"), max_size=9)


def task(responses: list[str], *, labels: tuple[str, ...] | None = None, answer_type: str = "short-text") -> Task:
    rows = tuple(Row(f"q{i}", r, "train") for i, r in enumerate(responses))
    return Task("t", "f", answer_type, labels, "exact_match", "train", "MIT", rows, ())


def slow_lcs(a: list[str], b: list[str]) -> int:
    @cache
    def go(i: int, j: int) -> int:
        if i == len(a) or j == len(b):
            return 0
        return 1 + go(i + 1, j + 1) if a[i] == b[j] else max(go(i + 1, j), go(i, j + 1))

    return go(0, 0)


@given(WORDS, WORDS)
def test_lcs_equals_the_plain_recursion(a: list[str], b: list[str]) -> None:
    assert lcs_length(a, b) == slow_lcs(a, b)


def test_rouge_l_is_the_f1_of_shared_order() -> None:
    assert rouge_l("The cat, sat.", "the cat sat") == 1.0
    assert rouge_l("the cat sat on it", "the dog sat") == pytest.approx(2 * (2 / 5) * (2 / 3) / (2 / 5 + 2 / 3))
    assert rouge_l("", "the cat") == rouge_l("the cat", "...") == 0.0
    assert rouge_l("aɪ doʊnt noʊ", "aɪ doʊnt") == pytest.approx(0.8)


@pytest.mark.parametrize("said", ["Yes", " yes\n", "YES.", '"yes"', '"Yes".', '"yes."', "“yes”", "`yes`", "'yes'"])
def test_normalise_forgives_form(said: str) -> None:
    assert normalise(said) == "yes"


@pytest.mark.parametrize(
    ("said", "kept"), [("new \n text", "new text"), ("yes..", "yes."), ('"yes', '"yes'), (".", "."), ('""', '""')]
)
def test_normalise_keeps_what_matters(said: str, kept: str) -> None:
    assert normalise(said) == kept


@pytest.mark.parametrize("labels", [("[A]", "[B]"), ("A", "B"), ("(a)", "(b)"), ("[True]", "[False]")])
def test_letter_and_bracket_labels_are_compared_as_written(labels: tuple[str, str]) -> None:
    form = AnswerFormat.of(task(list(labels), labels=labels, answer_type="label"))
    assert form.strict
    assert form.matches(f" {labels[0]}\n", labels[0])
    for wrong in (labels[0].swapcase(), labels[0].strip("[]()") + ".", f'"{labels[0]}"', labels[1]):
        assert not form.matches(wrong, labels[0])


def test_word_labels_are_forgiven_case_and_period() -> None:
    form = AnswerFormat.of(task(["Yes", "No"], labels=("Yes", "No"), answer_type="label"))
    assert not form.strict
    assert form.matches("yes.", "Yes")
    assert form.accepts("no") and not form.accepts("not sure")


def test_a_number_must_look_like_the_train_numbers() -> None:
    whole = AnswerFormat.of(task(["3", "42", "-7"], answer_type="number"))
    assert whole.accepts("12.") and whole.accepts("-3")
    assert not any(whole.accepts(x) for x in ("1.5", "1,000", "twelve", "12 apples", "", "x = 12"))
    fraction = AnswerFormat.of(task(["3", "4.5", "1,200"], answer_type="number"))
    assert all(fraction.accepts(x) for x in ("1.5", "12", "3,000"))


def test_short_text_is_one_line_of_the_usual_length() -> None:
    form = AnswerFormat.of(task(["abc", "abcde"]))
    assert form.accepts("x" * 15) and not form.accepts("x" * 16)
    assert not form.accepts("") and not form.accepts("one\ntwo")


def test_interval_covers_the_mean_and_shrinks_with_more_tasks() -> None:
    rng = np.random.default_rng(0)
    few, many = rng.normal(0.5, 0.1, 10).tolist(), rng.normal(0.5, 0.1, 1000).tolist()
    (m1, (lo1, hi1)), (m2, (lo2, hi2)) = mean_ci95(few), mean_ci95(many)
    assert m1 == pytest.approx(sum(few) / 10)
    assert lo1 < m1 < hi1 and lo2 < m2 < hi2
    assert hi2 - lo2 == pytest.approx(2 * 1.96 * 0.1 / 1000**0.5, rel=0.15)
    assert (hi1 - lo1) > 3 * (hi2 - lo2)
    assert mean_ci95([0.25]) == (0.25, [0.25, 0.25])

"""What counts as a label of a task, and what it may be in full."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from dnd_sdk.engine.label_words import label_tokens, phrases, shared_words


def test_shared_words_are_in_nearly_every_prompt() -> None:
    texts = [f"Same or DIFFERENT? {i}" for i in range(10)]
    assert shared_words(texts) == {"same", "different"}  # not "or"
    assert shared_words([*texts, "none"]) == {"same", "different"}  # 10 of 11
    assert shared_words([*texts, "none", "none"]) == set()  # 10 of 12


def test_tokens_begin_the_longest_shared_word_they_can() -> None:
    said = ["lit", "ir", " Iron", "i", "lite", "ironic", "or", "the"]
    tokenizer = SimpleNamespace(decode=lambda ids: said[ids[0]])
    words = {"literal", "ironic", "iron", "or"}  # whatever words it is given
    mean = torch.tensor([0.4, 0.1, 0.2, 0.1, 0.05, 0.05, 0.005, 0.095])
    # "i" is one letter and no word, "or" is too rare, "the" is no shared word
    assert {w: sorted(t) for w, t in label_tokens(mean, tokenizer, words).items()} == {
        "literal": [0, 4],
        "ironic": [1, 2, 5],
    }
    assert label_tokens(mean / 2, tokenizer, words) == {}  # free answers: labels are 40 % of them


@pytest.mark.parametrize(
    ("text", "word", "full"),
    [
        ("Pick: card lost, carry on or travel alert.", "card", ["card lost"]),
        ("Pick: card lost, carry on or travel alert.", "carry", ["carry on"]),
        ("Pick: card lost, travel notice or travel alert.", "travel", ["travel alert", "travel notice"]),
        ("travel_alert / travel_notice: ", "travel_notice", ["travel notice"]),
        ('Label it "subjective" or "objective".', "subjective", ["subjective"]),
        ("true and false", "true", ["true"]),
        ("one two three four five six", "one", ["one two three four"]),
        ("nothing of it", "yes", ["yes"]),
    ],
)
def test_a_label_in_full_goes_on_to_the_next_mark_or_conjunction(text: str, word: str, full: list[str]) -> None:
    assert phrases([text] * 10, word) == full


def test_a_phrase_that_prompts_do_not_share_is_no_label() -> None:
    assert phrases([f"say yes {i}" for i in range(10)], "yes") == ["yes"]
    assert phrases([*["say yes please"] * 9, "say yes"], "yes") == ["yes please"]  # 9 of 10

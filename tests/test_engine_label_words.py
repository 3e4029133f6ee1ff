"""What counts as a label of a task."""

from __future__ import annotations

from types import SimpleNamespace

import torch

from dnd_sdk.engine.label_words import label_tokens, shared_words


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

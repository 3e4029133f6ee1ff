"""What counts as a label of a task."""

from __future__ import annotations

from types import SimpleNamespace

import torch

from dnd_sdk.adaptation.label_words import label_tokens, opening_mark, shared_words


def test_shared_words_are_in_enough_prompts() -> None:
    texts = [f"Is it Same or DIFFERENT? {i}" for i in range(6)]
    assert shared_words(texts) == {"same", "different"}  # not "or" and its like
    assert shared_words([*texts, *["none"] * 14]) == {"same", "different", "none"}  # 6 of 20
    assert shared_words([*texts, *["none"] * 15]) == {"none"}


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


def test_an_opening_mark_has_no_letters_and_begins_nearly_all_answers() -> None:
    said = ["[", " yes", "2", " ", "</s>"]
    tokenizer = SimpleNamespace(decode=lambda ids: said[ids[0]], all_special_ids=[4])
    mostly = torch.full((5, 5), 0.025) + 0.875 * torch.eye(5)
    assert [opening_mark(mean, tokenizer) for mean in mostly] == [0, None, None, None, None]
    assert opening_mark(torch.tensor([0.7, 0.1, 0.1, 0.1, 0.0]), tokenizer) is None

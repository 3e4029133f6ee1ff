"""Labels are read off prompts: lists that all of them have, or else words, as far as answers begin with them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dnd_sdk.engine.label_words import LabelList, label_tokens, lists, shared_lists, shared_words


class Tokenizer:
    """One token for each of `said`, and one for any other text; a text begins with the longest it can."""

    def __init__(self, said: list[str]) -> None:
        self.said, self.eos_token_id = [*said, "<other>"], None

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        begun = [t for t in self.said if text.startswith(t)]
        return {"input_ids": [self.said.index(max(begun, key=len, default="<other>"))]}

    def decode(self, ids: list[int]) -> str:
        return self.said[ids[0]]


def found_labels(said: dict[str, float], texts: list[str]) -> dict[str, list[str]]:
    """Labels of `texts` to the tokens that begin them, when answers begin with tokens as often as `said`."""
    tokenizer, mean = Tokenizer([*said]), torch.tensor([*said.values(), 0.0])
    return {w: [tokenizer.said[t] for t in sorted(ids)] for w, ids in label_tokens(mean, tokenizer, texts).items()}


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("Answer yes or no.", [("Answer yes", (), "no")]),
        ("Is it spam/ham?", [("Is it spam", (), "ham")]),
        ("anger, joy, or fear", [("anger", ("joy",), "fear")]),
        ("Which one: A, B, C or D?\nText", [("A", ("B", "C"), "D")]),
        ("dim lights / lights off | plug on", [("dim lights", ("lights off",), "plug on")]),
        ("Reply (a) or (b).", [("Reply (a)", (), "(b)")]),
        ("Do it (yes, no), then stop.", [("yes", (), "no")]),
        ('Say "hot" or "cold"', [('Say "hot', (), "cold")]),
        ("one two three four five or six", [("two three four five", (), "six")]),
        (
            "a, b, what a very long item this is, c, d",
            [("a", ("b",), "what a very long"), ("long item this is", ("c",), "d")],
        ),
        ("no list here", []),
        ("or else", []),
        ("", []),
    ],
)
def test_lists_are_found_in_a_text(text: str, found: list[tuple[str, tuple[str, ...], str]]) -> None:
    assert [(" ".join(x.first), x.between, " ".join(x.last)) for x in lists(text)] == found


def test_a_list_belongs_to_the_job_when_nearly_all_prompts_have_it() -> None:
    texts = [
        f"{'Is' if i % 2 else 'Was'} it hot or cold {'today' if i % 3 else 'there'}? apples {i}, figs"
        for i in range(10)
    ]
    wanted = [LabelList(("it", "hot"), (), ("cold",))]
    assert shared_lists(texts) == wanted
    assert shared_lists([*texts, "none"]) == wanted  # 10 of 11
    assert shared_lists([*texts, "none", "none"]) == []  # 10 of 12
    twice = [t + " hot or cold" for t in texts[:5]]
    assert shared_lists([*twice, *["none"] * 5]) == []  # twice in a prompt counts once


def test_shared_words_are_in_nearly_every_prompt() -> None:
    texts = [f"Same or DIFFERENT? {i}" for i in range(10)]
    assert shared_words(texts) == {"same", "different"}  # not "or"
    assert shared_words([*texts, "none"]) == {"same", "different"}  # 10 of 11
    assert shared_words([*texts, "none", "none"]) == set()  # 10 of 12


def test_tokens_begin_the_longest_shared_word_they_can() -> None:
    texts = [f"ironic {i} literal {i} iron {i} or {i} the" for i in range(10)]
    said = {"lit": 0.4, "ir": 0.1, " Iron": 0.2, "i": 0.1, "lite": 0.05, "ironic": 0.05, "or": 0.005, "the": 0.095}
    # "i" is one letter and no word, "or" and "the" are function words; "iron" begins a longer word
    assert found_labels(said, texts) == {"literal": ["lit", "lite"], "ironic": ["ir", " Iron", "ironic"]}
    assert found_labels({t: p / 2 for t, p in said.items()}, texts) == {}  # free answers: labels are 40 % of them


def test_of_a_list_also_the_labels_that_are_never_said_count() -> None:
    said = {"fear": 0.7, "joy": 0.1, "sur": 1e-6, "Answer": 0.01, "love": 1e-5, "end": 0.1}
    texts = [f"{i}: Answer joy, surprise, love or fear." for i in range(8)]
    assert found_labels(said, texts) == {"joy": ["joy"], "surprise": ["sur"], "love": ["love"], "fear": ["fear"]}
    unlisted = [t.replace(",", "").replace(" or", "") for t in texts]  # then only those that are said
    assert found_labels(said, unlisted) == {"joy": ["joy"], "fear": ["fear"], "answer": ["Answer"]}
    assert found_labels(said | {"fear": 0.2, "end": 0.6}, texts) == {}  # most answers begin with no label


def test_the_list_whose_labels_are_said_is_the_one_that_is_meant() -> None:
    texts = [f"Does it attack men or women? Answer hate or ok. {i}" for i in range(8)]
    said = {"men": 0.1, "women": 0.1, "hate": 0.2, "ok": 0.6, "Answer": 0.0}
    assert found_labels(said, texts) == {"hate": ["hate"], "ok": ["ok"]}


def test_labels_that_begin_alike_are_one() -> None:
    texts = [f"{i}: lights on / lights off / plug on / plug off" for i in range(8)]
    groups = found_labels({"lights": 0.6, "plug": 0.3, "end": 0.1}, texts)
    assert groups == {"lights on": ["lights"], "plug on": ["plug"]}

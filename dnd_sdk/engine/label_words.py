"""Reads the labels of a job off its unlabeled prompts, and which tokens begin them.

* Prompts that ask for one of several labels mostly list them: "positive, negative or neutral", "yes/no". A list that
  nearly all prompts have, in the same words, belongs to the job; lists that differ belong to the prompts' own texts.
* Which list is meant, and where its first and last label begin and end ("Answer yes or no, please"), the base decides:
  it is the reading whose labels its answers begin with. Without such a list, labels are words that nearly all
  prompts have and that answers begin with.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from dnd_sdk.alike import leading_alike
from dnd_sdk.engine.chat import option_ids

SHARED_BY = 0.9
"""Part of the prompts that a label, or a list of them, must occur in."""
MIN_SHARE = 0.01
"""Of the answers that must begin with a word for it to count as a label."""
MIN_TOTAL = 0.5
"""Of the answers that must begin with some label; below, the answers are free."""
FUNCTION_WORDS = frozenset(
    "the an this that these those of to in on at for from with by as is are was were be and or".split()  # noqa: SIM905
)
"""Nearly all prompts hold some of these, and free answers begin with them: no labels ("a" is one often)."""

MOST_WORDS = 4
"""Longest label of a list."""

Groups = dict[str, list[int]]
"""Label to the tokens that begin it."""

_PARTS = re.compile(r"[.?!:;\n]|\s-\s|\((?!\w\))|(?<!\(\w)\)")
"""Ends a stretch of text that a list can lie in; "(a)" is a label, "(yes or no)" is a stretch."""
_BETWEEN = re.compile(r"\s*[,/|]\s*(?:or\b|and\b)?\s*|\s+(?:or|and)\s+", re.IGNORECASE)


class LabelList(NamedTuple):
    """Labels that a text lists, in order, as words."""

    first: tuple[str, ...]
    """Ends with the first label, which may be its last word alone or more of them."""
    between: tuple[str, ...]
    """Whole labels."""
    last: tuple[str, ...]
    """Begins with the last label."""


def label_tokens(mean: Tensor, tokenizer: Any, texts: Sequence[str]) -> Groups:
    """The job's labels as far as the answers begin with them; empty when the answers are free.

    `mean` (V,) are next-token probabilities where answers begin, `texts` the prompts. A token begins a label whose
    first word it is, or whose first letters (two at least).
    """
    said = [(t, tokenizer.decode([t]).strip().casefold()) for t in mean.topk(min(64, len(mean))).indices.tolist()]
    readings = [_listed(found, mean, said, tokenizer) for found in shared_lists(texts)]
    total = [sum(float(mean[tokens].sum()) for tokens in groups.values()) for groups in readings]
    best = max(range(len(readings)), key=lambda i: total[i], default=None)
    if best is not None and total[best] >= MIN_TOTAL and len(readings[best]) > 1:
        return readings[best]
    return _words(mean, said, shared_words(texts))


def shared_lists(texts: Sequence[str]) -> list[LabelList]:
    """The lists that nearly all of `texts` have, with as many words around them as those have in common."""
    alike: dict[tuple[Any, ...], list[LabelList]] = {}
    for text in texts:
        for core, found in {(x.first[-1], x.between, x.last[0]): x for x in lists(text)}.items():
            alike.setdefault(core, []).append(found)
    return [_common(found) for found in alike.values() if len(found) >= SHARED_BY * len(texts)]


def lists(text: str) -> Iterator[LabelList]:
    """Every list in `text`."""
    for stretch in _PARTS.split(text):
        items = [tuple(x.strip(" \"'").split()) for x in _BETWEEN.split(stretch or "")]
        while len(items) > 1:
            n = next((i for i in range(1, len(items)) if not 1 <= len(items[i]) <= MOST_WORDS), len(items))
            (first, *between, last), items = items[: n + 1], items[n:]
            if first and last:
                yield LabelList(first[-MOST_WORDS:], tuple(map(" ".join, between)), last[:MOST_WORDS])


def _common(found: Sequence[LabelList]) -> LabelList:
    first = leading_alike([x.first[::-1] for x in found])[::-1]
    return LabelList(tuple(first), found[0].between, tuple(leading_alike([x.last for x in found])))


def shared_words(texts: Sequence[str]) -> set[str]:
    """The words (case folded) that nearly all of `texts` hold, without function words."""
    counts = Counter(w for t in texts for w in set(re.findall(r"\w+", t.casefold())))
    return {w for w, n in counts.items() if n >= SHARED_BY * len(texts)} - FUNCTION_WORDS


def _listed(found: LabelList, mean: Tensor, said: list[tuple[int, str]], tokenizer: Any) -> Groups:
    """Labels of a list to their tokens; the first label is the reading of it that is said most."""
    starts = [" ".join(found.first[i:]) for i in range(len(found.first))]
    first = max(starts, key=lambda x: float(mean[_begin(x, said, tokenizer)].sum()))
    groups: Groups = {}
    taken: set[int] = set()
    for label in (first, *found.between, " ".join(found.last)):
        tokens = [t for t in _begin(label, said, tokenizer) if t not in taken]
        taken.update(tokens)
        if tokens:  # labels that begin alike count as the first of them
            groups[label] = tokens
    return groups


def _begin(label: str, said: list[tuple[int, str]], tokenizer: Any) -> list[int]:
    word = label.split()[0].casefold()
    likely = [t for t, text in said if text == word or (len(text) > 1 and word.startswith(text))]
    return sorted({*likely, option_ids(tokenizer, label)[0]})


def _words(mean: Tensor, said: list[tuple[int, str]], words: set[str]) -> Groups:
    """Labels among `words`; of several that a token may begin the longest counts."""
    found: Groups = {}
    for token, text in said:
        begun = [w for w in words if w == text or (len(text) > 1 and w.startswith(text))]
        if begun:
            found.setdefault(max(begun, key=lambda w: (len(w), w)), []).append(token)
    labels = {w: tokens for w, tokens in found.items() if mean[tokens].sum() >= MIN_SHARE}
    total = sum(float(mean[tokens].sum()) for tokens in labels.values())
    return labels if total >= MIN_TOTAL else {}

"""Which labels a task has, by its unlabeled prompts: words that many of them hold and answers begin with.

A mark may come before them, as in "[A]".
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

from torch import Tensor

SHARED_BY = 0.3
"""Part of the prompts that a label must occur in: in all that list the labels, in some of those that only ask."""
MIN_SHARE = 0.01
"""Of the answers that must begin with a word for it to count as a label."""
MIN_TOTAL = 0.5
"""Of the answers that must begin with some label; below, the answers are free."""
MARK_SHARE = 0.8
"""Of the answers that must begin with one mark for it to be read on."""
FUNCTION_WORDS = frozenset(
    """
    the an this that these those of to in on at for from with by as is are was were be been and or
    but so if there it he she they we i you its his her their our my your him them has have had do
    does did will would can could
    """.split()  # noqa: SIM905
)
"""Most prompts hold some of these, and free answers begin with them: no labels ("a" is one often)."""


def shared_words(texts: Sequence[str]) -> set[str]:
    """The words (case folded) that enough of `texts` hold, without function words."""
    counts = Counter(w for t in texts for w in set(re.findall(r"\w+", t.casefold())))
    return {w for w, n in counts.items() if n >= SHARED_BY * len(texts)} - FUNCTION_WORDS


def label_tokens(mean: Tensor, tokenizer: Any, words: set[str]) -> dict[str, list[int]]:
    """Label to the tokens that begin it, for labels among `words` that answers begin with often enough.

    `mean` (V,) are next-token probabilities. A token begins a word that it is, or whose first letters (two at least) it
    is; of several the longest counts. Empty when the labels found do not make up enough of the answers.
    """
    found: dict[str, list[int]] = {}
    for token in mean.topk(min(64, len(mean))).indices.tolist():
        text = tokenizer.decode([token]).strip().casefold()
        begun = [w for w in words if w == text or (len(text) > 1 and w.startswith(text))]
        if begun:
            found.setdefault(max(begun, key=lambda w: (len(w), w)), []).append(token)
    labels = {w: tokens for w, tokens in found.items() if mean[tokens].sum() >= MIN_SHARE}
    total = sum(float(mean[tokens].sum()) for tokens in labels.values())
    return labels if total >= MIN_TOTAL else {}


def opening_mark(mean: Tensor, tokenizer: Any) -> int | None:
    """The token, without letters or digits, that nearly all answers begin with, such as a bracket; None: there is none.

    `mean` (V,) are next-token probabilities. Labels come after it.
    """
    token = int(mean.argmax())
    text = tokenizer.decode([token]).strip()
    if token in tokenizer.all_special_ids or not text or re.search(r"\w", text):
        return None
    return token if mean[token] >= MARK_SHARE else None

"""How an answer is judged: exact match, ROUGE-L, answer format, and means with bootstrap intervals.

* Exact match forgives case, spacing, one trailing period and one pair of quotes, but not where the label *is* its
  form: for labels that are single letters or bracketed, "[A]" means "[A]" and "a" is not "A".
* The format a task asks for is read from its labels and train split only, never from the test split.
* Intervals are percentiles of a bootstrap over tasks, since rows of one task are no independent evidence on others;
  those of a single task are over its rows.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dnd_sdk.evaluation.units import RowScores
from dnd_sdk.tasks import Row, Task

MAX_LENGTH_RATIO = 3.0
"""A short-text answer longer than this many times the longest train response is not in the asked format."""

METRICS = ("exact_match", "rouge_l", "option_accuracy", "valid_format")
COMPARED = ("exact_match", "option_accuracy")
"""The two that are compared between methods at a glance: what is said, and what is held likeliest."""

_STRICT_LABEL = re.compile(r"[A-Za-z]|\[.+\]|\(.+\)")
_QUOTES = {'"': '"', "'": "'", "“": "”", "‘": "’", "`": "`"}


def normalise(text: str) -> str:
    """Collapse whitespace, fold case, drop one trailing period and one surrounding pair of quotes."""
    text = " ".join(text.split()).casefold()
    for peel in (_unquote, _unperiod, _unquote):  # the period may stand inside the quotes or outside
        text = peel(text)
    return text


def _unquote(text: str) -> str:
    paired = len(text) > 2 and _QUOTES.get(text[0]) == text[-1]
    return text[1:-1].strip() if paired else text


def _unperiod(text: str) -> str:
    return text[:-1].rstrip() if len(text) > 1 and text.endswith(".") else text


def rouge_l(prediction: str, reference: str) -> float:
    """F1 of the longest common subsequence of words (case folded, punctuation ignored)."""
    p, r = (re.findall(r"\w+", t.casefold()) for t in (prediction, reference))
    common = lcs_length(p, r)
    return 2.0 * common / (len(p) + len(r)) if common else 0.0


def lcs_length(a: Sequence[str], b: Sequence[str]) -> int:
    """Length of the longest common subsequence, by the row-by-row table."""
    best = [0] * (len(b) + 1)
    for x in a:
        diagonal = 0
        for j, y in enumerate(b, 1):
            diagonal, best[j] = best[j], diagonal + 1 if x == y else max(best[j], best[j - 1])
    return best[-1]


@dataclass(frozen=True)
class AnswerFormat:
    """What a valid answer to one task looks like."""

    labels: tuple[str, ...] | None
    strict: bool
    """Labels whose form matters: compared as written."""
    number: re.Pattern[str] | None
    """Matches numbers written as in the train split; None unless the answers are numbers."""
    max_chars: int
    """Longest acceptable short text."""

    @classmethod
    def of(cls, task: Task) -> AnswerFormat:
        """Read it from the task's labels and train responses."""
        responses = [r.response for r in task.train]
        labels = task.labels if task.answer_type == "label" else None
        return cls(
            labels=labels,
            strict=bool(labels) and all(_STRICT_LABEL.fullmatch(x) for x in labels or ()),
            number=_number_pattern(responses) if task.answer_type == "number" else None,
            max_chars=int(MAX_LENGTH_RATIO * max(map(len, responses), default=0)),
        )

    def matches(self, prediction: str, reference: str) -> bool:
        """Exact match, strict where the labels' form matters."""
        if self.strict:
            return prediction.strip() == reference
        return normalise(prediction) == normalise(reference)

    def accepts(self, prediction: str) -> bool:
        """Whether `prediction` has the asked format, right or wrong."""
        text = prediction.strip()
        if self.labels is not None:
            return any(self.matches(text, label) for label in self.labels)
        if self.number is not None:
            return self.number.fullmatch(normalise(text)) is not None
        return 0 < len(text) <= self.max_chars and len(text.splitlines()) == 1


def _number_pattern(responses: Sequence[str]) -> re.Pattern[str]:
    """Integers only, unless some train response carries a fraction; thousands separators only where train has them."""
    digits = r"\d[\d,]*" if any("," in r for r in responses) else r"\d+"
    fraction = r"(\.\d+)?" if any("." in r for r in responses) else ""
    return re.compile(f"-?{digits}{fraction}")


def row_scores(task: Task, rows: Sequence[Row], outputs: Sequence[str], choices: Sequence[int] | None) -> RowScores:
    """What every answer to `rows` comes to.

    `choices` holds the index of the likeliest label per row, None for a task without labels.
    """
    form = AnswerFormat.of(task)
    pairs = list(zip(outputs, (r.response for r in rows), strict=True))
    scores: RowScores = dict.fromkeys(METRICS)
    scores["exact_match"] = [float(form.matches(p, r)) for p, r in pairs]
    scores["valid_format"] = [float(form.accepts(p)) for p, _ in pairs]
    if task.metric == "rouge_l":
        scores["rouge_l"] = [rouge_l(p, r) for p, r in pairs]
    if choices is not None and task.labels is not None:
        scores["option_accuracy"] = [float(task.labels[c] == r) for c, (_, r) in zip(choices, pairs, strict=True)]
    return scores


def score_answers(
    task: Task, rows: Sequence[Row], outputs: Sequence[str], choices: Sequence[int] | None
) -> dict[str, float | None]:
    """Means of `row_scores`; None where a metric does not apply to the task."""
    return row_means(row_scores(task, rows, outputs, choices))


def row_means(scores: RowScores) -> dict[str, float | None]:
    """The mean of every metric over its rows."""
    return {metric: None if values is None else _mean(values) for metric, values in scores.items()}


def mean_change(
    pairs: Sequence[tuple[dict[str, float | None], dict[str, float | None]]],
) -> dict[str, float | None] | None:
    """Mean of (after - before) by metric over pairs of `score_answers`; None without pairs."""
    if not pairs:
        return None
    changes: dict[str, float | None] = {}
    for metric in COMPARED:
        both = [(b[metric], a[metric]) for b, a in pairs]
        each = [after - before for before, after in both if before is not None and after is not None]
        changes[metric] = _mean(each) if each else None
    return changes


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def mean_ci95(values: Sequence[float], *, resamples: int = 5000, seed: int = 0) -> tuple[float, list[float]]:
    """Mean and 95 % bootstrap interval over `values` (one per task or row); of one value, that value."""
    x = np.asarray(values, dtype=np.float64)
    rng = np.random.default_rng(seed)
    means = x[rng.integers(0, len(x), size=(resamples, len(x)))].mean(axis=1)
    low, high = np.percentile(means, [2.5, 97.5])
    return float(x.mean()), [float(low), float(high)]

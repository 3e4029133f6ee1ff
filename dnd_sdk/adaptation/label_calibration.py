"""Takes a base's taste for one label out of an adapter, from unlabeled prompts alone: "calibration".

A small base under an adapter often answers every prompt of a label task with the same label, whatever it reads. What it
answers on average over a batch of the task's prompts shows that taste, and dividing by it ("batch calibration",
arXiv 2309.17249) brings the prompts' own differences out. Here it becomes part of the LoRA, in closed form:

* The labels are read off the batch (`label_words`): words of the prompts with which answers begin, after a bracket or
  such a mark if all begin with it. A task without such words (free answers) is left alone.
* Only B of the last layer's `down_proj` changes, by one rank-one term: a direction that moves the labels' logits by
  what they are over- or under-said, and little else, times a combination of the LoRA's own r inner values that is
  about 1 where an answer begins and about 0 elsewhere. Shape, rank and the shared A stay.
* It assumes that the labels are about equally frequent. It reads a prompt once, or once more after a mark, and takes no
  gradient step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor

from dnd_sdk.adaptation.answer_start import AnswerStart, Seen
from dnd_sdk.adaptation.label_words import label_tokens, opening_mark, shared_words
from dnd_sdk.chat import Messages, prompt_ids

if TYPE_CHECKING:
    from dnd_sdk.engine import Resident

T = TypeVar("T")

MIN_PROMPTS, MAX_READ = 8, 32
"""Fewer prompts say too little of an average; more add next to nothing."""
MAX_PROMPT_TOKENS = 512
"""Longer prompts are passed over: they cost most and say no more."""
MAX_MARKS = 2
"""Marks that an answer may begin with before its label."""
PSEUDO_COUNT = 1.0
"""Times that every label counts as said beside what was measured: few prompts and many labels correct less."""
CANDIDATES = 512
"""Tokens, the likeliest first, whose logits the direction must not move unless they begin a label."""

_UNFIT = "this base has no LoRA on a last MLP whose output goes straight to its final norm"


@dataclass(frozen=True)
class Calibrated:
    """An adapter, and what was taken out of it."""

    flat: Tensor
    """(P,) the LoRA; the very one given when nothing was taken out."""
    shares: dict[str, float] = field(default_factory=dict)
    """Label to the share of answers it had before; empty when nothing was taken out."""
    reason: str = ""
    """Why nothing was taken out."""


@dataclass(frozen=True)
class _Case:
    """A task as it was read; with less than two labels its answers are free."""

    seen: Seen
    logits: Tensor
    """(n, V) where answers begin."""
    mean: Tensor
    """(V,) mean probability of each token there."""
    groups: dict[str, list[int]]
    """Label to the tokens that begin it; empty where answers are free."""
    before: Tensor
    """(K,) share of each label."""


class LabelCalibration:
    """The method for one base and its layout."""

    def __init__(self, resident: Resident) -> None:
        self._tokenizer, self._layout = resident.base.tokenizer, resident.layout
        self._start = AnswerStart(resident)

    @torch.no_grad()
    def calibrate(self, flat: Tensor, prompts: Sequence[str], chats: Sequence[Messages]) -> Calibrated:
        """`flat` (P,) calibrated on these prompts.

        Args:
            flat: The LoRA.
            prompts: What the user messages say: where labels are looked for. In any order.
            chats: The same prompts as the base is asked them.
        """
        if self._start.module is None:
            return Calibrated(flat, reason=_UNFIT)
        picked = self._pick(prompts, chats)
        if len(picked) < MIN_PROMPTS:
            return Calibrated(flat, reason=f"only {len(picked)} short enough prompts, {MIN_PROMPTS} are needed")
        case = self._read(flat, picked)
        seen = case.seen
        if not seen.straight:
            return Calibrated(flat, reason=_UNFIT)
        if len(case.groups) < 2:
            return Calibrated(flat, reason="the prompts show no labels that the answers begin with")
        direction, (A, _) = self._direction(case), self._start.factors(flat)
        combine = read_out(*(x @ A.to(x).T for x in (seen.x, seen.elsewhere)))
        if not self._better(case, (seen.x @ A.to(seen.x).T @ combine)[:, None] * direction):
            return Calibrated(flat, reason="the labels are said about equally often")
        told = dict(zip(case.groups, case.before.tolist(), strict=True))
        return Calibrated(self._with(flat, torch.outer(direction, combine)), told)

    def _read(self, flat: Tensor, picked: Sequence[tuple[str, list[int]]]) -> _Case:
        """Read the first few prompts, and the others if they have labels: free answers are soon seen.

        Where all answers begin with the same mark, such as a bracket, it is read on to where the labels begin.
        """
        words, rows = shared_words([text for text, _ in picked]), [ids for _, ids in picked]
        read = self._start.reader(flat, rows)
        case = self._case(read(rows[:MIN_PROMPTS]), words)
        for _ in range(MAX_MARKS):
            if (mark := opening_mark(case.mean, self._tokenizer)) is None:
                break
            rows = [[*r, mark] for r in rows]
            case = self._case(read(rows[:MIN_PROMPTS]), words)
        if case.groups and case.seen.straight and len(rows) > MIN_PROMPTS:
            return self._case(read(rows[MIN_PROMPTS:]), words, case)
        return case

    def _case(self, seen: Seen, words: set[str], first: _Case | None = None) -> _Case:
        """What was `seen`, after the prompts of `first`, and what of `words` begins answers there."""
        logits = self._start.logits(seen.hidden)
        if first is not None:
            seen, logits = Seen.joined([first.seen, seen]), torch.cat([first.logits, logits])
        probs = logits.softmax(-1)
        mean = probs.mean(0)
        groups = label_tokens(mean, self._tokenizer, words)
        return _Case(seen, logits, mean, groups, shares(probs, groups))

    def _pick(self, prompts: Sequence[str], chats: Sequence[Messages]) -> list[tuple[str, list[int]]]:
        """At most `MAX_READ` prompts spread over the sorted set, the first few of them too, with their tokens."""
        ordered = sorted(zip(prompts, chats, strict=True), key=lambda pair: pair[0])
        spread = _spread_over(ordered, 2 * MAX_READ)
        short = [(t, ids) for t, c in spread if len(ids := prompt_ids(self._tokenizer, c)) <= MAX_PROMPT_TOKENS]
        some = _spread_over(short, MAX_READ)
        first = _spread_over(some, MIN_PROMPTS)
        return first + [p for p in some if p not in first]

    def _direction(self, case: _Case) -> Tensor:
        """(d,) what to add to the stream where answers begin to move the labels' logits by their shifts."""
        hidden = case.seen.hidden
        tokens = _candidates(case.mean, case.groups)
        wanted = torch.zeros(len(tokens))
        for begun, shift in zip(case.groups.values(), shifts(case.before, len(hidden)), strict=True):
            wanted[torch.isin(tokens, torch.tensor(begun))] = shift
        at, before = hidden.mean(0), self._start.logits_of(tokens, hidden)
        # the final norm makes the logits bend a little along a straight line: the first step and two corrections
        direction = torch.zeros_like(at)
        for _ in range(3):
            moved = self._start.logits_of(tokens, hidden + direction) - before  # (n, n_tokens)
            missing = wanted - moved.mean(0)
            direction = direction + _solve(self._start.slopes(at + direction, tokens), missing)
        return direction

    def _better(self, case: _Case, change: Tensor) -> bool:
        """Whether a `change` (n, d) of the stream makes shares more even and still lets answers begin with labels."""
        after = shares(self._start.logits(case.seen.hidden + change).softmax(-1), case.groups)
        return bool(_unevenness(after) < _unevenness(case.before) and after.sum() >= 0.8 * case.before.sum())

    def _with(self, flat: Tensor, term: Tensor) -> Tensor:
        changed = flat.clone()
        B = self._start.factors(changed)[1]
        B.add_(term.to(B) / self._layout.scaling)
        return changed


def shares(probs: Tensor, groups: dict[str, list[int]]) -> Tensor:
    """(G,) mean probability that an answer begins with each label; `probs` (n, V)."""
    return torch.tensor([float(probs[:, tokens].sum(1).mean()) for tokens in groups.values()])


def shifts(before: Tensor, n: int) -> Tensor:
    """(G,) what to add to the labels' logits: minus their log share, keeping their total probability on average.

    A share measured on `n` prompts counts as if every label had been said `PSEUDO_COUNT` times more.
    """
    count = n * before / before.sum() + PSEUDO_COUNT
    shift = -(count / count.sum()).log()
    return shift + (before.sum() / (before * shift.exp()).sum()).log()


def read_out(inner: Tensor, elsewhere: Tensor) -> Tensor:
    """(r,) the combination of inner values that is 1 on average over `inner` (n, r), nearest 0 over `elsewhere`."""
    inner, elsewhere = inner.double(), elsewhere.double()
    gram = inner.T @ inner / len(inner) + elsewhere.T @ elsewhere / max(1, len(elsewhere))
    combine = torch.linalg.solve(_ridged(gram, 1e-3), inner.mean(0))
    return (combine / (inner @ combine).mean()).float()


def _unevenness(before: Tensor) -> Tensor:
    p = before / before.sum()
    return (p * p.clamp(min=1e-12).log()).sum()  # minus the entropy


def _spread_over(items: Sequence[T], most: int) -> list[T]:
    """At most `most` of them, evenly spaced."""
    n = min(len(items), most)
    return [items[i * len(items) // n] for i in range(n)]


def _candidates(mean: Tensor, groups: dict[str, list[int]]) -> Tensor:
    likely = mean.topk(min(CANDIDATES, len(mean))).indices.tolist()
    return torch.tensor(sorted({*likely, *(t for tokens in groups.values() for t in tokens)}))


def _solve(slopes: Tensor, wanted: Tensor) -> Tensor:
    """(d,) the least change of the stream that moves the logits by `wanted`, as nearly as a small ridge lets it."""
    slopes, wanted = slopes.double(), wanted.double()
    gram = slopes @ slopes.T
    return (slopes.T @ torch.linalg.solve(_ridged(gram, 1e-2), wanted)).float()


def _ridged(gram: Tensor, share: float) -> Tensor:
    """A Gram matrix with a `share` of its mean diagonal added to the diagonal."""
    return gram + share * gram.trace() / len(gram) * torch.eye(len(gram), dtype=gram.dtype)

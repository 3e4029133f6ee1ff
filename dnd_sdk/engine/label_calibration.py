"""Makes a label task's answers fairer and better read, from unlabeled prompts alone: "calibration".

A small base under an adapter often answers every prompt of a label task with the same label, whatever it reads. What it
answers on average over a batch of the task's prompts shows that taste, and dividing by it ("batch calibration",
arXiv 2309.17249) brings the prompts' own differences out. What the prompts are about, the sentence encoder may see
better than the base (`label_reading`). Both become part of the LoRA, in closed form:

* The labels are read off the batch (`label_words`). A task without such words (free answers) is left alone.
* Only the last layer's `down_proj` changes. The taste is one rank-one term on B: a direction that moves the labels'
  logits by what they are over- or under-said, and little else, times a combination of the LoRA's own r inner values
  that is about 1 where an answer begins and about 0 elsewhere. The encoder's reading needs inner values of its own, so
  A changes with it there; what no longer fits the rank is what matters least on these prompts.
* It assumes that the labels are about equally frequent. It reads each prompt once and takes no gradient step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor

from dnd_sdk.bare_prompts import Frame
from dnd_sdk.engine.answer_start import AnswerStart, Seen
from dnd_sdk.engine.chat import Messages, prompt_ids
from dnd_sdk.engine.label_reading import both_opinions, lower_rank, readout
from dnd_sdk.engine.label_words import label_tokens, phrases, shared_words

if TYPE_CHECKING:
    from dnd_sdk.lora_layout import LoraLayout
    from dnd_sdk.models import Base

T = TypeVar("T")
Embed = Callable[[Sequence[str]], Tensor]
"""Texts to one normalised vector each, (n, C)."""

MIN_PROMPTS, MAX_PROMPTS = 8, 32
"""Fewer prompts say too little of an average; more add next to nothing."""
MAX_PROMPT_TOKENS = 512
"""Longer prompts are passed over: they cost most and say no more."""
CANDIDATES = 512
"""Tokens, the likeliest first, whose logits the direction must not move unless they begin a label."""

_UNFIT = "this base has no LoRA on a last MLP whose output goes straight to its final norm"


@dataclass(frozen=True)
class Calibrated:
    """An adapter, and what was taken out of it."""

    flat: Tensor
    """(P,) the LoRA; the very one given when nothing was changed."""
    shares: dict[str, float] = field(default_factory=dict)
    """Label to the share of answers it had before; empty when nothing was changed."""
    read: bool = False
    """Whether the encoder's reading of the prompts was added."""
    reason: str = ""
    """Why nothing was changed."""


@dataclass(frozen=True)
class _Case:
    """One label task as it was read."""

    seen: Seen
    logits: Tensor
    """(n, V) where answers begin."""
    groups: dict[str, list[int]]
    """Label to the tokens that begin it."""
    before: Tensor
    """(K,) share of each label."""
    A: Tensor
    B: Tensor
    """Of the last `down_proj`, scaling folded in."""

    @property
    def own(self) -> Tensor:
        """(n, K) log-probabilities of the labels, evened out."""
        probs = self.logits.softmax(-1)
        each = torch.stack([probs[:, tokens].sum(1) for tokens in self.groups.values()], 1)
        return each.clamp(min=1e-12).log() + shifts(self.before, len(probs))


class LabelCalibration:
    """The method for one base and layout."""

    def __init__(self, base: Base, layout: LoraLayout, embed: Embed) -> None:
        self._base, self._layout, self._embed = base, layout, embed
        self._start = AnswerStart(base, layout)

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
        texts = [text for text, _ in picked]
        words = shared_words(texts)
        seen = self._read(flat, [ids for _, ids in picked], words)
        logits, groups = self._labels(seen, words)
        if not seen.straight:
            return Calibrated(flat, reason=_UNFIT)
        if len(groups) < 2:
            return Calibrated(flat, reason="the prompts show no labels that the answers begin with")
        probs = logits.softmax(-1)
        A, B = (f.to(logits) for f in self._start.factors(flat))
        return self._calibrated(
            flat, _Case(seen, logits, groups, shares(probs, groups), A, B * self._layout.scaling), texts
        )

    def _read(self, flat: Tensor, rows: list[list[int]], words: set[str]) -> Seen:
        """Read the first few prompts, and the others if any of `words` is a label there: free answers are soon seen."""
        seen, others = self._start.read(flat, rows[:MIN_PROMPTS]), rows[MIN_PROMPTS:]
        if others and seen.straight and self._labels(seen, words)[1]:
            return Seen.joined([seen, self._start.read(flat, others)])
        return seen

    def _labels(self, seen: Seen, words: set[str]) -> tuple[Tensor, dict[str, list[int]]]:
        """(n, V) logits where answers begin, and what tokens begin which of `words` there."""
        logits = self._start.logits(seen.hidden)
        return logits, label_tokens(logits.softmax(-1).mean(0), self._base.tokenizer, words)

    def _pick(self, prompts: Sequence[str], chats: Sequence[Messages]) -> list[tuple[str, list[int]]]:
        """At most `MAX_PROMPTS` prompts spread over the sorted set, the first few of them too, with their tokens."""
        tokenizer = self._base.tokenizer
        ordered = sorted(zip(prompts, chats, strict=True), key=lambda pair: pair[0])
        spread = _spread_over(ordered, 4 * MAX_PROMPTS)
        short = [(t, ids) for t, c in spread if len(ids := prompt_ids(tokenizer, c)) <= MAX_PROMPT_TOKENS]
        some = _spread_over(short, MAX_PROMPTS)
        first = _spread_over(some, MIN_PROMPTS)
        return first + [p for p in some if p not in first]

    def _calibrated(self, flat: Tensor, case: _Case, texts: Sequence[str]) -> Calibrated:
        """The first of reading and taste, and taste alone, that makes the labels' shares more even."""
        told = dict(zip(case.groups, case.before.tolist(), strict=True))
        for read, (A, B) in self._ways(case, texts):
            if self._better(case, A, B):
                return Calibrated(self._with(flat, A, B), told, read)
        return Calibrated(flat, reason="the labels are said about equally often")

    def _ways(self, case: _Case, texts: Sequence[str]) -> Iterator[tuple[bool, tuple[Tensor, Tensor]]]:
        seen, tokens = case.seen, _candidates(case.logits.softmax(-1).mean(0), case.groups)
        direction = self._direction(case, tokens)
        B = case.B + torch.outer(direction, gate(seen.x @ case.A.T, seen.elsewhere @ case.A.T))
        if opinions := both_opinions(case.own, self._similarity(texts, list(case.groups))):
            inner = readout(seen.x, seen.elsewhere, *opinions)
            outer = _solve(self._start.slopes(seen.hidden.mean(0), tokens), _rows_of(tokens, case.groups))
            samples = torch.cat([seen.x, seen.elsewhere * (len(seen.x) / max(1, len(seen.elsewhere))) ** 0.5])
            left, right = torch.cat([B, outer], 1), torch.cat([case.A, inner])
            yield True, lower_rank(left, right, self._layout.r, samples)
        yield False, (case.A, B)

    def _similarity(self, texts: Sequence[str], labels: list[str]) -> Tensor:
        """(n, K) cosine between what each prompt has of its own and the nearest phrase a label may stand for."""
        frame = Frame.of(texts)
        spelled = [(i, phrase) for i, label in enumerate(labels) for phrase in phrases(texts, label)]
        own, named = self._embed([*map(frame.own_part, texts)]), self._embed([phrase for _, phrase in spelled])
        each = own.float() @ named.float().T
        best = [each[:, [j for j, (owner, _) in enumerate(spelled) if owner == i]].amax(1) for i in range(len(labels))]
        return torch.stack(best, 1)

    def _direction(self, case: _Case, tokens: Tensor) -> Tensor:
        """(d,) what to add to the stream where answers begin to move the labels' logits by their shifts."""
        hidden, logits = case.seen.hidden, case.logits
        wanted = _rows_of(tokens, case.groups) @ shifts(case.before, len(hidden))
        at = hidden.mean(0)
        # the final norm makes the logits bend a little along a straight line: the first step and two corrections
        direction = torch.zeros_like(at)
        for _ in range(3):
            moved = self._start.logits(hidden + direction) - logits
            missing = wanted - moved[:, tokens].mean(0)
            direction = direction + _solve(self._start.slopes(at + direction, tokens), missing[:, None])[:, 0]
        return direction

    def _better(self, case: _Case, A: Tensor, B: Tensor) -> bool:
        """Whether these factors, as they will act, make shares more even and still let answers begin with labels."""
        x = case.seen.x
        change = x @ A.T @ B.T - x @ case.A.T @ case.B.T
        after = shares(self._start.logits(case.seen.hidden + change).softmax(-1), case.groups)
        return bool(_unevenness(after) < _unevenness(case.before) and after.sum() >= 0.8 * case.before.sum())

    def _with(self, flat: Tensor, A: Tensor, B: Tensor) -> Tensor:
        changed = flat.clone()
        own_A, own_B = self._start.factors(changed)
        own_A.copy_(A)
        own_B.copy_(B / self._layout.scaling)
        return changed


def shares(probs: Tensor, groups: dict[str, list[int]]) -> Tensor:
    """(G,) mean probability that an answer begins with each label; `probs` (n, V)."""
    return torch.stack([probs[:, tokens].sum(1).mean() for tokens in groups.values()])


def shifts(before: Tensor, n: int) -> Tensor:
    """(G,) what to add to the labels' logits: minus their log share, keeping their total probability on average.

    A share measured on `n` prompts counts as if every label had been said once more: few prompts and many labels
    correct less.
    """
    shift = -((n * before / before.sum() + 1.0) / (n + len(before))).log()
    return shift + (before.sum() / (before * shift.exp()).sum()).log()


def gate(inner: Tensor, elsewhere: Tensor) -> Tensor:
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


def _rows_of(tokens: Tensor, groups: dict[str, list[int]]) -> Tensor:
    """(n_tokens, K) one where a token begins a label."""
    own = [torch.isin(tokens, torch.tensor(begun)) for begun in groups.values()]
    return torch.stack(own, 1).float()


def _solve(slopes: Tensor, wanted: Tensor) -> Tensor:
    """(d, k) the least changes of the stream that move the logits by each column of `wanted` (n_tokens, k), nearly."""
    slopes, wanted = slopes.double(), wanted.double()
    gram = slopes @ slopes.T
    return (slopes.T @ torch.linalg.solve(_ridged(gram, 1e-2), wanted)).float()


def _ridged(gram: Tensor, share: float) -> Tensor:
    """A Gram matrix with a `share` of its mean diagonal added to the diagonal."""
    return gram + share * gram.trace() / len(gram) * torch.eye(len(gram), dtype=gram.dtype)

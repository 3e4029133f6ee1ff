"""Takes a base's taste for one label out of an adapter, from unlabeled prompts alone.

A small base under an adapter often answers every prompt of a label task with the same label, whatever it reads. What it
answers on average over a batch of the task's prompts shows that taste, and dividing by it ("batch calibration",
arXiv 2309.17249) brings the prompts' own differences out. Here it becomes part of the LoRA, in closed form:

* The labels are read off the batch: words that nearly all prompts share and that the answers begin with. A task without
  such words (free answers) is left alone.
* Only B of the last layer's `down_proj` changes, by one rank-one term: a direction that moves the labels' logits by
  what they are over- or under-said, and little else, times a combination of the LoRA's own r inner values that is
  about 1 where an answer begins and about 0 elsewhere. Shape, rank and the shared A stay.
* It assumes that the labels are about equally frequent. It reads each prompt once and takes no gradient step.
"""

from __future__ import annotations

import re
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from dnd_sdk.engine.batching import grouped
from dnd_sdk.engine.chat import Messages, prompt_ids
from dnd_sdk.lora_linear import tables_from_flat, use_lora

if TYPE_CHECKING:
    from dnd_sdk.lora_layout import LoraLayout
    from dnd_sdk.models import Base

T = TypeVar("T")

MIN_PROMPTS, MAX_PROMPTS = 8, 16
"""Fewer prompts say too little of an average; more add next to nothing."""
MAX_PROMPT_TOKENS = 512
"""Longer prompts are passed over: they cost most and say no more."""
BATCH_TOKENS = 2048

SHARED_BY = 0.9
"""Part of the prompts that a label must occur in."""
MIN_SHARE = 0.01
"""Of the answers that must begin with a word for it to count as a label."""
MIN_TOTAL = 0.5
"""Of the answers that must begin with some label; below, the answers are free."""
FUNCTION_WORDS = frozenset(
    "the an this that these those of to in on at for from with by as is are was were be and or".split()  # noqa: SIM905
)
"""Nearly all prompts hold some of these, and free answers begin with them: no labels ("a" is one often)."""
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
class _Seen:
    """What the base did at n prompts, under the adapter."""

    hidden: Tensor
    """(n, d) into the final norm, where the answer begins."""
    inner: Tensor
    """(n, r) A x of the last `down_proj`, there."""
    elsewhere: Tensor
    """(m, r) the same at all other positions."""
    straight: bool
    """Whether the last layer's MLP adds to the stream directly, as the method needs."""


class LabelPrior:
    """The method for one base and layout."""

    def __init__(self, base: Base, layout: LoraLayout) -> None:
        self._base, self._layout = base, layout

    @torch.no_grad()
    def take_out(self, flat: Tensor, prompts: Sequence[str], chats: Sequence[Messages]) -> Calibrated:
        """`flat` (P,) without its label prior on these prompts.

        Args:
            flat: The LoRA.
            prompts: What the user messages say: where labels are looked for. In any order.
            chats: The same prompts as the base is asked them.
        """
        last = self._last_mlp()
        if last is None:
            return Calibrated(flat, reason=_UNFIT)
        picked = self._pick(prompts, chats)
        if len(picked) < MIN_PROMPTS:
            return Calibrated(flat, reason=f"only {len(picked)} short enough prompts, {MIN_PROMPTS} are needed")
        seen = self._read(flat, last, [ids for _, ids in picked])
        logits = self._logits(seen.hidden)
        probs = logits.softmax(-1)
        groups = label_tokens(probs.mean(0), self._base.tokenizer, shared_words([text for text, _ in picked]))
        if not seen.straight:
            return Calibrated(flat, reason=_UNFIT)
        if len(groups) < 2:
            return Calibrated(flat, reason="the prompts show no labels that the answers begin with")
        before = shares(probs, groups)
        term = self._term(seen, logits, groups, shifts(before, len(picked)))
        if not self._better(seen, term, groups, before):
            return Calibrated(flat, reason="the labels are said about equally often")
        return Calibrated(self._add(flat, last, term), dict(zip(groups, before.tolist(), strict=True)))

    def _last_mlp(self) -> str | None:
        """Name of the last layer's `down_proj`, if it carries LoRA and its output goes straight to the final norm."""
        stack = self._base.model.base_model
        layers, head = getattr(stack, "layers", None), self._base.model.get_output_embeddings()
        parts = isinstance(layers, nn.ModuleList) and isinstance(getattr(stack, "norm", None), nn.Module)
        if not parts or head is None or getattr(self._base.model.config, "final_logit_softcapping", None):
            return None
        assert isinstance(layers, nn.ModuleList)
        module = getattr(getattr(layers[-1], "mlp", None), "down_proj", None)
        norm = getattr(layers[-1], "post_attention_layernorm", None)
        carried = (m.name for m in self._layout.modules if self._base.model.get_submodule(m.name) is module)
        return None if norm is None else next(carried, None)

    def _pick(self, prompts: Sequence[str], chats: Sequence[Messages]) -> list[tuple[str, list[int]]]:
        """At most `MAX_PROMPTS` prompts spread over the sorted set, with their tokens."""
        tokenizer = self._base.tokenizer
        ordered = sorted(zip(prompts, chats, strict=True), key=lambda pair: pair[0])
        spread = _spread_over(ordered, 4 * MAX_PROMPTS)
        short = [(t, ids) for t, c in spread if len(ids := prompt_ids(tokenizer, c)) <= MAX_PROMPT_TOKENS]
        return _spread_over(short, MAX_PROMPTS)

    def _read(self, flat: Tensor, last: str, rows: list[list[int]]) -> _Seen:
        device, dtype = self._base.model.device, self._base.model.dtype
        tables = tables_from_flat(self._layout, flat[None].to(device, dtype))
        A = tables[last][0][0].float()
        parts: list[_Seen] = []
        with self._watching() as caught, use_lora(tables, 0):
            by_length = sorted(range(len(rows)), key=lambda i: len(rows[i]))
            for some in grouped(by_length, lambda g: len(g) * len(rows[g[-1]]) <= BATCH_TOKENS):
                ids, ends = _pad([rows[i] for i in some])
                self._base.model.base_model(input_ids=ids.to(device), use_cache=False)
                parts.append(_cut(caught, A, ends.to(device)))
        return _Seen(
            torch.cat([p.hidden for p in parts]),
            torch.cat([p.inner for p in parts]),
            torch.cat([p.elsewhere for p in parts]),
            all(p.straight for p in parts),
        )

    @contextmanager
    def _watching(self) -> Iterator[dict[str, Tensor]]:
        """Keep what flows through the end of the last layer in this thread's forwards."""
        stack: Any = self._base.model.base_model
        layer, mine, caught = stack.layers[-1], threading.get_ident(), dict[str, Tensor]()

        def keep(name: str, value: Tensor) -> None:
            if threading.get_ident() == mine:
                caught[name] = value

        hooks = [
            stack.norm.register_forward_pre_hook(lambda _, args: keep("hidden", args[0])),
            layer.post_attention_layernorm.register_forward_pre_hook(lambda _, args: keep("stream", args[0])),
            layer.mlp.down_proj.register_forward_pre_hook(lambda _, args: keep("x", args[0])),
            layer.mlp.down_proj.register_forward_hook(lambda _, args, out: keep("y", out)),
        ]
        try:
            yield caught
        finally:
            for hook in hooks:
                hook.remove()

    def _logits(self, hidden: Tensor) -> Tensor:
        stack: Any = self._base.model.base_model
        head: Any = self._base.model.get_output_embeddings()
        logits: Tensor = head(stack.norm(hidden.to(self._base.model.dtype)))
        return logits.float()

    def _term(
        self, seen: _Seen, logits: Tensor, groups: dict[str, list[int]], wanted_shifts: Tensor
    ) -> tuple[Tensor, Tensor]:
        """(direction (d,), gate (r,)) whose outer product is what is added to scaling * B; `logits` are of `seen`."""
        tokens = _candidates(logits.softmax(-1).mean(0), groups)
        wanted = torch.zeros(len(tokens), device=logits.device)
        for tokens_of, shift in zip(groups.values(), wanted_shifts, strict=True):
            wanted[torch.isin(tokens, torch.tensor(tokens_of, device=tokens.device))] = shift
        at = seen.hidden.mean(0)
        # the final norm makes the logits bend a little along a straight line: the first step and two corrections
        direction = torch.zeros_like(at)
        for _ in range(3):
            moved = self._logits(seen.hidden + direction) - logits
            missing = wanted - moved[:, tokens].mean(0)
            direction = direction + _solve(self._slopes(at + direction, tokens), missing)
        return direction, gate(seen.inner, seen.elsewhere)

    def _slopes(self, hidden: Tensor, tokens: Tensor) -> Tensor:
        """(n_tokens, d) how each token's logit changes with the stream at `hidden` (d,)."""
        stack: Any = self._base.model.base_model
        head: Any = self._base.model.get_output_embeddings()
        dtype = self._base.model.dtype
        jacobian = torch.autograd.functional.jacobian(lambda h: stack.norm(h.to(dtype)).float(), hidden, vectorize=True)
        slopes: Tensor = head.weight[tokens].float() @ jacobian
        return slopes

    def _better(self, seen: _Seen, term: tuple[Tensor, Tensor], groups: dict[str, list[int]], before: Tensor) -> bool:
        """Whether the term, as it will act, makes shares more even and still lets answers begin with labels."""
        direction, combine = term
        probs = self._logits(seen.hidden + (seen.inner @ combine)[:, None] * direction).softmax(-1)
        after = shares(probs, groups)
        return bool(_unevenness(after) < _unevenness(before) and after.sum() >= 0.8 * before.sum())

    def _add(self, flat: Tensor, last: str, term: tuple[Tensor, Tensor]) -> Tensor:
        changed = flat.clone()
        direction, combine = (t.to(flat.device, flat.dtype) for t in term)
        for segment, view in self._layout.views(changed):
            if segment.module == last and segment.part == "lora_B":
                view.add_(torch.outer(direction, combine) / self._layout.scaling)
        return changed


def shared_words(texts: Sequence[str]) -> set[str]:
    """The words (case folded) that nearly all of `texts` hold, without function words."""
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
    return torch.tensor(sorted({*likely, *(t for tokens in groups.values() for t in tokens)}), device=mean.device)


def _solve(slopes: Tensor, wanted: Tensor) -> Tensor:
    """(d,) the least change of the stream that moves the logits by `wanted`, as nearly as a small ridge lets it."""
    slopes, wanted = slopes.double(), wanted.double()
    gram = slopes @ slopes.T
    return (slopes.T @ torch.linalg.solve(_ridged(gram, 1e-2), wanted)).float()


def _ridged(gram: Tensor, share: float) -> Tensor:
    """A Gram matrix with a `share` of its mean diagonal added to the diagonal."""
    return gram + share * gram.trace() / len(gram) * torch.eye(len(gram), device=gram.device, dtype=gram.dtype)


def _pad(batch: list[list[int]]) -> tuple[Tensor, Tensor]:
    """Right padding: under causal attention nothing before it sees it."""
    longest = max(map(len, batch))
    return torch.tensor([r + [0] * (longest - len(r)) for r in batch]), torch.tensor([len(r) - 1 for r in batch])


def _cut(caught: dict[str, Tensor], A: Tensor, ends: Tensor) -> _Seen:
    inner = caught["x"].float() @ A.T
    rows = torch.arange(len(ends), device=ends.device)
    before_end = torch.arange(inner.shape[1], device=ends.device)[None] < ends[:, None]
    hidden, stream, y = (caught[k].float() for k in ("hidden", "stream", "y"))
    straight = torch.allclose(hidden, stream + y, rtol=1e-2, atol=1e-2 * float(hidden.abs().mean()))
    return _Seen(hidden[rows, ends], inner[rows, ends], inner[before_end], straight)

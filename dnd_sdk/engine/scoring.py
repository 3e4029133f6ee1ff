"""How likely each of several answers is, reading every prompt once.

A prompt and all its options are one row: the options follow the prompt side by side, each with the positions it would
have alone, and a mask lets an option see the prompt and itself only. One forward then costs about the tokens of the
prompt plus the options'; it equals scoring every full sequence by itself. What all prompts begin with is read once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from dnd_sdk.chat import Messages, option_ids
from dnd_sdk.engine.attention import NAME, additive, other_layers
from dnd_sdk.engine.prefix import Prefix, shared_prefix
from dnd_sdk.errors import ConfigError, InputError
from dnd_sdk.models import grouped

if TYPE_CHECKING:
    from dnd_sdk.engine.resident import Resident

LOGIT_BYTES = 128 * 2**20
"""Bound on one batch's float32 logits."""

_PAD = -1


@dataclass(frozen=True)
class OptionScores:
    """Per chat and option."""

    logprobs: list[list[float]]
    """Sum of the log-probabilities (nats) of the option's tokens, end of turn included."""
    n_tokens: list[list[int]]
    """How many tokens that sum has, for callers that normalise by length."""


class _Pack(NamedTuple):
    """Options that share one row of a batch."""

    chat: int
    prompt: list[int]
    options: list[tuple[int, list[int]]]
    """(index in the chat's options, tokens with the end of turn)."""

    @property
    def width(self) -> int:
        return sum(len(ids) - 1 for _, ids in self.options)  # an option's last token is predicted, never read

    @property
    def length(self) -> int:
        return len(self.prompt) + self.width


def option_logprobs(
    resident: Resident,
    messages_list: Sequence[Messages],
    options_list: Sequence[Sequence[str]],
    adapter_ids: Sequence[str | None],
    *,
    batch_tokens: int = 2048,
) -> OptionScores:
    """Score each chat's own options after it, with its own adapter (None: the base).

    `batch_tokens` bounds the padded tokens of a batch; it changes speed and memory only.
    Raises `InputError` for lists of unequal length, a chat without options, or one that exceeds the base's context.
    """
    if not len(messages_list) == len(options_list) == len(adapter_ids):
        raise InputError(
            f"{len(messages_list)} chats, {len(options_list)} option lists, {len(adapter_ids)} adapter ids",
            fix="pass one of each per chat",
        )
    _check_packable(resident.base.model)
    most = max(1, LOGIT_BYTES // (4 * resident.base.model.config.get_text_config().vocab_size) - 1)
    packs = [p for i, m in enumerate(messages_list) for p in _packs(resident, i, m, options_list[i], most)]
    prefix = shared_prefix(resident.base.model, [p.prompt for p in packs], adapter_ids)
    scores = OptionScores([[0.0] * len(o) for o in options_list], [[0] * len(o) for o in options_list])

    def fits(some: list[int]) -> bool:
        longest, widest = max(packs[i].length for i in some), max(packs[i].width for i in some)
        small = len(some) * longest <= batch_tokens and len(some) * (widest + 1) <= most + 1
        return small and resident.fits_slots([adapter_ids[packs[i].chat] for i in some])

    rounds = resident.rounds(adapter_ids)
    for some in grouped(sorted(range(len(packs)), key=lambda i: (rounds[packs[i].chat], packs[i].length)), fits):
        batch = [packs[i] for i in some]
        with resident.running([adapter_ids[p.chat] for p in batch]):
            _score(resident.base.model, batch, scores, prefix)
    return scores


def _packs(resident: Resident, chat: int, messages: Messages, options: Sequence[str], most: int) -> Iterator[_Pack]:
    """One pack, or several when the options together are wider than `most`."""
    tokens = [option_ids(resident.base.tokenizer, o) for o in options]
    if not tokens or not all(tokens):
        raise InputError(f"chat {chat} has no options, or one without tokens", fix="pass at least one answer per chat")
    prompt = resident.prompt_ids(messages, max(map(len, tokens)))
    for some in grouped(range(len(tokens)), lambda g: sum(len(tokens[i]) - 1 for i in g) <= most):
        yield _Pack(chat, prompt, [(i, tokens[i]) for i in some])


def _score(model: Any, batch: Sequence[_Pack], scores: OptionScores, prefix: Prefix | None) -> None:
    width, known = max(p.width for p in batch), len(prefix or ())
    ids, positions, segments = (t.to(model.device) for t in _collate(batch, width, known))
    logits = (
        model(
            input_ids=ids,
            position_ids=positions,
            attention_mask=_masks(model, positions, segments, known),
            past_key_values=None if prefix is None else prefix.cache(len(batch)),
            use_cache=False,
            **({"logits_to_keep": width + 1} if model._supports_logits_to_keep() else {}),
        )
        .logits[:, -(width + 1) :]
        .float()
    )  # (B, T, V) -> (B, width + 1, V): from the prompt's last token on
    log_norm = logits.logsumexp(-1)  # (B, width + 1)
    for row, pack in enumerate(batch):
        at, labels, owner = (torch.tensor(x, device=model.device) for x in _targets(pack))
        each = logits[row, at, labels] - log_norm[row, at]  # (scored tokens,), then summed: (options,)
        sums = torch.zeros(len(pack.options), device=model.device).index_add_(0, owner, each).tolist()
        for (option, tokens), total in zip(pack.options, sums, strict=True):
            scores.logprobs[pack.chat][option] = total
            scores.n_tokens[pack.chat][option] = len(tokens)


def _collate(batch: Sequence[_Pack], width: int, known: int) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, positions and segments `(B, T)`; prompts (segment 0) end in one column, options (1..) follow, -1 pads.

    The first `known` tokens of the prompts are left out.
    """
    rows = []
    for pack in batch:
        lead, trail = max(len(p.prompt) for p in batch) - len(pack.prompt), width - pack.width
        row = [(0, 0, _PAD)] * lead + [(t, i, 0) for i, t in enumerate(pack.prompt)][known:]
        for segment, (_, tokens) in enumerate(pack.options, 1):
            row += [(t, len(pack.prompt) + j, segment) for j, t in enumerate(tokens[:-1])]
        rows.append(row + [(0, 0, _PAD)] * trail)
    ids, positions, segments = torch.tensor(rows).unbind(-1)  # (B, T, 3) -> three of (B, T)
    return ids, positions, segments


def _targets(pack: _Pack) -> tuple[list[int], list[int], list[int]]:
    """For every scored token: index of the logits that predict it, the token, and its option's place in the pack."""
    at, labels, owner = [], [], []
    start = 1
    for place, (_, tokens) in enumerate(pack.options):
        at += [0, *range(start, start + len(tokens) - 1)]  # the first token is predicted by the prompt's last
        labels += tokens
        owner += [place] * len(tokens)
        start += len(tokens) - 1
    return at, labels, owner


def _masks(model: Any, positions: Tensor, segments: Tensor, known: int) -> Tensor | dict[str, Tensor]:
    """Additive masks `(B, 1, T, known + T)`: all see the `known` columns before the batch's own.

    A dict by layer kind for a base that mixes full and sliding-window layers, for which nothing is known.
    """
    column = torch.arange(segments.shape[1], device=segments.device)
    query, key = segments[:, :, None], segments[:, None, :]  # (B, T, 1) and (B, 1, T), compared to (B, T, T)
    allowed = (column[None, :, None] >= column) & (key != _PAD) & ((key == 0) | (key == query))
    allowed |= column[:, None] == column  # padding sees itself: a row that sees nothing is undefined
    config = model.config.get_text_config()
    window = getattr(config, "sliding_window", None)
    full = additive(nn.functional.pad(allowed, (known, 0), value=True), model.dtype)[:, None]  # (B, 1, T, known + T)
    if window is None:
        return full
    near = positions[:, :, None] - positions[:, None, :] < window
    sliding = additive(allowed & near, model.dtype)[:, None]
    if getattr(config, "layer_types", None):
        return {"full_attention": full, "sliding_attention": sliding}
    return sliding


def _check_packable(model: Any) -> None:
    config = model.config.get_text_config()
    kinds = other_layers(config)
    if kinds or config._attn_implementation not in ("sdpa", "eager", NAME):
        raise ConfigError(
            f"option scoring needs layers of plain attention (sdpa or eager), {type(model).__name__} has "
            f"{kinds or config._attn_implementation}",
            fix='load the base with attn_implementation="sdpa"',
        )

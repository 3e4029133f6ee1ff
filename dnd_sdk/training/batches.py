"""Task rows as token batches, and the loss of a frozen base on their answers.

* A row is (system, prompt) as serving sends it, with the base's chat template where it has one, plus the answer and the
  end of turn; only answer tokens carry loss, averaged per row so that long answers weigh no more than short ones.
* Right padding and causal attention: padding comes after every label, so no attention mask is needed.
* Rows of one step are split into micro-batches of similar length; logits are computed only where labels are.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dnd_sdk.chat import option_ids, prompt_ids
from dnd_sdk.errors import InputError
from dnd_sdk.tasks import Task


@dataclass(frozen=True)
class TokenRow:
    """One training row: `ids[:n_prompt]` is the templated prompt, the rest the answer and end of turn."""

    ids: tuple[int, ...]
    n_prompt: int


@dataclass(frozen=True)
class TokenTask:
    """A task's train rows as tokens."""

    name: str
    rows: tuple[TokenRow, ...]


def tokenise_task(
    task: Task, tokenizer: PreTrainedTokenizerBase, *, max_tokens: int, max_rows: int, seed: int
) -> TokenTask:
    """At most `max_rows` random train rows of at most `max_tokens` tokens.

    A task whose prompts are all longer keeps its shortest rows instead (up to twice the limit).
    Raises `InputError` when no row fits even then.
    """
    rng = random.Random(f"{seed}/{task.name}")
    picked = rng.sample(task.train, min(len(task.train), 2 * max_rows))
    rows = [_tokenise(task.messages(r), r.response, tokenizer) for r in picked]
    short = [r for r in rows if len(r.ids) <= max_tokens][:max_rows]
    if len(short) < 16:
        fitting = [r for r in sorted(rows, key=lambda r: len(r.ids)) if len(r.ids) <= 2 * max_tokens]
        short = fitting[: max(1, max_rows // 4)]
    if not short:
        raise InputError(
            f"task {task.name!r} has no train row of at most {2 * max_tokens} tokens", fix="raise data.max_tokens"
        )
    return TokenTask(task.name, tuple(short))


def _tokenise(chat: list[dict[str, str]], response: str, tokenizer: PreTrainedTokenizerBase) -> TokenRow:
    head = prompt_ids(tokenizer, chat)
    return TokenRow((*head, *option_ids(tokenizer, response)), len(head))


@dataclass(frozen=True)
class MicroBatch:
    """Rows of similar length, right padded."""

    ids: Tensor
    """(b, T) token ids."""
    owner: Tensor
    """(b,) which adapter each row uses."""
    at: Tensor
    """(2, n) row and position of every hidden state that predicts a label."""
    labels: Tensor
    """(n,) the labels."""
    weights: Tensor
    """(n,) 1 / (answer length * rows of the step): the step's loss is the weighted sum."""


def micro_batches(rows: Sequence[tuple[TokenRow, int]], *, max_padded: int, pad: int) -> Iterator[MicroBatch]:
    """Split (row, adapter) pairs into micro-batches of at most `max_padded` tokens with padding (one row at least)."""
    ordered = sorted(rows, key=lambda r: len(r[0].ids))
    group: list[tuple[TokenRow, int]] = []
    for row in ordered:
        if group and (len(group) + 1) * len(row[0].ids) > max_padded:
            yield _collate(group, len(rows), pad)
            group = []
        group.append(row)
    yield _collate(group, len(rows), pad)


def _collate(group: list[tuple[TokenRow, int]], n_rows: int, pad: int) -> MicroBatch:
    longest = max(len(r.ids) for r, _ in group)
    ids = torch.full((len(group), longest), pad)
    at: list[tuple[int, int]] = []
    labels: list[int] = []
    weights: list[float] = []
    for i, (r, _) in enumerate(group):
        ids[i, : len(r.ids)] = torch.tensor(r.ids)
        answer = range(r.n_prompt, len(r.ids))
        at += [(i, p - 1) for p in answer]
        labels += [r.ids[p] for p in answer]
        weights += [1.0 / (len(answer) * n_rows)] * len(answer)
    owner = torch.tensor([o for _, o in group])
    return MicroBatch(ids, owner, torch.tensor(at).T, torch.tensor(labels), torch.tensor(weights))


def answer_loss(model: PreTrainedModel, batch: MicroBatch) -> Tensor:
    """This micro-batch's share of the step's cross-entropy; adapters come from the caller's `use_lora`."""
    device = next(model.parameters()).device
    hidden = model.base_model(input_ids=batch.ids.to(device), use_cache=False).last_hidden_state  # (b, T, C)
    rows, positions = batch.at.to(device)
    logits = _head(model)(hidden[rows, positions]).float()  # (n, C) -> (n, vocabulary)
    cap = getattr(model.config, "final_logit_softcapping", None)
    if cap:
        logits = cap * torch.tanh(logits / cap)
    per_token = nn.functional.cross_entropy(logits, batch.labels.to(device), reduction="none")  # (n,)
    return (per_token * batch.weights.to(device)).sum()


def _head(model: PreTrainedModel) -> nn.Module:
    head = model.get_output_embeddings()
    assert isinstance(head, nn.Module)
    return head

"""The frozen sentence encoder: prompts to windows of token states (the generator's condition) and pooled vectors.

* Pooled vectors equal sentence-transformers' for the same model; pooling is read from the model's folder.
* A prompt over the limit keeps its head and its tail: instructions often stand at the end of a long prompt.
* Batches hold prompts of similar length, so hardly any computation is spent on padding; order is restored.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from dnd_sdk.config import Home
from dnd_sdk.errors import ConfigError, InputError, WeightsUnavailableError
from dnd_sdk.models.batching import grouped
from dnd_sdk.models.catalogue import DEFAULT_ENCODER
from dnd_sdk.models.loading import fingerprint, load_encoder, pull, unavailable
from dnd_sdk.models.wheels import Note

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

MAX_TOKENS = 512
"""Upper bound on a prompt's tokens when the model's folder names none."""
CHARS_PER_TOKEN = 16
"""Characters kept per token of the limit, at either end, before tokenising: far above any tokenizer's average."""
_BATCH_TOKENS = 16_384
_PADDING_TOKENS = {"cpu": 96}
"""Padding worth one more batch, by device; a GPU fills its width with it."""


@dataclass(frozen=True)
class EncoderSettings:
    """What the model's folder says beside its weights."""

    pooling: str = "mean"
    """`"mean"` over the tokens, or `"cls"`, the first token."""
    max_tokens: int = MAX_TOKENS
    lower_case: bool = False


@dataclass(frozen=True)
class Encoded:
    """One set of prompts, in the order given."""

    states: Tensor | None
    """`(n, state_tokens, C)` float32 on the encoder's device, padding zeroed; None if not asked for."""
    pooled: Tensor
    """`(n, C)` float32 on the CPU, L2-normalised."""
    n_truncated: int
    """How many prompts were longer than the limit and lost their middle."""
    n_tokens: int
    """Of all prompts together, as they were read."""


class Encoder:
    """A text encoder that never changes; safe to share between threads."""

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str, settings: EncoderSettings
    ) -> None:
        self._model, self._tokenizer, self.name, self.settings = model, tokenizer, name, settings
        self.width: int = model.config.hidden_size
        self.fingerprint = fingerprint(model)
        self._token_ids(["warm up"])  # drops the tokenizer file's own truncation now: later calls only read it

    @classmethod
    def load(
        cls,
        name: str = DEFAULT_ENCODER,
        home: Home | None = None,
        device: str = "cpu",
        *,
        progress: Note | None = None,
    ) -> Encoder:
        """Load an embedded encoder, a local sentence-encoder folder or a Hugging Face id; `home` None is the default.

        `progress` is told in words about fetching and converting.
        Raises `WeightsUnavailableError` for an encoder that cannot be found or pools in a way not supported here.
        """
        home = home or Home.find()
        folder = pull(name, home, progress)
        with unavailable(name):
            settings = _read_settings(name, folder)
        model, tokenizer = load_encoder(name, home, device=device, folder=folder)
        return cls(model, tokenizer, name, _bounded(settings, model, tokenizer))

    def encode(self, prompts: Sequence[str], *, state_tokens: int = 64, with_states: bool = True) -> Encoded:
        """Encode a set of one or more prompts.

        Of a prompt with more than `state_tokens` tokens, `states` holds the first and the last half of them.
        Raises `InputError` if there are no prompts or one of them is blank or not a string.
        """
        if state_tokens < 1:
            raise ConfigError(f"state_tokens must be at least 1, got {state_tokens}")
        ids, n_truncated = self._tokenize(prompts)
        pooled = torch.empty(len(ids), self.width)
        states = torch.zeros(len(ids), state_tokens, self.width, device=self._model.device) if with_states else None
        with torch.inference_mode():
            for rows in _length_buckets([len(i) for i in ids], _PADDING_TOKENS.get(self._model.device.type, 4096)):
                hidden, lengths = self._forward([ids[r] for r in rows])
                pooled[rows] = self._pool(hidden, lengths).cpu()
                if states is not None:
                    states[rows] = _window(hidden, lengths, state_tokens)
        return Encoded(states, pooled, n_truncated, sum(map(len, ids)))

    def embed(self, texts: Sequence[str]) -> Tensor:
        """The pooled vectors `(n, C)` alone; raises as `encode` does."""
        return self.encode(texts, with_states=False).pooled

    def _tokenize(self, prompts: Sequence[str]) -> tuple[list[list[int]], int]:
        if isinstance(prompts, str) or len(prompts) == 0:
            raise InputError("no prompts to encode", fix="give a list with at least one prompt")
        limit = self.settings.max_tokens
        texts = [_clean(p, i, limit) for i, p in enumerate(prompts)]
        if self.settings.lower_case:
            texts = [t.lower() for t in texts]
        ids = self._token_ids(texts)
        cut = sum(len(i) > limit or len(p) > 2 * CHARS_PER_TOKEN * limit for i, p in zip(ids, prompts, strict=True))
        return [_head_and_tail(i, limit) for i in ids], cut

    def _token_ids(self, texts: list[str]) -> list[list[int]]:
        out = self._tokenizer(
            texts,
            return_attention_mask=False,
            return_token_type_ids=False,
            padding=False,
            truncation=False,
            verbose=False,
        )
        ids: list[list[int]] = out["input_ids"]
        return ids

    def _forward(self, ids: list[list[int]]) -> tuple[Tensor, Tensor]:
        """Last hidden states `(b, T, C)` and lengths `(b,)` of one batch."""
        lengths = torch.tensor([len(i) for i in ids])
        pad = self._tokenizer.pad_token_id or 0
        width = int(lengths.max())
        tokens = torch.tensor([i + [pad] * (width - len(i)) for i in ids])
        mask = torch.arange(width) < lengths[:, None]
        device = self._model.device
        out = self._model(input_ids=tokens.to(device), attention_mask=mask.long().to(device))
        return out.last_hidden_state.float(), lengths.to(device)

    def _pool(self, hidden: Tensor, lengths: Tensor) -> Tensor:
        if self.settings.pooling == "cls":
            return F.normalize(hidden[:, 0], dim=-1)
        mask = torch.arange(hidden.shape[1], device=hidden.device) < lengths[:, None]
        # the mean's divisor cancels in the normalisation
        return F.normalize(torch.einsum("btc,bt->bc", hidden, mask.to(hidden)), dim=-1)


def _clean(prompt: Any, row: int, limit: int) -> str:
    if not isinstance(prompt, str):
        raise InputError(f"prompt {row} is {type(prompt).__name__}, expected a string")
    keep = CHARS_PER_TOKEN * limit
    text = prompt if len(prompt) <= 2 * keep else f"{prompt[:keep]}\n{prompt[-keep:]}"
    text = text.encode("utf-8", "replace").decode("utf-8").strip()  # lone surrogates would stop the tokenizer
    if not text:
        raise InputError(f"prompt {row} is blank", fix="leave empty prompts out")
    return text


def _head_and_tail(ids: list[int], n: int) -> list[int]:
    # special tokens stand at the ends, so they survive
    return ids if len(ids) <= n else ids[: n - n // 2] + ids[len(ids) - n // 2 :]


def _length_buckets(lengths: Sequence[int], padding: int) -> Iterator[list[int]]:
    """Row numbers in batches of similar length: at most `padding` wasted positions and `_BATCH_TOKENS` in each."""

    def fits(rows: list[int]) -> bool:
        padded = len(rows) * lengths[rows[-1]]  # the last is the longest
        return padded <= _BATCH_TOKENS and padded - sum(lengths[row] for row in rows) <= padding

    return grouped(sorted(range(len(lengths)), key=lengths.__getitem__), fits)


def _window(hidden: Tensor, lengths: Tensor, size: int) -> Tensor:
    """`(b, T, C)` -> `(b, size, C)`: all states, or the first and last half of a longer row; zeros after its end."""
    at = torch.arange(size, device=hidden.device)
    from_end = (at >= size - size // 2) & (lengths[:, None] > size)  # (b, size)
    source = torch.where(from_end, lengths[:, None] - size + at, at)
    taken = hidden.gather(1, source.clamp(max=hidden.shape[1] - 1).unsqueeze(-1).expand(-1, -1, hidden.shape[2]))
    return taken * (at < lengths[:, None]).unsqueeze(-1)


def _bounded(settings: EncoderSettings, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> EncoderSettings:
    positions = getattr(model.config, "max_position_embeddings", None) or MAX_TOKENS
    limit = min(settings.max_tokens, positions, tokenizer.model_max_length)
    return EncoderSettings(settings.pooling, limit, settings.lower_case)


def _read_settings(name: str, folder: Path) -> EncoderSettings:
    for module in _read_json(folder / "modules.json") or []:
        kind = str(module.get("type")).rsplit(".", 1)[-1]
        if kind not in ("Transformer", "Pooling", "Normalize"):
            raise WeightsUnavailableError(
                f"encoder {name!r} has a {kind} module after its transformer, which is not supported",
                fix="use an encoder of Transformer, Pooling and Normalize modules",
            )
    bert = _read_json(folder / "sentence_bert_config.json") or {}
    pooling = _pooling_mode(name, _read_json(folder / "1_Pooling/config.json") or {})
    return EncoderSettings(pooling, bert.get("max_seq_length") or MAX_TOKENS, bool(bert.get("do_lower_case")))


def _pooling_mode(name: str, config: dict[str, Any]) -> str:
    # older folders have one flag per mode, newer ones `pooling_mode`
    flags = [
        k.removeprefix("pooling_mode_") for k, on in config.items() if k.startswith("pooling_mode_") and on is True
    ]
    modes = config.get("pooling_mode") or flags or ["mean"]
    modes = [modes] if isinstance(modes, str) else list(modes)
    known = {"mean": "mean", "mean_tokens": "mean", "cls": "cls", "cls_token": "cls"}
    if len(modes) != 1 or modes[0] not in known:
        raise WeightsUnavailableError(
            f"encoder {name!r} pools by {modes}, supported are mean and cls", fix="choose another encoder"
        )
    return known[modes[0]]


def _read_json(file: Path) -> Any:
    """What a settings file says; None if there is none."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValueError as e:
        raise WeightsUnavailableError(f"{file.name} of encoder {file.parent} is not JSON: {e}") from e

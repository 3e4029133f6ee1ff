"""What the base does where an answer begins: the end of its last layer, watched while it reads prompts.

The last MLP adds its output straight to the stream that the final norm and the head turn into logits, on most bases.
There a change of the LoRA of `down_proj` has an effect that is known without another forward: `change @ x`.

Everything here is given and returned in float32 on the CPU: what is computed of it is small, and not every device has
float64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dnd_sdk.engine import Prefix, shared_prefix
from dnd_sdk.models import grouped

if TYPE_CHECKING:
    from dnd_sdk.engine import Resident

BATCH_TOKENS = 2048
"""Padded tokens of one forward, for which others wait."""
ELSEWHERE = 32
"""Other positions kept of every prompt at most, evenly spaced."""


@dataclass(frozen=True)
class Seen:
    """What the base did at n prompts, under an adapter."""

    hidden: Tensor
    """(n, d) into the final norm, where the answer begins."""
    x: Tensor
    """(n, f) into the last `down_proj`, there."""
    elsewhere: Tensor
    """(m, f) the same at some of the other positions."""
    straight: bool
    """Whether the last layer's MLP adds to the stream directly."""

    @classmethod
    def joined(cls, parts: Sequence[Seen]) -> Seen:
        """Several readings in one, in their order."""
        hidden, x, elsewhere = (torch.cat([getattr(p, k) for p in parts]) for k in ("hidden", "x", "elsewhere"))
        return cls(hidden, x, elsewhere, all(p.straight for p in parts))


Reader = Callable[[Sequence[list[int]]], Seen]
"""Tokenised prompts -> what the base did at them, in their order."""


class AnswerStart:
    """Reads prompts on one base, in its turn; whatever it does there, others wait for one forward at most."""

    def __init__(self, resident: Resident) -> None:
        self._resident, self._model, self._layout = resident, resident.base.model, resident.layout
        self._stack: Any = self._model.base_model
        self.module = self._last_mlp()
        """Name of the last layer's `down_proj`; None where it has no LoRA or the base is built otherwise."""

    def _last_mlp(self) -> str | None:
        layers, head = getattr(self._stack, "layers", None), self._model.get_output_embeddings()
        parts = isinstance(layers, nn.ModuleList) and isinstance(getattr(self._stack, "norm", None), nn.Module)
        if not parts or head is None or getattr(self._model.config, "final_logit_softcapping", None):
            return None
        assert isinstance(layers, nn.ModuleList)
        module = getattr(getattr(layers[-1], "mlp", None), "down_proj", None)
        if getattr(layers[-1], "post_attention_layernorm", None) is None:
            return None
        return next((m.name for m in self._layout.modules if self._model.get_submodule(m.name) is module), None)

    def factors(self, flat: Tensor) -> tuple[Tensor, Tensor]:
        """Views (A (r, f), B (d, r)) of the last `down_proj` in a flat vector; scaling not folded in."""
        views = {s.part: view for s, view in self._layout.views(flat) if s.module == self.module}
        return views["lora_A"], views["lora_B"]

    def reader(self, flat: Tensor, rows: Sequence[list[int]]) -> Reader:
        """Something that reads `rows`, any of them or with more tokens after them, under the adapter `flat` (P,).

        What all `rows` (tokenised prompts) begin with is read once.
        """
        prefix = shared_prefix(self._model, rows, [""] * len(rows))
        return lambda some: self._read(flat, some, prefix)

    def _read(self, flat: Tensor, rows: Sequence[list[int]], prefix: Prefix | None) -> Seen:
        order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
        parts: dict[int, Seen] = {}
        with self._resident.trying(flat) as turn:
            for some in grouped(order, lambda g: len(g) * len(rows[g[-1]]) <= BATCH_TOKENS):
                parts |= zip(some, self._read_batch([rows[i] for i in some], prefix), strict=True)
                turn.step()
        return Seen.joined([parts[i] for i in range(len(rows))])

    def _read_batch(self, rows: list[list[int]], prefix: Prefix | None) -> Iterator[Seen]:
        known = len(prefix or ())
        ids, ends = _pad([r[known:] for r in rows])
        past = {} if prefix is None else {"past_key_values": prefix.cache(len(rows))}
        with self._watching() as caught:
            self._stack(input_ids=ids.to(self._model.device), use_cache=prefix is not None, **past)
        return _cut(caught, ends)

    @contextmanager
    def _watching(self) -> Iterator[dict[str, Tensor]]:
        """Keep what flows through the end of the last layer; only ours does, as nobody else has the turn."""
        layer, caught = self._stack.layers[-1], dict[str, Tensor]()

        def keep(name: str, value: Tensor) -> None:
            caught[name] = value

        hooks = [
            self._stack.norm.register_forward_pre_hook(lambda _, args: keep("hidden", args[0])),
            layer.post_attention_layernorm.register_forward_pre_hook(lambda _, args: keep("stream", args[0])),
            layer.mlp.down_proj.register_forward_pre_hook(lambda _, args: keep("x", args[0])),
            layer.mlp.down_proj.register_forward_hook(lambda _, args, out: keep("y", out)),
        ]
        try:
            yield caught
        finally:
            for hook in hooks:
                hook.remove()

    def logits(self, hidden: Tensor) -> Tensor:
        """(n, V) of the stream (n, d), as exact as the base's own."""
        head: Any = self._model.get_output_embeddings()
        with self._resident.turns.take():
            logits: Tensor = head(self._stack.norm(hidden.to(self._model.device, self._model.dtype)))
        return logits.float().cpu()

    def logits_of(self, tokens: Tensor, hidden: Tensor) -> Tensor:
        """(n, n_tokens) of the stream (n, d), in float32: small differences are lost in a base's bfloat16."""
        head: Any = self._model.get_output_embeddings()
        tokens = tokens.to(self._model.device)
        with self._resident.turns.take():
            states = self._stack.norm(hidden.to(self._model.device)).float()
            logits: Tensor = states @ head.weight[tokens].float().T  # (n, d) -> (n, n_tokens)
        return logits.cpu()

    def slopes(self, hidden: Tensor, tokens: Tensor) -> Tensor:
        """(n_tokens, d) how each token's logit changes with the stream at `hidden` (d,)."""
        head: Any = self._model.get_output_embeddings()
        norm, dtype = self._stack.norm, self._model.dtype
        at = hidden.to(self._model.device)
        with self._resident.turns.take():
            jacobian = torch.autograd.functional.jacobian(lambda h: norm(h.to(dtype)).float(), at, vectorize=True)
        slopes: Tensor = head.weight[tokens.to(at.device)].float() @ jacobian
        return slopes.cpu()


def _pad(batch: list[list[int]]) -> tuple[Tensor, Tensor]:
    """Right padding: under causal attention nothing before it sees it."""
    longest = max(map(len, batch))
    return torch.tensor([r + [0] * (longest - len(r)) for r in batch]), torch.tensor([len(r) - 1 for r in batch])


def _cut(caught: dict[str, Tensor], ends: Tensor) -> Iterator[Seen]:
    """Each row's last position, and some of those before it."""
    hidden, stream, x, y = (caught[k].float().cpu() for k in ("hidden", "stream", "x", "y"))
    near = 1e-2 * (hidden.abs() + hidden.abs().mean())
    straight = bool(((hidden - stream - y).abs() <= near).all())  # false with NaN, too
    for i, end in enumerate(ends.tolist()):
        others = torch.arange(min(end, ELSEWHERE)) * end // max(1, min(end, ELSEWHERE))
        yield Seen(hidden[i, end, None], x[i, end, None], x[i, others], straight)

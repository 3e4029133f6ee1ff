"""Writing in fixed shapes: one graph per number of rows of a lane, good for any mix of adapters and any swap.

All that changes between two steps lies in buffers that stay where they are: tokens, positions, keys and values, and
each row's own adapter. On a GPU a step is captured once as a CUDA graph and then replayed, one launch instead of a
thousand; what it computes is compared with the uncaptured step first, and where they differ nothing is captured any
more. Without capture the same buffers and shapes make a row's answer independent of who shares its batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dnd_sdk.engine.attention import LanePart, Step, flat_logits
from dnd_sdk.engine.kv_cache import Lane
from dnd_sdk.lora import Packing, SegmentedLora, TokenSegment

_WARM_UPS = 2
"""Steps that libraries set themselves up in, before one is captured."""
_TOLERANCE = 1e-2
"""Of the largest logit; captured kernels are the same ones, in the same order."""


class _Graph(NamedTuple):
    """A step of one lane, one number of rows, with adapters or without."""

    lane_kv: Tensor
    """Kept so that its memory is nobody else's while the graph writes to it."""
    adapters: Tensor | None
    ids: Tensor
    """`(1, n)`."""
    positions: Tensor
    """`(n,)`."""
    captured: Any
    """A `torch.cuda.CUDAGraph`, or None."""
    logits: Tensor
    """`(n, V)`: where a replay leaves them."""


class FixedSteps:
    """Steps of rows that write, for one base; owned by one thread at a time."""

    def __init__(self, model: Any, packing: Packing, mask: Tensor, *, capture: bool, n_rows: int = 1) -> None:
        """`mask` as the model takes it; `n_rows`: least number of rows of a step."""
        self._model, self._packing, self._mask = model, packing, mask
        self._capture, self._least = capture, n_rows
        self._graphs: dict[tuple[int, int, bool], _Graph] = {}
        self.note: str | None = None
        """Why nothing is captured, where something was to be; None: nothing was wrong."""

    @property
    def n_graphs(self) -> int:
        """How many steps there are; mixes of adapters and swaps make no further ones."""
        return len(self._graphs)

    def n_rows(self, n: int) -> int:
        """How many rows a step for n has: a power of two, or the least number where that is more."""
        return self._least if n <= self._least else 1 << (n - 1).bit_length()

    def rest(self) -> None:
        """Free all graphs, and with them the lanes that they write to."""
        self._graphs.clear()

    def logits(self, lane: Lane[Any], ids: Sequence[int], positions: Sequence[int], *, adapted: bool) -> Tensor:
        """Logits `(n, V)` of the first n rows of a lane after these tokens; `adapted`: with what `lane.adapters` holds.

        The lane must have `n_rows(n)` rows; those beyond n are read and written in vain. What is returned is
        overwritten by the next step.
        """
        n, size = len(ids), self.n_rows(len(ids))
        spare = [0] * (size - n)
        key = lane.length, size, adapted
        graph = self._graphs.get(key)
        if graph is None or graph.lane_kv is not lane.kv or (adapted and graph.adapters is not lane.adapters):
            graph = self._graphs[key] = self._made(lane, [*ids, *spare], [*positions, *spare], adapted)
            return graph.logits[:n]
        graph.ids.copy_(torch.tensor([[*ids, *spare]]))
        graph.positions.copy_(torch.tensor([*positions, *spare]))
        if graph.captured is not None:
            graph.captured.replay()
            return graph.logits[:n]
        return self._forward(lane, graph.ids, graph.positions, adapted)[:n]

    def _forward(self, lane: Lane[Any], ids: Tensor, positions: Tensor, adapted: bool) -> Tensor:
        size = positions.shape[0]
        lora = None
        if adapted:
            assert lane.adapters is not None
            lora = SegmentedLora(self._packing, [TokenSegment(size, self._packing.views(lane.adapters[:size]))])
        step = Step([LanePart(lane, 0, positions, lane.length)])
        return flat_logits(self._model, ids, positions[None], self._mask, step, lora)

    def _made(self, lane: Lane[Any], ids: list[int], positions: list[int], adapted: bool) -> _Graph:
        """A step's buffers, its first logits in them; captured where that is wanted and right."""
        device = lane.kv.device
        buffers = torch.tensor([ids], device=device), torch.tensor(positions, device=device)
        # a step can be run again: it writes the same keys and values to the same places
        logits = self._forward(lane, *buffers, adapted)
        captured = None
        if self._capture and self.note is None:
            for _ in range(_WARM_UPS):
                logits = self._forward(lane, *buffers, adapted)
            try:
                captured, left = self._captured(lane, *buffers, adapted)
                differ = difference(logits, left, _TOLERANCE)
                self.note = f"captured steps differ by {differ}" if differ else None
                captured, logits = (None, logits) if differ else (captured, left)
            except RuntimeError as e:  # a model whose forward waits for the device, a device without memory for it
                captured, self.note = None, f"a step cannot be captured: {e}".splitlines()[0]
        return _Graph(lane.kv, lane.adapters if adapted else None, *buffers, captured, logits)

    def _captured(self, lane: Lane[Any], ids: Tensor, positions: Tensor, adapted: bool) -> tuple[Any, Tensor]:
        graph = torch.cuda.CUDAGraph()
        # other threads may use the device meanwhile: encoding, making adapters
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            logits = self._forward(lane, ids, positions, adapted)
        graph.replay()
        torch.cuda.synchronize(ids.device)
        return graph, logits


def difference(plain: Tensor, other: Tensor, tolerance: float) -> str | None:
    """By how much logits differ, where it is more than `tolerance` of the largest; None: it is not."""
    largest = plain.float().abs().max().item()
    apart = (plain.float() - other.float()).abs().max().item()
    return None if apart <= tolerance * largest else f"{apart:.3g} of {largest:.3g}"

"""One forward for many requests: a flat list of their tokens, each request at its own place.

Every step reads one token of each row that writes its answer and the next pieces of prompts; rows may use different
adapters. The model is transformers' own; only its attention (`attention.py`) and the LoRA on its Linears know of rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dnd_sdk.engine.attention import LanePart, Part, PromptPart, Step, flat_logits
from dnd_sdk.engine.bank import SlotBank
from dnd_sdk.engine.fixed_steps import FixedSteps
from dnd_sdk.engine.kv_cache import KeyValueShape, Lane, Lanes
from dnd_sdk.engine.prompt_store import MIN_SHARED, PromptStore, alike
from dnd_sdk.lora import GroupViews, SegmentedLora, TokenSegment


@dataclass(eq=False)
class ModelRow:
    """What the model knows of one request."""

    prompt: list[int]
    adapter_row: int
    """Of the bank, leased as long as this lives; 0: the base."""
    adapter_key: Any
    """Equal for rows whose adapters are the same weights."""
    n_read: int = 0
    """Tokens whose keys and values are there."""
    n_reused: int = 0
    """Of them, taken from another request."""
    n_worth: int = 0
    """How many tokens of the prompt others will want."""
    token: int = 0
    """To be read next, once the prompt is."""
    kv: Tensor | None = None
    """Of the prompt, while it is read."""
    lane: Lane[ModelRow] | None = None
    place: int = 0
    has_copy: bool = False
    """Whether its place of the lane holds its adapter."""
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def is_read(self) -> bool:
        """Whether the prompt is."""
        return self.n_read >= len(self.prompt)


class FlatForward:
    """For bases whose layers all attend, to everything or to a window; owned by one thread at a time."""

    together = True
    """A step is one forward of all its rows; one that failed can be run again."""

    def __init__(self, model: Any, bank: SlotBank, shape: KeyValueShape, *, store_bytes: int) -> None:
        self._model, self._bank, self._shape = model, bank, shape
        self._lanes: Lanes[ModelRow] = Lanes(shape)
        self._store = PromptStore(store_bytes, shape.token_bytes)
        self._reading: list[ModelRow] = []
        self._views: dict[tuple[int, int, int], tuple[GroupViews, ...]] = {}
        self._mask = torch.zeros(1, 1, 1, 1, dtype=model.dtype, device=model.device)
        self._keeps = model._supports_logits_to_keep()  # it reads signatures, which takes a while
        self.windows: dict[int, int | None] = {}
        """By layer, how many tokens it saw in the last step; None: all."""
        self.fixed: FixedSteps | None = None
        """Steps of rows that write in fixed shapes, and every prompt by itself; None: all in one forward."""

    def fix_shapes(self, *, capture: bool, n_rows: int = 1) -> None:
        """From now on use `FixedSteps`, with these arguments."""
        self.fixed = FixedSteps(self._model, self._bank.packing, self._mask, capture=capture, n_rows=n_rows)

    @property
    def token_bytes(self) -> int:
        """What one token of a row takes."""
        return self._shape.token_bytes

    def must_wait(self, adapter_key: Any, prompt: Sequence[int]) -> bool:
        """Whether a row that is being read will soon leave a head that this prompt should begin with."""
        soon = [row for row in self._reading if row.n_worth and row.adapter_key == adapter_key]
        gains = [min(alike(row.prompt[: row.n_worth], prompt), len(prompt) - 1) for row in soon]
        if max(gains, default=0) < MIN_SHARED:
            return False
        known = self._store.known(adapter_key, prompt)
        return max(gains) >= (0 if known is None else known.shape[2]) + MIN_SHARED

    def start(self, row: ModelRow, others: Iterable[Sequence[int]] = ()) -> None:
        """Take a row in; `others` are prompts of the same adapter that wait."""
        known = self._store.known(row.adapter_key, row.prompt)
        row.kv = self._shape.empty(len(row.prompt))
        if known is not None:
            row.n_read = row.n_reused = known.shape[2]
            row.kv[:, :, : row.n_read].copy_(known)
        row.n_worth = self._store.worth(row.adapter_key, row.prompt, others, row.n_read)
        self._reading.append(row)

    def end(self, row: ModelRow) -> None:
        """Let a row go."""
        if row in self._reading:
            self._reading.remove(row)
        if row.lane is not None:
            self._leave(row.lane, row.place)
        row.lane = row.kv = None

    def rest(self) -> None:
        """Nothing runs: give back what only running rows need."""
        self._views.clear()
        if self.fixed is None:  # graphs are worth their lanes
            self._lanes.free()

    def forget(self) -> None:
        """Keep nothing of past prompts."""
        self._store.clear()

    def run(self, writing: Sequence[ModelRow], reading: Sequence[tuple[ModelRow, int]]) -> Tensor:
        """Read `token` of each row in `writing` and that many more tokens of each prompt in `reading`.

        Returns logits `(n, V)`: of the rows in `writing`, in the order of `ordered`, then of the prompts that end here.
        """
        for row in writing:
            self._make_room(row)
        runs = list(_neighbours(self.ordered(writing)))
        if self.fixed is None:
            logits = [self._flat(runs, reading)]
        else:
            logits = [self._fixed_or_flat(self.fixed, rows) for rows in runs]
            logits += [self._flat([], [piece]) for piece in reading]
        for row, n in reading:
            self._leave_head(row, n)
        # nothing fails from here on, so that a step that did can be run again
        for row in writing:
            row.n_read += 1
        for row, n in reading:
            row.n_read += n
            if row.is_read:
                self._reading.remove(row)
        return logits[0] if len(logits) == 1 else torch.cat(logits)

    def ordered(self, writing: Sequence[ModelRow]) -> list[ModelRow]:
        """The rows as `run` orders them."""
        return sorted(writing, key=lambda row: (row.lane.length if row.lane else 0, row.place))

    def _fixed_or_flat(self, fixed: FixedSteps, rows: list[ModelRow]) -> Tensor:
        lane, n = rows[0].lane, len(rows)
        assert lane is not None
        if rows[0].place or n != len(lane.rows):
            return self._flat([rows], [])
        lane.hold(fixed.n_rows(n))
        adapted = any(row.adapter_row for row in rows)
        if adapted:
            self._copy_adapters(lane, rows)
        return fixed.logits(lane, [row.token for row in rows], [row.n_read for row in rows], adapted=adapted)

    def _flat(self, runs: Sequence[list[ModelRow]], reading: Sequence[tuple[ModelRow, int]]) -> Tensor:
        parts: list[Part] = []
        segments: list[TokenSegment] = []
        ids: list[int] = []
        positions: list[int] = []
        for rows in runs:
            lane, first = rows[0].lane, rows[0].place
            assert lane is not None
            parts.append(LanePart.of(lane, first, [row.n_read for row in rows]))
            segments.append(TokenSegment(len(rows), self._adapters(lane, rows)))
            ids += [row.token for row in rows]
            positions += [row.n_read for row in rows]
        wanted = list(range(len(ids)))
        for row, n in reading:
            assert row.kv is not None
            end = row.n_read + n
            parts.append(PromptPart(row.kv, row.n_read, n))
            segments.append(TokenSegment(n, self._bank.views(row.adapter_row)))
            ids += row.prompt[row.n_read : end]
            positions += range(row.n_read, end)
            if end == len(row.prompt):
                wanted.append(len(ids) - 1)
        return self._logits(ids, positions, wanted, parts, segments)

    def _logits(
        self,
        ids: list[int],
        positions: list[int],
        wanted: list[int],
        parts: Sequence[Part],
        segments: Sequence[TokenSegment],
    ) -> Tensor:
        device = self._model.device
        plain = all(segment.views is None for segment in segments)
        lora = None if plain else SegmentedLora(self._bank.packing, segments)
        where = torch.tensor(wanted, device=device, dtype=torch.long)
        step = Step(parts)
        logits = flat_logits(
            self._model,
            torch.tensor([ids], device=device),
            torch.tensor([positions], device=device),
            self._mask,
            step,
            lora,
            **({"logits_to_keep": where} if self._keeps else {}),
        )
        self.windows = step.windows
        return logits if self._keeps else logits[where]  # (n or T, V) -> (n, V)

    def _leave_head(self, row: ModelRow, n: int) -> None:
        """Keep what others will want of a prompt of which n more tokens are read now."""
        n_worth, kv = row.n_worth, row.kv
        assert kv is not None
        if n_worth and row.n_read + n >= n_worth:
            row.n_worth = 0
            self._store.keep(row.adapter_key, row.prompt, kv[:, :, :n_worth])

    def _make_room(self, row: ModelRow) -> None:
        """Move a row into a lane with room for its next token, unless it is in one; as it was where memory is short."""
        old, place = row.lane, row.place
        if old is not None and row.n_read < old.length:
            return
        kv = row.kv if old is None else old.kv[:, :, place]
        assert kv is not None
        lane = self._lanes.lane_for(row.n_read + 1)
        row.place = lane.add(row, kv)
        row.lane, row.kv, row.has_copy = lane, None, False
        if old is not None:
            self._leave(old, place)

    def _leave(self, lane: Lane[ModelRow], place: int) -> None:
        moved = lane.remove(place)
        if moved is not None:
            moved.place = place

    def _adapters(self, lane: Lane[ModelRow], rows: Sequence[ModelRow]) -> tuple[GroupViews, ...] | None:
        if len({row.adapter_row for row in rows}) == 1:
            return self._bank.views(rows[0].adapter_row)
        adapters = self._copy_adapters(lane, rows)
        key = adapters.data_ptr(), rows[0].place, len(rows)
        if key not in self._views:
            self._views[key] = self._bank.packing.views(adapters[rows[0].place : rows[0].place + len(rows)])
        return self._views[key]

    def _copy_adapters(self, lane: Lane[ModelRow], rows: Sequence[ModelRow]) -> Tensor:
        """The lane's adapters `(rows, P)`, those of `rows` in their places."""
        adapters = lane.adapters_like(self._bank.packed(0))
        for row in rows:
            if not row.has_copy:
                adapters[row.place].copy_(self._bank.packed(row.adapter_row))
                row.has_copy = True
        return adapters


def _neighbours(rows: Sequence[ModelRow]) -> Iterable[list[ModelRow]]:
    """Runs of rows that lie side by side in a lane."""
    run: list[ModelRow] = []
    for row in rows:
        if run and (row.lane is not run[-1].lane or row.place != run[-1].place + 1):
            yield run
            run = []
        run.append(row)
    if run:
        yield run

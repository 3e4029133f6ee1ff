"""Who runs when: one thread owns the model and advances all running requests by a token a step.

* Rows join between two steps and leave when they end, whatever their adapter; prompts are read in pieces beside the
  tokens of those that write, so that nobody's next token waits for more than one piece.
* The thread lives as long as there is work. Each step is a turn on the model: calibrating, vetting and scoring, which
  run in the threads of their callers, take theirs in between.
* An error in a step is the error of the rows that have it alone; the others go on.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress

import torch
from torch import Tensor

from dnd_sdk.engine.bank import SlotBank
from dnd_sdk.engine.choosing import Forward
from dnd_sdk.engine.forward import ModelRow
from dnd_sdk.engine.row import Row
from dnd_sdk.engine.turns import Turns
from dnd_sdk.engine.waiting import Waiting
from dnd_sdk.errors import BusyError

_NAME = "dnd-engine"
_PATIENCE = 64
"""Others that may be let in before a row that needs another adapter in a slot, or much memory."""
_OLDEST_EVERY = 4
"""Steps after which the prompt that is being read for longest has its turn, however many new ones come."""
_POLL_S = 0.02
"""How often rows are looked at that wait for slots which nobody here uses."""


class Scheduler:
    """Runs rows on one base; thread-safe."""

    def __init__(
        self,
        forward: Forward,
        bank: SlotBank,
        turns: Turns,
        *,
        max_rows: int,
        piece: int,
        large_piece: int,
        kv_bytes: int,
        max_waiting: int,
        one_prompt_a_step: bool = False,
    ) -> None:
        """`piece` and `large_piece` bound the prompt tokens of one step, beside rows that write and alone; `kv_bytes`
        bounds what the keys and values of all running rows may come to.
        """
        self._forward, self._bank, self._turns = forward, bank, turns
        self._max_rows, self._piece, self._large_piece = max_rows, piece, large_piece
        self._kv_bytes, self._max_waiting = kv_bytes, max_waiting
        self._most_prompts = 1 if one_prompt_a_step else max_rows
        self._guard = threading.Condition()
        self._new: list[Row] = []
        self._thread: threading.Thread | None = None
        self._forget = False
        # below: the running thread's alone
        self._waiting = Waiting()
        self._rows: list[Row] = []
        self._stuck_since: float | None = None
        self._n_steps = 0

    def submit(self, *rows: Row, may_wait: bool = False) -> None:
        """Hand rows in, at once. Raises `BusyError` when too many wait, unless they are more of a call let in."""
        if not rows:
            return
        with self._guard:
            n = len(self._new) + len(self._waiting)
            if n >= self._max_waiting and not may_wait:
                raise BusyError(f"{n} requests wait already, the most that may", fix="try again later")
            n_before = len(self._new)
            self._new += rows
            self._guard.notify_all()
            if self._thread is None:
                # not a daemon: a thread killed inside the model aborts the interpreter on exit
                thread = threading.Thread(target=self._run, name=_NAME)
                try:
                    thread.start()
                except BaseException:
                    del self._new[n_before:]
                    raise
                self._thread = thread

    def forget(self) -> None:
        """Keep nothing of past prompts."""
        with self._guard:
            if self._thread is None:
                self._forward.forget()
            else:
                self._forget = True

    @property
    def n_running(self) -> int:
        """Rows that are being answered."""
        return len(self._rows)

    @property
    def n_waiting(self) -> int:
        """Rows that wait."""
        with self._guard:
            return len(self._new) + len(self._waiting)

    @property
    def is_idle(self) -> bool:
        """Whether nothing runs or waits."""
        return self._thread is None

    def _run(self) -> None:
        with torch.inference_mode():
            while self._take_new():
                try:
                    self._go_on()
                except BaseException as error:  # whatever it is: nobody may wait for a thread that is gone
                    self._fail_all(error)

    def _go_on(self) -> None:
        self._let_go()
        self._let_in()
        if self._rows:
            self._step()
        elif len(self._waiting):
            self._wait_for_slots()

    def _fail_all(self, error: BaseException) -> None:
        for row in list(self._rows):
            self._end(row, error)
        for row in list(self._waiting):
            self._waiting.remove(row)
            self._say(row, error)

    def _take_new(self) -> bool:
        """Whether there is anything to do; the thread is gone where there is not."""
        with self._guard:
            if self._thread is not threading.current_thread():  # its start was interrupted, its rows are taken back
                return False
            if self._forget:
                self._forward.forget()
                self._forget = False
            for row in self._new:
                self._waiting.add(row)
            self._new.clear()
            if self._rows or len(self._waiting):
                return True
            self._thread = None
            self._forward.rest()
            return False

    def _let_go(self) -> None:
        """End rows that are over, running or not."""
        if _nobody_else_is_left():
            for row in [*self._rows, *self._waiting]:
                row.drop()
        for row in [row for row in self._rows if row.is_over]:
            self._end(row)
        for row in [row for row in self._waiting if row.is_over]:
            self._waiting.remove(row)
            self._say(row, None)

    def _let_in(self) -> None:
        while len(self._rows) < self._max_rows and len(self._waiting):
            if self._picked() is None:
                return
            self._stuck_since = None
            for row in self._waiting.first:
                row.n_passed += 1

    def _picked(self) -> Row | None:
        """The next to join, those first that were passed over too often."""
        late = [row for row in self._waiting.first if row.n_passed >= _PATIENCE]
        return self._waiting.pick(lambda row: row in late and self._has_place(row)) or self._waiting.pick(
            lambda row: row not in late and not self._is_in_the_way(row, late) and self._has_place(row)
        )

    def _is_in_the_way(self, row: Row, late: Sequence[Row]) -> bool:
        """Whether one that was passed over too often, or who waits for a slot elsewhere, gets in sooner without it."""
        if not all(map(self._fits_memory, late)):
            return True
        running = Counter(other.request.adapter_id for other in self._rows)
        awaited, adapter_id = self._bank.is_awaited, row.request.adapter_id
        lacking = awaited or any(other.request.adapter_id not in (None, *running) for other in late)
        if adapter_id is None or not lacking:
            return False
        if awaited:  # whoever waits has not noticed yet that nobody uses this one any more
            running[adapter_id] += 0
        return any(self._bank.frees(used, n) for used, n in running.items() if used is not None)

    def _fits_memory(self, row: Row) -> bool:
        return not self._rows or self._need(row) + sum(map(self._need, self._rows)) <= self._kv_bytes

    def _has_place(self, row: Row) -> bool:
        """Whether the row may join; it has then, or has failed."""
        if not self._fits_memory(row):
            return False
        adapter_id = row.request.adapter_id
        try:
            place, loading = (0, 0)
            if adapter_id is not None:
                patient = row.n_passed < _PATIENCE
                wanted = {a for a in self._waiting.adapters if a is not None} if patient else set()
                leased = self._bank.try_lease(adapter_id, spare=wanted)
                if leased is None:
                    return False
                place, loading = leased
        except BaseException as error:
            self._say(row, error)
            return True
        key = None if adapter_id is None else (adapter_id, loading)
        try:
            if self._forward.must_wait(key, row.prompt):
                self._release(row)
                return False
            row.model = ModelRow(row.prompt, place, key)
            others = [other.prompt for other in self._waiting.of(adapter_id) if other is not row]
            self._forward.start(row.model, others[: self._max_rows])
        except BaseException as error:
            self._release(row)
            self._say(row, error)
            return True
        self._rows.append(row)
        return True

    def _need(self, row: Row) -> int:
        return self._forward.token_bytes * (len(row.prompt) + row.request.options.max_new_tokens)

    def _wait_for_slots(self) -> None:
        """Nothing runs, and what waits cannot: somebody else holds the slots, or just did."""
        now = time.monotonic()
        self._stuck_since = self._stuck_since or now
        if now - self._stuck_since > self._bank.wait_s:
            for row in [row for row in self._waiting if now - row.since > self._bank.wait_s]:
                self._waiting.remove(row)
                self._say(row, self._bank.full())
        with self._guard:
            if not self._new:
                self._guard.wait(_POLL_S)

    def _step(self) -> None:
        writing = [row for row in self._rows if row.model is not None and row.model.is_read]
        reading = self._pieces([row for row in self._rows if row not in writing], bool(writing))
        self._n_steps += 1
        if not self._forward.together:
            self._advance_one_by_one(writing, reading)
            return
        try:
            self._advance(writing, reading)
        except BaseException as error:
            if len(writing) + len(reading) == 1:
                self._end((writing or [row for row, _ in reading])[0], error)
                return
            self._advance_one_by_one(writing, reading)

    def _advance_one_by_one(self, writing: Sequence[Row], reading: Sequence[tuple[Row, int]]) -> None:
        """The step a row at a time; where it failed, so that it fails for those only that made it fail."""
        alone: list[tuple[list[Row], list[tuple[Row, int]]]] = [([row], []) for row in writing]
        alone += [([], [piece]) for piece in reading]
        for some_writing, some_reading in alone:
            try:
                self._advance(some_writing, some_reading)
            except BaseException as error:
                self._end((some_writing or [row for row, _ in some_reading])[0], error)

    def _pieces(self, unread: Sequence[Row], others_write: bool) -> list[tuple[Row, int]]:
        """How much of which prompts to read: what is soonest read first, now and then who waited longest.

        A piece that leaves its prompt unread is read by itself: nobody's first token waits for it.
        """
        budget = self._piece if others_write else self._large_piece
        if self._n_steps % _OLDEST_EVERY:
            unread = sorted(unread, key=_n_unread)
        pieces: list[tuple[Row, int]] = []
        for row in unread:
            n = min(budget, _n_unread(row))
            if n > 0 and len(pieces) < self._most_prompts and (not pieces or n == _n_unread(row)):
                pieces.append((row, n))
                budget -= n
        return pieces

    def _advance(self, writing: Sequence[Row], reading: Sequence[tuple[Row, int]]) -> None:
        owners = {row.model: row for row in self._rows}
        models = [row.model for row in writing if row.model is not None]
        pieces = [(row.model, n) for row, n in reading if row.model is not None]
        with self._turns.take():
            logits = self._forward.run(models, pieces)
            order = self._forward.ordered(models)  # now: a row that outgrew its lane has moved, and others with it
        order += [model for model, _ in pieces if model.is_read]
        self._take_tokens([owners[model] for model in order], logits)

    def _take_tokens(self, rows: Sequence[Row], logits: Tensor) -> None:
        """`logits` `(rows, V)`."""
        if not rows:
            return
        likeliest = logits.argmax(-1).tolist() if any(row.takes_the_likeliest for row in rows) else []
        for i, row in enumerate(rows):
            try:
                token = likeliest[i] if row.takes_the_likeliest else row.draw(logits[i])
                row.take(token)
                assert row.model is not None
                row.model.token = token
            except BaseException as error:  # of this row's text or draw: the others have theirs
                self._end(row, error)

    def _end(self, row: Row, error: BaseException | None = None) -> None:
        if row in self._rows:
            self._rows.remove(row)
        if row.model is not None:
            self._forward.end(row.model)
            self._release(row)
        self._say(row, error)

    def _say(self, row: Row, error: BaseException | None) -> None:
        try:
            if error is None:
                row.finish()
            else:
                row.fail(error)
        except BaseException as broken:  # its text cannot be made, or whoever listens cannot
            with suppress(BaseException):
                row.fail(broken)

    def _release(self, row: Row) -> None:
        if row.request.adapter_id is not None:
            self._bank.release(row.request.adapter_id)


def _n_unread(row: Row) -> int:
    """Tokens of a running row's prompt that are still to be read."""
    return 0 if row.model is None else len(row.prompt) - row.model.n_read


def _nobody_else_is_left() -> bool:
    """Whether the interpreter is about to exit and only waits for threads like this one."""
    main = threading.main_thread()
    if main.is_alive():
        return False
    return all(thread.daemon or thread is main or thread.name == _NAME for thread in threading.enumerate())

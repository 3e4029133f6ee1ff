"""Requests take turns on the model, one token each, in the order they asked.

On a CPU two forwards at once only fight over the cores; whole completions one after the other would make a short
request wait for a long one. A plain `threading.Lock` is not enough: whoever releases it and asks again at once mostly
gets it back.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager


class Turns:
    """A mutex handed over in first-come order."""

    def __init__(self) -> None:
        self._guard = threading.Lock()
        self._waiting: deque[threading.Lock] = deque()
        self._taken = False

    @contextmanager
    def take(self) -> Iterator[Turn]:
        """Hold the model inside the block; call the turn's `step` between tokens."""
        turn = Turn(self)
        try:
            turn.begin()
            yield turn
        finally:
            turn.end()

    def acquire(self) -> None:
        """Wait in line."""
        with self._guard:
            if not self._taken:
                self._taken = True
                return
            ticket = threading.Lock()
            ticket.acquire()
            self._waiting.append(ticket)
        try:
            ticket.acquire()  # released by whoever hands over to us
        except BaseException:  # Ctrl-C while waiting
            self._give_up(ticket)
            raise

    def release(self) -> None:
        """Hand over to the first in line."""
        with self._guard:
            if self._waiting:
                self._waiting.popleft().release()
            else:
                self._taken = False

    @property
    def contended(self) -> bool:
        """Whether anybody waits."""
        return bool(self._waiting)

    def _give_up(self, ticket: threading.Lock) -> None:
        with self._guard:
            waiting = ticket in self._waiting
            if waiting:
                self._waiting.remove(ticket)
        if not waiting:  # it was handed to us in the meantime
            self.release()


class Turn:
    """One request's hold on the model."""

    def __init__(self, turns: Turns) -> None:
        self._turns = turns
        self._held = False

    def begin(self) -> None:
        """Wait for the model."""
        self._turns.acquire()
        self._held = True

    def step(self) -> None:
        """Let the others have a token first, if any wait."""
        if self._turns.contended:
            self.end()
            self.begin()

    def end(self) -> None:
        """Free the model, if held."""
        if self._held:
            self._held = False
            self._turns.release()

"""The fair mutex."""

from __future__ import annotations

import threading
import time
from collections import Counter
from itertools import pairwise

import pytest

from dnd_sdk.engine.turns import Turns


def test_waiting_threads_alternate() -> None:
    turns, order, ready = Turns(), [], threading.Barrier(3)

    def work(name: str) -> None:
        ready.wait(5)
        with turns.take() as turn:
            for _ in range(20):
                order.append(name)
                time.sleep(0.001)
                turn.step()

    threads = [threading.Thread(target=work, args=(n,)) for n in "abc"]
    for t in threads:
        t.start()
    for t in threads:
        t.join(10)
    middle = order[10:40]
    assert max(Counter(middle).values()) <= 12, order
    assert not any(a == b for a, b in pairwise(middle)), order


def test_one_at_a_time() -> None:
    turns, inside, most = Turns(), [0], [0]

    def work() -> None:
        for _ in range(50):
            with turns.take() as turn:
                for _ in range(3):
                    inside[0] += 1
                    most[0] = max(most[0], inside[0])
                    inside[0] -= 1
                    turn.step()

    threads = [threading.Thread(target=work) for _ in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join(20)
    assert most[0] == 1


def test_an_error_frees_the_model() -> None:
    turns = Turns()
    with pytest.raises(KeyboardInterrupt), turns.take():
        raise KeyboardInterrupt
    with turns.take():
        assert not turns.contended


def test_an_interrupted_wait_leaves_the_line(monkeypatch: pytest.MonkeyPatch) -> None:
    turns = Turns()
    real_lock = threading.Lock

    class Interrupted:
        """A ticket whose second acquire (the wait) is interrupted."""

        def __init__(self) -> None:
            self.taken = False

        def acquire(self) -> None:
            if self.taken:
                raise KeyboardInterrupt
            self.taken = True

        def release(self) -> None:
            self.taken = False

    with turns.take():
        monkeypatch.setattr("dnd_sdk.engine.turns.threading.Lock", Interrupted)
        with pytest.raises(KeyboardInterrupt):
            turns.acquire()
        monkeypatch.setattr("dnd_sdk.engine.turns.threading.Lock", real_lock)
        assert not turns.contended
    turns.acquire()
    turns.release()

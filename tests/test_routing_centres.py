"""Centres: the nearest are those of plain FAISS, and a view never changes while the rest does."""

from __future__ import annotations

import random

import faiss
import numpy as np
import pytest

from dnd_sdk.routing.centres import Centres

WIDTH = 16


def unit(rng: np.random.Generator) -> np.ndarray:
    v = rng.standard_normal(WIDTH).astype(np.float32)
    return v / np.linalg.norm(v)


def plain(live: dict[str, np.ndarray], query: np.ndarray, k: int) -> set[str]:
    index = faiss.IndexFlatIP(WIDTH)
    index.add(np.stack(list(live.values())))
    return {list(live)[i] for i in index.search(query[None], min(k, len(live)))[1][0]}


@pytest.mark.parametrize("seed", range(4))
def test_any_history_is_searched_as_plain_faiss_does(seed: int) -> None:
    """Property: adding, replacing and removing at random, one or many at once."""
    rng, draw = np.random.default_rng(seed), random.Random(seed)
    centres, live = Centres[str](WIDTH), dict[str, np.ndarray]()
    for _ in range(120):
        added = {f"n{draw.randrange(150)}": unit(rng) for _ in range(draw.choice((0, 1, 1, 30)))}
        removed = set(draw.sample(sorted(live), min(len(live), draw.choice((0, 1, 10))))) - added.keys()
        centres.change({name: (v, name) for name, v in added.items()}, removed)
        live = {n: v for n, v in live.items() if n not in removed} | added
        assert centres.view.n_live == len(live)
        if live:
            query = unit(rng)
            for k in (1, 7):
                assert set(centres.view.nearest(query, k)) == plain(live, query, k)


def test_what_a_reader_holds_never_changes() -> None:
    rng = np.random.default_rng(0)
    centres, first = Centres[str](WIDTH), {f"a{i}": unit(rng) for i in range(50)}
    centres.change({n: (v, n) for n, v in first.items()}, set())
    held, query = centres.view, unit(rng)
    before = held.matrix.copy(), held.owners, held.nearest(query, 5)
    for i in range(300):
        centres.change({f"b{i}": (unit(rng), f"b{i}")}, {f"a{i}"} if i < 50 else set())
    assert np.array_equal(held.matrix, before[0]) and held.owners == before[1] and held.nearest(query, 5) == before[2]
    assert centres.view.n_live == 300


def test_adding_moves_nothing_until_the_room_is_used_up() -> None:
    rng = np.random.default_rng(0)
    centres = Centres[str](WIDTH)
    centres.change({"a": (unit(rng), "a")}, set())
    where = centres.view.matrix.ctypes.data
    for i in range(60):
        centres.change({f"b{i}": (unit(rng), "b")}, set())
        assert centres.view.matrix.ctypes.data == where

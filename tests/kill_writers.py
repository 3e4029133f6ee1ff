"""Several processes change one store at once while some are killed, with locks or without: what is lost, who sees it.

`python tests/kill_writers.py HOME --locks none` prints what it did as JSON; exit code 1 with the first fault.
* Each writer has names of its own, so that what must be stored is known, and all fight over names in common.
* One process only reads, all the time; it must know in the end what is stored, as a new process does.
* `--locks`: `real`; `none`: they say that they are not held; `lying`: they say that they are held and hold nobody off,
  as between machines over NFS.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import select
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from adapter_folders import TINY, store_one
from helpers import random_flat
from kill_store import KEY, after, forked, killed, left_behind, replay, same, say
from routing_parts import ENCODER, task_vectors

from dnd_sdk.adapters import AdapterStore, catalogue
from dnd_sdk.adapters.peft_config import config_text
from dnd_sdk.config import Home
from dnd_sdk.errors import AdapterNotFoundError, ConfigError
from dnd_sdk.files import atomic, locks
from dnd_sdk.routing import AdapterIndex, compare_saved

N_WRITERS, N_OWN, N_COMMON = 4, 4, 3
ENCODER_OF = {"encoder": "mini", "encoder_fingerprint": ENCODER}
PATIENCE_S = 30.0


def work(home: Home, writer: int, pipe: int, seed: int) -> None:
    """Change the store at random until killed."""
    rng, store = random.Random(seed), AdapterStore(home)
    index = AdapterIndex(KEY, home.index)
    while True:
        task, op = rng.randrange(1000), rng.choice(("own", "own", "common", "index"))
        if op == "index":
            index.sync(store)
        elif op == "common":
            with suppress(AdapterNotFoundError, ConfigError):  # somebody else was faster
                change(store, f"c{rng.randrange(N_COMMON)}", rng.choice(("add", "set", "rm")), task)
        else:
            name = f"w{writer}-{rng.randrange(N_OWN)}"
            own = rng.choice(("set", "set", "rm")) if os.path.isdir(store.root / name) else "add"
            say(pipe, {"begin": own, "name": name, "task": task})
            change(store, name, own, task)
            say(pipe, {"done": own})


def change(store: AdapterStore, name: str, op: str, task: int) -> None:
    if op == "add":
        store_one(store, weights(name), name=name, exemplars=task_vectors(task, 8), **ENCODER_OF)
    elif op == "set":
        store.set_exemplars(store.get(name), task_vectors(task, 8))
    else:
        store.rm(name)


def weights(name: str) -> torch.Tensor:
    return random_flat(TINY, seed=int.from_bytes(name.encode(), "big") % 2**31)


def read(home: Home, asked: int, told: int) -> None:
    """Follow the store all the time; for each line that comes in tell what is known."""
    store, index = AdapterStore(home), AdapterIndex(KEY, home.index)
    since, known = 0, dict[str, Any]()
    while True:
        changes = store.changes(since)
        if changes.everything:
            known.clear()
        known.update(changes.adapters)
        since = changes.now
        index.sync(store)
        if select.select([asked], [], [], 0.005)[0]:
            if not os.read(asked, 1):  # whoever asked is gone
                return
            here = {n: a.exemplars_sha256 for n, a in known.items() if a is not None}
            say(told, {"known": here, "indexed": sorted(index.names)})


def one_round(home: Home, state: dict[str, int], rng: random.Random) -> tuple[dict[str, int], int]:
    """All writers at once, killed one after the other; what is stored then of their own, and how much was done."""
    seeds = [rng.randrange(2**31) for _ in range(N_WRITERS)]
    running = [
        forked(lambda pipe, w=w: work(home, w, pipe, seeds[w]))  # type: ignore[misc]
        for w in range(N_WRITERS)
    ]
    rng.shuffle(running)
    done, cut = 0, []
    for child in running:
        time.sleep(rng.uniform(0.02, 0.15))
        said = killed(*child)
        state, begun = replay(state, said)
        done += sum("done" in line for line in said)
        cut.append(begun)
    return check(home, state, cut), done


def check(home: Home, state: dict[str, int], cut: list[dict | None]) -> dict[str, int]:
    """Start anew; every writer's own adapters must be those before or after what was cut short of it."""
    store = AdapterStore(home)
    held = {a.name: a for a in store.ls()}
    assert (problems := store.verify()) == [], problems
    for begun in cut:
        if begun is not None and not fits(store, held, state, begun["name"]):
            state = after(state, begun)
    own = {n for n in held if n.startswith("w")}
    assert own == set(state), f"{sorted(own)} is stored, expected {sorted(state)}; cut short: {cut}"
    for name in state:
        assert fits(store, held, state, name), f"{name} has other exemplars than were stored"
    for name, adapter in held.items():
        assert torch.equal(store.load(adapter, TINY), weights(name))
    return state


def fits(store: AdapterStore, held: dict, state: dict[str, int], name: str) -> bool:
    if name not in state or name not in held:
        return (name in state) == (name in held)
    return same(store.exemplars(held[name]), task_vectors(state[name], 8))


def converged(home: Home, reader: tuple[int, int], ask: int) -> float:
    """Seconds until the reader, a new process and its index know exactly what is stored."""
    truth = {a.name: a.exemplars_sha256 for a in AdapterStore(home).ls()}
    start = time.monotonic()
    with os.fdopen(os.dup(reader[1]), "rb") as lines:
        while True:
            os.write(ask, b"?")
            known = json.loads(lines.readline())
            assert "error" not in known, known
            if known == {"known": truth, "indexed": sorted(truth)}:
                break
            assert time.monotonic() - start < PATIENCE_S, f"the reader knows {known}, stored is {truth}"
            time.sleep(0.02)
    took, store = time.monotonic() - start, AdapterStore(home)
    index = AdapterIndex(KEY, home.index)
    index.sync(store)
    assert set(index.names) == set(truth) == set(store.changes(0).adapters)
    for name, adapter in store.changes(0).adapters.items():
        assert adapter is not None and index.score(task_vectors(1, 4)) is not None, name
    assert not truth or compare_saved(home.index, store) == (len(truth), 0), "the index is stale"
    return took


def without_locks(kind: str) -> None:
    """As on a disk whose locks do nothing."""
    if kind == "none":
        locks._acquired = lambda folder, shared, wait: None
    elif kind == "lying":
        locks._flocked = lambda file, kind, wait: True
    if kind != "real":
        locks.reach = atomic.reach = catalogue.reach = lambda folder: "machine"
        catalogue.LOOK_S = 0.2


def run(root: Path, rounds: int, seed: int, kind: str) -> dict[str, object]:
    """That many rounds; what was done, and how long the reader took to see all at most."""
    without_locks(kind)
    torch.set_num_threads(1)
    config_text(TINY, "tiny")  # peft is imported before the forks
    home, rng = Home(root / "home"), random.Random(seed)
    asked, ask = os.pipe()

    def follow(told: int) -> None:
        os.close(ask)
        read(home, asked, told)

    reader = forked(follow)
    state, counts, slowest = dict[str, int](), Counter[str](), 0.0
    for _ in range(rounds):
        state, done = one_round(home, state, rng)
        counts["done"] += done
        slowest = max(slowest, converged(home, reader, ask))
    killed(*reader)
    atomic.STALE_S = -1.0  # what cannot be told by its process is rubbish by its age
    AdapterStore(home).ls()
    AdapterIndex(KEY, home.index).sync(AdapterStore(home))
    assert (left := left_behind(home, home.index)) == [], f"left behind: {left}"
    return {"rounds": rounds, "kills": rounds * N_WRITERS, "done": counts["done"], "converged_s": round(slowest, 3)}


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("root", type=Path)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--locks", choices=("real", "none", "lying"), default="real")
    args = parser.parse_args()
    print(json.dumps(run(args.root, args.rounds, args.seed, args.locks)))

"""Kills a process that works on a store and its index, again and again, and checks what is left each time.

`python tests/kill_store.py HOME --kills 300 --seed 0` prints what it did as JSON; exit code 1 with the first fault.
The worker is forked from here, so nothing is imported twice; it says what it begins and what is done over a pipe.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch
from adapter_folders import BASE, TINY, peft_folder, peft_tensors, store_one
from helpers import random_flat
from routing_parts import ENCODER, WIDTH, task_vectors

from dnd_sdk.adapters import AdapterStore
from dnd_sdk.adapters.peft_config import config_text
from dnd_sdk.config import Home
from dnd_sdk.routing import INDEX_FILE, AdapterIndex, Key, compare_saved

KEY = Key(WIDTH, "mini", ENCODER, BASE)
NAMES = tuple(f"a{i}" for i in range(6))
OPS = ("add", "import", "merge", "set", "set", "rm", "index", "index")
MAX_S = 0.12
"""A worker lives at most this long; most operations take a few milliseconds."""


def work(home: Home, imports: Path, pipe: int, seed: int) -> None:
    """Change the store at random until killed."""
    rng, store = random.Random(seed), AdapterStore(home)
    encoder = {"encoder": "mini", "encoder_fingerprint": ENCODER}
    index = AdapterIndex(KEY, home.index)
    while True:
        op, i, task = rng.choice(OPS), rng.randrange(len(NAMES)), rng.randrange(1000)
        name, there = NAMES[i], os.path.isdir(store.root / NAMES[i])
        if (op in ("set", "rm") and not there) or (op in ("add", "import", "merge") and there):
            op = "index"
        say(pipe, {"begin": op, "name": name, "task": task})
        if op in ("add", "merge"):
            more = {"source": "merged", "parents": {"c" * 64: 1.0}} if op == "merge" else {}
            store_one(store, random_flat(TINY, seed=i), name=name, exemplars=task_vectors(task, 8), **encoder, **more)
        elif op == "import":
            more = {"base_fingerprint": BASE, "name": name, "exemplars": task_vectors(task, 8), **encoder}
            store.import_folder(imports / name, TINY, **more)
        elif op == "set":
            store.set_exemplars(store.get(name), task_vectors(task, 8))
        elif op == "rm":
            store.rm(name)
        else:
            index.sync(store)
        say(pipe, {"done": op})


def say(pipe: int, what: dict[str, object]) -> None:
    os.write(pipe, json.dumps(what).encode() + b"\n")


def forked(call: Callable[[int], None]) -> tuple[int, int]:
    """A process that is told the end of a pipe to write to; its id and the other end."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            call(writing)
        except BaseException as e:
            say(writing, {"error": repr(e)})
        os._exit(1)
    os.close(writing)
    return child, reading


def killed(child: int, reading: int) -> list[dict]:
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    with os.fdopen(reading, "rb") as lines:
        return [json.loads(line) for line in lines]


def one_kill(work: Callable[[int, int], None], rng: random.Random, max_s: float = MAX_S) -> list[dict]:
    """Let a worker (told its pipe and a seed) run for a moment; what it said until it was killed."""
    worker = forked(lambda pipe: work(pipe, rng.randrange(2**31)))
    time.sleep(rng.uniform(0.002, max_s))
    return killed(*worker)


def replay(state: dict[str, int], said: list[dict]) -> tuple[dict[str, int], dict | None]:
    """The tasks by name that were reported as stored, and what had begun without an end."""
    begun = None
    for line in said:
        if "error" in line:
            raise AssertionError(f"the worker failed: {line['error']}")
        if "begin" in line:
            begun = line
        else:
            state, begun = after(state, begun), None
    return state, begun


def after(state: dict[str, int], op: dict | None) -> dict[str, int]:
    if op is None or op["begin"] == "index":
        return state
    rest = {name: task for name, task in state.items() if name != op["name"]}
    return rest if op["begin"] == "rm" else rest | {op["name"]: op["task"]}


def check(home: Home, before: dict[str, int], op: dict | None) -> dict[str, int]:
    """Start anew; the state found, which must be the one before or after the operation that was cut short."""
    store = AdapterStore(home)
    index = AdapterIndex(KEY, home.index)
    index.sync(store)
    found = store.ls()
    assert store.verify() == [], store.verify()
    possible = (before, after(before, op))
    held = {a.name: store.exemplars(a) for a in found}
    fits = [s for s in possible if set(s) == set(held) and all(same(held[n], task_vectors(t, 8)) for n, t in s.items())]
    assert fits, f"{sorted(held)} is stored, expected one of {possible}; cut short: {op}"
    for a in found:
        assert torch.equal(store.load(a, TINY), random_flat(TINY, seed=NAMES.index(a.name)))
    assert set(index.names) == set(held)
    assert not held or compare_saved(home.index, store) == (len(held), 0), "the index is stale"
    assert set(store.changes(0).adapters) == set(held)
    assert (left := left_behind(home, home.index)) == [], f"left behind: {left}"
    return fits[0]


def left_behind(home: Home, index: Path) -> list[Path]:
    """What no finished operation leaves in the store's folder and in that of its index."""
    state = home.adapters / ".store"
    left = [p for p in home.adapters.rglob("*") if p.name.startswith(".") and p != state]
    left += [p for p in state.glob("*") if p.name != "journal.jsonl"]
    left += [p for p in index.glob("*") if p.name != INDEX_FILE and p.suffix != ".f32"]
    return left + sorted(index.glob("*.f32"))[1:]


def same(a: torch.Tensor | None, b: torch.Tensor) -> bool:
    return a is not None and a.shape == b.shape and torch.equal(a, b)


def run(root: Path, kills: int, seed: int) -> dict[str, object]:
    """Kill that often; what was cut short, by kind, and how many operations were done."""
    torch.set_num_threads(1)
    config_text(TINY, "tiny")  # peft is imported before the forks
    home, imports, rng = Home(root / "home"), root / "imports", random.Random(seed)
    for i, name in enumerate(NAMES):
        flat = dict(TINY.views(random_flat(TINY, seed=i)))
        peft_folder(imports / name, {s.peft_key: view.clone() for s, view in flat.items()} or peft_tensors(seed=i))
    state: dict[str, int] = {}
    cut, done = Counter[str](), 0
    for _ in range(kills):
        said = one_kill(lambda pipe, seed: work(home, imports, pipe, seed), rng)
        state, op = replay(state, said)
        done += sum("done" in line for line in said)
        cut[op["begin"] if op else "between"] += 1
        state = check(home, state, op)
    return {"kills": kills, "done": done, "cut": dict(cut)}


def as_script(run: Callable[[Path, int, int], dict[str, object]]) -> None:
    """Run it as the command line says and print its report; the first fault ends the script with exit code 1."""
    parser = argparse.ArgumentParser()
    parser.add_argument("root", type=Path)
    parser.add_argument("--kills", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    print(json.dumps(run(args.root, args.kills, args.seed)))


if __name__ == "__main__":
    as_script(run)

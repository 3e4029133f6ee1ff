"""Kills a process that adapts, in the library and by the command, again and again, and checks what is left each time.

`python tests/kill_session.py HOME --kills 300 --seed 0` prints what it did as JSON; exit code 1 with the first fault.
The worker is forked from here, where everything is imported and a session is loaded; a command loads its own.
"""

from __future__ import annotations

import logging
import random
import time
from collections import Counter
from pathlib import Path

import torch
from cli_runner import dnd
from kill_store import as_script, left_behind, one_kill, say
from tiny_world import World, make_world, prompts_of

from dnd_sdk.adapters import AdapterStore
from dnd_sdk.config import Home
from dnd_sdk.prompts import clean_prompts, prompt_set_hash
from dnd_sdk.routing import INDEX_FILE, AdapterIndex, choose_exemplars, compare_saved
from dnd_sdk.routing.vector_file import VectorFile
from dnd_sdk.session import DnD

NAMES = tuple(f"a{i}" for i in range(5))
TASKS = ("upper", "digits", "lower")
OPS = ("adapt", "adapt", "merge", "route", "dnd adapt", "dnd import", "dnd rm", "dnd route", "rm")
LIVES = 2.5
"""A worker lives at most this many times what a command takes here."""

Made = tuple[str, str]
"""How an adapter came to be, and the task its prompts are of."""


def work(world: World, session: DnD, pipe: int, seed: int) -> None:
    """Adapt, import, remove and route at random until killed."""
    rng = random.Random(seed)
    while True:
        op, name, task = rng.choice(OPS), rng.choice(NAMES), rng.choice(TASKS)
        stored = {a.name: a for a in session.store.ls()}
        if op.endswith("rm") != (name in stored) or (op == "merge" and len(stored) < 2):
            op = "route"
        say(pipe, {"begin": op, "name": name, "task": task})
        run(world, session, op, name, task)
        # merging may end in the only adapter near enough, and nothing new is stored
        say(pipe, {"done": op, "there": (session.store.root / name).exists()})


def run(world: World, session: DnD, op: str, name: str, task: str) -> None:
    prompts = f"{world.base.parent}/{task}.txt"
    if op in ("adapt", "merge"):
        session.adapt(asked(task, name), mode="generate" if op == "adapt" else "merge", name=name)
    elif op == "rm":
        session.store.rm(name)
    elif op == "route":
        session.route(prompts_of(task))
    else:
        line = {
            "dnd adapt": ("adapt", "-", "--mode", "generate", "--name", name),
            "dnd import": ("adapters", "import", world.base.parent / "theirs", "--prompts", prompts, "--name", name),
            "dnd rm": ("adapters", "rm", name),
            "dnd route": ("route", prompts_of(task)[0]),
        }[op]
        options = world.options if op != "dnd rm" else ["--home", world.home.root]
        ended = dnd(*line, *options, stdin="\n".join(asked(task, name)) if op == "dnd adapt" else None)
        assert ended.exit_code == 0, (op, ended.stdout, ended.stderr)


def asked(task: str, name: str) -> list[str]:
    """Prompts of a task that no other name is adapted to: the same would give the same adapter."""
    return [f"{name} {p}" for p in prompts_of(task, 6)]


def replay(state: dict[str, Made], said: list[dict]) -> list[dict[str, Made]]:
    """The states that may be found: what was reported, and with it what had begun."""
    begun: dict | None = None
    for line in said:
        assert "error" not in line, f"the worker failed: {line['error']}"
        if "begin" in line:
            begun = line
        else:
            assert begun is not None
            state = after(state, begun) if line["there"] != (begun["name"] in state) else state
            begun = None
    return [state, after(state, begun)]


def after(state: dict[str, Made], op: dict | None) -> dict[str, Made]:
    """The state that an operation that adds or removes leads to."""
    if op is None or op["begin"] in ("route", "dnd route"):
        return state
    rest = {n: made for n, made in state.items() if n != op["name"]}
    return rest if op["begin"].endswith("rm") else rest | {op["name"]: (op["begin"], op["task"])}


def check(world: World, session: DnD, possible: list[dict[str, Made]]) -> dict[str, Made]:
    """Start anew; the state found, which must be a possible one, with store and index in order."""
    store = AdapterStore(world.home)
    found = {a.name: a for a in store.ls()}
    assert store.verify() == [], store.verify()
    assert set(store.changes(0).adapters) == set(found)
    fits = [s for s in possible if set(s) == set(found)]
    assert fits, f"{sorted(found)} is stored, expected one of {possible}"
    for name, (op, task) in fits[-1].items():
        adapter, prompts = found[name], prompts_of(task) if op == "dnd import" else asked(task, name)
        pooled = session.encoder.encode(prompts, with_states=False).pooled
        kept = store.exemplars(adapter)
        assert kept is not None and torch.allclose(kept, choose_exemplars(pooled), atol=1e-4), (name, op)
        if op != "dnd import":
            assert adapter.prompt_hash == prompt_set_hash(clean_prompts(prompts).prompts)
        store.load(adapter, session.layout, base_fingerprint=session.base.fingerprint)
    session.route(prompts_of("upper"))  # a session that lived through all of it goes on
    for index in (p.parent for p in world.home.index.glob(f"*/{INDEX_FILE}")):
        AdapterIndex(VectorFile.found_in(index).key, index).sync(store)  # the next start mends the file
        assert compare_saved(index, store) == (len(found), 0)
        assert (left := left_behind(world.home, index)) == [], f"left behind: {left}"
    return fits[-1]


def command_s(world: World) -> float:
    """Seconds of a command once all that it imports is there."""
    for _ in range(2):
        start = time.perf_counter()
        assert dnd("route", "hello", *world.options).exit_code == 0
    return time.perf_counter() - start


def main(root: Path, kills: int, seed: int) -> dict[str, object]:
    """Kill that often; what was cut short, by kind, and how many operations were done."""
    torch.set_num_threads(1)
    world, rng = make_world(root), random.Random(seed)
    logging.disable(logging.WARNING)
    for task in TASKS:
        (root / f"{task}.txt").write_text("\n".join(prompts_of(task)) + "\n", encoding="utf-8")
    session = world.session(reuse=2.0)
    elsewhere = world._replace(home=Home(root / "elsewhere")).session()
    elsewhere.adapt(prompts_of("upper"), mode="generate", name="theirs")
    elsewhere.store.export("theirs", root / "theirs")
    (root / "theirs" / "dnd.json").unlink()
    (root / "theirs" / "exemplars.safetensors").unlink()
    max_s = LIVES * command_s(world)
    state: dict[str, Made] = {}
    cut, done = Counter[str](), Counter[str]()
    for _ in range(kills):
        said = one_kill(lambda pipe, seed: work(world, session, pipe, seed), rng, max_s)
        done.update(line["done"] for line in said if "done" in line)
        cut[said[-1]["begin"] if said and "begin" in said[-1] else "between"] += 1
        state = check(world, session, replay(state, said))
    return {"kills": kills, "done": sum(done.values()), "done_by_kind": dict(done), "cut": dict(cut)}


if __name__ == "__main__":
    as_script(main)

"""What methods are shown of a task, drawn by its name and a seed: no test row, nor a train row that repeats one."""

from __future__ import annotations

import random
from collections.abc import Sequence

from dnd_sdk.errors import InputError
from dnd_sdk.evaluation.settings import MAX_PROMPTS
from dnd_sdk.tasks import Row, Task


def instruction(task: Task) -> str:
    """One line that states the answer format, made from the train split alone."""
    if task.answer_type == "label" and task.labels:
        seen = {r.response for r in task.train}
        labels = [x for x in task.labels if x in seen] or list(task.labels)
        return f"Answer with exactly one of: {', '.join(labels)}. Answer only."
    if task.answer_type == "number":
        return "Answer with the number only, no explanation."
    return "Answer with the answer only, no explanation."


def unseen_rows(task: Task) -> tuple[Row, ...]:
    """The train rows whose prompt is not also a test prompt; raises `InputError` when there is none."""
    asked = {r.prompt for r in task.test}
    rows = tuple(r for r in task.train if r.prompt not in asked)
    if not rows:
        raise InputError(f"task {task.name!r} has no train prompt outside its test split to condition on")
    return rows


def conditioning_prompts(task: Task, seed: int, n: int = MAX_PROMPTS) -> list[str]:
    """At most `n` different train prompts of `task`, drawn by `seed`; never one that is also a test prompt."""
    pool = list(dict.fromkeys(r.prompt for r in unseen_rows(task)))
    return random.Random(f"{seed}/{task.name}").sample(pool, min(n, len(pool)))


def example_rows(task: Task, seed: int, k: int) -> tuple[Row, ...]:
    """At most `k` train rows of different prompts, drawn by `seed`; a smaller `k` gives the first of them."""
    rows = list({r.prompt: r for r in unseen_rows(task)}.values())
    random.Random(f"{seed}/shots/{task.name}").shuffle(rows)
    return tuple(rows[:k])


def donors(tasks: Sequence[Task], seed: int) -> dict[str, Task]:
    """For each task another one: a seeded derangement (Sattolo's single cycle, which has no fixed point)."""
    rng, cycle = random.Random(seed), sorted(tasks, key=lambda t: t.name)
    order = list(range(len(cycle)))
    for i in range(len(order) - 1, 0, -1):
        j = rng.randrange(i)
        order[i], order[j] = order[j], order[i]
    return {task.name: cycle[order[i]] for i, task in enumerate(cycle)}

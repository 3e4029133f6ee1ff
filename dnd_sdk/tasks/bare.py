"""Prompts without what many prompts of their task share.

The shared words are the task's instruction and its format, in one wording or a few; without them a prompt does not tell
what is asked. Then only an adapter made from whole prompts can: this is where the condition of a generator counts.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from dnd_sdk.tasks.reading import Row, Task

SHARED_BY = 0.15
"""Part of the prompts (two at least) that begin or end alike where that counts as a wording of the task."""


class Frame(NamedTuple):
    """What many prompts of one task begin and end with, in whole words."""

    starts: frozenset[str]
    ends: frozenset[str]

    @classmethod
    def of(cls, prompts: Sequence[str]) -> Frame:
        """All that enough of `prompts` begin and end with, with the white space between."""
        least = max(2, math.ceil(SHARED_BY * len(prompts)))
        starts = _shared([re.findall(r"\S+\s*", p) for p in prompts], least)
        ends = _shared([re.findall(r"\s*\S+", p)[::-1] for p in prompts], least)
        return cls(frozenset("".join(words) for words in starts), frozenset("".join(words[::-1]) for words in ends))

    def own_part(self, prompt: str) -> str:
        """What `prompt` has of its own; the whole prompt if that is nothing."""
        start = max((s for s in self.starts if prompt.startswith(s)), key=len, default="")
        rest = prompt.removeprefix(start)
        own = rest.removesuffix(max((e for e in self.ends if rest.endswith(e)), key=len, default="")).strip()
        return own or prompt


def _shared(lists: Sequence[list[str]], least: int) -> list[tuple[str, ...]]:
    """Every beginning of one word or more that at least `least` lists have."""
    found: list[tuple[str, ...]] = []
    groups: list[tuple[tuple[str, ...], list[list[str]]]] = [((), list(lists))]
    while groups:
        start, members = groups.pop()
        by_next: defaultdict[str, list[list[str]]] = defaultdict(list)
        for words in members:
            if len(words) > len(start):
                by_next[words[len(start)]].append(words)
        longer = [((*start, word), some) for word, some in by_next.items() if len(some) >= least]
        found += [words for words, _ in longer]
        groups += longer
    return found


def bare_task(task: Task) -> Task:
    """`task` as asked without what its train prompts share, and without its system prompts."""
    frame = Frame.of([r.prompt for r in task.train]) if len(task.train) > 1 else Frame(frozenset(), frozenset())
    return replace(task, train=_bare(task.train, frame), test=_bare(task.test, frame))


def _bare(rows: Sequence[Row], frame: Frame) -> tuple[Row, ...]:
    return tuple(r._replace(prompt=frame.own_part(r.prompt), system=None) for r in rows)

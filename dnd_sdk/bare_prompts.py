"""Prompts without what all prompts of their task share.

The shared words are the task's instruction and its format; without them a prompt does not tell what is asked. Then only
an adapter made from whole prompts can: this is where the condition of a generator counts.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from itertools import takewhile
from typing import NamedTuple

from dnd_sdk.tasks import Row, Task


class Frame(NamedTuple):
    """What prompts of one task begin and end with, in whole words; empty where they share nothing."""

    before: str
    after: str

    @classmethod
    def of(cls, prompts: Sequence[str]) -> Frame:
        """The most words that all `prompts` begin and end with, with the white space between."""
        before = _alike([re.findall(r"\S+\s*", p) for p in prompts])
        after = _alike([re.findall(r"\s*\S+", p)[::-1] for p in prompts])
        return cls("".join(before), "".join(after[::-1]))

    def own_part(self, prompt: str) -> str:
        """What `prompt` has of its own; the whole prompt if that is nothing."""
        own = prompt.removeprefix(self.before).removesuffix(self.after).strip()
        return own or prompt


def _alike(lists: Sequence[list[str]]) -> list[str]:
    columns = zip(*lists, strict=False)
    return [column[0] for column in takewhile(lambda column: len(set(column)) == 1, columns)]


def bare_task(task: Task) -> Task:
    """`task` as asked without what its train prompts share, and without its system prompts."""
    frame = Frame.of([r.prompt for r in task.train]) if len(task.train) > 1 else Frame("", "")
    return replace(task, train=_bare(task.train, frame), test=_bare(task.test, frame))


def _bare(rows: Sequence[Row], frame: Frame) -> tuple[Row, ...]:
    return tuple(r._replace(prompt=frame.own_part(r.prompt), system=None) for r in rows)

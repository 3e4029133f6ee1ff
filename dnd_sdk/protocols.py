"""Small shared types; no third-party imports."""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

PathLike = str | os.PathLike[str]

Progress = Callable[[str, int, int, float], None]
"""Called as progress(stage, steps done, steps in all, value): the stage's loss or score, 0 where it has none."""

Work = Callable[[str, Progress], Any]
"""Does the unit of that name and returns what it comes to. A unit depends on its job alone: any process may do any
unit, and one that is done twice, or found done, comes to the same."""


@dataclass(frozen=True, eq=False)
class Job:
    """Work in units, as other processes are told of it."""

    open: Callable[..., Work]
    """A function of a module. It may be slow (it loads models): a process calls it once for all its units."""
    arguments: Mapping[str, Any]
    """What `open` is called with: values that can be sent."""
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    """The same job again, in a second run, is not opened again."""


class Done(NamedTuple):
    """A unit that has ended."""

    unit: str
    value: Any
    """What it came to; None after an error."""
    error: Exception | None = None


class Workers(Protocol):
    """Who does the units of a job."""

    def run(self, job: Job, units: Sequence[str], progress: Progress) -> Iterator[Done]:
        """Do all `units`, in any order, and yield each as it ends.

        Workers that are other processes yield a unit that failed with its error and go on with the others.
        """


class ThisProcess:
    """Works alone: one unit after the other, in the order given. An error ends the run: it is raised as it is."""

    def __init__(self) -> None:
        self._id: str | None = None
        self._work: Work | None = None

    def run(self, job: Job, units: Sequence[str], progress: Progress) -> Iterator[Done]:
        """See `Workers`."""
        if self._work is None or self._id != job.id:
            self._id, self._work = job.id, job.open(**job.arguments)
        for unit in units:
            yield Done(unit, self._work(unit, progress))

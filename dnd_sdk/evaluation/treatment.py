"""What a method does to the base for one task, as a value."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from dnd_sdk.tasks import Row, Task

if TYPE_CHECKING:
    from torch import Tensor


class Treatment(NamedTuple):
    """What a method does to the base for one task."""

    flat: Tensor | None = None
    """Flat LoRA vector; None: the plain base."""
    system: str | None = None
    """Extra system text; None: none."""
    shots: tuple[Row, ...] = ()
    """Answered train rows shown as earlier turns of the chat; the last ones are left out where the context is full."""


@dataclass(frozen=True)
class Method:
    """A named way to treat a task."""

    name: str
    seeded: bool
    """False: the seed changes nothing, so one run is enough."""
    make: Callable[[Task, int], Treatment]

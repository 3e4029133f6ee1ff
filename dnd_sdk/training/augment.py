"""Views: other ways to ask a task's rows. Each makes a task of a task; `VIEWS` has them by name.

`data.views` of a recipe adds views as tasks of their own, with their own rows, prompts and adapter. A stage's `bare`
asks a share of a task's own rows so, and conditions on its whole prompts all the same.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace

from dnd_sdk.errors import ConfigError
from dnd_sdk.tasks import Task, bare_task

View = Callable[[Task], Task]
"""The same job, asked otherwise; name and family may stay as they are."""

VIEWS: dict[str, View] = {"bare": bare_task}
"""`bare`: without what the task's prompts share, its instruction first of all."""


def with_views(tasks: Mapping[str, Task], views: Sequence[str], *, but: Collection[str] = ()) -> dict[str, Task]:
    """`tasks`, and beside each its `views` as tasks `NAME.VIEW` of the same family; those named in `but` get none.

    Raises `ConfigError` where such a name is taken.
    """
    added: dict[str, Task] = {}
    for name, task in tasks.items():
        for view in () if name in but else views:
            added[f"{name}.{view}"] = replace(VIEWS[view](task), name=f"{name}.{view}", family=task.family)
    if taken := sorted(added.keys() & tasks.keys()):
        raise ConfigError(f"tasks {', '.join(taken)} have the names of views", fix="rename them, or drop data.views")
    return {**tasks, **added}

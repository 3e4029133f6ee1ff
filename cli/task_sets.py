"""`--set`: which tasks of a folder a command measures on, by what `index.json` says they are for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dnd_sdk.cli.output import Output
from dnd_sdk.errors import ConfigError

if TYPE_CHECKING:
    from dnd_sdk.tasks import Task

DEFAULT_SET = "validation"
SETS = ("train", DEFAULT_SET, "all")


@dataclass(frozen=True)
class TaskSet:
    """Tasks of one role, or all."""

    task_set: str | None = None
    """One of `SETS`; None: the default."""
    role: str | None = None
    """The same under the option's earlier name, for one more release: `--role` is a file of instructions elsewhere."""

    def checked(self) -> str:
        """The set's name; raises `ConfigError` for one that is none."""
        name = self.task_set or self.role or DEFAULT_SET
        if name not in SETS:
            raise ConfigError(f"--set takes {', '.join(SETS)}, got {name!r}")
        return name

    def tasks(self, out: Output, folder: Path, names: list[str] | None = None) -> list[Task]:
        """The folder's tasks of the set; all of them, with a note, where none names its role. Raises `InputError`."""
        from dnd_sdk.tasks import names_roles, read_tasks

        name = self.checked()
        if name == "all" or names_roles(folder):
            return read_tasks(folder, role=None if name == "all" else name, names=names)
        everything = read_tasks(folder, names=names)
        out.note(f"note: no task in {folder} names a role, so all are taken, not those with role {name!r}")
        return everything

"""A stored adapter as a folder of its own, elsewhere."""

from __future__ import annotations

import shutil
from pathlib import Path

from dnd_sdk.adapters.adapter import Adapter
from dnd_sdk.adapters.folders import publish
from dnd_sdk.adapters.writing import FILES
from dnd_sdk.errors import ConfigError
from dnd_sdk.files import locked, storage_errors


def copy_out(adapter: Adapter, out: Path) -> Path:
    """Copy an adapter's files to a new folder `out` and return it.

    Raises `ConfigError` when `out` exists and is not an empty folder, and `StorageError`; nothing is left then.
    """

    def fill(folder: Path) -> None:
        for file in FILES:
            if (adapter.path / file).is_file():
                shutil.copyfile(adapter.path / file, folder / file)

    # shared with readers and adders: nobody replaces exemplars between the copies
    with storage_errors("write", out), locked(adapter.path.parent, shared=True):
        out.parent.mkdir(parents=True, exist_ok=True)
        if not publish(out, fill):
            raise ConfigError(f"{out} exists and is not an empty folder", fix="choose another folder")
    return out

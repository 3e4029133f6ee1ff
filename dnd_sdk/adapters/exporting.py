"""A stored adapter as a folder of its own, elsewhere."""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path

from dnd_sdk.adapters.adapter import MANIFEST, Adapter, read_manifest
from dnd_sdk.adapters.card import CARD
from dnd_sdk.adapters.checks import check_not_replaced
from dnd_sdk.adapters.exemplars import EXEMPLARS, exemplars_path
from dnd_sdk.adapters.folders import publish
from dnd_sdk.adapters.peft_config import CONFIG
from dnd_sdk.adapters.peft_folder import WEIGHTS
from dnd_sdk.errors import ConfigError
from dnd_sdk.files import locked, storage_errors


def copy_out(adapter: Adapter, out: Path) -> Path:
    """Copy an adapter's files to a new folder `out` and return it.

    Raises `ConfigError` when `out` exists and is not an empty folder, `AdapterNotFoundError` when the adapter was
    replaced meanwhile, and `StorageError`; nothing is left then.
    """
    # shared with readers and adders: nobody of this machine replaces exemplars between the copies
    with storage_errors("write", out), locked(adapter.path.parent, shared=True):
        out.parent.mkdir(parents=True, exist_ok=True)
        if not publish(out, partial(_fill, adapter)):
            raise ConfigError(f"{out} exists and is not an empty folder", fix="choose another folder")
    return out


def _fill(adapter: Adapter, folder: Path) -> None:
    for file in (CARD, CONFIG, WEIGHTS, MANIFEST):
        if (adapter.path / file).is_file():
            shutil.copyfile(adapter.path / file, folder / file)
    copied = read_manifest(folder)  # the last of what belongs together, so that it tells of the rest
    check_not_replaced(copied, adapter)
    exemplars = exemplars_path(adapter.path, copied.exemplars_sha256)
    if exemplars.is_file():
        shutil.copyfile(exemplars, folder / EXEMPLARS)

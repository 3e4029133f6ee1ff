"""Writing small files so that a crash or a full disk leaves the old content or the new, never half of one."""

from __future__ import annotations

import os
import uuid
from pathlib import Path

from dnd_sdk.adapters.safe_files import storage_errors


def write_atomic(path: Path, data: bytes) -> None:
    """Replace `path` with `data`, creating its folder. Raises `StorageError`; then `path` is as it was."""
    with storage_errors("write", path):
        path.parent.mkdir(parents=True, exist_ok=True)
        # not mkstemp: its files are readable by their owner only, and a generator folder is made to be passed on
        temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
        try:
            with temporary.open("xb") as f:
                f.write(data)
                f.flush()
                os.fsync(f.fileno())
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise

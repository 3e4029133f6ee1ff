"""Writing small files so that a crash or a full disk leaves the old content or the new, never half of one."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from dnd_sdk.adapters.safe_files import storage_errors


def write_atomic(path: Path, data: bytes) -> None:
    """Replace `path` with `data`, creating its folder. Raises `StorageError`; then `path` is as it was."""
    with storage_errors("write", path):
        path.parent.mkdir(parents=True, exist_ok=True)
        fd, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(fd, "wb") as f:
                f.write(data)
                f.flush()
                os.fsync(f.fileno())
            os.replace(temporary, path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise

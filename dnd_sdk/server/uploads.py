"""Files that came with a request, put where the library reads files."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from starlette.datastructures import UploadFile

from dnd_sdk.errors import ConfigError
from dnd_sdk.prompts import PromptSet, read_prompts


def save_upload(file: UploadFile, path: Path, max_bytes: int) -> None:
    """Write a file to `path`; raises `ConfigError` for one of more than `max_bytes`."""
    if file.size is not None and file.size > max_bytes:
        raise ConfigError(f"{path.name} has {file.size} bytes, at most {max_bytes} are taken")
    with path.open("wb") as out:
        shutil.copyfileobj(file.file, out)


def prompts_of(file: UploadFile, max_bytes: int, *, column: str = "prompt", field: str | None = None) -> PromptSet:
    """The prompts in a file, read by its name as any prompt file is; raises as `read_prompts` does."""
    suffixes = "".join(Path(file.filename or "").suffixes[-2:])[-16:]
    with tempfile.TemporaryDirectory(prefix="dnd-") as folder:
        path = Path(folder, "prompts" + "".join(c for c in suffixes if c.isalnum() or c == "."))
        save_upload(file, path, max_bytes)
        return read_prompts(path, column=column, field=field)

"""The tokenizer of a base that is not loaded: enough to tell whether somebody else serves the same."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from dnd_sdk.config import Home
from dnd_sdk.errors import WeightsUnavailableError
from dnd_sdk.models.embedded import quiet_transformers
from dnd_sdk.models.loading import resolve

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def local_tokenizer(name: str, home: Home) -> tuple[PreTrainedTokenizerBase, Path] | None:
    """A model's tokenizer and its folder; None: it is not on this machine, and nothing is fetched for it."""
    from transformers import AutoTokenizer

    try:
        folder = Path(resolve(name, home, fetch=False))
    except WeightsUnavailableError:
        return None
    if not folder.is_dir():  # an id of the hub
        return None
    try:
        with quiet_transformers():
            return AutoTokenizer.from_pretrained(folder, trust_remote_code=False), folder
    except (OSError, ValueError):
        return None

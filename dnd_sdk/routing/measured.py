"""What routing goes by: the thresholds that were measured with a generator, or with its encoder alone."""

from __future__ import annotations

import logging
from pathlib import Path

from dnd_sdk.generator import shipped_folder
from dnd_sdk.routing.support import Support
from dnd_sdk.routing.thresholds import THRESHOLDS_FILE, RouterData, Thresholds

log = logging.getLogger(__name__)

EXACT_ONLY = Thresholds(reuse=2.0, reuse_single=2.0, support=-1.0, fitted_on={"what": "nothing"})
"""Without measured thresholds an adapter is reused for its very prompts only: no similarity reaches these."""


def measured(folder: Path | None, encoder: str) -> tuple[Thresholds, Support | None]:
    """What routing goes by with the generator in `folder` (None: no generator) and the encoder of that name."""
    if folder is not None and (folder / THRESHOLDS_FILE).exists():
        data = RouterData.load(folder)
        return data.thresholds, data.support
    alike = shipped_folder(encoder_name=encoder) if folder is None else None
    if alike is not None and (alike / THRESHOLDS_FILE).exists():
        return Thresholds.load(alike / THRESHOLDS_FILE), None  # reuse thresholds speak of the encoder alone
    log.warning("no measured routing thresholds: adapters are reused for identical prompt sets only")
    return EXACT_ONLY, None

"""Making the parts of a session from names and folders, each checked against the base."""

from __future__ import annotations

import logging
from collections.abc import Callable
from os import PathLike
from pathlib import Path

from dnd_sdk.adaptation import Parts
from dnd_sdk.adapters import AdapterStore
from dnd_sdk.config import Home
from dnd_sdk.engine import Engine
from dnd_sdk.errors import ConfigError, GeneratorError, LayoutMismatchError
from dnd_sdk.generator import Generator
from dnd_sdk.lora import LoraLayout
from dnd_sdk.models import DEFAULT_BASE, DEFAULT_ENCODER, Base, Encoder, load_base, resolve
from dnd_sdk.routing import THRESHOLDS_FILE, Calibration, DecisionLog, Router, Support, Thresholds

log = logging.getLogger(__name__)

DEFAULT_GENERATOR = Path(__file__).parents[1] / "generator" / "shipped" / DEFAULT_BASE
"""The generator shipped for the default base."""

EXACT_ONLY = Thresholds(reuse=2.0, reuse_single=2.0, support=-1.0, fitted_on={"what": "nothing"})
"""Without measured thresholds an adapter is reused for its very prompts only: no similarity reaches these."""


def load_parts(
    base: str,
    generator: str | PathLike[str] | None,
    encoder: str | None,
    home: Home,
    device: str,
    dtype: str,
    n_slots: int,
    progress: Callable[[str], None] | None,
) -> Parts:
    """See `DnD.load`."""
    folder = generator_folder(base, generator)
    resident = load_base(base, home, device=device, dtype=dtype, progress=progress)
    made = None if folder is None else load_generator(folder, resident)
    name = encoder or (made.encoder_name if made is not None else DEFAULT_ENCODER)
    resolve(name, home, progress=progress)  # fetch with progress; the load below finds it
    prompts = Encoder.load(name, home, device=str(resident.model.device))
    check_encoder(prompts, made)
    layout = made.layout if made is not None else LoraLayout.from_model(resident.model)
    store = AdapterStore(home)
    router = _router(folder, prompts, resident, layout, store, home)
    engine = Engine(resident, layout, n_slots=n_slots)
    return Parts(resident, made, prompts, store, router, engine, home, DecisionLog(home.logs))


def generator_folder(base: str, generator: str | PathLike[str] | None) -> Path | None:
    """The generator's folder: the named one, the shipped one for the default base, else none."""
    if generator is None:
        return DEFAULT_GENERATOR if base == DEFAULT_BASE else None
    folder = Path(generator).expanduser()
    if not folder.is_dir():
        raise GeneratorError(f"no generator folder {folder}", fix="give the folder that dnd train generator made")
    return folder


def load_generator(folder: Path, base: Base) -> Generator:
    """The generator, on the base's device. Raises `LayoutMismatchError` when it was made for another base."""
    made = Generator.from_pretrained(folder)
    wanted = made.layout
    layout = LoraLayout.from_model(
        base.model, r=wanted.r, lora_alpha=wanted.lora_alpha, target_modules=wanted.target_modules
    )
    if layout.digest != wanted.digest or made.base_fingerprint != base.fingerprint:
        shapes = "shapes differ" if layout.digest != wanted.digest else "same shapes, other weights"
        raise LayoutMismatchError(
            f"the generator in {folder} was made for another base than {base.name!r} ({shapes}): fingerprint "
            f"{made.base_fingerprint[:16]}, this base's is {base.fingerprint[:16]}",
            fix="load the base it was trained on, or train one for this base with `dnd train generator`",
        )
    return made.to(base.model.device).eval()


def check_encoder(encoder: Encoder, generator: Generator | None) -> None:
    """Raise `ConfigError` unless the generator, if any, was trained with this encoder."""
    wanted = "" if generator is None else generator.config.encoder_fingerprint
    if generator is not None and wanted and wanted != encoder.fingerprint:
        raise ConfigError(
            f"encoder {encoder.name!r} is not the one the generator was trained with, {generator.encoder_name!r}: "
            f"fingerprint {encoder.fingerprint[:16]}, wanted {wanted[:16]}",
            fix="leave --encoder out",
        )


def measured(folder: Path | None, encoder: str) -> tuple[Thresholds, Support | None]:
    """What routing goes by with the generator in `folder` (None: no generator) and the encoder of that name."""
    if folder is not None and (folder / THRESHOLDS_FILE).exists():
        calibration = Calibration.load(folder)
        return calibration.thresholds, calibration.support
    if folder is None and encoder == DEFAULT_ENCODER and (DEFAULT_GENERATOR / THRESHOLDS_FILE).exists():
        # reuse thresholds speak of the encoder alone
        return Thresholds.load(DEFAULT_GENERATOR / THRESHOLDS_FILE), None
    log.warning("no measured routing thresholds: adapters are reused for identical prompt sets only")
    return EXACT_ONLY, None


def _router(
    folder: Path | None, encoder: Encoder, base: Base, layout: LoraLayout, store: AdapterStore, home: Home
) -> Router:
    thresholds, support = measured(folder, encoder.name)
    return Router(
        store,
        encoder.name,
        encoder.fingerprint,
        base.fingerprint,
        thresholds,
        support=support,
        folder=home.index,
        usable=lambda adapter: adapter.layout_digest == layout.digest,
    )

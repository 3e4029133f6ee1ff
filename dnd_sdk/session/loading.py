"""Making the parts of a session from names and folders, each checked against the base."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

from dnd_sdk.adaptation import Parts, made_elsewhere
from dnd_sdk.adapters import AdapterStore
from dnd_sdk.config import Home, callable_of, text_of, whole_number
from dnd_sdk.engine import Engine
from dnd_sdk.errors import ConfigError, StorageError
from dnd_sdk.generator import Generator, check_encoder, folder_for, generator_folder, load_generator
from dnd_sdk.lora import MAX_RANK, LoraLayout
from dnd_sdk.models import DEFAULT_ENCODER, Base, BaseCard, Encoder, load_base
from dnd_sdk.routing import DecisionLog, Router, measured

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

DEFAULT_RANK = 8
"""Of the slots where no generator says otherwise."""


def load_parts(
    base_name: str,
    generator_source: str | PathLike[str] | None,
    encoder_name: str | None,
    home: Home,
    device: str,
    dtype: str,
    n_slots: int | None,
    r: int | None,
    deterministic: bool,
    progress: Callable[[str], None] | None,
) -> Parts:
    """See `DnD.load`.

    One after the other: with the libraries imported all of it takes a second of Python, which threads do not share.
    """
    base_name = text_of("base", base_name)
    encoder_name = None if encoder_name is None else text_of("encoder", encoder_name)
    n_slots = None if n_slots is None else whole_number("n_slots", n_slots, 1)  # before the slow part
    r = None if r is None else whole_number("r", r, 1, MAX_RANK)
    callable_of("progress", progress)
    folder = generator_folder(base_name, generator_source)
    base = load_base(base_name, home, device=device, dtype=dtype, progress=progress)
    folder = folder_for(base, folder)
    generator = None if folder is None else load_generator(folder, base)
    encoder = encoder_for(generator, encoder_name, home, base.model.device, progress)
    layout = LoraLayout.from_model(base.model, r=r or DEFAULT_RANK) if generator is None else slots_for(generator, r)
    store = AdapterStore(home)
    router = make_router(folder, encoder, base, layout, store, home)
    fetch = partial(store.load_by_id, layout=layout, base_fingerprint=base.fingerprint)
    is_stored = partial(store.has_id, base_fingerprint=base.fingerprint)
    engine = Engine(base, layout, n_slots=n_slots, fetch=fetch, is_stored=is_stored, deterministic=deterministic)
    tell_of_others(store, base, progress)
    return Parts(base, generator, encoder, store, router, engine, home, DecisionLog(home.logs))


def encoder_for(
    generator: Generator | None,
    name: str | None,
    home: Home,
    device: torch.device,
    progress: Callable[[str], None] | None,
) -> Encoder:
    """The encoder of that name, which fits the generator; None: the generator's own, else the default."""
    name = name or (generator.encoder_name if generator is not None else DEFAULT_ENCODER)
    encoder = Encoder.load(name, home, device=str(device), progress=progress)
    check_encoder(encoder, generator)
    return encoder


def slots_for(generator: Generator, r: int | None) -> LoraLayout:
    """The layout of the adapters that can be swapped in: the generator's, at rank `r` if there is one given."""
    own = generator.layout.r
    if r is not None and r < own:
        raise ConfigError(f"r must be at least {own}, the rank of the generator's adapters, got {r}")
    layout = generator.layout.at_rank(r or own)
    generator.widen(layout)
    return layout


def tell_of_others(store: AdapterStore, base: Base | BaseCard, progress: Callable[[str], None] | None) -> None:
    """Say what the home has for other embedded bases while it has nothing for this one."""
    with suppress(StorageError):  # whoever needs the store will say so
        if told := made_elsewhere(store, base):
            (progress or log.warning)(told)


def make_router(
    folder: Path | None, encoder: Encoder, base: Base | BaseCard, layout: LoraLayout, store: AdapterStore, home: Home
) -> Router:
    """The router of a base, with the thresholds of the generator in `folder` or what is measured for the encoder."""
    thresholds, support = measured(folder, encoder.name)
    return Router(
        store,
        encoder.name,
        encoder.fingerprint,
        base.fingerprint,
        thresholds,
        support=support,
        folder=home.index,
        usable=lambda adapter: store.fits(adapter, layout),
    )

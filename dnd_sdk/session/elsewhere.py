"""The parts of a session whose base a vLLM server runs: all the others are here, and of the base its card.

The card (name, fingerprint of the weights, layout) comes from the generator, or from the base itself, read once.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from os import PathLike
from pathlib import PurePosixPath

from dnd_sdk.adaptation import Parts
from dnd_sdk.adapters import Adapter, AdapterStore, prune_served
from dnd_sdk.config import Home, callable_of, one_of, path_of, text_of, whole_number
from dnd_sdk.engine import MAX_LOADED, VllmBackend
from dnd_sdk.errors import AdapterNotFoundError, ConfigError, LayoutMismatchError
from dnd_sdk.generator import Generator, folder_for, generator_folder
from dnd_sdk.lora import MAX_RANK, LoraLayout
from dnd_sdk.models import EMBEDDED, BaseCard, load_base, local_tokenizer, pick_device
from dnd_sdk.routing import DecisionLog
from dnd_sdk.session.loading import DEFAULT_RANK, encoder_for, make_router, slots_for, tell_of_others

log = logging.getLogger(__name__)

ENGINES = ("embedded", "vllm")
_PROBE = 'The 3 quick  brown foxes\n\tjumped über 12,345 ленивых собак: {"a": [1, 2.50]} 猫 👍🏽 don\'t'
"""Tokenizers of other families split it in other places, or number the pieces otherwise."""


@dataclass(frozen=True)
class VllmServer:
    """Where a vLLM server is."""

    url: str
    key: str | None = field(repr=False)
    shared: str | None
    """Where it sees the home folder; None: at the same path."""


def given_server(
    engine: object,
    url: str | None,
    key: str | None,
    shared: str | PathLike[str] | None,
    *,
    own: Mapping[str, bool],
) -> VllmServer | None:
    """The server that `DnD.load` is given; None: the base runs here. `own` are options of a base that does, if set.

    Raises `ConfigError` for options that contradict each other.
    """
    one_of("engine", engine, ENGINES)
    if engine == "embedded":
        given = [name for name, value in (("url", url), ("key", key), ("shared", shared)) if value is not None]
        if given:
            raise ConfigError(f"{given[0]} is for the engine vllm", fix='say engine="vllm", too, or leave it out')
        return None
    if url is None:
        raise ConfigError("the engine vllm needs the url of its server", fix="give it as url (--url, DND_URL)")
    if odd := [name for name, is_set in own.items() if is_set]:
        raise ConfigError(f"{odd[0]} is up to the vLLM server", fix="leave it out and set it where vLLM is started")
    return VllmServer(
        text_of("url", url),
        None if key is None else text_of("key", key),
        None if shared is None else os.fspath(path_of("shared", shared)),
    )


def load_parts_for(
    server: VllmServer,
    base_name: str,
    generator_source: str | PathLike[str] | None,
    encoder_name: str | None,
    home: Home,
    device: str,
    n_slots: int | None,
    r: int | None,
    progress: Callable[[str], None] | None,
) -> Parts:
    """See `DnD.load`."""
    base_name = text_of("base", base_name)
    encoder_name = None if encoder_name is None else text_of("encoder", encoder_name)
    n_slots = MAX_LOADED if n_slots is None else whole_number("n_slots", n_slots, 1)
    r = None if r is None else whole_number("r", r, 1, MAX_RANK)
    callable_of("progress", progress)
    where = pick_device(device)
    folder = generator_folder(base_name, generator_source)
    card = layout = None
    if folder is None:
        (progress or log.info)(f"reading {base_name} once, for what it is")
        base = load_base(base_name, home)
        card, layout = BaseCard(base.name, base.fingerprint), LoraLayout.from_model(base.model, r=r or DEFAULT_RANK)
        folder = folder_for(base, None)
        del base
    generator = None if folder is None else Generator.from_pretrained(folder).to(where).eval()
    if generator is not None:
        card, layout = _card_of(generator, base_name, card), slots_for(generator, r)
    assert card is not None and layout is not None
    store = AdapterStore(home)
    engine = _connect(server, layout, store, card, home, n_slots)
    (progress or log.info)(check_served(engine, card, home))
    encoder = encoder_for(generator, encoder_name, home, where, progress)
    router = make_router(folder, encoder, card, layout, store, home)
    tell_of_others(store, card, progress)
    return Parts(card, generator, encoder, store, router, engine, home, DecisionLog(home.logs))


def check_served(engine: VllmBackend, card: BaseCard, home: Home) -> str:
    """What the server serves and how it was compared with the card, in words.

    Raises `LayoutMismatchError` when it cannot be the same base, as far as that shows from outside: by its folder or,
    failing that, by how it splits a text into tokens. Weights cannot be seen.
    """
    served = engine.served_base
    of = f" {served.version}" if served.version else ""
    told = f"vLLM{of} at {engine.url} serves {served.name}, up to {served.context_tokens} tokens"
    ours = local_tokenizer(card.name, home)
    if ours is None:
        return f"{told}; whether that is {card.name} was not checked: none of its files are here to compare with"
    tokenizer, folder = ours
    if os.path.realpath(served.root) == os.path.realpath(folder):
        return f"{told}, from the folder that holds {card.name} here"
    theirs = engine.token_ids(_PROBE)
    if theirs is None:
        return f"{told}; whether that is {card.name} was not checked: it does not tell how it splits a text"
    if theirs != list(tokenizer(_PROBE, add_special_tokens=False)["input_ids"]):
        raise LayoutMismatchError(
            f"vLLM at {engine.url} serves another base than {card.name}: {served.name}, from {served.root}, splits a "
            "text into other tokens",
            fix="name its base with base (--base), or give the url of another server",
        )
    return f"{told}; it splits a text as {card.name} does here, its weights cannot be seen"


def _card_of(generator: Generator, base_name: str, read: BaseCard | None) -> BaseCard:
    """The card of a base by its generator. Raises `LayoutMismatchError` where that was made for another."""
    known = read.fingerprint if read is not None else EMBEDDED[base_name].fingerprint if base_name in EMBEDDED else None
    made_for = generator.base_fingerprint
    if known is not None and known != made_for:
        raise LayoutMismatchError(
            f"the generator was made for another base than {base_name!r}, {generator.config.base_name!r}: fingerprint "
            f"{made_for[:16]}, this base's is {known[:16]}",
            fix="name the base it was trained on, or train one for this base with `dnd train generator`",
        )
    return BaseCard(base_name, made_for)


def _connect(
    server: VllmServer, layout: LoraLayout, store: AdapterStore, card: BaseCard, home: Home, n_slots: int
) -> VllmBackend:
    def find(adapter_id: str) -> Adapter:
        for adapter in store.with_id(adapter_id):
            if adapter.base_fingerprint == card.fingerprint:
                return adapter
        raise AdapterNotFoundError(f"no adapter with the id {adapter_id[:16]} in the store", fix="adapt again")

    prune_served(home.served, store)
    seen_at = None if server.shared is None else str(PurePosixPath(server.shared, home.served.name))
    served = home.served.absolute()
    return VllmBackend(server.url, layout, served, key=server.key, seen_at=seen_at, find=find, max_loaded=n_slots)

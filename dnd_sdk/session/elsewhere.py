"""The parts of a session whose base vLLM runs, a server or one in this process: all the others are ours, and of the
base its card.

The card (name, fingerprint of the weights, layout) comes from the generator, or from the base itself, read once.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path, PurePosixPath

from dnd_sdk.adaptation import Parts
from dnd_sdk.adapters import Adapter, AdapterStore, prune_served
from dnd_sdk.config import ENGINE_OF, ENGINES, Home, callable_of, one_of, path_of, text_of, whole_number
from dnd_sdk.engine import MAX_LOADED, LocalVllmBackend, VllmBackend, check_vllm_local
from dnd_sdk.errors import AdapterNotFoundError, ConfigError, LayoutMismatchError
from dnd_sdk.generator import Generator, folder_for, generator_folder
from dnd_sdk.lora import MAX_RANK, LoraLayout
from dnd_sdk.models import EMBEDDED, BaseCard, load_base, local_tokenizer, pick_device, resolve
from dnd_sdk.routing import DecisionLog
from dnd_sdk.session.loading import DEFAULT_RANK, encoder_for, make_router, slots_for, tell_of_others

log = logging.getLogger(__name__)

_PROBE = 'The 3 quick  brown foxes\n\tjumped über 12,345 ленивых собак: {"a": [1, 2.50]} 猫 👍🏽 don\'t'
"""Tokenizers of other families split it in other places, or number the pieces otherwise."""


@dataclass(frozen=True)
class VllmServer:
    """Where a vLLM server is."""

    url: str
    key: str | None = field(repr=False)
    shared: str | None
    """Where it sees the home folder; None: at the same path."""


@dataclass(frozen=True)
class LocalVllm:
    """A vLLM to start in this process."""

    dtype: str
    args: str
    """Further options, as `vllm serve` takes them."""


def given_vllm(
    engine: object,
    url: str | None,
    key: str | None,
    shared: str | PathLike[str] | None,
    vllm_args: str | None,
    *,
    dtype: str,
    deterministic: bool,
) -> VllmServer | LocalVllm | None:
    """The vLLM that `DnD.load` is given; None: the embedded engine.

    Raises `ConfigError` for options that contradict each other.
    """
    one_of("engine", engine, ENGINES)
    given = {"url": url, "key": key, "shared": shared, "vllm_args": vllm_args}
    for name, needed in ENGINE_OF.items():
        if given[name] is not None and engine != needed:
            raise ConfigError(f"{name} is for the engine {needed}", fix=f'say engine="{needed}", or leave it out')
    if engine == "embedded":
        return None
    if deterministic:
        raise ConfigError("deterministic is for the embedded engine", fix="leave it out")
    if engine == "vllm-local":
        return LocalVllm(text_of("dtype", dtype), "" if vllm_args is None else text_of("vllm_args", vllm_args))
    if url is None:
        raise ConfigError("the engine vllm needs the url of its server", fix="give it as url (--url, DND_URL)")
    if dtype != "auto":
        raise ConfigError("dtype is up to the vLLM server", fix="leave it out and set it where vLLM is started")
    return VllmServer(
        text_of("url", url),
        None if key is None else text_of("key", key),
        None if shared is None else os.fspath(path_of("shared", shared)),
    )


def load_parts_for(
    vllm: VllmServer | LocalVllm,
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
    if isinstance(vllm, LocalVllm):
        check_vllm_local()  # before weights are fetched for it
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
    engine = _backend(vllm, layout, store, card, home, n_slots, progress)
    (progress or log.info)(check_served(engine, card, home, vllm.shared if isinstance(vllm, VllmServer) else None))
    encoder = encoder_for(generator, encoder_name, home, where, progress)
    router = make_router(folder, encoder, card, layout, store, home)
    tell_of_others(store, card, progress)
    return Parts(card, generator, encoder, store, router, engine, home, DecisionLog(home.logs))


def check_served(engine: VllmBackend, card: BaseCard, home: Home, shared: str | None = None) -> str:
    """What the server serves and how it was compared with the card, in words; it sees the home at `shared`.

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
    if _is_folder(served.root, folder, home, shared):
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


def _is_folder(theirs: str, ours: Path, home: Home, shared: str | None) -> bool:
    """Whether what the server calls `theirs` is our folder: at the same path, or below the home where it sees that."""
    if shared is None or not ours.is_relative_to(home.root):
        return os.path.realpath(theirs) == os.path.realpath(ours)
    return PurePosixPath(theirs) == PurePosixPath(shared, *ours.relative_to(home.root).parts)


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


def _backend(
    vllm: VllmServer | LocalVllm,
    layout: LoraLayout,
    store: AdapterStore,
    card: BaseCard,
    home: Home,
    n_slots: int,
    progress: Callable[[str], None] | None,
) -> VllmBackend:
    def find(adapter_id: str) -> Adapter:
        for adapter in store.with_id(adapter_id):
            if adapter.base_fingerprint == card.fingerprint:
                return adapter
        raise AdapterNotFoundError(f"no adapter with the id {adapter_id[:16]} in the store", fix="adapt again")

    prune_served(home.served, store)
    served = home.served.absolute()
    if isinstance(vllm, LocalVllm):
        model = str(resolve(card.name, home, progress=progress))
        (progress or log.info)("starting vLLM, which takes a minute")
        return LocalVllmBackend(model, layout, served, dtype=vllm.dtype, args=vllm.args, find=find, max_loaded=n_slots)
    seen_at = None if vllm.shared is None else str(PurePosixPath(vllm.shared, home.served.name))
    return VllmBackend(vllm.url, layout, served, key=vllm.key, seen_at=seen_at, find=find, max_loaded=n_slots)

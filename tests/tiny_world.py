"""A whole tiny installation on disk: base, encoder and generator folders, and prompts of three made-up tasks."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from helpers import random_flat, tiny_model, tiny_tokenizer
from transformers import BertConfig, BertModel

from dnd_sdk.adaptation import Limits, Parts
from dnd_sdk.adapters import AdapterStore
from dnd_sdk.config import Home
from dnd_sdk.engine import Engine, FakeBackend
from dnd_sdk.engine.fake import Answer
from dnd_sdk.generator.generator import Generator, GeneratorConfig
from dnd_sdk.lora.layout import LoraLayout
from dnd_sdk.models import BaseCard
from dnd_sdk.models.encoder import Encoder
from dnd_sdk.models.loading import Base, load_base
from dnd_sdk.observing.prompt_stream import StreamSettings
from dnd_sdk.routing import DecisionLog, Router, Thresholds
from dnd_sdk.session import DnD

ENCODER_WIDTH = 32


def save_base(folder: Path, *, seed: int = 0) -> Path:
    """A tiny random causal LM with its tokenizer."""
    tiny_model(seed=seed).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def save_encoder(folder: Path, *, width: int = ENCODER_WIDTH) -> Path:
    """A tiny random sentence encoder with its tokenizer."""
    config = BertConfig(
        vocab_size=260,
        hidden_size=width,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
        max_position_embeddings=128,
        pad_token_id=0,
    )
    torch.manual_seed(1)
    BertModel(config).eval().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def prompts_of(task: str, n: int = 20) -> list[str]:
    """`n` different prompts of one task; two tasks share hardly a character."""
    fills = {
        "upper": "QUESTION {} ABOUT THE ORDER",
        "digits": "0{}1 + 22 * 333 - 4 = ?",
        "lower": "the cat {} sat on it",
    }
    return [fills[task].format(i) for i in range(n)]


def save_generator(folder: Path, base: Base, encoder: Encoder, *, r: int = 4) -> Path:
    """A tiny untrained generator whose adapters differ from prompt set to prompt set and change the tiny base."""
    config = GeneratorConfig(
        encoder_width=encoder.width,
        n_prompts=4,
        state_tokens=8,
        width=8,
        base_name=base.name,
        base_fingerprint=base.fingerprint,
        encoder_name=encoder.name,
        encoder_fingerprint=encoder.fingerprint,
    )
    torch.manual_seed(2)
    generator = Generator(config, LoraLayout.from_model(base.model, r=r))
    with torch.no_grad():
        generator.shared.copy_(random_flat(generator.layout, seed=3, std=0.05))
        generator.gain.fill_(1.0)
    generator.save_pretrained(folder)
    return folder


class World(NamedTuple):
    """Folders of one tiny installation."""

    base: Path
    encoder: Path
    generator: Path
    home: Home

    def session(
        self,
        *,
        reuse: float = 0.999,
        generator: bool = True,
        n_slots: int = 4,
        stream: StreamSettings | None = None,
        vetting: Limits | None = None,
    ) -> DnD:
        """A session over these parts; `reuse` is the router's threshold."""
        base, encoder = load_base(str(self.base), self.home), Encoder.load(str(self.encoder), self.home)
        layout = LoraLayout.from_model(base.model, r=4)
        store = AdapterStore(self.home)
        limits = Thresholds(reuse=reuse, reuse_single=reuse, support=-1.0)
        router = Router(store, encoder.name, encoder.fingerprint, base.fingerprint, limits, folder=self.home.index)
        made = Generator.from_pretrained(self.generator) if generator else None
        fetch = partial(store.load_by_id, layout=layout, base_fingerprint=base.fingerprint)
        is_stored = partial(store.has_id, base_fingerprint=base.fingerprint)
        engine = Engine(base, layout, n_slots=n_slots, fetch=fetch, is_stored=is_stored)
        parts = Parts(base, made, encoder, store, router, engine, self.home, DecisionLog(self.home.logs))
        return DnD(parts, stream_settings=stream, limits=vetting)

    def elsewhere(self, answer: Answer | None = None) -> DnD:
        """A session whose base runs in no process at all; `answer` as for `FakeBackend`."""
        encoder, made = Encoder.load(str(self.encoder), self.home), Generator.from_pretrained(self.generator)
        base, store = BaseCard("elsewhere", made.config.base_fingerprint), AdapterStore(self.home)
        limits = Thresholds(reuse=0.999, reuse_single=0.99, support=-1.0)
        router = Router(store, encoder.name, encoder.fingerprint, base.fingerprint, limits, folder=self.home.index)
        engine, log = FakeBackend(made.layout, answer), DecisionLog(self.home.logs)
        return DnD(Parts(base, made, encoder, store, router, engine, self.home, log))

    @property
    def options(self) -> list[str]:
        """The command-line options that name these parts."""
        return ["--base", str(self.base), "--generator", str(self.generator), "--home", str(self.home.root)]


def make_world(root: Path) -> World:
    """Save base, encoder and generator under `root`; the home is empty."""
    home = Home(root / "home")
    base_folder, encoder_folder = save_base(root / "base"), save_encoder(root / "encoder")
    base, encoder = load_base(str(base_folder), home), Encoder.load(str(encoder_folder), home)
    return World(base_folder, encoder_folder, save_generator(root / "generator", base, encoder), home)

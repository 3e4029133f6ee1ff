"""A tiny random session, for measuring what is not the models' work: base, encoder and generator cost next to nothing.

The encoder has the width of the default one, so that what is made of its vectors costs what it does there.
"""

from __future__ import annotations

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from dnd_sdk.adaptation import Parts
from dnd_sdk.adapters import AdapterStore
from dnd_sdk.config import Home
from dnd_sdk.engine import Engine
from dnd_sdk.generator import Generator, GeneratorConfig
from dnd_sdk.lora import LoraLayout
from dnd_sdk.models import Base, Encoder, EncoderSettings, fingerprint
from dnd_sdk.routing import DecisionLog, Router, Thresholds
from dnd_sdk.session import DnD

WIDTH = 384
_N_TOKENS = 258


def stand_in(home: Home) -> DnD:
    """A session on random models made here; its store, index and log are those of `home`."""
    with torch.random.fork_rng(devices=[]):  # the same models every time, and the caller's draws untouched
        torch.manual_seed(0)
        base, encoder = _base(), _encoder()
        layout = LoraLayout.from_model(base.model, r=4)
        generator = _generator(base, encoder, layout)
    store = AdapterStore(home)
    router = router_of(store, encoder, base.fingerprint, home)
    parts = Parts(base, generator, encoder, store, router, Engine(base, layout), home, DecisionLog(home.logs))
    return DnD(parts)


def router_of(store: AdapterStore, encoder: Encoder, base_fingerprint: str, home: Home) -> Router:
    """A router that compares with what is stored and never reuses it."""
    never = Thresholds(reuse=2.0, reuse_single=2.0, support=-1.0)
    return Router(store, encoder.name, encoder.fingerprint, base_fingerprint, never, folder=home.index)


def _base() -> Base:
    config = LlamaConfig(
        vocab_size=_N_TOKENS,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=2048,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
    )
    model = _random(LlamaForCausalLM(config))
    return Base(model, _tokenizer(), "stand-in", fingerprint(model))


def _encoder() -> Encoder:
    config = BertConfig(
        vocab_size=_N_TOKENS,
        hidden_size=WIDTH,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=128,
        pad_token_id=0,
    )
    return Encoder(_random(BertModel(config)), _tokenizer(), "stand-in-encoder", EncoderSettings(max_tokens=64))


def _generator(base: Base, encoder: Encoder, layout: LoraLayout) -> Generator:
    config = GeneratorConfig(
        encoder_width=WIDTH,
        n_prompts=4,
        state_tokens=8,
        width=8,
        base_name=base.name,
        base_fingerprint=base.fingerprint,
        encoder_name=encoder.name,
        encoder_fingerprint=encoder.fingerprint,
    )
    generator = Generator(config, layout).eval().requires_grad_(False)
    generator.shared.normal_(std=0.05)
    generator.gain.fill_(1.0)
    return generator


def _random(model: PreTrainedModel) -> PreTrainedModel:
    return model.eval().requires_grad_(False)


def _tokenizer() -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {t: i for i, t in enumerate(["<|end|>", "<|unk|>", *alphabet])}
    raw = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<|unk|>"))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<|end|>", eos_token="<|end|>", unk_token="<|unk|>")

"""Shared pieces of the tests: tiny random bases of four families, their tokenizer, and named tolerances."""

from __future__ import annotations

import codecs
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from dnd_sdk.lora.layout import LoraLayout

SAME_MATHS = {"rtol": 1e-5, "atol": 1e-6}
"""fp32 on CPU, the same operations in another order."""

CHAT_TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

_BYTES = {char: byte for byte, char in bytes_to_unicode().items()}

TINY_SIZES: dict[str, Any] = dict(
    vocab_size=260,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    max_position_embeddings=512,
    bos_token_id=None,
    eos_token_id=2,
    pad_token_id=0,
)
"""Of a base's configuration; `GROUPED` for those whose query heads share key heads."""
GROUPED: dict[str, Any] = {"num_key_value_heads": 2, "head_dim": 8}

FAMILIES = ("llama", "qwen2", "gemma3_text", "mistral")


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer with chat tokens; hermetic, 260 entries."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {t: i for i, t in enumerate(["<|pad|>", "<|im_start|>", "<|im_end|>", "<|unk|>", *alphabet])}
    raw = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<|unk|>"))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    tok = PreTrainedTokenizerFast(
        tokenizer_object=raw,
        pad_token="<|pad|>",
        eos_token="<|im_end|>",
        unk_token="<|unk|>",
        additional_special_tokens=["<|im_start|>"],
    )
    tok.chat_template = CHAT_TEMPLATE
    return tok


def read_bytes(tokens: list[str], *, final: bool) -> str:
    """The text of `tiny_tokenizer`'s tokens by Python's decoder; not `final`: without an incomplete last character."""
    raw = bytes(_BYTES[token] for token in tokens)
    return codecs.getincrementaldecoder("utf-8")("replace").decode(raw, final)


def tiny_model(family: str = "llama", *, seed: int = 0, hidden: int = 32, layers: int = 2) -> PreTrainedModel:
    """A random causal LM with grouped-query attention (4 heads, 2 key/value heads) and 260 tokens."""
    config = AutoConfig.for_model(
        family, **{**TINY_SIZES, **GROUPED, "hidden_size": hidden, "num_hidden_layers": layers}
    )
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)


def random_flat(layout: LoraLayout, *, seed: int = 0, std: float = 0.1) -> torch.Tensor:
    """A random flat LoRA vector, large enough to change a tiny model's answers."""
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(layout.n_parameters, generator=rng) * std

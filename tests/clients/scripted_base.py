"""A tiny base that says fixed texts, so that a client's whole round trip can be checked word by word.

Its chat template picks the text: a tool call where tools are on offer, code for an agent that asks for code, and so on;
the prompt's last token stands for it. Its weights say it: embeddings are one-hot, and the head gives each piece of a
text the next one. Held to a JSON schema, where those pieces do not fit, it closes whatever may be closed, so that
every answer is short. What it is asked otherwise makes no difference.
"""

from __future__ import annotations

import re
from itertools import pairwise

import torch
from common import TEXTS
from helpers import tiny_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

_STARTS = {name: f"<|{name}|>" for name in TEXTS}
"""The token that an answer's prompt ends in."""

_PICK = (
    "{% set asked = messages | map(attribute='content') | join('\n') %}{% set last = messages[-1] %}"
    "{% if last.role == 'tool' %}<|told|>"
    "{% elif tools %}<|call|>"
    "{% elif '<code>' in asked %}<|code|>"
    "{% elif '[[ ## ' in asked %}<|fields|>"
    "{% elif 'Action Input' in asked %}<|react|>"
    "{% elif '<|COMPLETE|>' in asked %}<|graph|>"
    "{% else %}<|say|>{% endif %}"
)

CHAT_TEMPLATE = (
    "{% if tools %}{% for t in tools %}{{ t | tojson + '\n' }}{% endfor %}{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] }}{% for c in m.tool_calls or [] %}"
    "{{ {'name': c.function.name, 'arguments': c.function.arguments} | tojson }}{% endfor %}{{ '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}" + _PICK + "{% endif %}"
)

_AS_VOCAB = bytes_to_unicode()
_NEXT, _FIRST = 100.0, 85.0
_CLOSING = {'"': 70.0, "]": 67.0, "}": 64.0, ",": 61.0, ":": 58.0, "{": 55.0, "[": 52.0, "1": 49.0}
"""What a letter calls for, and which character of JSON comes before which."""


def _spelled(text: str) -> str:
    """A text as a byte-level vocabulary writes it."""
    return "".join(_AS_VOCAB[byte] for byte in text.encode())


def _pieces(text: str, taken: set[str]) -> list[str]:
    """The text in words, each a token that nothing else uses; one that is taken goes into the next."""
    pieces: list[str] = []
    piece = ""
    for word in re.findall(r"\s*\S+\s*?|\s+$", text):
        piece += word
        if len(piece) > 1 and piece not in taken:
            taken.add(piece)
            pieces.append(piece)
            piece = ""
    if piece:
        taken.remove(pieces[-1])
        pieces[-1] += piece
        assert pieces[-1] not in taken, text
        taken.add(pieces[-1])
    return pieces


def scripted_base() -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """The model and its tokenizer; a token a byte, but for the texts it says."""
    taken: set[str] = set()
    chains = {name: _pieces(text, taken) for name, text in TEXTS.items()}
    tokenizer = _tokenizer([piece for chain in chains.values() for piece in chain])
    ids = tokenizer.get_vocab()
    head: dict[tuple[int, int], float] = {}
    for name, chain in chains.items():
        tokens = [ids[_STARTS[name]], *(ids[_spelled(piece)] for piece in chain), int(tokenizer.eos_token_id)]
        head |= {(after, before): _NEXT for before, after in pairwise(tokens)}
    return _model(tokenizer, head, first=ids[_spelled(chains["say"][0])]), tokenizer


def _tokenizer(pieces: list[str]) -> PreTrainedTokenizerFast:
    known = tiny_tokenizer().get_vocab()
    vocab = known | {token: len(known) + i for i, token in enumerate([*_STARTS.values(), *map(_spelled, pieces)])}
    raw = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<|unk|>"))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=raw,
        pad_token="<|pad|>",
        eos_token="<|im_end|>",
        unk_token="<|unk|>",
        additional_special_tokens=["<|im_start|>", *_STARTS.values()],
        chat_template=CHAT_TEMPLATE,
    )


def _model(tokenizer: PreTrainedTokenizerFast, head: dict[tuple[int, int], float], *, first: int) -> PreTrainedModel:
    """`head`: the weight of a token after another; `first` follows any letter. Its one layer adds nothing."""
    ids, size = tokenizer.get_vocab(), len(tokenizer)
    width = -(-(size + 2) // 64) * 64
    always, letter = width - 1, width - 2  # features beside the tokens' own
    config = AutoConfig.for_model(
        "llama", vocab_size=size, hidden_size=width, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, max_position_embeddings=65_536, bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    layer, embedding, logits = model.model.layers[0], model.model.embed_tokens.weight, model.lm_head.weight
    layer.self_attn.o_proj.weight.zero_()
    layer.mlp.down_proj.weight.zero_()
    # far larger than what an adapter makes of the layer
    embedding.zero_()[:, :size] += 100 * torch.eye(size)
    embedding[:, always] = 100
    embedding[[i for token, i in ids.items() if len(token) == 1 and token.isalnum()], letter] = 100
    logits.zero_()[first, letter] = _FIRST
    for character, weight in _CLOSING.items():
        logits[ids[character], always] = weight
    for (after, before), weight in head.items():
        logits[after, before] += weight
    return model

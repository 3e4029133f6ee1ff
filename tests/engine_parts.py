"""A tiny base with an engine, and the plain ways to compute what it computes."""

from __future__ import annotations

import copy
import threading
import time
from collections.abc import Callable
from typing import Any

import torch
from helpers import random_flat, read_bytes, tiny_model, tiny_tokenizer
from peft import LoraConfig, get_peft_model

from dnd_sdk.config import SamplingOptions
from dnd_sdk.engine import CompletionRequest, Engine, Generation
from dnd_sdk.lora.layout import LoraLayout
from dnd_sdk.models.loading import Base

SAME_LOGITS = {"rtol": 1e-5, "atol": 2e-5}
"""The same fp32 operations in another order, under adapters that magnify the rounding (logits of about 1)."""

SUMS = {"rtol": 1e-5, "atol": 1e-4}
"""Sums of up to 16 log-probabilities of about -5 each, the same maths in another order."""

PROMPTS = ("hi", "what is the capital of France?", "route this ticket", "2 + 2 =", "x")


def tiny_base(family: str = "llama", *, layers: int = 2) -> Base:
    return Base(tiny_model(family, layers=layers), tiny_tokenizer(), f"tiny-{family}", "0" * 64)


def tiny_layout(base: Base) -> LoraLayout:
    return LoraLayout.from_model(base.model, r=4, lora_alpha=12)


def tiny_engine(family: str = "llama", *, layers: int = 2, **settings: Any) -> Engine:
    base = tiny_base(family, layers=layers)
    return Engine(base, tiny_layout(base), **settings)


def adapted_engine(**settings: Any) -> Engine:
    """A tiny engine with two adapters in its slots, "a" and "b"."""
    made = tiny_engine(**settings)
    for i, name in enumerate("ab"):
        made.bank.load(name, strong(made.layout, i))
    return made


def ask(engine: Engine, chat: Any, adapter: str | None, options: SamplingOptions) -> Generation:
    """The answer to one chat."""
    return engine.complete([CompletionRequest(chat, adapter, options)])[0]


def ask_all(engine: Engine, chats: list[Any], adapters: list[str | None], options: SamplingOptions) -> list[Generation]:
    """The answers to several, together."""
    return engine.complete([CompletionRequest(c, a, options) for c, a in zip(chats, adapters, strict=True)])


def soon(condition: Callable[[], Any]) -> bool:
    """Whether the condition comes true within the time a token could ever take."""
    end = time.monotonic() + 20
    while not condition() and time.monotonic() < end:
        time.sleep(0.005)
    return bool(condition())


def generating() -> bool:
    """Whether any thread still generates."""
    return any(t.name in ("dnd-engine", "dnd-fake") for t in threading.enumerate())


def idle(engine: Engine) -> bool:
    """Whether nothing runs or waits, and all adapters are given back."""
    return engine._scheduler.is_idle and not any(slot.leases for slot in engine.bank._table._slots.values())


def strong(layout: LoraLayout, seed: int) -> torch.Tensor:
    """Weights that change a tiny base's greedy answers."""
    return random_flat(layout, seed=seed, std=0.3)


def peft_model(base: Base, layout: LoraLayout, flat: torch.Tensor) -> Any:
    """Plain peft with the same weights, on a copy made before any engine hooks the base."""
    config = LoraConfig(r=layout.r, lora_alpha=layout.lora_alpha, target_modules=list(layout.target_modules))
    model = get_peft_model(copy.deepcopy(base.model), config).eval()
    state = model.state_dict()
    for segment, values in layout.views(flat):
        state[segment.peft_key.replace(".weight", ".default.weight")].copy_(values)
    return model


def chat_ids(base: Base, text: str) -> torch.Tensor:
    """Token ids `(1, T)` of one user message, through the tokenizer's own template call."""
    chat = [{"role": "user", "content": text}]
    out = base.tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    return out["input_ids"]


def greedy(model: Any, base: Base, text: str, n: int) -> str:
    """The model's own greedy answer."""
    ids = chat_ids(base, text)
    out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=n, do_sample=False)
    tokens = base.tokenizer.convert_ids_to_tokens(out[0, ids.shape[1] :].tolist(), skip_special_tokens=True)
    return read_bytes(tokens, final=bool(out[0, -1] == base.tokenizer.eos_token_id))


def naive_logprob(model: Any, base: Base, prompt: str, option: str) -> float:
    """Log-probability of `option` and the end of turn after `prompt`, from one forward over both."""
    head = chat_ids(base, prompt)[0].tolist()
    tail = [*base.tokenizer(option, add_special_tokens=False)["input_ids"], base.tokenizer.eos_token_id]
    logp = model(input_ids=torch.tensor([head + tail])).logits[0].log_softmax(-1)
    return sum(logp[len(head) + j - 1, t].item() for j, t in enumerate(tail))

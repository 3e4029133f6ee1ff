"""The rivals of the engine in its bench: plain transformers, and peft with `set_adapter` and its hot-swap.

Each is a model of its own that shares the base's weights: nothing the engine did to the base's modules is in it, and it
takes the memory of its adapters only.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dnd_sdk.chat import prompt_ids
from dnd_sdk.lora import LoraLayout
from dnd_sdk.models import Base


class Plain:
    """transformers' own `generate`, one request after the other."""

    def __init__(self, base: Base) -> None:
        from transformers import GenerationConfig

        self.model: Any = sharing_weights(base.model)
        self._tokenizer, self._base_config = base.tokenizer, base.model.generation_config
        self._config = GenerationConfig(
            do_sample=False,
            eos_token_id=getattr(self._base_config, "eos_token_id", None) or base.tokenizer.eos_token_id,
            pad_token_id=base.tokenizer.pad_token_id or 0,
        )

    def answer(self, chat: str, n_tokens: int) -> tuple[int, str]:
        """How many tokens were made, greedily and at most `n_tokens`, and their text."""
        ids = torch.tensor([prompt_ids(self._tokenizer, chat)], device=self.model.device)  # (1, T)
        config = copy.deepcopy(self._config)
        config.max_new_tokens = n_tokens
        with torch.inference_mode():
            out = self.model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=config)
        made = out[0, ids.shape[1] :].tolist()
        return len(made), str(self._tokenizer.decode(made, skip_special_tokens=True))


class Peft(Plain):
    """The same through peft, each request behind its own `set_adapter`."""

    def __init__(self, base: Base, layout: LoraLayout, adapters: Mapping[str, Tensor]) -> None:
        """`adapters`: name -> flat vector `(P,)`; one or more."""
        from peft import LoraConfig, get_peft_model

        super().__init__(base)
        options: dict[str, Any] = {"r": layout.r, "lora_alpha": layout.lora_alpha, "inference_mode": True}
        self.config = LoraConfig(target_modules=list(layout.target_modules), **options)
        first, *others = adapters
        own_dtype: dict[str, Any] = {"autocast_adapter_dtype": False}  # else peft casts to float32 and back everywhere
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of transformers, over what peft asks it
            self.model = get_peft_model(self.model, self.config, adapter_name=first, **own_dtype).eval()
            for name in others:
                self.model.add_adapter(name, self.config, **own_dtype)
        for name, flat in adapters.items():
            self._write(name, layout, flat)

    def set_adapter(self, name: str) -> None:
        """Use this one from now on."""
        self.model.set_adapter(name)

    def hotswap(self, name: str, state: Mapping[str, Tensor]) -> None:
        """Overwrite an adapter by peft's `hotswap_adapter_from_state_dict`; `state` as `state_of` gives it."""
        from peft.utils.hotswap import hotswap_adapter_from_state_dict

        hotswap_adapter_from_state_dict(self.model, dict(state), name, self.config)

    def hotswap_folder(self, name: str, folder: Path) -> None:
        """Overwrite it from a peft folder on disk by peft's `hotswap_adapter`."""
        from peft.utils.hotswap import hotswap_adapter

        hotswap_adapter(self.model, str(folder), name, torch_device=str(self.model.device))

    def _write(self, name: str, layout: LoraLayout, flat: Tensor) -> None:
        own = dict(self.model.named_parameters())
        for key, values in state_of(layout, flat, name).items():
            own[key].data.copy_(values)


def state_of(layout: LoraLayout, flat: Tensor, name: str) -> dict[str, Tensor]:
    """The flat vector `(P,)` as the state of peft's adapter `name`: a tensor of its own for each matrix."""
    return {s.peft_key.replace(".weight", f".{name}.weight"): v.clone() for s, v in layout.views(flat)}


def sharing_weights(model: Any) -> Any:
    """A new model of the same class and config whose parameters and buffers are `model`'s own tensors."""
    with torch.device("meta"):
        twin = type(model)(copy.deepcopy(model.config))
    tensors: chain[tuple[str, Tensor]] = chain(
        model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False)
    )
    for name, tensor in tensors:
        path, _, leaf = name.rpartition(".")
        owner = twin.get_submodule(path)
        (owner._parameters if leaf in owner._parameters else owner._buffers)[leaf] = tensor
    return twin.eval().requires_grad_(False)

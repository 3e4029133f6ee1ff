"""`adapter_config.json`: written by peft itself, read without peft and judged field by field.

Only plain LoRA fits the slots of a resident model; whatever else a config asks for is refused by name, never ignored.
"""

from __future__ import annotations

import json
import math
import tempfile
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from dnd_sdk.errors import AdapterCorruptError, LayoutMismatchError
from dnd_sdk.files import is_finite_number, read_json
from dnd_sdk.lora import MAX_RANK, LoraLayout

CONFIG = "adapter_config.json"
MAX_CONFIG_BYTES = 2**20

_PLAIN_INITS = (True, False, None, "gaussian", "orthogonal", "eva")
"""Other `init_lora_weights` (pissa, olora, loftq, ...) change the base's own weights."""
_UNSUPPORTED = (
    "alora_invocation_tokens",
    "alpha_pattern",
    "arrow_config",
    "kasa_config",
    "layer_replication",
    "lora_bias",
    "megatron_config",
    "modules_to_save",
    "monteclora_config",
    "rank_pattern",
    "target_parameters",
    "trainable_token_indices",
    "use_bdlora",
    "use_dora",
    "use_qalora",
)
_NARROWING = ("layers_to_transform", "layers_pattern", "exclude_modules")


@dataclass(frozen=True)
class PeftSettings:
    """What a reader needs of an `adapter_config.json`."""

    r: int
    scaling: float
    base_name: str | None
    target_modules: tuple[str, ...] | None
    """Names every matching module of which must have weights; None where the config does not tell exactly."""

    def expects(self, module: str) -> bool:
        """Whether the config promises weights for `module` (PEFT's rule for a list of targets)."""
        return self.target_modules is not None and any(
            module == t or module.endswith(f".{t}") for t in self.target_modules
        )


@lru_cache(maxsize=32)
def config_text(layout: LoraLayout, base_name: str) -> str:
    """The `adapter_config.json` peft writes for `layout`; the first call imports peft, which takes seconds."""
    from peft import LoraConfig

    alpha = int(layout.lora_alpha) if layout.lora_alpha.is_integer() else layout.lora_alpha
    config = LoraConfig(
        r=layout.r,
        lora_alpha=alpha,  # type: ignore[arg-type]
        target_modules=list(layout.target_modules),
        task_type="CAUSAL_LM",
        inference_mode=True,
        base_model_name_or_path=base_name,
    )
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        data = json.loads(Path(folder, CONFIG).read_text(encoding="utf-8"))
    # peft keeps the targets in a set: its order changes from process to process
    data["target_modules"] = list(layout.target_modules)
    return json.dumps(data, indent=2, sort_keys=True) + "\n"


def read_config(folder: Path) -> PeftSettings:
    """Read and judge `adapter_config.json`.

    Raises `AdapterCorruptError` when it is missing, too large or not what peft writes, `LayoutMismatchError` when it
    asks for more than plain LoRA or for a rank above `MAX_RANK`.
    """
    path = folder / CONFIG
    data = read_json(folder, CONFIG, MAX_CONFIG_BYTES)
    _refuse_unsupported(data, path)
    r, alpha = data.get("r"), data.get("lora_alpha")
    if not isinstance(r, int) or isinstance(r, bool) or r < 1:
        raise AdapterCorruptError(f"{path}: r is {str(r)[:40]!r}, expected a whole number from 1 to {MAX_RANK}")
    if r > MAX_RANK:
        raise LayoutMismatchError(f"{path}: rank r={str(r)[:40]} is above {MAX_RANK}", fix="use a smaller rank")
    if not is_finite_number(alpha):
        raise AdapterCorruptError(f"{path}: lora_alpha is {str(alpha)[:40]!r}, expected a number")
    base = data.get("base_model_name_or_path")
    scaling = alpha / (math.sqrt(r) if data.get("use_rslora") else r)
    return PeftSettings(r, scaling, base if isinstance(base, str) and base else None, _targets(data, path))


def _refuse_unsupported(data: dict[str, Any], path: Path) -> None:
    asked = [f"{key}={str(data[key])[:60]}" for key in _UNSUPPORTED if data.get(key)]
    if str(data.get("peft_type", "LORA")).upper() != "LORA":
        asked.append(f"peft_type={str(data['peft_type'])[:60]}")
    if data.get("bias", "none") not in ("none", None):
        asked.append(f"bias={str(data['bias'])[:60]}")
    init = data.get("init_lora_weights", True)
    if init not in _PLAIN_INITS:
        asked.append(f"init_lora_weights={str(init)[:60]}")
    if asked:
        raise LayoutMismatchError(
            f"{path} asks for {', '.join(asked)}; only plain LoRA is supported",
            fix="export the adapter as plain LoRA (peft: no DoRA, no bias, no saved modules, one rank and alpha)",
        )


def _targets(data: dict[str, Any], path: Path) -> tuple[str, ...] | None:
    targets = data.get("target_modules")
    # a pattern would have to be run as a regular expression from an untrusted file: the tensors themselves tell instead
    if targets is None or isinstance(targets, str) or any(data.get(key) for key in _NARROWING):
        return None
    if not isinstance(targets, list) or not all(isinstance(t, str) for t in targets):
        raise AdapterCorruptError(f"{path}: target_modules is not a list of names")
    return tuple(targets)

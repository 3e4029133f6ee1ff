"""`adapter_config.json`: written by peft itself, read without peft and judged field by field.

Only plain LoRA fits the slots of a resident model; whatever else a config asks for is refused by name, never ignored.
"""

from __future__ import annotations

import json
import math
import re
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeGuard

from dnd_sdk.adapters.patterns import Budget
from dnd_sdk.adapters.targets import ByModule, Targets
from dnd_sdk.errors import AdapterCorruptError, LayoutMismatchError, StorageError, brief
from dnd_sdk.files import is_finite_number, read_json
from dnd_sdk.lora import MAX_RANK, LoraLayout

CONFIG = "adapter_config.json"
MAX_CONFIG_BYTES = 2**20

_PLAIN_INITS = (True, False, None, "gaussian", "orthogonal", "eva")
"""Other `init_lora_weights` (pissa, olora, loftq, ...) change the base's own weights."""
_UNSUPPORTED = (
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "layer_replication",
    "lora_bias",
    "megatron_config",
    "modules_to_save",
    "monteclora_config",
    "target_parameters",
    "trainable_token_indices",
    "use_bdlora",
    "use_dora",
    "use_qalora",
)
_READ = (
    "alpha_pattern",
    "base_model_name_or_path",
    "bias",
    "exclude_modules",
    "init_lora_weights",
    "layers_pattern",
    "layers_to_transform",
    "lora_alpha",
    "peft_type",
    "r",
    "rank_pattern",
    "target_modules",
    "use_rslora",
)
_WITHOUT_EFFECT = (
    "auto_mapping",
    "corda_config",
    "ensure_weight_tying",
    "eva_config",
    "fan_in_fan_out",
    "inference_mode",
    "loftq_config",
    "lora_dropout",
    "lora_ga_config",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
    "task_type",
    "velora_config",
)
"""What says how it was trained, or is of use only beside a key of `_UNSUPPORTED`."""
_KNOWN = {*_READ, *_UNSUPPORTED, *_WITHOUT_EFFECT}
MAX_BASE_NAME = 4096


@dataclass(frozen=True)
class PeftSettings:
    """What a reader needs of an `adapter_config.json`."""

    r: int
    lora_alpha: float
    rslora: bool
    base_name: str | None
    targets: Targets
    ranks: ByModule[int]
    alphas: ByModule[float]
    notes: tuple[str, ...]
    """What was not understood or not kept."""

    def rank_of(self, module: str) -> int:
        """The rank of `module`'s matrices."""
        return self.ranks.of(module, self.r)

    def scaling_of(self, module: str) -> float:
        """What peft multiplies `B @ A` of `module` with."""
        r = self.rank_of(module)
        return self.alphas.of(module, self.lora_alpha) / (math.sqrt(r) if self.rslora else r)

    def expects(self, module: str) -> bool:
        """Whether the config promises weights for `module`: its targets are named one by one."""
        return self.targets.named and self.targets.take(module)


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
    budget = Budget()
    base, notes = _base_name(data)
    unknown = sorted(data.keys() - _KNOWN)
    if unknown:
        notes.append(f"its config has keys that were not understood: {some(brief(k, 80) for k in unknown)}")
    targets = Targets(data, path, budget)
    if targets.unsaid:
        notes.append("its config names no target_modules: what its file holds is taken")
    return PeftSettings(
        r=_rank(data, path),
        lora_alpha=_alpha(data, path),
        rslora=bool(data.get("use_rslora")),
        base_name=base,
        targets=targets,
        ranks=ByModule("rank_pattern", data, path, budget, _is_rank),
        alphas=ByModule("alpha_pattern", data, path, budget, is_finite_number),
        notes=tuple(notes),
    )


def base_name_in(folder: Path) -> str | None:
    """What the base is called in a folder's `adapter_config.json`; None: it does not say, or cannot be read."""
    try:
        return _base_name(read_json(folder, CONFIG, MAX_CONFIG_BYTES))[0]
    except (AdapterCorruptError, StorageError):
        return None


def some(names: Iterable[str], n: int = 4) -> str:
    """The first `n` names, and how many more there are."""
    names = list(names)
    return ", ".join(names[:n]) + (f" and {len(names) - n} more" if len(names) > n else "")


def _rank(data: dict[str, Any], path: Path) -> int:
    r = data.get("r")
    if not _is_rank(r):
        number = re.fullmatch(r"\s*(\d{1,4})(\.0+)?\s*", str(r))
        fix = f'write "r": {number[1]}' if number else 'write "r" as a number, the rank of its lora_A matrices,'
        raise AdapterCorruptError(
            f"{path}: r is {str(r)[:40]!r}, expected a whole number from 1 to {MAX_RANK}", fix=f"{fix} in {path.name}"
        )
    if r > MAX_RANK:
        raise LayoutMismatchError(f"{path}: rank r={str(r)[:40]} is above {MAX_RANK}", fix="use a smaller rank")
    return r


def _alpha(data: dict[str, Any], path: Path) -> float:
    alpha = data.get("lora_alpha")
    if not is_finite_number(alpha):
        raise AdapterCorruptError(
            f"{path}: lora_alpha is {str(alpha)[:40]!r}, expected a number",
            fix=f'write "lora_alpha" as a number in {path.name}',
        )
    return float(alpha)


def _is_rank(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _base_name(data: dict[str, Any]) -> tuple[str | None, list[str]]:
    """The base's name, None where there is none that can be written again, and what to say of that."""
    name = data.get("base_model_name_or_path")
    if not isinstance(name, str) or not name:
        return None, []
    if len(name) <= MAX_BASE_NAME and name.isprintable():
        return name, []
    return None, [f"its config's base_model_name_or_path is no name and not kept: {brief(name, 200)}"]


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
            fix="export the adapter as plain LoRA (peft: no DoRA, no bias, no saved modules)",
        )

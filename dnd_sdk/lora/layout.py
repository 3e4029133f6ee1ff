"""The contract every part shares: which Linears of a base carry LoRA, in what order, with what shapes.

* Derived from (base model, r, lora_alpha, target_modules); nothing is written per model family.
* LoRA weights travel as ONE flat vector of `n_parameters` values: for each module in order, `lora_A (r, in)` row-major,
  then `lora_B (out, r)` row-major. Splitting it gives views, so a swap is one copy and a hash is one pass.
* Names, r and alpha are PEFT's; scaling is `lora_alpha / r` and is NOT folded into the flat vector.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

from dnd_sdk.errors import ConfigError, LayoutMismatchError

if TYPE_CHECKING:
    from torch import Tensor, nn

MAX_RANK = 64
ALL_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class LoraModule:
    """One adapted Linear: its dotted name in the base and its two widths."""

    name: str
    in_features: int
    out_features: int


class Segment(NamedTuple):
    """Where one matrix lies in the flat vector: `flat[start:stop].view(shape)`."""

    module: str
    part: str
    """`"lora_A"` or `"lora_B"`."""
    start: int
    stop: int
    shape: tuple[int, int]

    @property
    def peft_key(self) -> str:
        """The tensor's name in a PEFT `adapter_model.safetensors`."""
        return f"base_model.model.{self.module}.{self.part}.weight"


@dataclass(frozen=True)
class LoraLayout:
    """Ordered names and shapes of every LoRA matrix of one base at one rank."""

    r: int
    lora_alpha: float
    target_modules: tuple[str, ...]
    modules: tuple[LoraModule, ...]

    def __post_init__(self) -> None:
        if not 1 <= self.r <= MAX_RANK:
            raise ConfigError(f"r must be 1..{MAX_RANK}, got {self.r}", fix=f"choose r between 1 and {MAX_RANK}")
        if not self.lora_alpha > 0:
            raise ConfigError(f"lora_alpha must be positive, got {self.lora_alpha}")
        if not self.modules:
            raise ConfigError("a LoRA layout needs at least one module")

    @property
    def scaling(self) -> float:
        """PEFT's `lora_alpha / r`."""
        return self.lora_alpha / self.r

    def at_rank(self, r: int) -> LoraLayout:
        """The same modules and scaling at another rank."""
        return self if r == self.r else replace(self, r=r, lora_alpha=self.scaling * r)

    def widens_to(self, other: LoraLayout) -> bool:
        """Whether another layout is this one, at the same rank or a larger one."""
        return other.r >= self.r and self.at_rank(other.r) == other

    def can_hold(self, other: LoraLayout) -> bool:
        """Whether a LoRA of another layout fits into this one: no module or rank that this has not."""
        return other.r <= self.r and set(other.modules) <= set(self.modules)

    @cached_property
    def segments(self) -> tuple[Segment, ...]:
        """Every matrix in flat order."""
        out, at = [], 0
        for m in self.modules:
            for part, shape in (("lora_A", (self.r, m.in_features)), ("lora_B", (m.out_features, self.r))):
                size = shape[0] * shape[1]
                out.append(Segment(m.name, part, at, at + size, shape))
                at += size
        return tuple(out)

    @property
    def n_parameters(self) -> int:
        """Length of the flat vector."""
        return self.segments[-1].stop

    @cached_property
    def digest(self) -> str:
        """sha256 over rank, alpha, names and shapes: equal digests mean interchangeable flat vectors."""
        return hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()

    def views(self, flat: Tensor) -> Iterator[tuple[Segment, Tensor]]:
        """Yield each matrix as a view of `flat` (..., n_parameters), leading axes kept."""
        self.check_size(flat.shape[-1])
        # one split, not many slices: its backward is one concatenation instead of a full-size zero fill per matrix
        pieces = flat.split([s.stop - s.start for s in self.segments], dim=-1)
        for s, piece in zip(self.segments, pieces, strict=True):
            yield s, piece.unflatten(-1, s.shape)

    def check_size(self, n: int) -> None:
        """Raise `LayoutMismatchError` unless `n` is this layout's number of parameters."""
        if n != self.n_parameters:
            raise LayoutMismatchError(
                f"flat LoRA vector has {n} values, this base at r={self.r} needs {self.n_parameters}",
                fix="use weights made for this base, rank and target modules",
            )

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form; `from_dict` is its inverse."""
        return {
            "r": self.r,
            "lora_alpha": self.lora_alpha,
            "target_modules": list(self.target_modules),
            "modules": [[m.name, m.in_features, m.out_features] for m in self.modules],
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> LoraLayout:
        """Inverse of `to_dict`; raises `LayoutMismatchError` on a damaged dict."""
        try:
            modules = tuple(LoraModule(str(n), int(i), int(o)) for n, i, o in data["modules"])
            return cls(int(data["r"]), float(data["lora_alpha"]), tuple(map(str, data["target_modules"])), modules)
        except (KeyError, TypeError, ValueError, OverflowError) as e:
            raise LayoutMismatchError(f"not a LoRA layout: {e}") from e

    @classmethod
    def from_model(
        cls, model: nn.Module, *, r: int = 8, lora_alpha: float = 16.0, target_modules: Sequence[str] = ALL_LINEAR
    ) -> LoraLayout:
        """Read the layout off a live (or meta-device) model.

        A module matches when its last name part is in `target_modules` (PEFT's rule for a list).
        Raises `LayoutMismatchError` naming the module when a target matches nothing, is not an `nn.Linear`,
        or shares its weight with another module (a LoRA on one would silently miss the other).
        """
        found = tuple(_matching_linears(model, tuple(target_modules)))
        missing = set(target_modules) - {m.name.rsplit(".", 1)[-1] for m in found}
        if missing:
            linears = sorted({n.rsplit(".", 1)[-1] for n, m in model.named_modules() if _is_linear(m)})
            raise LayoutMismatchError(
                f"no Linear named {sorted(missing)} in {type(model).__name__}; its Linears are {linears}",
                fix="pass target_modules with names from that list",
            )
        return cls(r, float(lora_alpha), tuple(target_modules), found)


def _is_linear(module: nn.Module) -> bool:
    from torch import nn

    return isinstance(module, nn.Linear)


def _matching_linears(model: nn.Module, targets: tuple[str, ...]) -> Iterator[LoraModule]:
    owners: dict[int, list[str]] = {}
    for name, param in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(param), []).append(name)
    for name, module in model.named_modules():
        if name.rsplit(".", 1)[-1] not in targets:
            continue
        if not _is_linear(module):
            raise LayoutMismatchError(
                f"target module {name!r} is {type(module).__name__}, LoRA needs nn.Linear",
                fix="leave it out of target_modules",
            )
        if len(owners[id(module.weight)]) > 1:
            raise LayoutMismatchError(
                f"target module {name!r} shares its weight with {owners[id(module.weight)]}",
                fix="leave tied modules (often lm_head) out of target_modules",
            )
        yield LoraModule(name, int(module.in_features), int(module.out_features))  # type: ignore[arg-type]

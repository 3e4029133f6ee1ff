"""The trained generator: token states of a prompt set in, a flat LoRA vector out, in one forward pass.

* `adapter(x) = shared + gain * (D(x) - D(0))`: D is the hyper-conv decoder of arXiv 2506.16406 followed by the weight
  tokenizer. `shared` is one adapter for all tasks (its A is every adapter's A), `gain` one learned scale per matrix,
  from zero. A zeroed condition therefore gives exactly `shared`, and the decoder can only learn what tasks differ in.
* Any number of prompts: the decoder takes `n_prompts` at a time; larger sets are averaged over groups, smaller ones
  repeat. The result does not depend on the order of the prompts.
* On disk: `config.json` (sizes, layout and its digest), `model.safetensors`; refused on a base it was not made for.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dnd_sdk.errors import ConfigError, GeneratorError, LayoutMismatchError
from dnd_sdk.files import replacing, write_atomic
from dnd_sdk.generator.hyperconv import HyperConvDecoder, Shape
from dnd_sdk.generator.weight_tokenizer import WeightTokenizer
from dnd_sdk.lora import LoraLayout, widened
from dnd_sdk.protocols import PathLike

FORMAT_VERSION = 1
_MAX_CONFIG_BYTES = 4 << 20


@dataclass(frozen=True)
class GeneratorConfig:
    """Sizes of a generator and the names of what it was made for; the rest is derived from the layout."""

    encoder_width: int
    """C of the encoder's token states."""
    n_prompts: int = 16
    """Prompts the decoder takes at a time (N)."""
    state_tokens: int = 64
    """Token states per prompt (L)."""
    width: int = 128
    """Channels before the last layer."""
    kernel_size: int = 3
    max_groups: int = 2
    """At most `max_groups * n_prompts` prompts are looked at."""
    parts: tuple[str, ...] = ("lora_B",)
    """Which matrices are generated; the others are the shared adapter's."""
    base_name: str = ""
    base_fingerprint: str = ""
    encoder_name: str = ""
    encoder_fingerprint: str = ""

    def __post_init__(self) -> None:
        for name in ("encoder_width", "n_prompts", "width", "max_groups"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.kernel_size < 1 or self.kernel_size % 2 == 0:
            raise ConfigError(f"kernel_size must be odd, got {self.kernel_size}")
        if self.state_tokens < 4:
            raise ConfigError(f"state_tokens must be at least 4, got {self.state_tokens}")
        if not self.parts or set(self.parts) - {"lora_A", "lora_B"}:
            raise ConfigError(f"parts must name lora_A, lora_B or both, got {self.parts}")


def decoder_shapes(config: GeneratorConfig, grid: Shape) -> list[Shape]:
    """The cascade: token axis halved and prompts doubled twice, then `width` channels, then the weight grid."""
    T, H, W = grid
    N, L = config.n_prompts, config.state_tokens
    return [(N, L, config.encoder_width), (2 * N, L // 2, W), (4 * N, L // 4, W), (config.width, H, W), (T, H, W)]


class Generator(nn.Module):
    """Prompt states to a LoRA for one base model and layout."""

    def __init__(self, config: GeneratorConfig, layout: LoraLayout) -> None:
        super().__init__()
        self.config = config
        self.layout = layout
        self._given = layout
        self.weight_tokenizer = WeightTokenizer(layout, config.parts)
        grid = (self.weight_tokenizer.T, self.weight_tokenizer.H, self.weight_tokenizer.W)
        self.decoder = HyperConvDecoder(decoder_shapes(config, grid), config.kernel_size)
        self.shared = nn.Parameter(torch.zeros(layout.n_parameters))
        self.gain = nn.Parameter(torch.zeros(len(layout.segments)))
        self._zeroed: Tensor | None = None

    @property
    def base_fingerprint(self) -> str:
        """Fingerprint of the base model this generator was trained on."""
        return self.config.base_fingerprint

    @property
    def encoder_name(self) -> str:
        """The encoder whose states it takes."""
        return self.config.encoder_name

    @property
    def state_tokens(self) -> int:
        """Token states per prompt it takes."""
        return self.config.state_tokens

    @property
    def max_prompts(self) -> int:
        """How many prompts of a set it looks at."""
        return self.config.n_prompts * self.config.max_groups

    @cached_property
    def id(self) -> str:
        """16 hex digits of the sha256 over all weights."""
        digest = hashlib.sha256(self.layout.digest.encode())
        for name, tensor in sorted(self.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]

    def forward(self, x: Tensor) -> Tensor:
        """Conditions `(B, N, L, C)` to flat LoRA vectors `(B, P)`; differentiable."""
        tokens = self.decoder(torch.cat([x, torch.zeros_like(x[:1])]))  # (B + 1, N, L, C) -> (B + 1, T, H, W)
        residual = self.weight_tokenizer.detokenise(tokens)  # (B + 1, P)
        return self._add(residual[:-1] - residual[-1:])  # (B, P): the last one is the zeroed condition's

    def _add(self, residual: Tensor) -> Tensor:
        sizes = torch.tensor([s.stop - s.start for s in self.layout.segments], device=residual.device)
        return self.shared + residual * self.gain.repeat_interleave(sizes)  # gain: one a segment -> (P,)

    def condition(self, states: Tensor) -> Tensor:
        """Token states `(n, L, C)` of any n >= 1 prompts to decoder inputs `(groups, n_prompts, L, C)`.

        Raises `GeneratorError` when the states are not of the size this generator takes or not finite.
        """
        want = (self.config.state_tokens, self.config.encoder_width)
        if states.dim() != 3 or tuple(states.shape[1:]) != want or len(states) == 0:
            raise GeneratorError(
                f"prompt states have shape {tuple(states.shape)}, this generator takes (n >= 1, {want[0]}, {want[1]})",
                fix=f"encode with {self.config.encoder_name or 'its own encoder'} and state_tokens={want[0]}",
            )
        if not bool(states.isfinite().all()):
            raise GeneratorError("prompt states hold NaN or inf", fix="check the encoder's weights")
        # (n, L, C), in an order that does not depend on the one given
        ordered = states[states.double().sum((1, 2)).argsort(stable=True)]
        used = min(len(ordered), self.max_prompts)
        spread = torch.arange(used) * len(ordered) // used
        groups = math.ceil(used / self.config.n_prompts)
        fill = torch.arange(groups * self.config.n_prompts) % used
        picked = ordered[spread[fill]]  # (n_prompts groups, L, C): spread over all, repeated where they are fewer
        # every group gets each groups-th prompt: (n_prompts, groups, L, C) -> (groups, n_prompts, L, C)
        return picked.unflatten(0, (self.config.n_prompts, groups)).transpose(0, 1)

    @torch.no_grad()
    def generate(self, states: Tensor) -> Tensor:
        """The adapter `(P,)` for token states `(n, L, C)`, n >= 1; independent of the prompts' order.

        Of the generator's own layout, or of the one it was told to `widen` to.
        """
        x = self.condition(states).to(self.shared.device, self.shared.dtype)  # (groups, N, L, C)
        if self._zeroed is None or self.training:
            self._zeroed = self.weight_tokenizer.detokenise(self.decoder(torch.zeros_like(x[:1])))
        # (groups, T, H, W) -> (groups, P) -> (1, P)
        residual = self.weight_tokenizer.detokenise(self.decoder(x)).mean(0, keepdim=True)
        return widened(self._add(residual - self._zeroed)[0], self.layout, self._given)

    def mean(self) -> Tensor:
        """The adapter `(P,)` of a zeroed condition, the shared adapter; its layout is that of `generate`."""
        return widened(self.shared.detach().clone(), self.layout, self._given)

    def widen(self, layout: LoraLayout) -> None:
        """Have `generate` and `mean` give vectors of `layout`, the generator's own at a larger rank.

        Raises `LayoutMismatchError` for another.
        """
        if not self.layout.widens_to(layout):
            raise LayoutMismatchError(f"a generator of rank {self.layout.r} cannot give LoRAs of this layout")
        self._given = layout

    def save_pretrained(self, folder: PathLike) -> None:
        """Write `config.json` and `model.safetensors` into `folder` (made if missing), weights first."""
        root = Path(folder)
        root.mkdir(parents=True, exist_ok=True)
        weights = {k: v.detach().cpu().contiguous() for k, v in self.state_dict().items()}
        with replacing(root / "model.safetensors") as temporary:
            save_file(weights, temporary, {"format": "pt"})
        data = {
            "format_version": FORMAT_VERSION,
            "generator": asdict(self.config),
            "layout": self.layout.to_dict(),
            "layout_digest": self.layout.digest,
        }
        write_atomic(root / "config.json", json.dumps(data, indent=1) + "\n")

    @classmethod
    def from_pretrained(cls, folder: PathLike, layout: LoraLayout | None = None) -> Generator:
        """Load a saved generator in eval mode; `layout` (None: any) is the base's, refused when it differs.

        Raises `GeneratorError` for a missing or damaged folder and `LayoutMismatchError` for another base's.
        """
        root = Path(folder)
        config, own = _read_config(root)
        if layout is not None and layout.digest != own.digest:
            raise LayoutMismatchError(_difference(root, layout, own), fix="load the base this generator was trained on")
        model = cls(config, own)
        weights = _read_weights(root, model.state_dict())
        model.load_state_dict(weights)
        return model.eval().requires_grad_(False)


def _read_config(root: Path) -> tuple[GeneratorConfig, LoraLayout]:
    file = root / "config.json"
    if not file.is_file():
        raise GeneratorError(f"{root} is not a generator folder: no config.json", fix="pass a folder made by dnd train")
    if file.stat().st_size > _MAX_CONFIG_BYTES:
        raise GeneratorError(f"{file} is larger than {_MAX_CONFIG_BYTES} bytes", fix="get the folder again")
    try:
        data: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        if data["format_version"] != FORMAT_VERSION:
            raise GeneratorError(
                f"{file} has format_version {data['format_version']}, this release reads {FORMAT_VERSION}",
                fix="use the dnd_sdk release that made it, or train again",
            )
        sizes = data["generator"]
        config = GeneratorConfig(**{**sizes, "parts": tuple(sizes["parts"])})
        layout = LoraLayout.from_dict(data["layout"])
        if layout.digest != data["layout_digest"]:
            raise GeneratorError(f"{file}: layout_digest does not match the layout", fix="get the folder again")
        return config, layout
    except (ValueError, KeyError, TypeError, UnicodeDecodeError) as e:
        if isinstance(e, GeneratorError):
            raise
        raise GeneratorError(f"{file} is damaged: {e}", fix="get the folder again") from e


def _read_weights(root: Path, expected: dict[str, Tensor]) -> dict[str, Tensor]:
    file = root / "model.safetensors"
    try:
        weights = load_file(file)
    except (OSError, SafetensorError) as e:
        raise GeneratorError(f"cannot read {file}: {e}", fix="get the folder again; only safetensors is read") from e
    if weights.keys() != expected.keys():
        odd = sorted(weights.keys() ^ expected.keys())
        raise GeneratorError(f"{file}: missing or extra tensors {odd[:4]}", fix="get the folder again")
    for name, tensor in weights.items():
        if tensor.shape != expected[name].shape:
            got, want = tuple(tensor.shape), tuple(expected[name].shape)
            raise GeneratorError(f"{file}: {name} has shape {got}, expected {want}", fix="get the folder again")
        if not bool(tensor.isfinite().all()):
            raise GeneratorError(f"{file}: {name} holds NaN or inf", fix="get the folder again")
    return weights


def _difference(root: Path, layout: LoraLayout, trained_on: LoraLayout) -> str:
    def short(x: LoraLayout) -> str:
        return f"r={x.r}, alpha={x.lora_alpha:g}, {len(x.modules)} modules, {x.n_parameters} weights"

    return f"generator {root} does not fit this base: it is made for {short(trained_on)}; the base has {short(layout)}"


def select_states(states: Tensor, rows: Sequence[int], n_prompts: int) -> Tensor:
    """A training condition `(n_prompts, L, C)` from the chosen rows, repeated in order when there are fewer."""
    at = torch.tensor(rows)
    # (n, L, C) -> (n_prompts, L, C)
    return states[at[torch.arange(n_prompts) % len(at)]]

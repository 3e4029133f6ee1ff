"""An int8 stand-in for the frozen base while training on a CPU.

Training never changes the base's weights, it only needs activations and activation gradients through them. Both are
computed here as int8 x int8 -> int32 products (weights per channel, activations per token), which CPUs with VNNI run
several times faster than fp32. LoRA, norms, attention and the loss stay fp32; serving always uses the exact weights.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from dnd_sdk.lora import LoraLayout

_EPS = 1e-12


def quantize_frozen_linears(model: nn.Module, layout: LoraLayout) -> None:
    """Swap the forward of every Linear of `layout` for int8 products; call before `attach_lora`."""
    modules = dict(model.named_modules())
    for m in layout.modules:
        linear = modules[m.name]
        assert isinstance(linear, nn.Linear)
        linear.forward = _Int8Forward(linear)  # type: ignore[method-assign, assignment]


def _quantize(x: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    scale = x.abs().amax(dim, keepdim=True).clamp_min_(_EPS).div_(127.0)
    return (x / scale).round_().to(torch.int8), scale


class _Int8Forward:
    """Holds both quantisations of one weight: per output channel (forward) and per input channel (backward)."""

    def __init__(self, linear: nn.Linear) -> None:
        weight = linear.weight.detach().float()
        self.bias = linear.bias
        self.fwd = _quantize(weight, 1)  # (out, in), (out, 1)
        self.bwd = _quantize(weight, 0)  # (out, in), (1, in)

    def __call__(self, x: Tensor) -> Tensor:
        y = _Int8Product.apply(x.flatten(0, -2), self).unflatten(0, x.shape[:-1])
        return y if self.bias is None else y + self.bias


class _Int8Product(torch.autograd.Function):
    """y = x W^T and dx = dy W, both through int8."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, holder: _Int8Forward) -> Tensor:
        ctx.holder = holder
        return _product(x, holder.fwd[0].t(), holder.fwd[1].t())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return _product(grad, ctx.holder.bwd[0], ctx.holder.bwd[1]), None


def _product(x: Tensor, wq: Tensor, w_scale: Tensor) -> Tensor:
    xq, x_scale = _quantize(x, 1)
    return torch._int_mm(xq, wq).to(x.dtype).mul_(x_scale).mul_(w_scale)

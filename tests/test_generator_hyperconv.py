"""Hyper-conv layers against the released module's outputs and against slow loops."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from dnd_sdk.generator.hyperconv import HyperConvDecoder, HyperConvLayer

GOLDEN = Path(__file__).parent / "hyperconv_golden.safetensors"


def _golden() -> tuple[dict[str, Tensor], dict[str, str]]:
    with safe_open(GOLDEN, "pt") as f:
        return {k: f.get_tensor(k) for k in f.keys()}, f.metadata()  # noqa: SIM118


def test_equals_the_released_module() -> None:
    tensors, meta = _golden()
    shapes = [tuple(s) for s in json.loads(meta["features"])]
    decoder = HyperConvDecoder(shapes, int(meta["kernel_size"])).double()
    weights = {"layers." + k.removeprefix("layer"): v for k, v in tensors.items() if k.startswith("layer")}
    decoder.load_state_dict(weights)
    torch.testing.assert_close(decoder(tensors["input"]), tensors["output"], rtol=0, atol=1e-9)


def _slow_same_conv(image: Tensor, weight: Tensor) -> Tensor:
    """(Cin, H, W) with (Cout, Cin, k, k), stride 1, zero padding, by loops."""
    k, (_, H, W) = weight.shape[-1], image.shape
    out = torch.zeros(weight.shape[0], H, W, dtype=image.dtype)
    for y in range(H):
        for x in range(W):
            for dy in range(k):
                for dx in range(k):
                    iy, ix = y + dy - k // 2, x + dx - k // 2
                    if 0 <= iy < H and 0 <= ix < W:
                        out[:, y, x] += weight[:, :, dy, dx] @ image[:, iy, ix]
    return out


@pytest.mark.parametrize("k", [1, 3, 5])
def test_one_layer_equals_loops(k: int) -> None:
    torch.manual_seed(0)
    layer = HyperConvLayer((3, 4, 5), (2, 3, 6), k).double()
    x = torch.randn(1, 3, 4, 5, dtype=torch.float64)
    h = torch.nn.functional.layer_norm(x, (4, 5), layer.norm.weight, layer.norm.bias)[0]
    wide = _slow_same_conv(h.permute(2, 1, 0), layer.width_first.width).permute(2, 1, 0)
    wide = _slow_same_conv(wide.permute(1, 0, 2), layer.width_first.height).permute(1, 0, 2)
    tall = _slow_same_conv(h.permute(1, 0, 2), layer.height_first.height).permute(1, 0, 2)
    tall = _slow_same_conv(tall.permute(2, 1, 0), layer.height_first.width).permute(2, 1, 0)
    mixed = (wide + torch.tanh(tall) + layer.bias) / 3
    expected = _slow_same_conv(mixed, layer.layerwise.weight) + layer.layerwise.bias[:, None, None]
    torch.testing.assert_close(layer(x)[0], expected)


def test_equal_shapes_are_residual() -> None:
    layer = HyperConvLayer((3, 4, 5), (3, 4, 5), 3)
    for p in layer.parameters():
        p.data.zero_()
    x = torch.randn(2, 3, 4, 5)
    assert torch.equal(layer(x), x)
    other = HyperConvLayer((3, 4, 5), (3, 4, 6), 3)
    assert not other.residual

"""Where the store meets torch: inside it, everything is numpy, so that what only reads it loads no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dnd_sdk.files import FloatArray

if TYPE_CHECKING:
    from torch import Tensor


def array_of(tensor: Tensor) -> FloatArray:
    """The numbers as fp32 on the CPU, without a copy where they are that already."""
    array: FloatArray = tensor.detach().cpu().float().numpy()
    return array


def tensor_of(array: FloatArray) -> Tensor:
    """A tensor over the same memory."""
    import torch  # only who asks for a tensor needs it

    return torch.from_numpy(array)

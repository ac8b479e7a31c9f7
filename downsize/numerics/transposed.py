"""Transposed convolutions as convolutions: over an input with zeros between its values, with the kernel turned round."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def turned(weight: Tensor, groups: int) -> Tensor:
    """The weight [outputs, inputs / groups, *kernel] of that convolution, from torch's [inputs, outputs / groups, *kernel]; and back again."""
    parts = [part.transpose(0, 1) for part in weight.chunk(groups)]
    return torch.cat(parts).flip(*range(2, weight.dim())).contiguous()


def cropped(kernel: Sequence[int], padding: Sequence[int], dilation: Sequence[int]) -> tuple[int, ...]:
    """Zeros around its input in each direction, from what the transposed convolution crops (torch's padding); and back again."""
    return tuple(d * (k - 1) - p for k, p, d in zip(kernel, padding, dilation, strict=True))

"""Floats of 16 bits: float16 (11 bits of precision, up to 65504) and bfloat16 (8 bits, the range of float32), simulated in float32."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


@torch.library.custom_op("downsize::round_to", mutates_args=())
def round_to(x: Tensor, dtype: torch.dtype) -> Tensor:
    """``x`` rounded to the nearest number of ``dtype``, ties to even, in the type of ``x``. Gradient: straight through."""
    return x.to(dtype).to(x.dtype, copy=True)


@round_to.register_fake
def _(x: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty_like(x)


round_to.register_autograd(lambda ctx, grad: (grad, None), setup_context=lambda ctx, inputs, output: None)


class Loss(NamedTuple):
    """What a tensor loses when it is rounded: how many of its numbers overflow, how many that are not zero become so, and the largest one."""

    overflowed: int
    vanished: int
    largest: float


def loss_of(x: Tensor, dtype: torch.dtype) -> Loss:
    """See :class:`Loss`; infinite values of ``x`` itself are kept exactly, and count for nothing."""
    x = x.detach()
    rounded, finite = x.to(dtype), x.isfinite()
    largest = float(torch.where(finite, x, 0).abs().max()) if x.numel() else 0.0
    return Loss(int((rounded.isinf() & finite).sum()), int(((rounded == 0) & (x != 0)).sum()), largest)

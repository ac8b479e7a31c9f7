"""Column scales that protect the weights which large inputs meet (Lin et al. 2023, arXiv 2306.00978)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .hessian import output_error

STEPS = 20
# Columns whose input is hardly seen are not scaled down below this part of the mean scale.
SMALLEST = 1e-4


def awq_scales(weight: Tensor, gram: Tensor, magnitude: Tensor, quantize: Callable[[Tensor], Tensor], steps: int = STEPS) -> Tensor:
    """The scale of each column with the least output error once ``weight * scale`` is quantized and the inputs are divided by it.

    Tried are ``magnitude ** exponent`` for ``steps`` exponents up to 1, and exponent 0, which changes nothing: the error never grows.

    Args:
        weight: [rows, columns]; gram: [columns, columns], sums of ``x x^T`` over inputs; magnitude: [columns], means of ``|x|``.
        quantize: from a weight to what it becomes, both [rows, columns].

    Returns: float32 [columns], all above zero.
    """
    matrix = weight.flatten(1).float()
    best, least = torch.ones_like(magnitude, dtype=torch.float32), torch.inf
    for i in range(steps + 1):
        scale = _scale(magnitude, i / steps)
        error = float(output_error(quantize(matrix * scale) / scale - matrix, gram).sum())
        if error < least:
            best, least = scale, error
    return best


def _scale(magnitude: Tensor, exponent: float) -> Tensor:
    raised = magnitude.double().clamp(min=0).pow(exponent)
    raised = (raised / raised.mean().clamp(min=1e-30)).clamp(min=SMALLEST)
    return (raised / (raised.max() * raised.min()).sqrt()).float()

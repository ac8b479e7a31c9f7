"""Zero points without data: half-quadratic quantization (Badri & Shaji 2023, "Half-Quadratic Quantization of Large Machine Learning Models").

The few large weights should not decide where the grid lies. So the error is measured by a norm that cares less for large ones, and made
small by turns: the weights that stick out are set aside by shrinkage, and the zero point takes the mean of what the others want.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .clipping import Encoding, full_range, group_sums
from .grids import Grid
from .groups import group_codes, group_values, spread

NORM = 0.7  # the exponent of the error
STRENGTH, GROWTH = 10.0, 1.01  # of the tie between what is set aside and what is left, and its growth from round to round
ROUNDS = 20


def hqq(weight: Tensor, group: int, grid: Grid, half: bool = False, rounded: bool = True) -> Encoding:
    """Scales of the full range and zero points by half-quadratic quantization, for a weight [rows, columns]: [rows, groups] each.

    Args:
        half: scales (and real zero points) are rounded to float16 first.
        rounded: zero points become integers on the grid, int32, and each group keeps that of the full range where it errs less in the
            norm that is minimised. Else they are float32, for values ``scale * (q - zero_point)``.
    """
    matrix = weight.flatten(1).float()
    start = full_range(matrix, group, grid, symmetric=False, half=half)
    zero = _solved(matrix, start, group, grid)
    if not rounded:
        return Encoding(start.scale, zero.half().float() if half else zero)
    other = Encoding(start.scale, zero.round().clamp(grid.low, grid.high).int())
    wins = _norm(matrix, other, group, grid) < _norm(matrix, start, group, grid)
    return Encoding(start.scale, torch.where(wins, other.zero_point, start.zero_point))


def real_codes(matrix: Tensor, encoding: Encoding, group: int, grid: Grid) -> Tensor:
    """Codes [rows, columns], as floats, of the grid with real zero points [rows, groups]: ``round(x / scale + zero_point)``."""
    s, z = (spread(each, matrix.shape[1], group) for each in encoding)
    return (matrix / s + z).round_().clamp_(grid.low, grid.high)


def _solved(matrix: Tensor, start: Encoding, group: int, grid: Grid) -> Tensor:
    columns = matrix.shape[1]
    s = spread(start.scale, columns, group)
    counts = group_sums(torch.ones_like(matrix), group)
    zero, strength = start.zero_point.float(), STRENGTH
    best, least = zero, torch.full_like(zero, torch.inf)
    for _ in range(ROUNDS):
        codes = real_codes(matrix, Encoding(start.scale, zero), group, grid)
        error = matrix - (codes - spread(zero, columns, group)) * s
        found = group_sums(error.abs().pow(NORM), group)
        best, least = torch.where(found < least, zero, best), torch.minimum(found, least)
        aside = torch.sign(error) * (error.abs() - (error.abs() + 1e-12).pow(NORM - 1) / strength).clamp(min=0)
        zero = group_sums(codes - (matrix - aside) / s, group) / counts
        strength *= GROWTH
    return best


def _norm(matrix: Tensor, encoding: Encoding, group: int, grid: Grid) -> Tensor:
    values = group_values(group_codes(matrix, *encoding, group, grid), *encoding, group)
    return group_sums((values - matrix).abs().pow(NORM), group)

"""Zero points without data: half-quadratic quantization (Badri & Shaji 2023, "Half-Quadratic Quantization of Large Machine Learning Models").

The few large weights should not decide where the grid lies. So the error is measured by a norm that cares less for large ones, and made
small by turns: the weights that stick out are set aside by shrinkage, and the zero point takes the mean of what the others want.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .clipping import Encoding, full_range, group_sums, least_error
from .grids import Grid
from .groups import spread

NORM = 0.7  # the exponent of the error
STRENGTH, GROWTH = 10.0, 1.01  # of the tie between what is set aside and what is left, and its growth from round to round
ROUNDS = 20


def hqq(weight: Tensor, group: int, grid: Grid, half: bool = False, clipped: bool = True, rounded: bool = False) -> Encoding:
    """Scales and, by half-quadratic quantization, zero points for a weight [rows, columns]: [rows, groups] each.

    Errors are taken in steps of the grid, so that the size of the weights does not matter; the paper takes them as they are.

    Args:
        half: scales (and real zero points) are rounded to float16 first.
        clipped: scales are those of least squared error (:func:`.clipping.least_error`); else of the full range, as in the paper.
        rounded: zero points become integers on the grid, int32, and each group keeps the one it started from where that errs less in the
            norm that is minimised. Else they are float32, for values ``scale * (q - zero_point)`` of :func:`real_codes`.
    """
    matrix = weight.flatten(1).float()
    start = (least_error if clipped else full_range)(matrix, group, grid, symmetric=False, half=half)
    zero = _solved(matrix, start, group, grid)
    if not rounded:
        return Encoding(start.scale, zero.half().float() if half else zero)
    whole = zero.round().clamp(grid.low, grid.high)
    wins = _norm(matrix, start.scale, whole, group, grid) < _norm(matrix, start.scale, start.zero_point, group, grid)
    return Encoding(start.scale, torch.where(wins, whole.int(), start.zero_point))


def real_codes(matrix: Tensor, encoding: Encoding, group: int, grid: Grid) -> Tensor:
    """Codes [rows, columns], as floats, of the grid with real zero points [rows, groups]: ``round(x / scale + zero_point)``."""
    s, z = (spread(each, matrix.shape[1], group) for each in encoding)
    return (matrix / s + z).round_().clamp_(grid.low, grid.high)


def real_values(codes: Tensor, encoding: Encoding, group: int) -> Tensor:
    """Values ``scale * (q - zero_point)`` of codes [rows, columns]: float32 [rows, columns]."""
    s, z = (spread(each, codes.shape[1], group) for each in encoding)
    return (codes.float() - z) * s


def _solved(matrix: Tensor, start: Encoding, group: int, grid: Grid) -> Tensor:
    steps = matrix / spread(start.scale, matrix.shape[1], group)
    plain = torch.ones_like(start.scale)
    counts = group_sums(torch.ones_like(matrix), group)
    zero, strength = start.zero_point.float(), STRENGTH
    best, least = zero, torch.full_like(zero, torch.inf)
    for _ in range(ROUNDS):
        codes = real_codes(steps, Encoding(plain, zero), group, grid)
        error = steps - real_values(codes, Encoding(plain, zero), group)
        found = group_sums(error.abs().pow(NORM), group)
        best, least = torch.where(found < least, zero, best), torch.minimum(found, least)
        aside = torch.sign(error) * (error.abs() - (error.abs() + 1e-12).pow(NORM - 1) / strength).clamp(min=0)
        zero = group_sums(codes - steps + aside, group) / counts
        strength *= GROWTH
    return best


def _norm(matrix: Tensor, scale: Tensor, zero_point: Tensor, group: int, grid: Grid) -> Tensor:
    encoding = Encoding(scale, zero_point)
    error = real_values(real_codes(matrix, encoding, group, grid), encoding, group) - matrix
    return group_sums(error.abs().pow(NORM), group)

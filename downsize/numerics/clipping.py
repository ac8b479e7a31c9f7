"""Scales and zero points of weights in groups: of the whole range, or of the part of it that gives the least squared error.

A weight is a matrix [rows, columns], its groups are as in :mod:`.groups`, all scales and zero points are [rows, groups]. ``importance``
weighs the squared error of each column [columns]: the diagonal of the Gram matrix of the inputs, so that it is the layer's output error as
far as inputs are uncorrelated. With ``half`` scales are rounded to float16 before anything else depends on them: a file may then store
them in 16 bits without a change of the result. ``symmetric`` fixes the zero point in the middle of the grid.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from .grids import Grid, filled
from .groups import group_codes, group_count, group_values, spread

# Ranges that are tried, each smaller than the one before by so much; then scales are fitted by least squares to the codes so often.
SHRINK, TRIED, FITS = 0.96, 41, 3
SMALLEST, SMALLEST_HALF, LARGEST_HALF = torch.finfo(torch.float32).tiny, 2.0**-24, 65504.0
# Elements of a weight that are worked on at a time: few enough to stay in the processor's caches.
ELEMENTS = 2**17


class Encoding(NamedTuple):
    """What turns codes into values: scale float32 and zero point int32, both [rows, groups]."""

    scale: Tensor
    zero_point: Tensor


def group_sums(values: Tensor, group: int) -> Tensor:
    """The sum of every group: [..., groups] from [..., columns]."""
    columns = values.shape[-1]
    return pad(values, (0, group_count(columns, group) * group - columns)).unflatten(-1, (-1, group)).sum(-1)


def group_extremes(matrix: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """The smallest value of every group or zero, and the largest or zero: [rows, groups] each."""
    columns = matrix.shape[1]
    runs = pad(matrix, (0, group_count(columns, group) * group - columns)).unflatten(1, (-1, group))
    return runs.amin(2).clamp(max=0), runs.amax(2).clamp(min=0)


def stored(scale: Tensor, half: bool) -> Tensor:
    """Scales as a file holds them, in float32: rounded to float16 if ``half``, to none that is zero.

    Raises:
        ValueError: a scale is too large for float16.
    """
    if not half:
        return scale.float().clamp(min=SMALLEST)
    if scale.numel() and float(scale.max()) > LARGEST_HALF:
        raise ValueError(f"a scale of {float(scale.max()):.3g} was found; float16 ends at {LARGEST_HALF:.0f}.")
    return scale.half().clamp(min=SMALLEST_HALF).float()


def full_range(weight: Tensor, group: int, grid: Grid, symmetric: bool, half: bool = False) -> Encoding:
    """The grid of every group that just covers its values, and zero."""
    return _grid(*group_extremes(weight.flatten(1).float(), group), grid, symmetric, half)


def _grid(low: Tensor, high: Tensor, grid: Grid, symmetric: bool, half: bool) -> Encoding:
    low, high = low.double(), high.double()
    middle = (grid.low + grid.high + 1) // 2
    if symmetric:
        scale = stored(filled(torch.maximum(-low, high) / (grid.high - middle)), half)
        return Encoding(scale, torch.full_like(scale, middle, dtype=torch.int32))
    scale = stored(filled((high - low) / (grid.high - grid.low)), half)
    return Encoding(scale, (grid.low - low / scale).round().clamp(grid.low, grid.high).int())


def least_error(weight: Tensor, group: int, grid: Grid, symmetric: bool, half: bool = False, importance: Tensor | None = None) -> Encoding:
    """The grid of every group with the least squared error of the weights that are rounded to it, of many that were tried.

    Tried are ranges down to a fifth of the full one, with zero points beside the one that splits them as the values do; scales are then
    fitted by least squares to the codes that they give. The full range is among them, so that the error never grows.
    """
    matrix = weight.flatten(1).float()
    rows = max(1, ELEMENTS // max(1, matrix.shape[1]))
    found = [_least_error(each, group, grid, symmetric, half, importance) for each in matrix.split(rows)]
    return Encoding(*(torch.cat(each) for each in zip(*found, strict=True)))


def _least_error(matrix: Tensor, group: int, grid: Grid, symmetric: bool, half: bool, importance: Tensor | None) -> Encoding:
    def values(encoding: Encoding) -> Tensor:
        return group_values(group_codes(matrix, *encoding, group, grid), *encoding, group)

    def refined(encoding: Encoding) -> Encoding:
        steps = values(encoding) / spread(encoding.scale, matrix.shape[1], group)
        return Encoding(stored(fitted_scale(matrix, steps, encoding.scale, group, importance), half), encoding.zero_point)

    return best_encoding(matrix, _ranges(matrix, group, grid, symmetric, half), values, refined, group, importance)


def _ranges(matrix: Tensor, group: int, grid: Grid, symmetric: bool, half: bool) -> Iterator[Encoding]:
    low, high = group_extremes(matrix, group)
    for i in range(TRIED):
        encoding = _grid(low * SHRINK**i, high * SHRINK**i, grid, symmetric, half)
        yield encoding
        if not symmetric:
            for other in (-1, 1):
                yield Encoding(encoding.scale, (encoding.zero_point + other).clamp(grid.low, grid.high))


def best_encoding(
    matrix: Tensor,
    tried: Iterable[Encoding],
    values: Callable[[Encoding], Tensor],
    refined: Callable[[Encoding], Encoding],
    group: int,
    importance: Tensor | None,
) -> Encoding:
    """For every group that of the encodings whose values err least, refined as long as that lessens the error.

    Args: ``values``: what the matrix becomes by an encoding [rows, columns]; ``refined``: a better encoding for the codes of one.
    """

    def error(encoding: Encoding) -> Tensor:
        squared = (values(encoding) - matrix).square_()
        return group_sums(squared if importance is None else squared * importance.float(), group)

    def better(best: Encoding, least: Tensor, other: Encoding) -> tuple[Encoding, Tensor]:
        found = error(other)
        wins = found < least
        return Encoding(*(torch.where(wins, new, old) for new, old in zip(other, best, strict=True))), torch.where(wins, found, least)

    several = iter(tried)
    best = next(several)
    least = error(best)
    for other in several:
        best, least = better(best, least, other)
    for _ in range(FITS):
        best, least = better(best, least, refined(best))
    return best


def fitted_scale(matrix: Tensor, steps: Tensor, scale: Tensor, group: int, importance: Tensor | None) -> Tensor:
    """The scale of every group with the least squared error of ``scale * steps`` [rows, columns]; as it was where that is none above zero."""
    weighed = steps if importance is None else steps * importance.float()
    cross, energy = group_sums(weighed * matrix, group), group_sums(weighed * steps, group)
    return torch.where((cross > 0) & (energy > 0), cross / energy, scale)

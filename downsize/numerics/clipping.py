"""Scales and zero points of weights in groups: of the whole range, or of the part of it that gives the least squared error.

A weight is a matrix [rows, columns], its groups are as in :mod:`.groups`, all scales and zero points are [rows, groups]. ``importance``
weighs the squared error of each column [columns]: the diagonal of the Gram matrix of the inputs, so that it is the layer's output error as
far as inputs are uncorrelated. With ``half`` scales are rounded to float16 before anything else depends on them: a file may then store
them in 16 bits without a change of the result. ``symmetric`` fixes the zero point in the middle of the grid.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from .grids import Grid, filled
from .groups import group_count

# Ranges that are tried, each smaller than the one before by so much; then scales are fitted by least squares to the codes so often.
SHRINK, TRIED, FITS = 0.96, 41, 3
SMALLEST, SMALLEST_HALF, LARGEST_HALF = torch.finfo(torch.float32).tiny, 2.0**-24, 65504.0
# Elements of a weight that are worked on at a time: few enough to stay in the processor's caches.
ELEMENTS = 2**17


class Encoding(NamedTuple):
    """What turns codes into values: scale float32 and zero point int32, both [rows, groups]."""

    scale: Tensor
    zero_point: Tensor


def runs_of(values: Tensor, group: int) -> Tensor:
    """Columns as groups: [..., groups, group] from [..., columns], the last one filled up with zeros."""
    columns = values.shape[-1]
    return pad(values, (0, group_count(columns, group) * group - columns)).unflatten(-1, (-1, group))


def group_sums(values: Tensor, group: int) -> Tensor:
    """The sum of every group: [..., groups] from [..., columns]."""
    return runs_of(values, group).sum(-1)


def group_extremes(matrix: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """The smallest value of every group or zero, and the largest or zero: [rows, groups] each."""
    runs = runs_of(matrix, group)
    return runs.amin(-1).clamp(max=0), runs.amax(-1).clamp(min=0)


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

    def steps(runs: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
        low, high = grid.low - zero_point[..., None], grid.high - zero_point[..., None]
        return runs.div(scale[..., None]).round_().clamp_(low, high)

    def tried(part: Tensor) -> Iterator[Encoding]:
        return _ranges(part, group, grid, symmetric, half)

    return best_encoding(matrix, group, tried, steps, half, importance)


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
    group: int,
    tried: Callable[[Tensor], Iterator[Encoding]],
    steps: Callable[[Tensor, Tensor, Tensor], Tensor],
    half: bool,
    importance: Tensor | None,
) -> Encoding:
    """For every group that of several encodings with the least squared error, and the scale that then fits its codes best.

    Args:
        tried: the encodings for some rows of the matrix.
        steps: from groups [rows, groups, group], scale and zero point to the rounded values in units of the scale.
    """
    weights = None if importance is None else runs_of(importance.float(), group)
    rows = max(1, ELEMENTS // max(1, matrix.shape[1]))
    found = [_best(runs_of(part, group), tried(part), steps, half, weights) for part in matrix.split(rows)]
    return Encoding(*(torch.cat(each) for each in zip(*found, strict=True)))


def _best(runs: Tensor, tried: Iterator[Encoding], steps: Callable[..., Tensor], half: bool, weights: Tensor | None) -> Encoding:
    def error(encoding: Encoding) -> Tensor:
        squared = steps(runs, *encoding).mul_(encoding.scale[..., None]).sub_(runs).square_()
        return (squared if weights is None else squared.mul_(weights)).sum(-1)

    def better(best: Encoding, least: Tensor, other: Encoding) -> tuple[Encoding, Tensor]:
        found = error(other)
        wins = found < least
        return Encoding(*(torch.where(wins, new, old) for new, old in zip(other, best, strict=True))), torch.where(wins, found, least)

    best = next(tried)
    least = error(best)
    for other in tried:
        best, least = better(best, least, other)
    for _ in range(FITS):
        scale = stored(fitted_scale(runs, steps(runs, *best), best.scale, weights), half)
        best, least = better(best, least, Encoding(scale, best.zero_point))
    return best


def fitted_scale(runs: Tensor, steps: Tensor, scale: Tensor, weights: Tensor | None) -> Tensor:
    """The scale of every group with the least squared error of ``scale * steps``, [..., groups]; as it was where that is none above zero.

    ``runs`` and ``steps``: [..., groups, group]; ``weights``: of each column, [groups, group].
    """
    weighed = steps if weights is None else steps * weights
    cross, energy = (weighed * runs).sum(-1), (weighed * steps).sum(-1)
    return torch.where((cross > 0) & (energy > 0), cross / energy, scale)

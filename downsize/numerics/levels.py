"""Weights quantized to levels that are no grid: the quantiles of a normal distribution, times the scale of a group."""

from __future__ import annotations

import torch
from torch import Tensor

from .clipping import Encoding, best_encoding, fitted_scale, group_extremes, stored
from .grids import filled
from .groups import level_codes, level_values, spread

SHRINK = 33  # scales that are tried
SMALLEST = 0.6  # the smallest, as a part of the largest


def normal_float(bits: int = 4) -> Tensor:
    """The ``2**bits`` levels of NormalFloat, rising from -1 to 1, zero among them: float32 (Dettmers et al. 2023, arXiv 2305.14314).

    They are quantiles of the normal distribution at equal steps of probability, one more above zero than below. The outermost would lie
    at infinity; they are taken where a share of the probability is left beyond that is the mean of what half a step of ``2**bits`` and of
    ``2**bits - 1`` levels leaves.
    """
    half = 2 ** (bits - 1)
    outermost = 1 - (1 / (4 * half) + 1 / (4 * half - 2)) / 2
    above, below = (torch.special.ndtri(torch.linspace(outermost, 0.5, steps, dtype=torch.float64)[:-1]) for steps in (half + 1, half))
    levels = torch.cat([-below, torch.zeros(1, dtype=torch.float64), above.flip(0)])
    return (levels / levels.abs().max()).float()


def level_scale(weight: Tensor, levels: Tensor, group: int, importance: Tensor | None = None, half: bool = False, search: bool = True) -> Tensor:
    """The scale of every group of a weight [rows, columns] whose values become scales times ``levels``: float32 [rows, groups].

    Without ``search`` the largest magnitude of the group, which gets the outermost level. With it the least squared error is sought
    among smaller scales too, and the scale then fitted by least squares. ``importance`` and ``half`` as in :mod:`.clipping`.
    """
    matrix = weight.flatten(1).float()
    columns = matrix.shape[1]
    low, high = group_extremes(matrix, group)
    widest = stored(filled(torch.maximum(high, -low).double() / float(levels.abs().max())), half)
    if not search:
        return widest

    def values(encoding: Encoding) -> Tensor:
        return level_values(level_codes(matrix, encoding.scale, levels, group), encoding.scale, levels, group)

    def refined(encoding: Encoding) -> Encoding:
        steps = values(encoding) / spread(encoding.scale, columns, group)
        return Encoding(stored(fitted_scale(matrix, steps, encoding.scale, group, importance), half), encoding.zero_point)

    zero = torch.zeros_like(widest, dtype=torch.int32)
    tried = [Encoding(stored(widest * float(part), half), zero) for part in torch.linspace(1, SMALLEST, SHRINK)]
    return best_encoding(matrix, tried, values, refined, group, importance).scale

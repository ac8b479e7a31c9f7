"""Weights quantized to levels that are no grid: the quantiles of a normal distribution, times the scale of a group."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .clipping import SHRINK, TRIED, Encoding, best_encoding, group_extremes, stored
from .grids import filled


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
    middles = (levels[1:] + levels[:-1]) / 2

    def widest(part: Tensor) -> Encoding:
        low, high = group_extremes(part, group)
        scale = stored(filled(torch.maximum(high, -low).double() / float(levels.abs().max())), half)
        return Encoding(scale, torch.zeros_like(scale, dtype=torch.int32))

    def tried(part: Tensor) -> Iterator[Encoding]:
        scale, zero_point = widest(part)
        return (Encoding(stored(scale * SHRINK**i, half), zero_point) for i in range(0, TRIED, 2))

    def steps(runs: Tensor, scale: Tensor, _: Tensor) -> Tensor:
        return levels[torch.bucketize(runs / scale[..., None], middles)]

    return best_encoding(matrix, group, tried, steps, half, importance).scale if search else widest(matrix).scale

"""Solvers that use the Gram matrix of a layer's inputs, which is the Hessian of its squared output error."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .grids import Grid

DAMPING = 0.01
BLOCK = 128
# What a column becomes: called with the place where the block starts, the block's weights as they are by then
# [groups, rows, columns of the block], and the column's place in it; returns the column's final values [groups, rows].
Decide = Callable[[int, Tensor, int], Tensor]
# How a column is rounded: called with its values as they are by then [groups, rows] and its place in the weight [groups]; returns the like.
Nearest = Callable[[Tensor, Tensor], Tensor]


def gptq(weight: Tensor, gram: Tensor, scale: Tensor, grid: Grid, damping: float = DAMPING) -> Tensor:
    """Round a weight to the symmetric grid of each row by :func:`compensated`: shapes as there, ``scale`` [groups, rows] the step.

    Weights that are exactly zero stay so: their error, too, is made up for by the others.
    """

    def nearest(column: Tensor, _: Tensor) -> Tensor:
        return (column / scale).round().clamp(grid.low, grid.high) * scale

    return compensated(weight, gram, nearest, damping)


def gptq_groups(weight: Tensor, gram: Tensor, scale: Tensor, zero_point: Tensor, group: int, grid: Grid, damping: float = DAMPING) -> Tensor:
    """Round a weight [rows, columns] to the grids of its groups of columns by :func:`compensated`, with a Gram matrix [columns, columns].

    Scales and zero points [rows, groups of columns] are fixed before (static groups), so that columns may come in any order. Returns the
    values, float [rows, columns]: the codes are those of :func:`.groups.group_codes`.
    """

    def nearest(column: Tensor, place: Tensor) -> Tensor:
        s, z = scale[:, int(place) // group], zero_point[:, int(place) // group]
        return ((column / s).round() + z).clamp(grid.low, grid.high).sub(z) * s

    return compensated(weight[None], gram[None], nearest, damping)[0]


def gptq_levels(weight: Tensor, gram: Tensor, scale: Tensor, levels: Tensor, group: int, damping: float = DAMPING) -> Tensor:
    """As :func:`gptq_groups`, to the nearest of ``levels`` (rising) times the scale of the group."""
    middles = (levels[1:] + levels[:-1]) / 2

    def nearest(column: Tensor, place: Tensor) -> Tensor:
        s = scale[:, int(place) // group]
        return levels[torch.bucketize(column / s, middles)] * s

    return compensated(weight[None], gram[None], nearest, damping)[0]


def compensated(weight: Tensor, gram: Tensor, nearest: Nearest, damping: float = DAMPING) -> Tensor:
    """Round a weight, each column's error made up for by the columns after it (Frantar et al. 2023, arXiv 2210.17323).

    Args:
        weight: [groups, rows, columns]; a layer without groups has one.
        gram: [groups, columns, columns], sums of ``x x^T`` over inputs.
        nearest: how a column is rounded, see :data:`Nearest`; zero must round to itself.
        damping: added to the diagonal, as a fraction of its mean.

    Returns: the rounded weight, float of the same shape. Columns are visited by falling diagonal (act-order); a column whose input was
    never seen is rounded to nearest. Weights that are exactly zero stay so.
    """
    gram = gram.double()
    diagonal = gram.diagonal(dim1=1, dim2=2)
    mean = diagonal.mean(1, keepdim=True).clamp(min=1e-30)
    gram = gram + torch.diag_embed(torch.where(diagonal > 0, damping * mean, mean))
    order = diagonal.argsort(dim=1, descending=True)
    columns = order.shape[1]
    rows = order[:, :, None].expand(-1, -1, columns)
    gram = gram.gather(1, rows).gather(2, order[:, None, :].expand(-1, columns, -1))
    upper = inverse_factor(gram).float()
    index = order[:, None, :].expand_as(weight)
    ordered = weight.float().gather(2, index)
    kept = ordered != 0

    def decide(start: int, block: Tensor, i: int) -> Tensor:
        return nearest(block[:, :, i], order[:, start + i]) * kept[:, :, start + i]

    rounded = sweep(ordered, upper, decide)
    return torch.empty_like(rounded).scatter_(2, index, rounded)


def output_error(difference: Tensor, gram: Tensor) -> Tensor:
    """Each row's squared output error: ``d G d^T`` for the rows d of a weight's change [..., rows, columns]; float64 [..., rows]."""
    wide = difference.double()
    return ((wide @ gram.double()) * wide).sum(-1).clamp(min=0)


def fitted_scales(weight: Tensor, values: Tensor, scale: Tensor, group: int, gram: Tensor, damping: float = DAMPING) -> Tensor:
    """The scales of least output error for the codes that a rounded weight has: least squares, each row on its own.

    Args: ``weight``, ``values``: [rows, columns], before and after rounding with ``scale`` [rows, groups]; ``gram``: [columns, columns].

    Returns: float32 [rows, groups]. With the damping of :func:`compensated`, scales that the inputs say little of fit the weights; one that
    would not stay above zero stays as it was.
    """
    columns, groups = weight.shape[1], scale.shape[1]
    where = torch.arange(columns, device=weight.device) // group
    wide = gram.double() + torch.eye(columns, dtype=torch.float64, device=gram.device) * (damping * gram.diagonal().double().mean())
    steps = values.double() / scale.double()[:, where]

    def sums(each: Tensor) -> Tensor:
        return each.new_zeros(len(each), groups).index_add_(1, where, each)

    missing = sums((weight - values).double() @ wide * steps)
    parts = [slice(i * group, min((i + 1) * group, columns)) for i in range(groups)]
    normal = torch.stack([sums(steps[:, part] @ wide[part] * steps) for part in parts], dim=1)
    ridge = 1e-9 * normal.diagonal(dim1=1, dim2=2).mean(1).clamp(min=1e-30)
    change = torch.linalg.solve(normal + torch.diag_embed(ridge[:, None].expand(-1, groups)), missing)
    fitted = (scale.double() + change).float()
    return torch.where(fitted > 0, fitted, scale)


def inverse_factor(gram: Tensor) -> Tensor:
    """The upper triangular ``u`` with ``u.T @ u`` the inverse of a positive definite matrix: [..., columns, columns], as are both."""
    return torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(gram))).mT


def sweep(weight: Tensor, upper: Tensor, decide: Decide, size: int = BLOCK) -> Tensor:
    """Settle column after column, each one's error made up for by the columns after it (optimal brain surgeon, in a fixed order).

    Args:
        weight: [groups, rows, columns].
        upper: [groups, columns, columns], the :func:`inverse_factor` of the Gram matrix.
        decide: what each column becomes, see :data:`Decide`.
        size: columns of a block: the error spreads at once within a block, and behind it once a block.
    """
    rest, settled = weight.clone(), torch.empty_like(weight)
    columns = weight.shape[2]
    for start in range(0, columns, size):
        stop = min(start + size, columns)
        block, errors = rest[:, :, start:stop], torch.empty_like(rest[:, :, start:stop])
        for i in range(stop - start):
            settled[:, :, start + i] = decide(start, block, i)
            error = (block[:, :, i] - settled[:, :, start + i]) / upper[:, start + i, start + i, None]
            errors[:, :, i] = error
            if i + 1 < stop - start:
                block[:, :, i + 1 :] -= error[:, :, None] * upper[:, start + i, None, start + i + 1 : stop]
        if stop < columns:
            rest[:, :, stop:] -= errors @ upper[:, start:stop, stop:]
    return settled

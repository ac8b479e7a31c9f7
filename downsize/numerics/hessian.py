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


def gptq(weight: Tensor, gram: Tensor, scale: Tensor, grid: Grid, damping: float = DAMPING) -> Tensor:
    """Round a weight to its grid, each column's rounding error made up for by the columns after it (Frantar et al. 2023, arXiv 2210.17323).

    Args:
        weight: [groups, rows, columns]; a layer without groups has one.
        gram: [groups, columns, columns], sums of ``x x^T`` over inputs.
        scale: [groups, rows], the step of a symmetric grid.
        damping: added to the diagonal, as a fraction of its mean.

    Returns: the rounded weight, float of the same shape, on the grid. Columns are visited by falling diagonal (act-order); a column whose
    input was never seen is rounded to nearest. Weights that are exactly zero stay so: their error, too, is made up for by the others.
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

    def nearest(start: int, block: Tensor, i: int) -> Tensor:
        return (block[:, :, i] / scale).round().clamp(grid.low, grid.high) * scale * kept[:, :, start + i]

    rounded = sweep(ordered, upper, nearest)
    return torch.empty_like(rounded).scatter_(2, index, rounded)


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

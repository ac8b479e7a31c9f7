"""Solvers that use the Gram matrix of a layer's inputs, which is the Hessian of its squared output error."""

from __future__ import annotations

import torch
from torch import Tensor

from .grids import Grid

DAMPING = 0.01
BLOCK = 128


def gptq(weight: Tensor, gram: Tensor, scale: Tensor, grid: Grid, damping: float = DAMPING) -> Tensor:
    """Round a weight to its grid, each column's rounding error made up for by the columns after it (Frantar et al. 2023, arXiv 2210.17323).

    Args:
        weight: [groups, rows, columns]; a layer without groups has one.
        gram: [groups, columns, columns], sums of ``x x^T`` over inputs.
        scale: [groups, rows], the step of a symmetric grid.
        damping: added to the diagonal, as a fraction of its mean.

    Returns: the rounded weight, float of the same shape, on the grid. Columns are visited by falling diagonal (act-order); a column whose
    input was never seen is rounded to nearest.
    """
    gram = gram.double()
    diagonal = gram.diagonal(dim1=1, dim2=2)
    mean = diagonal.mean(1, keepdim=True).clamp(min=1e-30)
    gram = gram + torch.diag_embed(torch.where(diagonal > 0, damping * mean, mean))
    order = diagonal.argsort(dim=1, descending=True)
    columns = order.shape[1]
    rows = order[:, :, None].expand(-1, -1, columns)
    gram = gram.gather(1, rows).gather(2, order[:, None, :].expand(-1, columns, -1))
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(gram))
    upper = torch.linalg.cholesky(inverse).mT.float()
    index = order[:, None, :].expand_as(weight)
    rounded = _sweep(weight.float().gather(2, index), upper, scale, grid)
    return torch.empty_like(rounded).scatter_(2, index, rounded)


def _sweep(weight: Tensor, upper: Tensor, scale: Tensor, grid: Grid) -> Tensor:
    """Round column after column; the error spreads at once within a block of columns, and behind it once a block."""
    rest, rounded = weight.clone(), torch.empty_like(weight)
    columns = weight.shape[2]
    for start in range(0, columns, BLOCK):
        stop = min(start + BLOCK, columns)
        block, errors = rest[:, :, start:stop], torch.empty_like(rest[:, :, start:stop])
        for i in range(stop - start):
            column = block[:, :, i]
            q = (column / scale).round().clamp(grid.low, grid.high) * scale
            rounded[:, :, start + i] = q
            error = (column - q) / upper[:, start + i, start + i, None]
            errors[:, :, i] = error
            if i + 1 < stop - start:
                block[:, :, i + 1 :] -= error[:, :, None] * upper[:, start + i, None, start + i + 1 : stop]
        if stop < columns:
            rest[:, :, stop:] -= errors @ upper[:, start:stop, stop:]
    return rounded

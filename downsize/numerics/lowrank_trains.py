"""A convolution's weight as a train of four cores, one a direction: inputs, height, width, outputs.

Oseledets 2011, "Tensor-train decomposition", with the order that makes each core a convolution: 1 x 1, height x 1, 1 x width, 1 x 1. The outer
cores are Tucker's; between them, where Tucker has a whole kernel, stands a spatial pair.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from .lowrank_fitting import LEAST_GAIN, Fit, Goal, alternate, basis_of, improved, last_factor
from .lowrank_solvers import SPATIAL, TUCKER, Solver, Weights, balanced, even


def tensor_train(goal: Goal) -> Solver:
    """1 x 1 to r channels, height x 1 from r to s, 1 x width from s to t, 1 x 1: for ranks (r, s, t)."""
    start, block = TUCKER.start(goal), TUCKER.blocks(goal)

    def solve(ranks: tuple[int, ...]) -> Weights:
        reads, fit, _ = _rounds(goal, block, start[: ranks[0]], ranks)
        matrix = _matrix(reads, fit)
        inner, width, last = _even(goal, _behind(goal, reads), fit, matrix)
        given = ((reads @ block) * reads).sum(1).clamp(min=0).div(goal.weight[0, 0].numel() * goal.positions).sqrt()
        size = even(given, inner.transpose(0, 1).flatten(1).norm(dim=1))
        weights = [(reads / size[:, None])[:, :, None, None], (inner * size[:, None])[..., None], width[:, :, None], last[:, :, None, None]]
        return weights, matrix

    return solve


def _rounds(goal: Goal, block: Tensor, reads: Tensor, ranks: tuple[int, ...]) -> tuple[Tensor, Fit, float]:
    """The first core [r, inputs], the others as a fit of a spatial pair behind it, and their error by the damped covariance.

    In turn the others are fitted to what the first gives, and the first moves for the others.
    """
    found = _others(goal, reads, ranks, None)
    for _ in range(goal.rounds):
        reads, fit, lost = found
        moved = improved(goal, TUCKER, Fit(reads, fit.outer, torch.einsum(SPATIAL.product, fit.inner, fit.last)), block)
        found = min(found, _others(goal, moved, ranks, fit.inner), key=lambda one: one[2])
        if lost - found[2] <= LEAST_GAIN * lost:
            break
    return found


def _others(goal: Goal, reads: Tensor, ranks: tuple[int, ...], inner: Tensor | None) -> tuple[Tensor, Fit, float]:
    """The spatial pair behind a first core, from an ``inner`` factor of it or from the best if taps did not correlate."""
    behind = _behind(goal, reads)
    outputs, _, _, width = behind.weight.shape
    inner = SPATIAL.start(behind)[: ranks[1]] if inner is None else inner
    fit = alternate(behind, SPATIAL, inner, torch.Size((outputs, len(inner), width)), SPATIAL.blocks(behind), ranks[2])
    missed = goal.matrix - _matrix(reads, fit)
    return reads, fit, float((missed @ goal.damped * missed).sum())


def _behind(goal: Goal, reads: Tensor) -> Goal:
    """What a convolution behind the first core [r, inputs] should give, and on which inputs: the best weight [outputs, r, height, width]."""
    taps = goal.weight.shape[2:]
    basis = basis_of(TUCKER, reads, torch.Size((len(goal.matrix), len(reads), *taps)))
    weight, _ = last_factor(goal, basis)
    return replace(
        goal,
        weight=weight.unflatten(1, (len(reads), *taps)),
        covariance=basis @ goal.covariance @ basis.mT,
        damped=basis @ goal.damped @ basis.mT,
        mean=basis @ goal.mean,
    )


def _matrix(reads: Tensor, fit: Fit) -> Tensor:
    """The weight [outputs, n] that all cores stand for."""
    behind = torch.einsum(SPATIAL.product, fit.inner, fit.last)
    return fit.outer @ torch.einsum(TUCKER.product, reads, behind).flatten(1)


def _even(goal: Goal, behind: Goal, fit: Fit, matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The second, third and last core, [s, r, height], [t, s, width] and [outputs, t], channels between them of even size."""
    read = fit.outer.mT @ matrix
    size = even((read @ goal.damped * read).sum(1).clamp(min=0).sqrt() / goal.positions**0.5, read.new_ones(len(read)))
    inner, width = balanced(behind, SPATIAL, Fit(fit.inner, torch.diag(1 / size), fit.last), SPATIAL.blocks(behind), (1, -1, 1))
    return inner, width, fit.outer * size

"""The best weights of each form of a factored convolution (one group of it): from a goal to a function from ranks to weights."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .lowrank import FAINT, Spectrum, directions
from .lowrank_fitting import Fit, Goal, Pair, alternate

# Weights at some ranks, each [outputs, inputs, height, width], and the matrix [outputs, columns] that they stand for.
Weights = tuple[list[Tensor], Tensor]
Solver = Callable[[tuple[int, ...]], Weights]

SPATIAL = Pair("riy,qrx->qiyx", "qiyx->qxiy", "iyxjux->iyju", batch=0, columns=2)
TUCKER = Pair("ri,qryx->qiyx", "qiyx->qyxi", "iyxjyx->ij", batch=0, columns=1)
SEPARABLE = Pair("iryx,qir->qiyx", "qiyx->iqyx", "iyxiuv->iyxuv", batch=1, columns=2)


def channel(goal: Goal) -> Solver:
    """The whole kernel to r channels, then 1 x 1: the matrix [outputs, inputs * height * width] at rank r, in closed form."""
    left, values, lost = directions(goal.matrix, goal.covariance, goal.damped)
    found = Spectrum(left, values, left.mT @ goal.matrix, goal.mean, goal.energy, lost, goal.positions)

    def solve(ranks: tuple[int, ...]) -> Weights:
        first, second, _ = found.factors(ranks[0])
        return [first.unflatten(1, goal.weight.shape[1:]), second[:, :, None, None]], second @ first

    return solve


def spatial(goal: Goal) -> Solver:
    """height x 1 to r channels, then 1 x width: Jaderberg et al. 2014, arXiv 1405.3866."""
    start, block = SPATIAL.start(goal), SPATIAL.blocks(goal)
    outputs, _, _, width = goal.weight.shape

    def solve(ranks: tuple[int, ...]) -> Weights:
        fit = alternate(goal, SPATIAL, start[: ranks[0]], torch.Size((outputs, ranks[0], width)), block, None)
        inner, last = balanced(goal, SPATIAL, fit, block, (1, -1, 1))
        return [inner[..., None], last[:, :, None]], fit.matrix(SPATIAL)

    return solve


def tucker(goal: Goal) -> Solver:
    """1 x 1 to r channels, the whole kernel from r to s channels, 1 x 1: Kim et al. 2016, arXiv 1511.06530.

    Without a Gram matrix the alternation is the orthogonal iteration of De Lathauwer et al. 2000, "On the best rank-1 and rank-(R1, ...
    RN) approximation of higher-order tensors".
    """
    start, block = TUCKER.start(goal), TUCKER.blocks(goal)
    outputs, _, height, width = goal.weight.shape

    def solve(ranks: tuple[int, ...]) -> Weights:
        rank = ranks[0]
        fit = alternate(goal, TUCKER, start[:rank], torch.Size((outputs, rank, height, width)), block, ranks[1])
        matrix = fit.matrix(TUCKER)
        read = fit.outer.mT @ matrix
        size = even((read @ goal.damped * read).sum(1).clamp(min=0).sqrt() / goal.positions**0.5, read.new_ones(len(read)))
        inner, core = balanced(goal, TUCKER, Fit(fit.inner, torch.diag(1 / size), fit.last), block, (1, -1, 1, 1))
        return [inner[:, :, None, None], core, (fit.outer * size)[:, :, None, None]], matrix

    return solve


def separable(goal: Goal) -> Solver:
    """Each input by r kernels of its own (depthwise), then 1 x 1: Guo et al. 2018, "Network decoupling", arXiv 1808.05517."""
    start, block = SEPARABLE.start(goal), SEPARABLE.blocks(goal)
    outputs, inputs = goal.weight.shape[:2]

    def solve(ranks: tuple[int, ...]) -> Weights:
        rank = ranks[0]
        fit = alternate(goal, SEPARABLE, start[:, :rank], torch.Size((outputs, inputs, rank)), block, None)
        inner, last = balanced(goal, SEPARABLE, fit, block, (1, inputs, rank))
        return [inner.flatten(0, 1)[:, None], last.flatten(1)[:, :, None, None]], fit.matrix(SEPARABLE)

    return solve


def even(given: Tensor, read: Tensor) -> Tensor:
    """What channels are divided by, and the weights that read them multiplied by, so that both have one size.

    Args:
        given: the root mean square of each channel. read: the length of the weights that read it.
    """
    faintest = FAINT * float(given.max()) if given.numel() else 0.0
    return (given.clamp(min=faintest or 1.0) / read.clamp(min=torch.finfo(read.dtype).tiny)).sqrt() if faintest else torch.ones_like(given)


def balanced(goal: Goal, pair: Pair, fit: Fit, block: Tensor, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """The inner and the last factor [outputs, ...] with the same product, their shared channels of even size.

    Args:
        shape: in which the sizes of the channels multiply the last factor.
    """
    last = (fit.outer @ fit.last.flatten(1)).unflatten(1, fit.last.shape[1:])
    flat = fit.inner.flatten(-pair.columns)
    taps = goal.taps.shape[:3].numel() / flat.shape[-1] / (len(flat) if pair.batch else 1)
    given = ((flat @ block) * flat).sum(-1).clamp(min=0).div(taps * goal.positions).sqrt()
    length = torch.einsum(pair.overlap, last, last).diagonal(dim1=-2, dim2=-1).clamp(min=0).sqrt()
    size = even(given, length)
    return fit.inner / size[(...,) + (None,) * pair.columns], last * size.reshape(shape)

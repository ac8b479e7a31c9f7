"""A convolution's weight as a sum of products of one vector a direction: canonical polyadic decomposition that does not degenerate.

Harshman 1970, "Foundations of the PARAFAC procedure"; for convolutions Lebedev et al. 2015, arXiv 1412.6553. There may be no best sum: terms
can grow without end while they cancel. So the inner vectors have length 1, and a ridge on the last factor is raised until the terms
together are not many times larger than their sum.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .lowrank_fitting import RIDGE, Goal, Pair, improved, last_factor
from .lowrank_solvers import SPATIAL, Solver, Weights, even

# Each inner factor beside what the other three give together.
INNER = {
    "i": Pair("ri,qryx->qiyx", "", "iyxjyx->ij", batch=0, columns=1),
    "y": Pair("ry,qrix->qiyx", "", "iyxiux->yu", batch=0, columns=1),
    "x": Pair("rx,qriy->qiyx", "", "iyxiyu->xu", batch=0, columns=1),
}
BASIS = "ri,ry,rx->riyx"
# The energies of the terms add up to no more than so many times that of their sum.
CANCELLING = 10.0
RIDGES = (RIDGE, 1e-6, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
# Rounds for each start, and more for the best of them; fewer when one takes away less than this part of the error.
TRIAL_ROUNDS, ROUNDS, LEAST_GAIN = 2, 6, 0.02

Vectors = dict[str, Tensor]


def cp(goal: Goal) -> Solver:
    """1 x 1 to r channels, then height x 1 and 1 x width for each channel alone, then 1 x 1."""
    starts = (_slices(goal), _products(goal))
    blocks = {letter: pair.blocks(goal) for letter, pair in INNER.items()}

    def solve(ranks: tuple[int, ...]) -> Weights:
        tried = [_rounds(goal, blocks, _solved(goal, {letter: part[: ranks[0]] for letter, part in start.items()}), TRIAL_ROUNDS) for start in starts]
        best = min(tried, key=lambda found: found[1])
        vectors, last = _rounds(goal, blocks, best, ROUNDS)[0]
        basis = torch.einsum(BASIS, *vectors.values()).flatten(1)
        given = torch.einsum("ri,ij,rj->r", vectors["i"], blocks["i"], vectors["i"]).clamp(min=0) / (goal.weight[0, 0].numel() * goal.positions)
        size = even(given.sqrt(), last.norm(dim=0))
        inputs, height, width = (vectors[letter] for letter in "iyx")
        weights = [(inputs / size[:, None])[:, :, None, None], height[:, None, :, None], width[:, None, None], (last * size)[:, :, None, None]]
        return weights, last @ basis

    return solve


Found = tuple[tuple[Vectors, Tensor], float]


def _rounds(goal: Goal, blocks: Vectors, found: Found, rounds: int) -> Found:
    for _ in range(rounds):
        (vectors, last), error = found
        outer, reduced = torch.linalg.qr(last) if last.shape[1] < len(last) else (torch.eye(len(last), dtype=last.dtype), last)
        vectors = dict(vectors)
        for letter, pair in INNER.items():
            if vectors[letter].shape[1] == 1:
                continue
            others = [part for other, part in vectors.items() if other != letter]
            letters = [other for other in vectors if other != letter]
            rest = torch.einsum(f"qr,r{letters[0]},r{letters[1]}->qr{''.join(letters)}", reduced, *others)
            vectors[letter] = improved(goal, pair, vectors[letter], outer, rest, blocks[letter])
            length = vectors[letter].norm(dim=1).clamp(min=torch.finfo(last.dtype).tiny)
            vectors[letter], reduced = vectors[letter] / length[:, None], reduced * length
        changed = _solved(goal, vectors)
        if changed[1] < error:
            found = changed
        if error - changed[1] <= LEAST_GAIN * error:
            break
    return found


def _solved(goal: Goal, vectors: Vectors) -> Found:
    """The last factor for the inner ones, and the error by the damped covariance."""
    basis = torch.einsum(BASIS, *vectors.values()).flatten(1)
    last, matrix = goal.matrix.new_zeros(len(goal.matrix), len(basis)), torch.zeros_like(goal.matrix)
    each = ((basis @ goal.damped) * basis).sum(1)
    for ridge in RIDGES:
        last, _ = last_factor(goal, basis, ridge)
        matrix = last @ basis
        if float((last.square() * each).sum()) <= CANCELLING * float((matrix @ goal.damped * matrix).sum()):
            break
    missed = goal.matrix - matrix
    return (vectors, last), float((missed @ goal.damped * missed).sum())


def _slices(goal: Goal) -> Vectors:
    """Terms from the singular vectors of [outputs, inputs] slices, after height and width are turned to their principal directions.

    All of them together, height * width * min(outputs, inputs), are the weight itself.
    """
    weight = goal.weight
    turned = {letter: torch.linalg.eigh(torch.einsum(f"qiyx,{other}->{letter}{letter.upper()}", weight, weight))[1] for letter, other in TURNS}
    core = torch.einsum("qiyx,yh,xw->hwqi", weight, turned["y"], turned["x"]).flatten(0, 1)
    _, values, inputs = torch.linalg.svd(core, full_matrices=False)
    order = values.flatten().argsort(descending=True, stable=True)
    slices = order.div(values.shape[1], rounding_mode="floor")
    width = turned["x"].shape[1]
    return {
        "i": inputs.flatten(0, 1)[order],
        "y": turned["y"].mT[slices.div(width, rounding_mode="floor")],
        "x": turned["x"].mT[slices % width],
    }


TURNS = (("y", "qiYx"), ("x", "qiyX"))


def _products(goal: Goal) -> Vectors:
    """Terms from the products of two vectors in the spatial form: those of its factors' [inputs, height] and [outputs, width] parts."""
    start = SPATIAL.start(goal)
    rows = torch.einsum("qiyx,riy->rqx", goal.weight, start / start.flatten(1).norm(dim=1).clamp(min=1e-150)[:, None, None] ** 2)
    inputs, a, height = torch.linalg.svd(start, full_matrices=False)
    _, b, width = torch.linalg.svd(rows, full_matrices=False)
    size = a[:, :, None] * b[:, None, :]
    order = size.flatten().argsort(descending=True, stable=True)
    term, inner = order.div(size[0].numel(), rounding_mode="floor"), order % size[0].numel()
    p, q = inner.div(b.shape[1], rounding_mode="floor"), inner % b.shape[1]
    return {"i": inputs.mT[term, p], "y": height[term, p], "x": width[term, q]}

"""A convolution's weight as a sum of products of one vector a direction: canonical polyadic decomposition that does not degenerate.

Harshman 1970, "Foundations of the PARAFAC procedure"; for convolutions Lebedev et al. 2015, arXiv 1412.6553. There may be no best sum: terms
can grow without end while they cancel. So the inner vectors have length 1, and a ridge on the last factor is raised until the terms
together are not many times larger than their sum.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

from .lowrank_fitting import LEAST_GAIN, RIDGE, Goal, descended, last_factor, two_sided
from .lowrank_solvers import Solver, Weights, even

# How the covariance of one direction comes from that of all, summed over the taps of the others.
BLOCKS = {"i": "iyxjyx->ij", "y": "iyxiux->yu", "x": "iyxiyu->xu"}
BASIS = "ri,ry,rx->riyx"
# The energies of the terms add up to no more than so many times that of their sum.
CANCELLING = 10.0
RIDGES = (RIDGE, 1e-6, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)

Vectors = dict[str, Tensor]


def cp(goal: Goal) -> Solver:
    """1 x 1 to r channels, then height x 1 and 1 x width for each channel alone, then 1 x 1."""
    start = _slices(goal)
    blocks = {letter: torch.einsum(block, goal.taps) for letter, block in BLOCKS.items()}

    def solve(ranks: tuple[int, ...]) -> Weights:
        vectors, last = _rounds(goal, blocks, _solved(goal, {letter: part[: ranks[0]] for letter, part in start.items()}))[0]
        basis = torch.einsum(BASIS, *vectors.values()).flatten(1)
        given = torch.einsum("ri,ij,rj->r", vectors["i"], blocks["i"], vectors["i"]).clamp(min=0) / (goal.weight[0, 0].numel() * goal.positions)
        size = even(given.sqrt(), last.norm(dim=0))
        inputs, height, width = (vectors[letter] for letter in "iyx")
        weights = [(inputs / size[:, None])[:, :, None, None], height[:, None, :, None], width[:, None, None], (last * size)[:, :, None, None]]
        return weights, last @ basis

    return solve


Found = tuple[tuple[Vectors, Tensor], float]


def _rounds(goal: Goal, blocks: Vectors, found: Found) -> Found:
    """Rounds of alternating least squares, each followed by a longer step in its direction, which is kept where the error falls."""
    stride = 1.0
    for _ in range(2 * goal.rounds):
        (vectors, last), error = found
        outer, reduced = torch.linalg.qr(last) if last.shape[1] < len(last) else (torch.eye(len(last), dtype=last.dtype), last)
        moved = dict(vectors)
        for letter, block in blocks.items():
            if len(block) > 1:
                part = _moved(goal, moved, letter, outer, reduced, block)
                length = part.norm(dim=1).clamp(min=torch.finfo(last.dtype).tiny)
                moved[letter], reduced = part / length[:, None], reduced * length
        changed = _solved(goal, moved)
        far = {letter: normalize(part + stride * (part - vectors[letter]), dim=1) for letter, part in moved.items()}
        further = _solved(goal, far)
        stride = stride * 1.5 if further[1] < changed[1] else stride / 2
        found = min(found, changed, further, key=lambda one: one[1])
        if error - found[1] <= LEAST_GAIN * error:
            break
    return found


def _moved(goal: Goal, vectors: Vectors, letter: str, outer: Tensor, reduced: Tensor, block: Tensor) -> Tensor:
    """The vectors [ranks, ...] of one direction, improved for the others and the last factor ``outer @ reduced``."""
    others = [letter_ for letter_ in vectors if letter_ != letter]
    rest = torch.einsum(f"r{others[0]},r{others[1]}->r{''.join(others)}", *(vectors[other] for other in others))
    rest = rest.reshape(len(rest), *(1 if name == letter else goal.weight.shape[1 + number] for number, name in enumerate("iyx")))
    shape = [len(rest), *(-1 if name == letter else 1 for name in "iyx")]
    apart = [1 + number for number, name in enumerate("iyx") if name != letter]

    def product(direction: Tensor) -> Tensor:
        return reduced @ (direction.reshape(shape) * rest).flatten(1)

    def back(matrix: Tensor) -> Tensor:
        return ((reduced.mT @ matrix).unflatten(1, goal.weight.shape[1:]) * rest).sum(apart)

    overlap = (reduced.mT @ reduced) * (rest.flatten(1) @ rest.flatten(1).mT)
    return descended(goal, vectors[letter], outer, product, back, two_sided(overlap, block, 1))


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
    turned = {"y": torch.linalg.eigh(torch.einsum("qiyx,qiux->yu", weight, weight))[1]}
    turned["x"] = torch.linalg.eigh(torch.einsum("qiyx,qiyu->xu", weight, weight))[1]
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

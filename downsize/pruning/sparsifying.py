"""One weight made sparse: every method is tried, and what loses least on data that it was not fitted on is taken."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..numerics.sparsity import (
    Pattern,
    Quadratic,
    counts_above,
    erk,
    keep_best,
    keep_pattern,
    lamp,
    least_squares,
    solving_work,
    sparsegpt,
    surgeon,
    surgeon_work,
    wanda,
)
from .weights import Weight

# How strongly solutions are drawn to the weights they start from, as a fraction of the Gram matrix's mean diagonal; the first is tried with
# every method, the others with the best.
RIDGES = (1e-2, 1e-3, 1e-1)
# Rounds in which the surgeon takes weights away.
ROUNDS = 8
# Multiplications above which a weight is not solved for: about a minute on one thread.
MOST_WORK = 2e11


@dataclass(frozen=True, eq=False)
class Wanted:
    """What is to be left of a weight: ``count`` values, or those that ``pattern`` leaves; only where ``allowed`` [groups, rows, columns]."""

    count: int
    pattern: Pattern | None
    allowed: Tensor

    def mask(self, scores: Tensor, per_row: bool = False) -> Tensor:
        """The mask of the highest scores."""
        scores = torch.where(self.allowed, scores.double(), -1.0)
        best = keep_best(scores, self.count, per_row) if self.pattern is None else keep_pattern(scores, self.pattern)
        return best & self.allowed

    def steps(self) -> list[int | Pattern]:
        """What is to be left after each round of taking away: equal shares of what is left, or one less of each run."""
        if self.pattern is not None:
            return [Pattern(keep, self.pattern.of) for keep in range(self.pattern.of - 1, self.pattern.keep - 1, -1)]
        start = max(1, int(self.allowed.sum()))
        return [round(start * (self.count / start) ** (step / ROUNDS)) for step in range(1, ROUNDS + 1)]


class Solved(NamedTuple):
    """A sparse weight, float64 [groups, rows, columns], how it was made, and its relative squared output error on held-back data."""

    matrix: Tensor
    method: str
    error: float | None = None


def spread(allocation: str, weights: Sequence[Weight], matrices: Sequence[Tensor], density: float) -> list[int]:
    """How many values stay in each weight when of all together the share ``density`` stays; one for each row at least.

    Args:
        allocation: ``lamp``, ``erk``, ``global`` or ``uniform``: see :class:`~downsize.techniques.sparsify.Sparsify`.
        matrices: the weights, [groups, rows, columns] each.
    """
    sizes = [matrix.numel() for matrix in matrices]
    if allocation == "uniform":
        counts = [round(density * size) for size in sizes]
    elif allocation == "erk":
        counts = [round(share * size) for share, size in zip(erk([weight.shape for weight in weights], density), sizes, strict=True)]
    else:
        scores = [matrix.abs() if allocation == "global" else lamp(matrix) for matrix in matrices]
        counts = counts_above(scores, round(density * sum(sizes)))
    return [max(weight.rows, count) for weight, count in zip(weights, counts, strict=True)]


def by_magnitude(matrix: Tensor, wanted: Wanted) -> Solved:
    """The largest weights, as they are: what can be done without data."""
    return Solved(matrix.double() * wanted.mask(matrix.abs()), "magnitude")


def solve(matrix: Tensor, wanted: Wanted, fit: Quadratic, held: Quadratic, methods: Sequence[str], polish: bool) -> Solved:
    """The sparse weight of least error on ``held``, among those that the methods make with ``fit``; with ``polish`` also those whose values
    are solved for by least squares.

    Args:
        matrix: the weight, [groups, rows, columns]; where it is too large for the surgeon, that one is replaced by SparseGPT.
    """
    if "surgeon" in methods and surgeon_work(wanted.allowed, wanted.steps()) > MOST_WORK:
        methods = tuple(dict.fromkeys("sparsegpt" if method == "surgeon" else method for method in methods))
    target = _target(matrix, fit, held) if polish else matrix
    found: list[Solved] = []
    for method in methods:
        made = _made(method, matrix, target, wanted, fit)
        found.append(Solved(made, method, held.error(made)))
        if polish:
            found += _polished(found[-1], matrix, fit, held, RIDGES[:1])
    best = min(found, key=_error)
    if best.method.endswith("polished"):
        best = min([best, *_polished(best, matrix, fit, held, RIDGES[1:])], key=_error)
    return best


def _error(solved: Solved) -> float:
    assert solved.error is not None
    return solved.error


def _target(matrix: Tensor, fit: Quadratic, held: Quadratic) -> Tensor:
    """The dense weight that makes up best for what the changed layers before have done to the inputs."""
    full = torch.ones_like(matrix, dtype=torch.bool)
    options = [matrix.double(), *(least_squares(matrix, full, fit, ridge) for ridge in RIDGES)]
    return min(options, key=held.error)


def _made(method: str, matrix: Tensor, target: Tensor, wanted: Wanted, fit: Quadratic) -> Tensor:
    if method == "magnitude":
        return by_magnitude(matrix, wanted).matrix
    if method == "wanda":
        return matrix.double() * wanted.mask(wanda(matrix, fit.gram), per_row=True)
    if method == "surgeon":
        return surgeon(matrix, fit, wanted.steps(), wanted.allowed, RIDGES[0])
    return sparsegpt(target, fit.gram, wanted.count, wanted.pattern, wanted.allowed)


def _polished(made: Solved, matrix: Tensor, fit: Quadratic, held: Quadratic, ridges: Sequence[float]) -> list[Solved]:
    mask = made.matrix != 0
    if solving_work(mask) > MOST_WORK:
        return []
    solutions = [least_squares(matrix, mask, fit, ridge) for ridge in ridges]
    name = made.method.removesuffix(", polished") + ", polished"
    return [Solved(solution, name, held.error(solution)) for solution in solutions]

"""Factors of a convolution's weight by alternating least squares in the output error: each factor in turn, the others held.

A weight [outputs q, inputs i, height y, width x] is written as a product by an equation of :func:`torch.einsum`, and the error of another
weight W' is ``tr((W - W') C (W - W')^T)`` with C the covariance of the inputs under the kernel. The last factor, which makes the outputs,
is solved exactly; an inner one by a few steps of preconditioned conjugate gradients, of which none raises the error.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from .lowrank import centred, directions, finite, raised

# Added to a covariance's diagonal, as a part of its mean: what the data leave open follows the weight itself.
OPEN = 1e-6
# The ridge of normal equations of unit diagonal, which may be singular.
RIDGE = 1e-12
# Steps of conjugate gradients each time a factor has its turn.
STEPS = 3
# At most so many rounds, fewer when one takes away less than a part of the error. A round is measured by the products of all outputs' weights
# with the covariance: within WORK of them, but the first two as long as they stay within LONGEST.
ROUNDS = 60
WORK = 20_000_000
LONGEST = 400_000_000
LEAST_GAIN = 0.005

Linear = Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Goal:
    """One group of a convolution: what its factors should give, and on which inputs.

    weight: [outputs, inputs, height, width], double precision. covariance: [n, n] with n = inputs * height * width, a sum over
    positions. damped: the one that is solved with. mean: [n], of the inputs. positions: how many.
    """

    weight: Tensor
    covariance: Tensor
    damped: Tensor
    mean: Tensor
    positions: float

    @cached_property
    def matrix(self) -> Tensor:
        """The weight as [outputs, n]."""
        return self.weight.flatten(1)

    @cached_property
    def wanted(self) -> Tensor:
        """The weight times the damped covariance: [outputs, n]."""
        return self.matrix @ self.damped

    @cached_property
    def energy(self) -> float:
        """Of the centred output."""
        return float((self.matrix @ self.covariance * self.matrix).sum())

    @cached_property
    def taps(self) -> Tensor:
        """The damped covariance, [inputs, height, width, inputs, height, width]."""
        return self.damped.reshape(*self.weight.shape[1:], *self.weight.shape[1:])

    @property
    def rounds(self) -> int:
        """How often the factors may have their turn: a small layer's as often as it takes, a large one's as long as that pays."""
        work = max(1, self.wanted.numel() * len(self.damped))
        return max(min(2, LONGEST // work), min(ROUNDS, WORK // work))

    def error(self, matrix: Tensor) -> float:
        """The squared output error of another weight [outputs, n]."""
        missed = self.matrix - matrix
        return max(0.0, float((missed @ self.covariance * missed).sum()))


def goal_of(weight: Tensor, gram: Tensor | None, damping: float) -> Goal:
    """The goal of a weight [outputs, inputs, height, width] with the Gram matrix of its inputs and a 1 (see :func:`~.lowrank.spectrum`)."""
    finite(weight)
    covariance, mean, positions = centred(gram, weight[0].numel())
    damped = covariance if gram is None else raised(covariance, damping + OPEN)
    return Goal(weight.double(), covariance, damped, mean, positions)


@dataclass(frozen=True)
class Pair:
    """A weight as two factors: which letters they have.

    product: the equation of the inner and the last factor. unfolded: the weight as [..., rows, columns], columns being what the inner
    factor combines. block: the part of the covariance of those columns, summed over the taps that are not among them. batch: 1 if every
    input has an inner factor of its own, else 0. columns: how many dimensions they have.
    """

    product: str
    unfolded: str
    block: str
    batch: int
    columns: int

    @cached_property
    def overlap(self) -> str:
        """The equation of the last factor's products with itself, summed over all but the ranks."""
        last = self.product.split(",")[1].split("->")[0]
        rank = self.product[self.batch]
        return f"{last},{last.replace(rank, 's')}->{self.product[: self.batch]}{rank}s"

    def blocks(self, goal: Goal) -> Tensor:
        """The covariance of an inner factor's columns, [..., columns, columns]."""
        part = torch.einsum(self.block, goal.taps)
        return part.flatten(-self.columns).flatten(self.batch, -2)

    def start(self, goal: Goal) -> Tensor:
        """Inner factors of every rank at once, [..., ranks, columns ...]: the best if taps apart from one another did not correlate."""
        rows = torch.einsum(self.unfolded, goal.weight)
        shape = rows.shape[rows.dim() - self.columns :]
        rows = rows.flatten(-self.columns).flatten(self.batch, -2)
        block = self.blocks(goal)
        left, _, _ = directions(rows, block, block)
        return (left.mT @ rows).unflatten(-1, shape)

    def ranked(self, start: Tensor, rank: int) -> Tensor:
        """The inner factor of one rank."""
        return start.narrow(self.batch, 0, rank)


@dataclass(frozen=True, eq=False)
class Fit:
    """inner: the inner factor. outer: [outputs, q], orthonormal. last: [q, ...]; outer times last is the last factor."""

    inner: Tensor
    outer: Tensor
    last: Tensor

    def matrix(self, pair: Pair) -> Tensor:
        """The weight that the factors stand for, [outputs, n]."""
        return self.outer @ torch.einsum(pair.product, self.inner, self.last).flatten(1)


def improved(goal: Goal, pair: Pair, fit: Fit, block: Tensor) -> Tensor:
    """The inner factor after some steps of conjugate gradients, preconditioned by what the normal equations are if taps do not correlate.

    Args:
        block: of :meth:`Pair.blocks`.
    """
    inner, last = pair.product.split("->")[0].split(",")
    adjoint = f"{last},{pair.product.split('->')[1]}->{inner}"
    shape = goal.weight.shape[1:]

    def product(direction: Tensor) -> Tensor:
        return torch.einsum(pair.product, direction, fit.last).flatten(1)

    def back(matrix: Tensor) -> Tensor:
        return torch.einsum(adjoint, fit.last, matrix.unflatten(1, shape))

    scale = two_sided(torch.einsum(pair.overlap, fit.last, fit.last), block, pair.columns)
    return descended(goal, fit.inner, fit.outer, product, back, scale)


def descended(goal: Goal, inner: Tensor, outer: Tensor, product: Linear, back: Linear, scale: Linear) -> Tensor:
    """A factor after some steps of preconditioned conjugate gradients on its normal equations.

    Args:
        outer: [outputs, q], orthonormal; the weight is outer times what the factor gives.
        product: from the factor to [q, n]. back: its adjoint. scale: about the inverse of the normal equations.
    """
    residual = back(outer.mT @ goal.wanted - product(inner) @ goal.damped)
    found, direction, slope = inner, torch.zeros_like(inner), 0.0
    for _ in range(STEPS):
        step = scale(residual)
        before, slope = slope, float((residual * step).sum())
        if slope <= 0:
            break
        direction = step + (slope / before if before else 0.0) * direction
        image = product(direction)
        through = image @ goal.damped
        curvature = float((image * through).sum())
        if curvature <= 0:
            break
        found = found + slope / curvature * direction
        residual = residual - slope / curvature * back(through)
    return found


def two_sided(left: Tensor, right: Tensor, columns: int) -> Linear:
    """``X -> left^-1 X right^-1`` for X [..., ranks, columns ...]; both raised a little, as they may be singular."""
    a, b = (torch.linalg.inv(raised(part, 1e-9)) for part in (left, right))
    return lambda x: (a @ x.flatten(-columns) @ b).unflatten(-1, x.shape[x.dim() - columns :])


def last_factor(goal: Goal, basis: Tensor, ridge: float = RIDGE) -> tuple[Tensor, Tensor]:
    """The least-squares matrix [outputs, p] on a basis [p, n], and the products ``W C basis^T`` [outputs, p].

    Args:
        ridge: relative to the diagonal of the normal equations, which counts every row of the basis alike.
    """
    through = basis @ goal.damped
    gram, cross = through @ basis.mT, goal.matrix @ through.mT
    size = gram.diagonal().clamp(min=0).sqrt()
    unit = torch.where(size > 0, 1 / size.clamp(min=torch.finfo(torch.float64).tiny), 0.0)
    normal = gram * unit[:, None] * unit
    factor, failed = torch.linalg.cholesky_ex(raised_by(normal, ridge))
    while int(failed):
        ridge = max(ridge, RIDGE) * 10
        factor, failed = torch.linalg.cholesky_ex(raised_by(normal, ridge))
    return torch.cholesky_solve((cross * unit).mT, factor).mT * unit, cross


def raised_by(matrix: Tensor, ridge: float) -> Tensor:
    """[n, n] with the ridge on its diagonal."""
    return matrix + ridge * torch.eye(len(matrix), dtype=matrix.dtype)


def basis_of(pair: Pair, inner: Tensor, last: torch.Size) -> Tensor:
    """What the last factor of that shape [outputs, ...] combines: [p, n]."""
    unit = torch.eye(last[1:].numel(), dtype=inner.dtype).unflatten(1, last[1:])
    return torch.einsum(pair.product, inner, unit).flatten(1)


def alternate(goal: Goal, pair: Pair, inner: Tensor, last: torch.Size, block: Tensor, rank: int | None) -> Fit:
    """The best pair of factors that alternating least squares finds from a first inner factor.

    After each round a longer step in its direction is kept where the error falls (Bro 1998, "Multi-way analysis in the food industry").

    Args:
        last: the shape of the last factor, [outputs, ...].
        rank: of the last factor as a matrix [outputs, p]; None: whatever it has.
    """
    found = _fitted(goal, pair, inner, last, rank)
    full, stride = float((goal.wanted * goal.matrix).sum()), 1.0
    for _ in range(goal.rounds):
        fit, error = found
        if error <= 1e-12 * full:
            break
        moved = improved(goal, pair, fit, block)
        changed, further = (_fitted(goal, pair, to, last, rank) for to in (moved, moved + stride * (moved - fit.inner)))
        stride = stride * 1.5 if further[1] < changed[1] else stride / 2
        found = min(found, changed, further, key=lambda one: one[1])
        if error - found[1] <= LEAST_GAIN * error:
            break
    return found[0]


def _fitted(goal: Goal, pair: Pair, inner: Tensor, last: torch.Size, rank: int | None) -> tuple[Fit, float]:
    """The best last factor for an inner one, and the error by the damped covariance."""
    matrix, cross = last_factor(goal, basis_of(pair, inner, last))
    if rank is None or rank >= min(matrix.shape):
        outer = torch.linalg.qr(matrix)[0] if matrix.shape[1] < len(matrix) else torch.eye(len(matrix), dtype=matrix.dtype)
    else:
        products = matrix @ cross.mT
        outer = torch.linalg.eigh((products + products.mT) / 2)[1][:, -rank:].flip(1)
    reduced = outer.mT @ matrix
    error = float((goal.wanted * goal.matrix).sum()) - float((reduced * (outer.mT @ cross)).sum())
    return Fit(inner, outer, reduced.unflatten(1, last[1:])), error

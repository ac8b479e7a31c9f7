"""Which units of a layer's input to remove, by the output error left after the best repair: OBS on Gram matrices, greedy.

A unit (a channel, a head, a neuron) is a set of columns in one or more readings; a reading is a layer that reads it. The error of a
reading is the quadratic form of its Gram matrix H, so that everything below is exact algebra on the calibration data (Hassibi & Stork
1993, "Second order derivatives for network pruning"; for sets of columns Kurtic et al. 2023, ZipLM, arXiv 2302.04089).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

DAMPING = 0.01
# Below this the Gram matrix of few or dependent samples cannot be inverted in double precision.
SMALLEST_DAMPING = 1e-9
# Columns that go before the inverse and the weight are brought up to date: one large product instead of many passes over memory.
BLOCK = 96


@dataclass(frozen=True)
class Reading:
    """A layer that reads units.

    weight: [rows, columns]. gram: [columns, columns], the sum of ``x x^T`` over inputs, at any positive scale. unit: int64 [columns],
    the unit that a column belongs to, -1 for columns that never go (a bias as a column of ones is one: then constant units cost
    nothing). importance: the factor of this reading's error in the sum over readings.
    """

    weight: Tensor
    gram: Tensor
    unit: Tensor
    importance: float = 1.0


@dataclass(frozen=True)
class Removal:
    """order: int64 [count], the units in the order in which they go. errors: float64 [count + 1], the output error after each, errors[0] = 0."""

    order: Tensor
    errors: Tensor


def remove(readings: Sequence[Reading], units: int, count: int, grain: int = 1, damping: float = DAMPING, keep: Tensor | None = None) -> Removal:
    """Remove ``count`` units one after the other, each time the one that costs least, the columns that stay making up for it.

    Removing the columns S of a reading costs ``tr(W_S (Hinv_SS)^-1 W_S^T)``; a unit's cost is the sum over its readings. Then the weights
    take their optimal update and Hinv its Schur complement. The error at every count is that of the weights of :func:`repaired`: the sum
    over readings of ``importance * ||W_old X - W_new X||^2``, without the damping.

    Args:
        units: how many units there are; those without columns cost nothing.
        grain: how many units are chosen at a time, by the costs before any of them goes. More is faster, but of two units that can
            stand in for each other both may go. The errors stay exact.
        damping: added to the diagonal of each Gram matrix, as a fraction of its mean.
        keep: bool [units], the units that must not go.

    Raises:
        ValueError: fewer than ``count`` units may go, or the shapes do not fit.
    """
    free = torch.ones(units, dtype=torch.bool) if keep is None else ~keep.bool()
    if not 0 <= count <= int(free.sum()) or grain < 1:
        raise ValueError(f"{count} units to remove, {grain} at a time; expected at most the {int(free.sum())} that may go, at least 1 at a time.")
    solvers = [_Solver(reading, units, damping) for reading in readings]
    order: list[int] = []
    errors = [0.0]
    while len(order) < count:
        cost = torch.zeros(units, dtype=torch.float64)
        for solver in solvers:
            cost += solver.costs(free)
        size = min(grain, count - len(order))
        chosen = cost.masked_fill(~free, torch.inf).argsort(stable=True)[:size]
        free[chosen] = False
        after = torch.stack([solver.take(chosen) for solver in solvers]).sum(0) if solvers else torch.zeros(size, dtype=torch.float64)
        order += chosen.tolist()
        errors += after.clamp(min=0).tolist()
    return Removal(torch.tensor(order, dtype=torch.int64), torch.tensor(errors, dtype=torch.float64))


def repaired(reading: Reading, gone: Tensor, damping: float = DAMPING) -> Tensor:
    """The weight [rows, columns] that comes nearest to the old outputs without the units ``gone`` (int64): their columns are zero.

    The kept columns K are ``W H_:K (H_KK)^-1`` on the damped Gram matrix: what :func:`remove` counts its errors for.
    """
    weight, gram, _, _ = _damped(reading, damping)
    stays = ~torch.isin(reading.unit, gone)
    new = torch.zeros_like(weight)
    if bool(stays.any()):
        factor = torch.linalg.cholesky(gram[stays][:, stays])
        new[:, stays] = torch.cholesky_solve(gram[stays] @ weight.T, factor).T
    silent = (reading.gram.diagonal() <= 0) & stays
    new[:, silent] = reading.weight.double()[:, silent]
    return new.to(reading.weight.dtype)


def members(unit: Tensor, units: int) -> Tensor:
    """The positions of each unit: int64 [units, most], padded with -1.

    >>> members(torch.tensor([1, 0, 1, -1]), 2)
    tensor([[ 1, -1],
            [ 0,  2]])
    """
    if unit.numel() and int(unit.max()) >= units:
        raise ValueError(f"unit {int(unit.max())} came; expected units below {units}.")
    positions = (unit >= 0).nonzero()[:, 0]
    positions = positions[unit[positions].argsort(stable=True)]
    owners = unit[positions]
    counts = torch.bincount(owners, minlength=units)
    table = torch.full((units, int(counts.max()) if units else 0), -1, dtype=torch.int64)
    table[owners, torch.arange(len(owners)) - (counts.cumsum(0) - counts)[owners]] = positions
    return table


def _damped(reading: Reading, damping: float) -> tuple[Tensor, Tensor, Tensor, float]:
    """The weight without columns whose input was always zero, the damped Gram matrix, its Cholesky factor, and what was added to its diagonal.

    The damping is a fraction of the mean over the inputs that are not always zero. Where a matrix of rounded sums is still not positive
    definite, it grows tenfold until it is.
    """
    weight, gram = reading.weight.detach().double(), reading.gram.double()
    columns = weight.shape[1]
    if gram.shape != (columns, columns) or reading.unit.shape != (columns,):
        raise ValueError(f"a weight with {columns} columns has a Gram matrix {list(gram.shape)} and units {list(reading.unit.shape)}.")
    if not bool(torch.isfinite(gram).all() & torch.isfinite(weight).all()):
        raise ValueError("a weight or a Gram matrix has NaN or infinite values; expected finite ones.")
    diagonal = gram.diagonal()
    mean = float(diagonal.sum() / (diagonal > 0).sum().clamp(min=1))
    level = max(damping, SMALLEST_DAMPING) * (mean if mean > 0 else 1.0)
    while True:
        damped = gram + torch.eye(columns, dtype=torch.float64) * level
        factor, failed = torch.linalg.cholesky_ex(damped)
        if not int(failed):
            return torch.where(diagonal > 0, weight, 0.0), damped, factor, level
        level *= 10


class _Solver:
    """One reading while its units go.

    Between two updates of the large matrices, the current ones are ``inverse - panel panel^T`` and ``weight - rise panel^T``; what
    the costs need (the blocks on the diagonal of Hinv and of W^T W) is always current. Columns that went are dropped at an update.
    """

    def __init__(self, reading: Reading, units: int, damping: float) -> None:
        weight, _, factor, self.level = _damped(reading, damping)
        weight = weight * reading.importance**0.5
        if weight.shape[0] > weight.shape[1]:
            # Errors depend on W^T W alone, so that the triangle of W = Q R serves as well as W.
            weight = torch.linalg.qr(weight, mode="r").R
        self.inverse = torch.cholesky_inverse(factor)
        self.weight, self.first = weight, weight
        self.unit = reading.unit
        self.units = units
        self.error = 0.0
        self._renew()

    def _renew(self) -> None:
        """Start a block: no columns gone since the last update."""
        columns = len(self.unit)
        self.gone = torch.zeros(columns, dtype=torch.bool)
        self.panel = torch.zeros(columns, 0, dtype=torch.float64)
        self.rise = torch.zeros(self.weight.shape[0], 0, dtype=torch.float64)
        self.table = members(self.unit, self.units)
        self.real = self.table >= 0
        self.index = self.table.clamp(min=0)
        if not columns:
            return
        pairs = self.real[:, :, None] & self.real[:, None, :]
        empty = torch.eye(self.table.shape[1], dtype=torch.float64)
        self.block = torch.where(pairs, self.inverse[self.index[:, :, None], self.index[:, None, :]], empty)
        read = torch.where(self.real[:, None, :], self.weight.T[self.index].mT, 0.0)
        self.product = read.mT @ read

    def costs(self, free: Tensor) -> Tensor:
        """What each unit costs to remove now: [units]; that of units which are not free means nothing."""
        if not self.table.shape[1] or not len(self.unit):
            return torch.zeros(self.units, dtype=torch.float64)
        if self.table.shape[1] == 1:
            return (self.product / self.block.clamp(min=torch.finfo(torch.float64).tiny)).reshape(-1)
        cost = torch.zeros(self.units, dtype=torch.float64)
        cost[free] = (self.product[free] * torch.cholesky_inverse(torch.linalg.cholesky(self.block[free]))).sum((1, 2))
        return cost

    def take(self, chosen: Tensor) -> Tensor:
        """Remove units, in this order, at once. Returns the error after each: [chosen]."""
        counts = self.real[chosen].sum(1)
        if self.panel.shape[1] and self.panel.shape[1] + int(counts.sum()) > BLOCK:
            self._update()
        gone = self.table[chosen][self.real[chosen]]
        if not len(gone):
            return torch.full((len(chosen),), self.error, dtype=torch.float64)
        inverse = self.inverse[gone] - self.panel[gone] @ self.panel.T
        factor = torch.linalg.cholesky(inverse[:, gone])
        panel = torch.linalg.solve_triangular(factor, inverse, upper=False).T
        read = self.weight[:, gone] - self.rise @ self.panel[gone].T
        rise = torch.linalg.solve_triangular(factor, read.T, upper=False).T
        pull = rise.T @ self.weight - (rise.T @ self.rise) @ self.panel.T
        errors = self._errors(panel, rise, pull)
        self._follow(panel, rise, pull)
        self.panel, self.rise = torch.cat([self.panel, panel], 1), torch.cat([self.rise, rise], 1)
        self.gone[gone] = True
        after = torch.cat([torch.tensor([self.error], dtype=torch.float64), errors])[counts.cumsum(0)]
        self.error = float(after[-1])
        return after

    def _errors(self, panel: Tensor, rise: Tensor, pull: Tensor) -> Tensor:
        """The error after each column of a step: the damped one grows by the column's cost; what the damping counts for is taken off.

        That is ``level * ||first - weight||^2``, which each column changes by a product of rank one.
        """
        inner, spread = rise.T @ rise, panel.T @ panel
        moved = ((rise.T @ self.first - pull) * panel.T).sum(1)
        growth = 2 * moved + 2 * (inner * spread).tril(-1).sum(1) + inner.diagonal() * spread.diagonal()
        return self.error + (inner.diagonal() - self.level * growth).cumsum(0)

    def _follow(self, panel: Tensor, rise: Tensor, pull: Tensor) -> None:
        """Bring the diagonal blocks of Hinv and W^T W up to date."""
        own = torch.where(self.real[:, :, None], panel[self.index], 0.0)
        half = pull - 0.5 * (rise.T @ rise) @ panel.T
        change = own @ torch.where(self.real[:, None, :], half.T[self.index].mT, 0.0)
        self.block -= own @ own.mT
        self.product -= change + change.mT

    def _update(self) -> None:
        """Bring the large matrices up to date and drop the columns that went."""
        stays = ~self.gone
        panel = self.panel[stays]
        self.inverse = self.inverse[stays][:, stays].addmm_(panel, panel.T, alpha=-1)
        self.weight = self.weight[:, stays].addmm_(self.rise, panel.T, alpha=-1)
        self.first, self.unit = self.first[:, stays], self.unit[stays]
        self._renew()

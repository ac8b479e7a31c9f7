"""Closed-form refit of a layer from moments: the original's outputs, from the inputs that the smaller network gives.

With A the covariance of the inputs and R that of the inputs with what the old weight misses, the weight changes by ``R A^-1``. With few
samples the small eigenvalues of A are noise, and dividing by them fits noise. So a ridge damps that division, and the one that errs
least on moments of other samples is taken, if any errs less than no refit at all.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# Inputs are multiplied in pieces of so many positions in their own precision, which are then summed in double precision.
POSITIONS = 4096
RIDGES = (1e-4, 1e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0, 3.0, 10.0)
# Wider layers are solved for each ridge, as their eigendecomposition takes longer than that.
LARGEST_COLUMNS = 2304
# Inputs whose squared deviation is less than this part of their squares are taken as constant: the rest is rounding.
CONSTANT = 1e-12
# A pivot below this part of the mean squared deviation is rounding: the ridge is raised until there is none.
SMALLEST_PIVOT = 1e-6
# How many elements of Gram matrices the rows of a sparse weight may take at a time.
ELEMENTS = 2**24


@dataclass
class Moments:
    """Sums over positions of what a layer reads and should give. Convolutions are unfolded; a layer without groups has one.

    gram: [groups, columns + 1, columns + 1], of the inputs with a 1 behind them. cross: [groups, rows, columns + 1], targets by inputs.
    energy: [groups, rows], of the squared targets. count: positions. All double precision.
    """

    gram: Tensor
    cross: Tensor
    energy: Tensor
    count: int = 0

    @staticmethod
    def zero(groups: int, rows: int, columns: int) -> Moments:
        """The moments of nothing yet."""
        wide, double = columns + 1, torch.float64
        return Moments(
            torch.zeros(groups, wide, wide, dtype=double), torch.zeros(groups, rows, wide, dtype=double), torch.zeros(groups, rows, dtype=double)
        )

    def add(self, x: Tensor, y: Tensor) -> None:
        """Take in inputs [groups, columns, positions] and targets [groups, rows, positions].

        Products are taken in the precision of ``x``, of pieces whose mean is taken off before and put back in double precision: a
        large mean costs no accuracy.

        Raises:
            ValueError: the shapes do not fit, or a value is NaN or infinite; then nothing was taken in.
        """
        groups, rows, wide = self.cross.shape
        if x.shape[:2] != (groups, wide - 1) or y.shape != (groups, rows, x.shape[2]):
            raise ValueError(
                f"inputs {list(x.shape)} and targets {list(y.shape)} came; expected [{groups}, {wide - 1}, n] and [{groups}, {rows}, n]."
            )
        if not bool(torch.isfinite(x).all() & torch.isfinite(y).all()):
            raise ValueError("inputs or targets have NaN or infinite values; expected finite ones.")
        for start in range(0, x.shape[2], POSITIONS):
            self._add(x[:, :, start : start + POSITIONS].detach(), y[:, :, start : start + POSITIONS].detach())
        self.count += x.shape[2]

    def _add(self, x: Tensor, y: Tensor) -> None:
        y = y.to(x.dtype)
        x_mean, y_mean = x.mean(2, keepdim=True), y.mean(2, keepdim=True)
        x, y = x - x_mean, y - y_mean
        ones = torch.ones_like(x_mean[:, :1])
        x = torch.cat([x, torch.zeros_like(x[:, :1])], 1)
        shift, mean = torch.cat([x_mean, ones], 1).double(), y_mean.double()
        # Not exactly zero: the mean was rounded.
        rest, y_rest = x.sum(2, keepdim=True, dtype=torch.float64), y.sum(2, keepdim=True, dtype=torch.float64)
        count = x.shape[2]
        self.gram += (x @ x.mT).double() + rest @ shift.mT + shift @ rest.mT + count * shift @ shift.mT
        self.cross += (y @ x.mT).double() + y_rest @ shift.mT + mean @ rest.mT + count * mean @ shift.mT
        self.energy += (y.square().sum(2, keepdim=True, dtype=torch.float64) + 2 * mean * y_rest + count * mean.square())[:, :, 0]


def refit(
    moments: Moments, weight: Tensor, bias: Tensor | None, ridge: float, support: Tensor | None = None, own: bool = False
) -> tuple[Tensor, Tensor | None]:
    """The weight and bias that minimise ``sum ||y - W x - b||^2 + ridge * d * ||W - W_old||^2``; the bias is free.

    The factor d is the mean, over the columns that vary, of their summed squared deviation: the ridge has no unit. Where the inputs
    leave the weight undetermined and the ridge is 0, it changes least (up to about ``SMALLEST_PIVOT``).

    Args:
        weight: [groups, rows, columns], the old one.
        bias: [groups, rows]; None for a layer that has none and gets none: then squares, not squared deviations, make d.
        support: bool like ``weight``; weights outside are set to zero and stay zero.
        own: the ridge of each column is a fraction of its own squared deviation (instead of d).

    Returns: both in the shape and dtype of the old ones.

    Raises:
        ValueError: the moments are those of no positions.
    """
    old = weight.double() if support is None else torch.where(support, weight.double(), 0.0)
    a, missed = _normal(moments, old, moments if bias is not None else None)
    diagonal, mean = a.diagonal(dim1=1, dim2=2), _mean(a)
    added = ridge * (diagonal if own else mean[:, None].expand_as(diagonal))
    # A constant input is missed by nothing, so that any positive diagonal leaves its weight as it is.
    damped = a + torch.diag_embed(torch.where(diagonal > 0, added, mean[:, None]))
    if support is None:
        change = torch.cholesky_solve(missed.mT, _factor(damped, mean)).mT
    else:
        change = torch.stack([_sparse(*parts) for parts in zip(damped, missed, support, mean, strict=True)])
    return _finish(moments, old + change, weight, bias)


def residual(moments: Moments, weight: Tensor, bias: Tensor | None) -> float:
    """The relative output error ``sum ||y - W x - b||^2 / sum ||y - mean y||^2``, by the moments alone.

    Targets that never vary are measured by their squares (0 for no error at all).
    """
    return _error(moments, weight, bias) / _variation(moments)


def best_refit(
    fit: Moments, held: Moments, weight: Tensor, bias: Tensor | None, ridges: Sequence[float] = RIDGES, support: Tensor | None = None
) -> tuple[Tensor, Tensor | None, float, float]:
    """The refit on ``fit`` that errs least on ``held``, the moments of samples that are not in ``fit``.

    Candidates: nothing; the bias alone; and each ridge towards the old weight, of both kinds (see ``own`` of :func:`refit`). More ways
    to damp (eigenvalues left out, a covariance shrunk towards its diagonal) were tried on a small convolutional network, and were no
    better on further samples. Layers wider than ``LARGEST_COLUMNS``, and sparse ones, are solved anew for each ridge.

    Returns: weight and bias, and the error (see :func:`residual`) on ``held`` before and after, which is never higher. Equal errors
    mean that nothing was changed.
    """
    old = weight if support is None else torch.where(support, weight, 0)
    before = _error(held, old, bias)
    best = (old, bias, before)
    for new, shift in _candidates(fit, held, old, bias, ridges, support):
        after = _error(held, new, shift)
        if after < best[2]:
            best = (new, shift, after)
    variation = _variation(held)
    return best[0], best[1], before / variation, best[2] / variation


def _candidates(
    fit: Moments, held: Moments, weight: Tensor, bias: Tensor | None, ridges: Sequence[float], support: Tensor | None
) -> Iterator[tuple[Tensor, Tensor | None]]:
    old = weight.double()
    yield _finish(fit, old, weight, bias)
    if support is not None or weight.shape[2] > LARGEST_COLUMNS:
        for own in (False, True):
            for ridge in ridges:
                yield refit(fit, weight, bias, ridge, support, own)
        return
    for own in (False, True) if ridges else ():
        yield _finish(fit, old + _spectral(fit, held, old, bias is not None, ridges, own), weight, bias)


def _spectral(fit: Moments, held: Moments, old: Tensor, centred: bool, ridges: Sequence[float], own: bool) -> Tensor:
    """The change of the weight with the ridge that errs least on ``held``, from one eigendecomposition a group.

    With the change ``Z f V^T`` for factors f of the eigenvalues, the error on ``held`` is a quadratic form in f, of the size of a
    column: so one more ridge costs next to nothing.
    """
    a, missed = _normal(fit, old, fit if centred else None)
    test, test_missed = _normal(held, old, fit if centred else None)
    diagonal = a.diagonal(dim1=1, dim2=2)
    mean = _mean(a)
    unit = (diagonal if own else mean[:, None].expand_as(diagonal)).sqrt()
    unit = torch.where(diagonal > 0, 1 / unit.clamp(min=1e-150), 0.0)
    values, vectors = torch.linalg.eigh(a * unit[:, :, None] * unit[:, None, :])
    vectors = unit[:, :, None] * vectors
    z = missed @ vectors
    linear = (z * (test_missed @ vectors)).sum(1)
    quadratic = (z.mT @ z) * (vectors.mT @ test @ vectors)
    # A ridge of 0 would divide by what is rounding.
    factors = [1 / (values.clamp(min=0) + max(ridge, SMALLEST_PIVOT)) for ridge in ridges]
    errors = [float((factor * (quadratic @ factor[:, :, None])[:, :, 0] - 2 * linear * factor).sum()) for factor in factors]
    best = factors[errors.index(min(errors))]
    return (z * best[:, None, :]) @ vectors.mT


def _normal(moments: Moments, old: Tensor, center: Moments | None) -> tuple[Tensor, Tensor]:
    """Second moments of the inputs, and of what the old weight misses by the inputs, about the means of ``center`` (None: about zero).

    Returns [groups, columns, columns] and [groups, rows, columns]. Inputs that are constant have zeros.
    """
    gram, cross = moments.gram[:, :-1, :-1], moments.cross[:, :, :-1]
    raw = gram.diagonal(dim1=1, dim2=2)
    if center is not None:
        x, y = _means(center)
        x_sum, y_sum = moments.gram[:, :-1, -1], moments.cross[:, :, -1]
        gram = gram - x_sum[:, :, None] * x[:, None] - x[:, :, None] * x_sum[:, None] + moments.count * x[:, :, None] * x[:, None]
        cross = cross - y_sum[:, :, None] * x[:, None] - y[:, :, None] * x_sum[:, None] + moments.count * y[:, :, None] * x[:, None]
    varies = gram.diagonal(dim1=1, dim2=2) > CONSTANT * raw
    gram = gram * varies[:, :, None] * varies[:, None, :]
    return gram, (cross - old @ gram) * varies[:, None, :]


def _means(moments: Moments) -> tuple[Tensor, Tensor]:
    """The means of inputs [groups, columns] and targets [groups, rows]."""
    if not moments.count:
        raise ValueError("moments of no positions came; expected at least one: add inputs and targets before.")
    return moments.gram[:, :-1, -1] / moments.count, moments.cross[:, :, -1] / moments.count


def _mean(a: Tensor) -> Tensor:
    """The mean of a diagonal over what is not zero: [groups]; 1 if all is."""
    diagonal = a.diagonal(dim1=1, dim2=2)
    mean = diagonal.sum(1) / (diagonal > 0).sum(1).clamp(min=1)
    return torch.where(mean > 0, mean, 1.0)


def _factor(a: Tensor, mean: Tensor) -> Tensor:
    """Cholesky factors of matrices [n, columns, columns]; the diagonal is raised, tenfold each time, until no pivot is rounding."""
    factor, failed = torch.linalg.cholesky_ex(a)
    level = SMALLEST_PIVOT * mean
    while a.shape[1]:
        singular = (failed != 0) | (factor.diagonal(dim1=1, dim2=2).square().amin(1) < SMALLEST_PIVOT / 2 * mean)
        if not bool(singular.any()):
            break
        raised = a[singular] + torch.diag_embed(level[singular, None].expand(-1, a.shape[1]))
        factor[singular], failed[singular] = torch.linalg.cholesky_ex(raised)
        level = level * 10
    return factor


def _sparse(a: Tensor, missed: Tensor, support: Tensor, mean: Tensor) -> Tensor:
    """The change of each row of one group, on the columns of its support alone: [rows, columns]."""
    change = torch.zeros_like(missed)
    counts = support.sum(1)
    order = counts.argsort()
    while len(order):
        # Rows of about as many columns share a batch, filled up with columns of the identity.
        step = max(1, ELEMENTS // max(1, int(counts[order[-1]])) ** 2)
        rows, order = order[-step:], order[:-step]
        most = int(counts[rows].max())
        index = support[rows].to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :most]
        real = support[rows].gather(1, index)
        part = torch.where(real[:, :, None] & real[:, None, :], a[index[:, :, None], index[:, None, :]], 0.0)
        part = part + torch.diag_embed(torch.where(real, 0.0, mean))
        right = torch.where(real, missed[rows].gather(1, index), 0.0)[:, :, None]
        solved = torch.cholesky_solve(right, _factor(part, mean.expand(len(rows))))[:, :, 0]
        change[rows] = torch.zeros_like(change[rows]).scatter_(1, index, solved)
    return change


def _finish(moments: Moments, new: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The new weight in the old one's dtype, and the bias that gives its outputs the mean of the targets."""
    new = new.to(weight.dtype)
    if bias is None:
        return new, None
    x, y = _means(moments)
    return new, (y - (new.double() @ x[:, :, None])[:, :, 0]).to(bias.dtype)


def _error(moments: Moments, weight: Tensor, bias: Tensor | None) -> float:
    """``sum ||y - W x - b||^2``."""
    shift = weight.new_zeros(weight.shape[:2]) if bias is None else bias
    full = torch.cat([weight.double(), shift.double()[:, :, None]], 2)
    return max(0.0, float(moments.energy.sum() + ((full @ moments.gram - 2 * moments.cross) * full).sum()))


def _variation(moments: Moments) -> float:
    """``sum ||y - mean y||^2``; of targets that never vary, their squares, and 1 if these are 0 too."""
    energy = float(moments.energy.sum())
    if not energy:
        return 1.0
    variation = energy - float(moments.cross[:, :, -1].square().sum()) / moments.count
    return variation if variation > CONSTANT * energy else energy

"""Products of two factors that are contracted over a small inner dimension: the basis of it in which they are balanced.

What ``left^T right`` computes with columns of d numbers on both sides does not change when left becomes ``R left`` and right ``R^-T right``.
With the second moments A and B of the two sides, the singular values of the product are those of ``B^(1/2) A^(1/2)``; in the basis of its
singular vectors both sides have the same diagonal second moment, as in the balanced realisations of Moore (1981, "Principal component
analysis in linear systems"), and leaving out the last coordinates is the best approximation of the product (Eckart and Young, 1936).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .lowrank import finite, raised

# Added to the diagonal of both second moments, as a part of its mean: so much at least a direction is taken to carry, which bounds how far
# the basis may stretch it. Below it lies what is left of nothing when activations come in single precision.
LEAST = 1e-6


@dataclass(frozen=True, eq=False)
class Balance:
    """A basis of the inner dimension: ``basis`` [d, d] is R, for the left side, ``inverse`` [d, d] its inverse, whose transpose is for the
    right side. ``values`` [d], falling: what each coordinate carries in the product, a singular value. All double precision."""

    basis: Tensor
    inverse: Tensor
    values: Tensor


def balance(left: Tensor, right: Tensor) -> Balance:
    """The basis in which both second moments [d, d] are diagonal and, up to one number, equal: ``R left R^T = c S``, ``R^-T right R^-1 = S / c``.

    S are the singular values of the product, the largest first; the sum of their squares from the r-th on is the squared error of a product
    without those coordinates, ``tr(left right)`` that of no product at all. The number c keeps the ratio of the two traces.

    Raises:
        ValueError: the shapes differ, are not square, or a value is NaN or infinite.
    """
    if left.shape != right.shape or left.dim() != 2 or left.shape[0] != left.shape[1]:
        raise ValueError(f"second moments {list(left.shape)} and {list(right.shape)} came; expected two of [d, d].")
    finite(left)
    finite(right)
    one, other = _root(left), _root(right)
    outer, values, inner = torch.linalg.svd(other.mT @ one)
    stretch = (one.square().sum() / other.square().sum()) ** 0.25 / values.sqrt()
    shrink = (other.square().sum() / one.square().sum()) ** 0.25 / values.sqrt()
    return Balance(stretch[:, None] * (outer.mT @ other.mT), one @ inner.mT * shrink, values)


def centred_moment(moment: Tensor) -> Tensor:
    """The second moment [d, d] about the mean, of sums [d + 1, d + 1] of ``x x^T`` with a 1 behind x."""
    sums = moment[:-1, -1]
    return moment[:-1, :-1] - sums[:, None] * sums / moment[-1, -1].clamp(min=1)


def _root(moment: Tensor) -> Tensor:
    """L [d, d] with ``L L^T`` the moment, at least so much in each direction."""
    squares, vectors = torch.linalg.eigh(raised((moment + moment.mT).double() / 2, LEAST))
    # Rounding may leave less than that of a direction that carries nothing.
    return vectors * squares.clamp(min=LEAST / 2 * float(squares.mean())).sqrt()

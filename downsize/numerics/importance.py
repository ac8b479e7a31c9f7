"""How much a unit (a channel, a head, a neuron) matters, read from tensors alone: scores [units], higher stays."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .removal import members

# A tensor, one of its dimensions, and int64 [size of that dimension]: the unit that each index belongs to, -1 for none.
Part = tuple[Tensor, int, Tensor]


def magnitude(parts: Sequence[Part], units: int, p: float = 2) -> Tensor:
    """The L1 or L2 norm (``p``) of all that belongs to a unit, over all parts together: for 2 the root of the summed squares (Li et al.
    2017, arXiv 1608.08710).

    >>> weight = torch.tensor([[3.0, 4.0], [0.0, 1.0]])
    >>> magnitude([(weight, 0, torch.tensor([0, 1]))], 2)
    tensor([5., 1.], dtype=torch.float64)
    """
    if p not in (1, 2):
        raise ValueError(f"the norm {p} came; expected 1 or 2.")
    total = torch.zeros(units, dtype=torch.float64)
    for tensor, dim, unit in parts:
        rows = _rows(tensor, dim)
        total += _sums(rows.abs().sum(1) if p == 1 else rows.square().sum(1), unit, units)
    return total if p == 1 else total.sqrt()


def scale(parts: Sequence[Part], units: int) -> Tensor:
    """The sum of the magnitudes of the factors of batch normalisations (Liu et al. 2017, network slimming, arXiv 1708.06519)."""
    return magnitude(parts, units, 1)


def geometric_median(parts: Sequence[Part], units: int) -> Tensor:
    """The sum of the distances to all other units: a unit in their midst can be stood in for (He et al. 2019, FPGM, arXiv 1811.00250).

    A unit's vector is all that belongs to it, part after part, in the order of the indices; a shorter one is filled with zeros.
    """
    vectors = torch.zeros(units, 0, dtype=torch.float64)
    for tensor, dim, unit in parts:
        rows = _rows(tensor, dim)
        table = members(_fitting(unit, rows), units)
        # The row behind the last is what fills a shorter vector.
        rows = torch.cat([rows, rows.new_zeros(1, rows.shape[1])])
        vectors = torch.cat([vectors, rows[table].flatten(1)], 1)
    # By differences, not by products: else twins come out some 1e-8 of their length apart.
    return torch.cdist(vectors, vectors, compute_mode="donot_use_mm_for_euclid_dist").sum(1)


def taylor(parts: Sequence[Part], gradients: Sequence[Tensor], units: int) -> Tensor:
    """How much the loss of one batch changes without the unit, to first order: ``(sum of gradient * value)^2`` over all parts (Molchanov et
    al. 2019, arXiv 1906.10771, equation 8). Scores of batches are summed by the caller.

    Args:
        gradients: one a part, in its tensor's shape.
    """
    total = torch.zeros(units, dtype=torch.float64)
    for (tensor, dim, unit), gradient in zip(parts, gradients, strict=True):
        total += _sums((_rows(tensor, dim) * _rows(gradient, dim)).sum(1), unit, units)
    return total.square()


def energy(moments: Tensor, unit: Tensor, units: int) -> Tensor:
    """The summed second moments [columns] of what is read of a unit: the diagonal of a Gram matrix, whose columns ``unit`` assigns."""
    return _sums(moments.detach().double(), unit, units)


def random(units: int, seed: int) -> Tensor:
    """Uniform scores in [0, 1): the control that every criterion must beat."""
    return torch.rand(units, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def normalise(scores: Tensor) -> Tensor:
    """Scores over their mean, so that units of different layers can be ranked together; all zeros stay zeros."""
    mean = scores.mean() if scores.numel() else scores.new_zeros(())
    return scores / mean if float(mean) > 0 else scores.clone()


def _rows(tensor: Tensor, dim: int) -> Tensor:
    """[size of the dimension, everything else], double precision."""
    moved = tensor.detach().movedim(dim, 0)
    return moved.reshape(moved.shape[0], -1).double()


def _sums(values: Tensor, unit: Tensor, units: int) -> Tensor:
    """The sum of a value [size] over each unit's indices: [units]."""
    owned = _fitting(unit, values) >= 0
    if bool(owned.any()) and int(unit.max()) >= units:
        raise ValueError(f"unit {int(unit.max())} came; expected units below {units}.")
    return torch.zeros(units, dtype=torch.float64).index_add_(0, unit[owned], values[owned])


def _fitting(unit: Tensor, rows: Tensor) -> Tensor:
    if unit.shape != rows.shape[:1]:
        raise ValueError(f"{list(unit.shape)} units came for {rows.shape[0]} indices; expected one an index.")
    return unit

"""The basis of an inner dimension: balanced, ordered, and the best product of every rank, against numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from downsize.numerics.lowrank_products import LEAST, balance, centred_moment


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def skewed(rows: int, seed: int) -> Tensor:
    """[rows, 6], of columns that are correlated and of sizes 1 to 10."""
    return normal(rows, 6, seed=seed) @ normal(6, 6, seed=seed + 1) * torch.logspace(0, 1, 6, dtype=torch.float64)


def test_both_sides_have_the_same_diagonal_moment_in_the_basis():
    left, right = skewed(40, 1), skewed(30, 5)
    found = balance(left.mT @ left, right.mT @ right)
    one, other = left @ found.basis.mT, right @ found.inverse
    moments = torch.stack([one.mT @ one, other.mT @ other])
    values = moments.diagonal(dim1=1, dim2=2)
    largest = values.amax(1, keepdim=True)
    # As far as the floor beneath the moments goes.
    assert ((moments - values.diag_embed()).abs() / largest[:, None]).max() < 1e-4
    assert torch.allclose(values[0] / largest[0], values[1] / largest[1], atol=1e-4)
    ratio = left.square().sum() / right.square().sum()
    assert values[0].sum() / values[1].sum() == pytest.approx(float(ratio), rel=1e-4)


@pytest.mark.parametrize("rank", range(7))
def test_the_first_coordinates_are_the_best_product_of_their_rank(rank):
    left, right = skewed(40, 1), normal(30, 6, seed=5) @ normal(6, 6, seed=6)
    found = balance(left.mT @ left, right.mT @ right)
    singular = np.linalg.svd((left @ right.mT).numpy(), compute_uv=False)[:6]
    kept = (left @ found.basis.mT)[:, :rank] @ (right @ found.inverse)[:, :rank].mT
    error = float((left @ right.mT - kept).square().sum())
    # The floor beneath both moments moves the smallest singular values a little.
    assert error == pytest.approx((singular[rank:] ** 2).sum(), abs=1e-5 * (singular**2).sum())
    assert float(found.values[rank:].square().sum()) == pytest.approx((singular[rank:] ** 2).sum(), abs=1e-5 * (singular**2).sum())
    assert bool((found.values.diff() <= 0).all())


@pytest.mark.parametrize("ranks", [(3, 6), (2, 2), (0, 6), (0, 0), (1, 5)])
def test_what_has_no_full_rank_is_balanced_by_a_basis_that_can_be_inverted(ranks):
    one, other = (normal(50, rank, seed=rank + i) @ normal(rank, 6, seed=9 + i) for i, rank in enumerate(ranks))
    found = balance(one.mT @ one, other.mT @ other)
    assert (found.basis @ found.inverse - torch.eye(6, dtype=torch.float64)).abs().max() < 1e-9
    assert torch.linalg.cond(found.basis) < 10 / LEAST**0.5
    product, left, right = one @ other.mT, one @ found.basis.mT, other @ found.inverse
    size = float(one.norm() * other.norm())
    assert float((left @ right.mT - product).norm()) <= 1e-9 * size
    rank = min(ranks)
    assert float((left[:, :rank] @ right[:, :rank].mT - product).norm()) <= 1e-4 * size


def test_moments_about_the_mean_are_those_of_numpy():
    x = normal(30, 5) + 3
    row = torch.cat([x, x.new_ones(30, 1)], 1)
    assert np.allclose(centred_moment(row.mT @ row), np.cov(x.numpy().T, bias=True) * 30)


@pytest.mark.parametrize(
    ("left", "right"), [(torch.eye(3), torch.eye(4)), (torch.ones(2, 3), torch.ones(2, 3)), (torch.eye(2), torch.full((2, 2), torch.nan))]
)
def test_what_is_no_pair_of_moments_is_refused(left, right):
    with pytest.raises(ValueError, match=r"came|NaN"):
        balance(left, right)

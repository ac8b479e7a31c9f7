"""Which weights move: by hand, and as laws over random layers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from downsize.training.regrowth import FRACTION, moving, regrown


def matrix(*rows: list[float]) -> Tensor:
    return torch.tensor([list(rows)])


def test_the_smallest_go_and_the_largest_gradients_grow_by_hand():
    """Four weights of which half move: 0.1 and -0.2 are the smallest; 9 and -8 are the largest gradients of what is free."""
    weight = matrix([1.0, 0.1, 0, 0, 0], [3.0, -0.2, 0, 0, 0])
    gradient = matrix([0.0, 1, 9, 2, 0.0], [7.0, 0.5, 3, -8, 1])
    made = regrown(weight != 0, weight, gradient, 0.5, torch.ones_like(weight, dtype=torch.bool))
    assert made.tolist() == [[[True, False, True, False, False], [True, False, False, True, False]]]


def test_what_went_may_grow_again_and_the_largest_of_each_row_stays():
    """The row of 0.01 keeps it, though three of four move; 0.1 goes and comes back by its gradient."""
    weight = matrix([0.01, 0, 0], [1.0, 0.1, 0.2])
    gradient = matrix([0.0, 0, 1], [0.0, 5, 0])
    made = regrown(weight != 0, weight, gradient, 0.75, torch.ones_like(weight, dtype=torch.bool))
    assert made.tolist() == [[[True, False, True], [True, True, False]]]


def test_nothing_grows_where_it_is_not_allowed():
    weight = matrix([1.0, 0.5, 0, 0])
    allowed = torch.tensor([[[True, True, False, True]]])
    made = regrown(weight != 0, weight, matrix([0.0, 0, 100, 1]), 0.5, allowed)
    assert made.tolist() == [[[True, False, False, True]]]


@pytest.mark.parametrize("seed", range(8))
def test_the_number_stays_and_at_most_the_share_moves(seed: int):
    generator = torch.Generator().manual_seed(seed)
    weight, gradient = (torch.randn(2, 5, 7, generator=generator) for _ in range(2))
    allowed = torch.rand(2, 5, 7, generator=generator) < 0.8
    mask = allowed & (torch.rand(2, 5, 7, generator=generator) < 0.4)
    made = regrown(mask, weight * mask, gradient, 0.3, allowed)
    assert int(made.sum()) == int(mask.sum()) and not bool((made & ~allowed).any())
    assert 0 < int((made & ~mask).sum()) <= round(0.3 * int(mask.sum()))
    assert torch.equal(regrown(mask, weight * mask, gradient, 0.0, allowed), mask)


def test_the_share_that_moves_falls_as_a_cosine():
    assert [moving(progress) for progress in (0.0, 0.5, 1.0, 2.0)] == pytest.approx([FRACTION, FRACTION / 2, 0, 0])

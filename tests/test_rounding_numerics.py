"""Learned rounding: closed forms of its parts, and where it starts, against codes counted by hand and by brute force."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from downsize.numerics.grids import Grid, codes, values, weight_grid
from downsize.numerics.rounding import (
    FARTHEST,
    FIRST_BETA,
    LAST_BETA,
    NEAREST,
    Rounding,
    annealed,
    inverse_rectified,
    rectified_sigmoid,
    undecided,
)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_the_rectified_sigmoid_is_a_stretched_and_clipped_one_and_has_an_inverse():
    v = torch.tensor([-40.0, -3.0, -1.0, 0.0, 1.0, 3.0, 40.0])
    expected = [min(1.0, max(0.0, 1.2 / (1 + math.exp(-x)) - 0.1)) for x in v.tolist()]
    assert torch.allclose(rectified_sigmoid(v), torch.tensor(expected), atol=1e-6)
    assert rectified_sigmoid(v)[[0, -1]].tolist() == [0.0, 1.0]
    h = torch.linspace(0, 1, 101, dtype=torch.float64)
    assert torch.allclose(rectified_sigmoid(inverse_rectified(h)), h, atol=1e-12)


def test_the_regulariser_is_zero_where_decided_and_its_gradient_leads_there():
    h = torch.tensor([0.0, 0.1, 0.25, 0.5, 0.8, 1.0], dtype=torch.float64, requires_grad=True)
    found = undecided(h, 3.0)
    assert found.tolist() == pytest.approx([1 - abs(2 * x - 1) ** 3 for x in h.tolist()])
    assert found[0] == found[-1] == 0 and found[3] == 1
    found.sum().backward()
    assert h.grad is not None
    # A step down the gradient goes to 0 from below 1/2 and to 1 from above it.
    assert (h.grad[1:3] > 0).all() and (h.grad[4:] < 0).all() and h.grad[3] == 0
    assert (undecided(h, 20.0) >= undecided(h, 2.0)).all()


def test_the_exponent_falls_from_the_first_to_the_last_after_a_warm_up():
    found = [annealed(step, 100) for step in range(100)]
    assert found[:20] == [None] * 20
    acting = [beta for beta in found if beta is not None]
    assert acting == sorted(acting, reverse=True) and len(acting) == 80
    assert acting[0] == pytest.approx(FIRST_BETA) and acting[-1] == pytest.approx(LAST_BETA)
    assert annealed(0, 1) is None or annealed(0, 1) == FIRST_BETA


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("zero_point", [0, 1])
def test_the_hard_start_is_what_was_chosen_and_the_other_code_is_its_neighbour_towards_the_original(bits, zero_point):
    grid = weight_grid(bits)
    original = random(6, 40)
    original[:, 3] = 0.0
    step, zero = 0.8 * original.abs().amax(1, keepdim=True) / grid.high, torch.full((6, 1), float(zero_point))
    # Not the nearest: a solver's choice may lie some codes away.
    moved = (original / step).round() + torch.randint(-2, 3, original.shape, generator=torch.Generator().manual_seed(bits))
    chosen = (moved.clamp(grid.low - zero_point, grid.high - zero_point) * step) * (original != 0)
    rounding = Rounding.of(chosen, original, step, zero, grid)
    assert torch.equal(rounding.hard(rounding.start), chosen)
    low, high = rounding.hard(torch.full_like(original, -9.0)), rounding.hard(torch.full_like(original, 9.0))
    for i in range(6):
        for j in range(40):
            assert_neighbours(
                float(chosen[i, j] / step[i, 0]), float(original[i, j] / step[i, 0]), (low[i, j], high[i, j]), step[i, 0], grid, zero_point
            )


def assert_neighbours(code: float, exact: float, ends: tuple[Tensor, Tensor], step: Tensor, grid: Grid, zero: int) -> None:
    below, above = (round(float(end / step)) for end in ends)
    if exact == 0:
        assert below == above == 0
        return
    assert above == below + 1 and grid.low <= below + zero and above + zero <= grid.high
    code = round(code)
    assert code in (below, above)
    other = above if code == below else below
    # The other one lies towards the original, unless it would leave the grid.
    assert (other - code) * (exact - code) >= 0 or code + zero in (grid.low, grid.high)


def test_of_nearest_rounding_the_soft_start_is_the_original_where_that_is_near_a_code_else_as_near_as_allowed():
    grid, original, step = weight_grid(4), random(4, 200), torch.full((4, 1), 0.5)
    scale, zero = torch.full((4,), 0.5), torch.zeros(4, dtype=torch.int32)
    nearest = values(codes(original, scale, zero, 0, grid), scale, zero, 0)
    rounding = Rounding.of(nearest, original, step, torch.zeros(4, 1), grid)
    away = (rounding.soft(rectified_sigmoid(rounding.start)) - nearest) / step
    wanted = (original - nearest) / step
    inside = (original / step > grid.low) & (original / step < grid.high)
    assert torch.allclose(away.abs()[inside], wanted.abs().clamp(NEAREST, FARTHEST)[inside], atol=1e-5)
    clear = inside & (wanted.abs() > NEAREST)
    assert torch.equal(away[clear].sign(), wanted[clear].sign())
    assert torch.equal(rounding.hard(rounding.start), nearest)


def test_gradients_go_through_what_is_between_and_zeros_stay():
    grid, original = weight_grid(3), random(3, 10)
    original[1, 2:5] = 0.0
    rounding = Rounding.of(original, original, torch.full((3, 1), 0.4), torch.zeros(3, 1), grid)
    v = rounding.start.clone().requires_grad_()
    rounding.soft(rectified_sigmoid(v)).sum().backward()
    sigma = torch.sigmoid(rounding.start)
    assert v.grad is not None
    assert torch.allclose(v.grad, 0.4 * 1.2 * sigma * (1 - sigma) * (original != 0), atol=1e-6)
    for end in (-9.0, 9.0):
        assert (rounding.hard(torch.full_like(original, end))[1, 2:5] == 0).all()

"""Scales and zero points of groups: against plain loops, against dense searches, and by what must never grow."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from downsize.numerics.clipping import Encoding, fitted_scale, full_range, group_extremes, group_sums, least_error, runs_of
from downsize.numerics.grids import Grid, activation_grid, weight_grid
from downsize.numerics.groups import group_codes, group_values


def draw(seed: int, *shape: int) -> Tensor:
    """Heavy tails, and columns of different size."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator) * torch.randn(shape, generator=generator).abs() * torch.linspace(0.2, 2, shape[-1])


def rounded(weight: Tensor, encoding: Encoding, group: int, grid: Grid) -> Tensor:
    return group_values(group_codes(weight, *encoding, group, grid), *encoding, group)


def error(weight: Tensor, encoding: Encoding, group: int, grid: Grid, importance: Tensor | None = None) -> Tensor:
    squared = (rounded(weight, encoding, group, grid) - weight) ** 2
    return group_sums(squared if importance is None else squared * importance, group)


def test_sums_and_extremes_of_groups_whose_last_is_shorter():
    weight = draw(0, 3, 10)
    pieces = [weight[:, i : i + 4] for i in (0, 4, 8)]
    assert torch.allclose(group_sums(weight, 4), torch.stack([each.sum(1) for each in pieces], 1))
    low, high = group_extremes(weight + 9, 4)
    assert torch.equal(low, torch.zeros(3, 3)) and torch.equal(high, torch.stack([(each + 9).amax(1) for each in pieces], 1))


@settings(max_examples=60, deadline=None)
@given(
    bits=st.integers(2, 8),
    group=st.integers(3, 40),
    columns=st.integers(1, 60),
    symmetric=st.booleans(),
    half=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_a_full_range_moves_no_weight_by_more_than_half_a_step(bits, group, columns, symmetric, half, seed):
    weight, grid = draw(seed, 4, columns), activation_grid(bits)
    encoding = full_range(weight, group, grid, symmetric, half)
    moved = (rounded(weight, encoding, group, grid) - weight).abs()
    steps = encoding.scale[:, torch.arange(columns) // group]
    # An asymmetric zero point is itself rounded, which pushes one end out by half a step; float16 moves the ends by a little more.
    slack = 2**bits * 2.0**-11 if half else 1e-3
    assert bool((moved <= steps * (0.5 if symmetric else 1.0) + steps * slack + 1e-7).all())
    if half:
        assert torch.equal(encoding.scale, encoding.scale.half().float())
    if symmetric:
        assert encoding.zero_point.unique().tolist() == [2 ** (bits - 1)]
    assert int(encoding.zero_point.min()) >= grid.low and int(encoding.zero_point.max()) <= grid.high


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_least_error_is_near_the_best_of_a_dense_search(bits, symmetric, half):
    weight, group, grid = draw(bits, 3, 32), 16, activation_grid(bits)
    importance = torch.rand(32, generator=torch.Generator().manual_seed(9)) + 0.1
    found = error(weight, least_error(weight, group, grid, symmetric, half, importance), group, grid, importance)
    for row in range(3):
        for place in range(2):
            columns = slice(place * group, (place + 1) * group)
            best = dense(weight[row, columns].numpy(), importance[columns].numpy(), grid, symmetric)
            assert float(found[row, place]) <= 1.25 * best + 1e-9


def dense(weight: np.ndarray, importance: np.ndarray, grid: Grid, symmetric: bool) -> float:
    """The least error of 600 scales and all zero points."""
    best = np.inf
    zeros = [(grid.low + grid.high + 1) // 2] if symmetric else range(grid.low, grid.high + 1)
    reach = float(np.abs(weight).max()) / (grid.high - zeros[0]) if symmetric else float(np.ptp(weight)) / (grid.high - grid.low)
    for scale in reach * np.linspace(0.1, 1.1, 300):
        for zero in zeros:
            values = (np.clip(np.rint(weight / scale) + zero, grid.low, grid.high) - zero) * scale
            best = min(best, float((importance * (values - weight) ** 2).sum()))
    return best


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
def test_least_error_never_errs_more_than_the_full_range(bits, symmetric):
    weight, grid = draw(20 + bits, 40, 100), weight_grid(bits)
    for group in (16, 32, 100):
        found, full = least_error(weight, group, grid, symmetric), full_range(weight, group, grid, symmetric)
        assert bool((error(weight, found, group, grid) <= error(weight, full, group, grid) * (1 + 1e-5)).all())
    if bits == 2:
        assert float(error(weight, found, 100, grid).sum()) < 0.8 * float(error(weight, full, 100, grid).sum())


def test_the_fitted_scale_is_the_least_squares_one():
    weight, steps, importance = draw(3, 2, 12), draw(4, 2, 12), torch.rand(12, generator=torch.Generator().manual_seed(5))
    scale = fitted_scale(runs_of(weight, 8), runs_of(steps, 8), torch.full((2, 2), 7.0), runs_of(importance, 8))
    for row in range(2):
        for place, columns in enumerate((slice(0, 8), slice(8, 12))):
            root = importance[columns].sqrt().double().numpy()
            expected = np.linalg.lstsq((steps[row, columns].numpy() * root)[:, None], weight[row, columns].numpy() * root, rcond=None)[0]
            assert float(scale[row, place]) == pytest.approx(float(expected[0]) if expected[0] > 0 else 7.0, rel=1e-4)


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("symmetric", [False, True])
def test_groups_of_zeros_and_tiny_weights_stay_finite(symmetric, half):
    weight, grid = torch.zeros(3, 8), activation_grid(4)
    weight[1], weight[2, :4] = 1e-9, torch.tensor([1.0, -2.0, 0.5, 0.25])
    for encoding in (full_range(weight, 4, grid, symmetric, half), least_error(weight, 4, grid, symmetric, half)):
        values = rounded(weight, encoding, 4, grid)
        assert bool(values.isfinite().all()) and torch.equal(values[0], torch.zeros(8)) and torch.equal(values[2, 4:], torch.zeros(4))
        assert bool((encoding.scale > 0).all())


def test_scales_beyond_float16_are_refused():
    with pytest.raises(ValueError, match="float16 ends at 65504"):
        full_range(torch.full((1, 4), 3e6), 4, activation_grid(4), True, half=True)
    assert float(full_range(torch.full((1, 4), 3e6), 4, activation_grid(4), True).scale) == pytest.approx(3e6 / 7)

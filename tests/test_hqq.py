"""Half-quadratic zero points: against the iteration in plain loops, and against what they must not be worse than."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from downsize.numerics.clipping import full_range, group_sums, least_error
from downsize.numerics.grids import activation_grid
from downsize.numerics.groups import group_codes, group_values
from downsize.numerics.hqq import GROWTH, NORM, ROUNDS, STRENGTH, hqq, real_codes, real_values


def draw(seed: int, rows: int = 6, columns: int = 40) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    weight[:, ::13] *= 5
    return weight


def by_turns(weight: np.ndarray, scale: float, zero: float, top: int) -> float:
    """One group: what sticks out is set aside, then the zero point is the mean of what the rest want; the best round wins."""
    best, least, strength = zero, np.inf, STRENGTH
    for _ in range(ROUNDS):
        codes = [min(max(round(float(w / scale + zero)), 0), top) for w in weight]
        errors = [float(w) / scale - (q - zero) for w, q in zip(weight, codes, strict=True)]
        found = sum(abs(e) ** NORM for e in errors)
        if found < least:
            best, least = zero, found
        aside = [np.sign(e) * max(0.0, abs(e) - (abs(e) + 1e-12) ** (NORM - 1) / strength) for e in errors]
        zero = float(np.mean([q - w / scale + e for w, q, e in zip(weight, codes, aside, strict=True)]))
        strength *= GROWTH
    return best


@pytest.mark.parametrize("clipped", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_real_zero_points_are_those_of_plain_loops(bits, clipped):
    weight, group, grid = draw(bits), 16, activation_grid(bits)
    start, found = (least_error if clipped else full_range)(weight, group, grid, False), hqq(weight, group, grid, clipped=clipped)
    assert torch.equal(found.scale, start.scale) and found.zero_point.dtype == torch.float32
    for row in range(len(weight)):
        for place in range(3):
            one = weight[row, place * group : (place + 1) * group].double().numpy()
            expected = by_turns(one, float(start.scale[row, place]), float(start.zero_point[row, place]), grid.high)
            assert float(found.zero_point[row, place]) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("clipped", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_no_group_errs_more_in_the_norm_than_where_it_started(bits, clipped, half):
    weight, group, grid = draw(7, 64, 100), 32, activation_grid(bits)

    def norm(values: Tensor) -> Tensor:
        return group_sums((values - weight).abs().pow(NORM), group)

    start = (least_error if clipped else full_range)(weight, group, grid, False, half)
    found = hqq(weight, group, grid, half, clipped, rounded=True)
    assert found.zero_point.dtype == torch.int32 and int(found.zero_point.min()) >= 0 and int(found.zero_point.max()) <= grid.high
    # With whole zero points the codes and values of real ones are those of the grid.
    errors = [norm(group_values(group_codes(weight, *each, group, grid), *each, group)) for each in (start, found)]
    assert bool((errors[1] <= errors[0] * 1.0001).all())
    real = hqq(weight, group, grid, half, clipped)
    values = real_values(real_codes(weight, real, group, grid), real, group)
    if not half:  # sixteen bits move the real zero points by up to a hundredth of a step
        assert bool((norm(values) <= errors[0] * 1.0001).all())
    if bits <= 3:
        assert float(norm(values).sum()) < 0.97 * float(errors[0].sum())


def test_the_size_of_the_weights_does_not_matter():
    weight, grid = draw(1), activation_grid(3)
    small, large = hqq(weight, 16, grid), hqq(weight * 1024, 16, grid)
    assert torch.equal(small.zero_point, large.zero_point) and torch.equal(small.scale * 1024, large.scale)

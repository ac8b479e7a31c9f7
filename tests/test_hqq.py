"""Half-quadratic zero points: against the iteration in plain loops, and against what they must not be worse than."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from downsize.numerics.clipping import full_range, group_sums
from downsize.numerics.grids import activation_grid
from downsize.numerics.groups import group_codes, group_values, spread
from downsize.numerics.hqq import GROWTH, NORM, ROUNDS, STRENGTH, hqq, real_codes


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
        errors = [float(w) - (q - zero) * scale for w, q in zip(weight, codes, strict=True)]
        found = sum(abs(e) ** NORM for e in errors)
        if found < least:
            best, least = zero, found
        aside = [np.sign(e) * max(0.0, abs(e) - (abs(e) + 1e-12) ** (NORM - 1) / strength) for e in errors]
        zero = float(np.mean([q - (w - e) / scale for w, q, e in zip(weight, codes, aside, strict=True)]))
        strength *= GROWTH
    return best


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_real_zero_points_are_those_of_plain_loops(bits):
    weight, group, grid = draw(bits).double().float(), 16, activation_grid(bits)
    start, found = full_range(weight, group, grid, symmetric=False), hqq(weight, group, grid, rounded=False)
    assert torch.equal(found.scale, start.scale) and found.zero_point.dtype == torch.float32
    for row in range(len(weight)):
        for place in range(3):
            one = weight[row, place * group : (place + 1) * group].double().numpy()
            expected = by_turns(one, float(start.scale[row, place]), float(start.zero_point[row, place]), grid.high)
            assert float(found.zero_point[row, place]) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_no_group_errs_more_in_the_norm_than_with_the_full_range(bits, half):
    weight, group, grid = draw(7, 64, 100), 32, activation_grid(bits)

    def norm(values: Tensor) -> Tensor:
        return group_sums((values - weight).abs().pow(NORM), group)

    start, found = full_range(weight, group, grid, False, half), hqq(weight, group, grid, half)
    assert found.zero_point.dtype == torch.int32 and int(found.zero_point.min()) >= 0 and int(found.zero_point.max()) <= grid.high
    errors = [norm(group_values(group_codes(weight, *each, group, grid), *each, group)) for each in (start, found)]
    assert bool((errors[1] <= errors[0]).all())
    real = hqq(weight, group, grid, half, rounded=False)
    values = (real_codes(weight, real, group, grid) - spread(real.zero_point, 100, group)) * spread(real.scale, 100, group)
    if not half:  # sixteen bits move the real zero points by up to a hundredth of a step
        assert bool((norm(values) <= errors[0] * 1.0001).all())
    if bits <= 3:
        assert float(norm(values).sum()) < 0.97 * float(errors[0].sum())

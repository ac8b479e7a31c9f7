"""NormalFloat: the published levels, scipy's quantiles, and scales against a dense search."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import norm

from downsize.numerics.groups import level_codes, level_values
from downsize.numerics.levels import level_scale, normal_float

# Dettmers et al. 2023, appendix E.
PUBLISHED = (
    "-1.0 -0.6961928009986877 -0.5250730514526367 -0.39491748809814453 -0.28444138169288635 -0.18477343022823334 -0.09105003625154495 0.0 "
    "0.07958029955625534 0.16093020141124725 0.24611230194568634 0.33791524171829224 0.44070982933044434 0.5626170039176941 "
    "0.7229568362236023 1.0"
)


def test_four_bits_are_the_published_levels():
    assert normal_float(4).tolist() == pytest.approx([float(each) for each in PUBLISHED.split()], abs=1e-6)


@pytest.mark.parametrize("bits", [2, 3, 4, 5])
def test_levels_lie_at_equal_steps_of_probability(bits):
    levels = normal_float(bits).double().numpy()
    half = 2 ** (bits - 1)
    assert len(levels) == 2**bits and (np.diff(levels) > 0).all() and levels[half - 1] == 0 and (levels[0], levels[-1]) == (-1, 1)
    outermost = norm.ppf(1 - (1 / 2 ** (bits + 1) + 1 / (2 ** (bits + 1) - 2)) / 2)
    probability = norm.cdf(levels * outermost)
    for steps in (np.diff(probability[:half]), np.diff(probability[half - 1 :])):
        assert np.allclose(steps, steps.mean(), atol=1e-6)


@pytest.mark.parametrize("importance", [None, torch.linspace(0.1, 3, 24)])
def test_the_searched_scale_is_near_the_best_of_all_and_the_plain_one_the_largest_magnitude(importance):
    weight = torch.randn(6, 24, generator=torch.Generator().manual_seed(0)) * torch.linspace(0.5, 1.5, 24)
    levels, group = normal_float(4), 8
    plain = level_scale(weight, levels, group, search=False)
    assert torch.allclose(plain, weight.unflatten(1, (-1, group)).abs().amax(2))

    def error(scale: torch.Tensor) -> torch.Tensor:
        squared = (level_values(level_codes(weight, scale, levels, group), scale, levels, group) - weight) ** 2
        return (squared * (1 if importance is None else importance)).unflatten(1, (-1, group)).sum(2)

    found = level_scale(weight, levels, group, importance, half=True)
    assert torch.equal(found, found.half().float())
    best = torch.stack([error(plain * float(part)) for part in torch.linspace(0.4, 1.2, 400)]).amin(0)
    assert bool((error(found) <= error(plain) * (1 + 1e-3)).all())
    assert float(error(found).sum()) <= 1.1 * float(best.sum()) and float(error(found).sum()) < 0.9 * float(error(plain).sum())

"""Column scales: they never make the output error grow, they mend what outlying inputs break, and scaling by them is undone exactly."""

from __future__ import annotations

import torch
from torch import Tensor

from downsize.numerics.awq import SMALLEST, awq_scales
from downsize.numerics.clipping import full_range
from downsize.numerics.grids import activation_grid
from downsize.numerics.groups import group_codes, group_values
from downsize.numerics.hessian import output_error


def quantize(weight: Tensor) -> Tensor:
    grid = activation_grid(3)
    encoding = full_range(weight, 32, grid, symmetric=False)
    return group_values(group_codes(weight, *encoding, 32, grid), *encoding, 32)


def case(outliers: bool) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(500, 64, generator=generator)
    if outliers:
        x[:, ::16] *= 30
    return torch.randn(24, 64, generator=generator), x


def error(weight: Tensor, x: Tensor, scale: Tensor) -> float:
    """Of the outputs themselves, with the inputs divided."""
    return float(((x / scale) @ quantize(weight * scale).T - x @ weight.T).square().sum())


def test_outlying_inputs_are_protected():
    weight, x = case(outliers=True)
    scale = awq_scales(weight, x.T @ x, x.abs().mean(0), quantize)
    assert error(weight, x, scale) < 0.4 * error(weight, x, torch.ones(64))
    assert float(scale[::16].min()) > float(scale[1::16].max())


def test_the_best_of_all_exponents_is_taken():
    weight, x = case(outliers=True)
    magnitude = x.abs().mean(0)
    found = error(weight, x, awq_scales(weight, x.T @ x, magnitude, quantize, steps=10))
    assert found <= min(error(weight, x, magnitude**exponent) for exponent in (i / 10 for i in range(11))) * 1.02


def test_the_error_never_grows_and_inputs_alike_need_no_scale():
    weight, x = case(outliers=False)
    for magnitude in (x.abs().mean(0), x.abs().mean(0).flip(0), torch.logspace(-6, 6, 64), torch.zeros(64)):
        scale = awq_scales(weight, x.T @ x, magnitude, quantize)
        assert bool((scale > 0).all()) and bool(scale.isfinite().all())
        assert float(scale.min() / scale.max()) >= SMALLEST**2 / 64
        assert error(weight, x, scale) <= error(weight, x, torch.ones(64)) * (1 + 1e-4)
    assert torch.equal(awq_scales(weight, x.T @ x, torch.ones(64), quantize), torch.ones(64))


def test_the_error_it_minimises_is_that_of_the_outputs():
    weight, x = case(outliers=True)
    scale = torch.linspace(0.5, 2, 64)
    found = float(output_error(quantize(weight * scale) / scale - weight, x.T @ x).sum())
    assert abs(found - error(weight, x, scale)) <= 1e-3 * found

"""GPTQ against the textbook's loops, scales of least output error against numpy's least squares."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from downsize.numerics.clipping import full_range, least_error
from downsize.numerics.grids import activation_grid, weight_grid
from downsize.numerics.groups import group_codes, group_values, level_codes, level_values
from downsize.numerics.hessian import DAMPING, compensated, fitted_scales, gptq, gptq_groups, gptq_levels, output_error
from downsize.numerics.levels import level_scale, normal_float


def case(seed: int, rows: int, columns: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(400, columns, generator=generator) @ torch.randn(columns, columns, generator=generator) / columns**0.5
    x = x * torch.linspace(0.3, 3, columns)[torch.randperm(columns, generator=generator)]
    return torch.randn(rows, columns, generator=generator), x.T @ x


def textbook(weight: Tensor, gram: Tensor, nearest: Callable[[float, int, int], float]) -> np.ndarray:
    """Optimal brain quantization in the order of the falling diagonal: one weight, one elimination at a time, in float64."""
    w, h = weight.double().numpy().copy(), gram.double().numpy().copy()
    diagonal = h.diagonal().copy()
    h[np.diag_indices_from(h)] += np.where(diagonal > 0, DAMPING * diagonal.mean(), diagonal.mean())
    inverse = np.linalg.inv(h)
    zeros, settled = w == 0, np.zeros_like(w)
    left = list(np.argsort(-diagonal, kind="stable"))
    while left:
        j = left.pop(0)
        for row in range(len(w)):
            settled[row, j] = 0.0 if zeros[row, j] else nearest(float(w[row, j]), row, j)
            error = (w[row, j] - settled[row, j]) / inverse[j, j]
            for k in left:
                w[row, k] -= error * inverse[j, k]
        inverse -= np.outer(inverse[:, j], inverse[j]) / inverse[j, j]
    return settled


def agree(found: Tensor, expected: np.ndarray, gram: Tensor, weight: Tensor) -> None:
    """The same values, but for the few that lie in the middle between two in float32."""
    same = np.isclose(found.numpy(), expected, atol=1e-4)
    assert same.mean() > 0.98
    errors = [float(output_error(torch.as_tensor(each) - weight, gram).sum()) for each in (found, expected)]
    assert errors[0] == pytest.approx(errors[1], rel=0.02)


@pytest.mark.parametrize(("group", "columns"), [(16, 40), (8, 37), (40, 40), (32, 150)])
@pytest.mark.parametrize("bits", [2, 4])
def test_groups_are_rounded_as_the_textbook_does(bits, group, columns):
    weight, gram = case(bits + columns, 5, columns)
    weight[0, ::5] = 0
    grid = activation_grid(bits)
    scale, zero = full_range(weight, group, grid, symmetric=False)

    def nearest(value: float, row: int, column: int) -> float:
        s, z = float(scale[row, column // group]), int(zero[row, column // group])
        return (min(max(round(value / s) + z, grid.low), grid.high) - z) * s

    found = gptq_groups(weight, gram, scale, zero, group, grid)
    agree(found, textbook(weight, gram, nearest), gram, weight)
    assert bool((found[0, ::5] == 0).all())
    assert torch.allclose(group_values(group_codes(found, scale, zero, group, grid), scale, zero, group), found, atol=1e-6)


@pytest.mark.parametrize("group", [16, 30])
def test_levels_are_rounded_as_the_textbook_does(group):
    weight, gram = case(3, 5, 30)
    levels = normal_float(4)
    scale = level_scale(weight, levels, group, gram.diagonal())

    def nearest(value: float, row: int, column: int) -> float:
        s = float(scale[row, column // group])
        return min(levels.tolist(), key=lambda level: abs(level - value / s)) * s

    found = gptq_levels(weight, gram, scale, levels, group)
    agree(found, textbook(weight, gram, nearest), gram, weight)
    assert torch.allclose(level_values(level_codes(found, scale, levels, group), scale, levels, group), found, atol=1e-6)


def test_rows_are_rounded_as_the_textbook_does_and_groups_of_a_whole_row_are_the_same():
    weight, gram = case(4, 6, 140)
    gram[7], gram[:, 7] = 0, 0
    grid = weight_grid(4)
    scale, zero = full_range(weight, 140, grid, symmetric=True)
    found = gptq(weight[None], gram[None], scale[:, 0][None], grid)[0]
    agree(found, textbook(weight, gram, lambda v, row, _: min(max(round(v / float(scale[row, 0])), -8), 7) * float(scale[row, 0])), gram, weight)
    assert torch.equal(found, gptq_groups(weight, gram, scale, zero, 140, grid))
    assert torch.equal(found[:, 7], group_values(group_codes(weight, scale, zero, 140, grid), scale, zero, 140)[:, 7])  # never seen: nearest


def test_several_matrices_at_once_are_each_rounded_on_its_own():
    cases = [case(seed, 4, 30) for seed in (5, 6)]
    weight, gram = (torch.stack(each) for each in zip(*cases, strict=True))

    def nearest(column: Tensor, place: Tensor) -> Tensor:
        step = 0.1 + 0.01 * place[:, None]
        return (column / step).round() * step

    both = compensated(weight, gram, nearest)
    for i in range(2):
        assert torch.allclose(both[i], compensated(weight[i : i + 1], gram[i : i + 1], nearest)[0], atol=1e-6)


@pytest.mark.parametrize("bits", [3, 4])
def test_compensation_more_than_halves_the_output_error(bits):
    weight, gram = case(8, 40, 64)
    grid = activation_grid(bits)
    encoding = least_error(weight, 32, grid, False, importance=gram.diagonal())
    nearest = group_values(group_codes(weight, *encoding, 32, grid), *encoding, 32)
    errors = [float(output_error(each - weight, gram).sum()) for each in (nearest, gptq_groups(weight, gram, *encoding, 32, grid))]
    assert errors[1] < 0.5 * errors[0]


@pytest.mark.parametrize("group", [8, 20, 50])
def test_fitted_scales_are_those_of_least_squares(group):
    weight, gram = case(9, 4, 50)
    grid = activation_grid(3)
    scale, zero = full_range(weight, group, grid, symmetric=False)
    values = group_values(group_codes(weight, scale, zero, group, grid), scale, zero, group)
    found = fitted_scales(weight, values, scale, group, gram)
    damped = gram.double().numpy() + DAMPING * float(gram.diagonal().double().mean()) * np.eye(50)
    root = np.linalg.cholesky(damped).T
    groups = scale.shape[1]
    fitted = values.clone()
    for row in range(4):
        steps = np.zeros((50, groups))
        for column in range(50):
            steps[column, column // group] = float(values[row, column]) / float(scale[row, column // group])
        expected = np.linalg.lstsq(root @ steps, root @ weight[row].double().numpy(), rcond=None)[0]
        assert np.allclose(found[row].numpy(), expected, rtol=1e-4, atol=1e-5)
        fitted[row] = torch.as_tensor(steps @ expected)
    assert float(output_error(fitted - weight, gram).sum()) < float(output_error(values - weight, gram).sum())


def test_the_output_error_is_that_of_the_outputs():
    generator = torch.Generator().manual_seed(1)
    x, change = torch.randn(70, 9, generator=generator).double(), torch.randn(5, 9, generator=generator).double()
    assert torch.allclose(output_error(change, x.T @ x), (x @ change.T).square().sum(0))

"""Few levels: steps against brute force, ternary and binary weights by hand and by least squares, gradients against finite differences."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from downsize.numerics import lowbit
from downsize.numerics.grids import Grid, activation_grid, weight_grid
from downsize.numerics.lowbit import (
    SETTLED,
    TWO_SIDED,
    binary_codes,
    binary_connect,
    binary_weight,
    codes_of,
    learned_step,
    least_error_step,
    ternary_codes,
    ternary_weight,
    trained_ternary,
    two_magnitudes,
    two_sided_codes,
)

fake_quantize = torch.ops.downsize.fake_quantize


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_grids_of_few_bits():
    assert [(weight_grid(b).low, weight_grid(b).high) for b in (2, 3, 4, 7, 8)] == [(-2, 1), (-4, 3), (-8, 7), (-64, 63), (-127, 127)]
    assert [(activation_grid(b).low, activation_grid(b).high) for b in (2, 3, 4, 8)] == [(0, 3), (0, 7), (0, 15), (0, 255)]
    assert activation_grid(3).dtype is torch.uint8 and weight_grid(3).dtype is torch.int8


# Steps ----------------------------------------------------------------------------------------------------------------------------


def rounding_error(weight: np.ndarray, step: float, grid: Grid) -> float:
    return float(((np.clip(np.rint(weight / step), grid.low, grid.high) * step - weight) ** 2).sum())


@pytest.mark.parametrize("bits", [2, 3, 4, 6])
@pytest.mark.parametrize("axis", [None, 0, 1])
def test_the_step_has_nearly_the_least_error_of_all(bits, axis):
    weight, grid = draw(bits, 4, 500) * torch.tensor([1.0, 0.1, 3.0, 0.01])[:, None], weight_grid(bits)
    weight[0, 0] = 9.0
    rows = [weight.numpy().ravel()] if axis is None else list(weight.numpy())
    step = least_error_step(weight.T if axis == 1 else weight, axis, grid)
    assert step.shape == (() if axis is None else (4,))
    for row, found in zip(rows, step.reshape(-1).tolist(), strict=True):
        best = min(rounding_error(row, one, grid) for one in np.linspace(0.02, 1.2, 1500) * np.abs(row).max() / grid.high)
        assert rounding_error(row, found, grid) <= 1.05 * best + 1e-12
        assert rounding_error(row, found, grid) <= rounding_error(row, 2 * np.abs(row).mean() / grid.high**0.5, grid) * (1 + 1e-5)


def test_rows_of_zeros_take_the_largest_step():
    weight = torch.stack([torch.zeros(8), draw(1, 8), 2 * draw(2, 8)])
    step = least_error_step(weight, 0, weight_grid(4))
    assert step[0] == step.max() > 0
    assert float(least_error_step(torch.zeros(2, 3), None, weight_grid(4))) == 1.0


# Two and three levels -------------------------------------------------------------------------------------------------------------


def test_ternary_by_hand():
    weight = torch.tensor([[1.0, -2.0, 0.5, -0.5], [0.0, 0.0, 3.0, -1.0]])
    # Mean magnitudes 1 and 1, so thresholds 0.7: of the first row 1 and -2 are above, of the second 3 and -1.
    codes, step = ternary_codes(weight, 0, masked=False)
    assert codes.tolist() == [[1, -1, 0, 0], [0, 0, 1, -1]] and step.tolist() == [1.5, 2.0]
    # Without its zeros the second row has the mean 2 and the threshold 1.4.
    codes, step = ternary_codes(weight, 0, masked=True)
    assert codes.tolist() == [[1, -1, 0, 0], [0, 0, 1, 0]] and step.tolist() == [1.5, 3.0]
    codes, step = ternary_codes(weight, None, masked=False)
    assert codes.tolist() == [[1, -1, 0, 0], [0, 0, 1, -1]] and float(step) == 1.75


def test_binary_by_hand():
    weight = torch.tensor([[1.0, -2.0, 0.0], [0.5, 0.5, -0.5]])
    codes, step = binary_codes(weight, 0, masked=False)
    assert codes.tolist() == [[1, -1, 1], [1, 1, -1]] and step.tolist() == [1.0, 0.5]
    codes, step = binary_codes(weight, 0, masked=True)
    assert codes.tolist() == [[1, -1, 0], [1, 1, -1]] and step.tolist() == [1.5, 0.5]


@pytest.mark.parametrize("codes_with_step", [ternary_codes, binary_codes])
@pytest.mark.parametrize("axis", [None, 0, 1])
def test_the_step_is_the_least_squares_one_of_its_codes(codes_with_step, axis):
    weight = draw(3, 6, 5, 4)
    codes, step = codes_with_step(weight, axis, False)
    rows = [(c, w) for c, w in zip(codes.movedim(axis or 0, 0), weight.movedim(axis or 0, 0), strict=True)] if axis is not None else [(codes, weight)]
    for (code, row), found in zip(rows, step.reshape(-1).tolist(), strict=True):
        solution = np.linalg.lstsq(code.double().reshape(-1, 1).numpy(), row.double().reshape(-1).numpy(), rcond=None)[0]
        assert found == pytest.approx(float(solution[0]), rel=1e-5)


def test_two_magnitudes_and_their_codes_by_hand():
    weight = torch.tensor([[4.0, 2.0, -1.0, 0.1, -0.2]])  # the mean is 1.46, the threshold 1.022
    magnitudes = two_magnitudes(weight, 0, masked=False)
    assert magnitudes.tolist() == [[3.0], [0.0]]
    codes, step = two_sided_codes(weight, torch.tensor([[3.0], [1.0]]), 0, masked=False)
    assert codes.tolist() == [[63, 63, 0, 0, 0]] and float(step) == pytest.approx(3 / 63)
    weight = torch.tensor([[4.0, -2.0, -3.0, 0.1, -0.2]])  # 1.86, 1.302
    codes, step = two_sided_codes(weight, two_magnitudes(weight, 0, masked=False), 0, masked=False)
    assert codes.tolist() == [[63, -39, -39, 0, 0]]  # 2.5 / 4 * 63 = 39.4
    assert float(step) * 63 == pytest.approx(4.0)


def functions(weight: Tensor, axis: int | None) -> list[tuple[Any, ...]]:
    step = least_error_step(weight, axis, weight_grid(3))
    return [
        (learned_step, weight, step, torch.full_like(step, 1.1), torch.zeros_like(step, dtype=torch.int32), axis, -4, 3),
        (ternary_weight, weight, axis, False),
        (binary_weight, weight, axis, False),
        (binary_connect, weight, binary_codes(weight, axis, False)[1], axis, False),
        (trained_ternary, weight, (start := two_magnitudes(weight, axis, False)), torch.full_like(start, 0.9), axis, False),
    ]


@pytest.mark.parametrize("axis", [None, 0, 1])
@pytest.mark.parametrize("number", range(len(SETTLED)))
def test_what_is_trained_is_what_is_saved(number, axis):
    """The value in the training's graph is, bit for bit, what the saved operator gives for the settled weight."""
    weight = draw(number, 6, 7, 3)
    function, *arguments = functions(weight, axis)[number]
    live = function(*arguments)
    codes, step = codes_of(function, *arguments)
    shape = [1, 1, 1]
    if axis is not None:
        shape[axis] = -1
    settled = codes * step.reshape(shape)
    saved = fake_quantize(settled, step, torch.zeros_like(step, dtype=torch.int32), axis, TWO_SIDED.low, TWO_SIDED.high)
    assert torch.equal(live, settled) and torch.equal(live, saved)
    assert len(live.unique()) > 1


def test_a_row_too_small_beside_the_others_settles_to_zeros_on_their_step():
    weight = torch.stack([draw(1, 9), torch.zeros(9), draw(2, 9) * 1e-12])
    codes, step = codes_of(ternary_weight, weight, 0, False)
    assert codes[1:].abs().sum() == 0 and codes[0].abs().sum() > 0 and step.tolist() == [float(step[0])] * 3


# Gradients ------------------------------------------------------------------------------------------------------------------------

STEPS = [
    pytest.param(draw(7, 4, 30), torch.tensor(0.2), torch.tensor(2.3), None, 0, 15, id="activations with a zero point"),
    pytest.param(draw(8, 5, 16), torch.tensor(0.5), torch.tensor(0.0), None, 0, 3, id="activations from zero"),
    pytest.param(draw(9, 6, 4, 3), torch.linspace(0.2, 0.8, 6), torch.zeros(6), 0, -2, 1, id="rows of weights"),
    pytest.param(draw(9, 3, 4), torch.linspace(0.2, 0.8, 4), torch.zeros(4), 1, -8, 7, id="columns of weights"),
]


@pytest.mark.parametrize(("x", "start", "zero", "axis", "low", "high"), STEPS)
def test_the_learned_step_gives_the_operators_values(x, start, zero, axis, low, high):
    factor = torch.full_like(start, 0.7)
    got = learned_step(x, start, factor, zero, axis, low, high)
    assert torch.equal(got, fake_quantize(x, start * factor, zero.round().int(), axis, low, high))


@pytest.mark.parametrize(("x", "start", "zero", "axis", "low", "high"), STEPS)
def test_gradients_of_the_learned_step_are_those_of_the_function_with_rounding_held(x, start, zero, axis, low, high):
    """s (clamp(x / s + r + z, low, high) - z) with the rounding errors r of codes and zero point held, in float64; times g for step and zero."""
    x, start, zero = x.double(), start.double(), zero.double()
    shape = [1] * x.dim()
    if axis is not None:
        shape[axis] = -1
    factor = torch.full_like(start, 1.25)
    step, whole = (start * factor).reshape(shape), zero.round().reshape(shape)
    codes = (x / step).round() + whole
    x = torch.where((codes == low) | (codes == high), step * (0.1 if low < 0 else 1.1), x)  # the function has kinks there
    upstream, along_x = draw(12, *x.shape).double(), draw(13, *x.shape).double()
    along_factor, along_zero = draw(14, *start.shape).double(), draw(15, *start.shape).double()
    residue = (x / step).round() - x / step

    def function(amount: float, parts: tuple[float, float, float]) -> float:
        s = (start * (factor + amount * parts[1] * along_factor)).reshape(shape)
        z = whole + (amount * parts[2] * along_zero).reshape(shape)
        inner = ((x + amount * parts[0] * along_x) / s + residue + z).clamp(low, high) - z
        return float((upstream * s * inner).sum())

    leaves = [x.clone().requires_grad_(), factor.clone().requires_grad_(), zero.clone().requires_grad_()]
    (learned_step(leaves[0], start, leaves[1], leaves[2], axis, low, high) * upstream).sum().backward()
    g = 1 / ((x[0].numel() if axis is None else x.numel() // x.shape[axis]) * high) ** 0.5
    for place, (leaf, along, scaling) in enumerate(zip(leaves, (along_x, along_factor, along_zero), (1.0, g, g), strict=True)):
        parts = tuple(float(i == place) for i in range(3))
        slope = (function(1e-7, parts) - function(-1e-7, parts)) / 2e-7  # type: ignore[arg-type]
        assert leaf.grad is not None and (abs(slope) > 1e-3 or place == 2)
        assert float((leaf.grad * along).sum()) == pytest.approx(scaling * slope, rel=1e-4, abs=1e-7)


def test_the_gradient_of_a_step_is_esser_s_equation_three_by_hand():
    x = torch.tensor([[-9.0, -0.6, 0.2, 0.9, 9.0]])
    factor = torch.tensor([1.0], requires_grad=True)
    learned_step(x, torch.tensor([0.5]), factor, torch.zeros(1, dtype=torch.int32), 0, -4, 3).sum().backward()
    inside = sum(round(v / 0.5) - v / 0.5 for v in (-0.6, 0.2, 0.9))
    assert factor.grad is not None
    assert float(factor.grad) == pytest.approx(0.5 * (-4 + 3 + inside) / (5 * 3) ** 0.5, rel=1e-5)


def test_a_zero_point_learns_only_from_what_is_clipped():
    x = torch.tensor([[-1.0, 0.3, 0.4, 9.0, 8.0]])
    zero = torch.tensor(1.0, requires_grad=True)
    learned_step(x, torch.tensor(0.5), torch.tensor(1.0), zero, None, 0, 3).sum().backward()
    assert zero.grad is not None and float(zero.grad) == pytest.approx(-0.5 * 3 / (5 * 3) ** 0.5, rel=1e-5)  # -1, 9 and 8 are clipped


@pytest.mark.parametrize("function", [ternary_weight, binary_connect])
def test_gradients_go_straight_through(function):
    weight, upstream = draw(1, 4, 6).requires_grad_(), draw(2, 4, 6)
    arguments = (weight, 0, False) if function is ternary_weight else (weight, torch.ones(4), 0, False)
    (function(*arguments) * upstream).sum().backward()
    assert weight.grad is not None and torch.equal(weight.grad, upstream)


@pytest.mark.parametrize("axis", [None, 0, 1])
def test_the_gradient_of_binary_weights_goes_straight_through_and_through_the_step(axis):
    weight, upstream = draw(1, 4, 6).double().requires_grad_(), draw(2, 4, 6).double()
    (binary_weight(weight, axis, False) * upstream).sum().backward()
    signs, along = weight.detach().sign(), draw(3, 4, 6).double()
    dims = [dim for dim in range(2) if dim != axis]

    def through_the_step(amount: float) -> float:
        moved = weight.detach() + amount * along
        return float((upstream * signs * moved.abs().mean(dims, keepdim=True)).sum())

    slope = (through_the_step(1e-7) - through_the_step(-1e-7)) / 2e-7 + float((upstream * along).sum())
    assert weight.grad is not None and float((weight.grad * along).sum()) == pytest.approx(slope, rel=1e-5)


def test_gradients_of_trained_levels_by_hand():
    weight = torch.tensor([[4.0, -2.0, -3.0, 0.1, -0.2]], requires_grad=True)
    start, factor = torch.tensor([[4.0], [2.5]]), torch.tensor([[1.0], [0.5]], requires_grad=True)
    upstream = torch.tensor([[1.0, 2.0, 3.0, 4.0, 5.0]])
    (trained_ternary(weight, start, factor, 0, False) * upstream).sum().backward()
    assert weight.grad is not None and factor.grad is not None
    assert weight.grad.tolist() == [[1.0, 1.0, 1.5, 4.0, 5.0]]  # times 1, 0.5 and 1 for the levels up, down and zero
    assert factor.grad.tolist() == [[4.0], [-2.5 * 5.0]]


def test_masked_zeros_stay_zeros_in_every_kind():
    weight = draw(5, 6, 8) * (draw(6, 6, 8) > 0)
    for function, *arguments in functions(weight, 0):
        if function is not learned_step:
            arguments[-1] = True
        assert bool((function(*arguments)[weight == 0] == 0).all()), function
    assert lowbit.LEVELS == ("uniform", "twn", "ttq", "binary_connect", "xnor")

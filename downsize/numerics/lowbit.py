"""Weights and activations of few levels: uniform grids with learned steps, ternary and binary weights, and how gradients go through them.

The functions of the second half stand in the graph of a network that is trained. Each gives exactly the values that :func:`codes_of` and the
step it returns give, so that what is trained is what is saved. ``axis`` is the one that steps run along, None for one step.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from .grids import Grid, filled, per_axis, wide

Levels = Literal["uniform", "twn", "ttq", "binary_connect", "xnor"]
LEVELS: tuple[Levels, ...] = get_args(Levels)
TERNARY = Grid(-1, 1)
# Steps that are tried, as fractions of the one that covers the largest value: each 3 % above the one before.
FRACTIONS = torch.logspace(-1.4, 0.05, 104, dtype=torch.float64).tolist()
# Of three levels that are not evenly spaced: products with unsigned bytes can be added by twos in 16 bits, so that every processor is exact.
TWO_SIDED = Grid(-63, 63)
# Of the mean magnitude: below it a ternary weight is zero.
THRESHOLD = 0.7


def least_error_step(weight: Tensor, axis: int | None, grid: Grid) -> Tensor:
    """The step of a grid around zero with the least squared error of rounding and clipping: [n] along ``axis``, or a scalar.

    Tried are fractions of the step that covers the largest value, and ``2 mean|w| / sqrt(high)``, with which learned steps begin in Esser et al.
    2020 (arXiv 1902.08153).
    """
    rows = _rows(weight.detach().float(), axis)
    extreme, mean = rows.abs().amax(1), rows.abs().mean(1)
    best, least = torch.zeros_like(extreme), torch.full_like(extreme, float("inf"))
    for step in [2 * mean / grid.high**0.5, *(extreme * (fraction / grid.high) for fraction in FRACTIONS)]:
        divisor = torch.where(step > 0, step, 1.0)[:, None]
        error = (rows / divisor).round_().clamp_(grid.low, grid.high).mul_(divisor).sub_(rows).square_().sum(1)
        best, least = torch.where(error < least, step, best), torch.minimum(error, least)
    return _shaped(filled(best), axis)


def ternary_codes(weight: Tensor, axis: int | None, masked: bool) -> tuple[Tensor, Tensor]:
    """Codes -1, 0, 1 and the step of ternary weights (Li et al. 2016, arXiv 1605.04711): zero up to 0.7 of the mean magnitude of the row; the
    step, the mean magnitude of the others, is their least-squares one.

    Args: ``masked``: zeros are no weights, and not in the mean.
    """
    support = _support(weight, axis, masked)
    magnitude = weight.abs() * support
    step = _sum(magnitude, axis) / _sum(support.to(weight.dtype), axis).clamp(min=1)
    return weight.sign() * support, _shaped(step.reshape(-1), axis)


def binary_codes(weight: Tensor, axis: int | None, masked: bool) -> tuple[Tensor, Tensor]:
    """Codes -1 and 1 (0 only for zeros where ``masked``) and the step, the row's mean magnitude, which is the least-squares one (Rastegari et
    al. 2016, arXiv 1603.05279)."""
    codes = _signs(weight, masked)
    step = _sum(weight.abs(), axis) / _sum(codes.abs(), axis).clamp(min=1)
    return codes, _shaped(step.reshape(-1), axis)


def two_magnitudes(weight: Tensor, axis: int | None, masked: bool) -> Tensor:
    """The mean magnitudes of what is above the ternary threshold and below its negative, [2, n]: the least-squares levels of three."""
    support = _support(weight, axis, masked)
    sides = [support & (weight > 0), support & (weight < 0)]
    return torch.stack([_sum(weight.abs() * side, axis).reshape(-1) / _sum(side.float(), axis).reshape(-1).clamp(min=1) for side in sides])


def two_sided_codes(weight: Tensor, magnitudes: Tensor, axis: int | None, masked: bool) -> tuple[Tensor, Tensor]:
    """Codes in [-63, 63], three a row, and the step: ``magnitudes`` [2, n] are the values of the positive and (negated) the negative level,
    of which the larger is exact and the other is rounded to a 63rd of it."""
    step = magnitudes.amax(0) / TWO_SIDED.high
    levels = (magnitudes / torch.where(step > 0, step, 1.0)).round()
    above, below = (per_axis(_shaped(level, axis), axis, weight.dim()) for level in levels)
    return _support(weight, axis, masked) * torch.where(weight > 0, above, -below), _shaped(step, axis)


def _support(weight: Tensor, axis: int | None, masked: bool) -> Tensor:
    magnitude = weight.abs()
    count = _sum((magnitude > 0).to(weight.dtype), axis).clamp(min=1) if masked else magnitude.numel() / _sum(magnitude, axis).numel()
    return magnitude > THRESHOLD * _sum(magnitude, axis) / count


def _signs(weight: Tensor, masked: bool) -> Tensor:
    return weight.sign() if masked else torch.where(weight < 0, -1.0, 1.0).to(weight.dtype)


def _rows(tensor: Tensor, axis: int | None) -> Tensor:
    return tensor.reshape(1, -1) if axis is None else tensor.movedim(axis, 0).flatten(1)


def _shaped(rows: Tensor, axis: int | None) -> Tensor:
    """One number a row as a vector, or as a scalar where there is one row for all."""
    return rows.reshape(()) if axis is None else rows


def _sum(tensor: Tensor, axis: int | None) -> Tensor:
    """The sum of each row, with its dimensions kept."""
    return tensor.sum([dim for dim in range(tensor.dim()) if dim != axis], keepdim=True)


# In the graph of a network that is trained -------------------------------------------------------------------------------------------


def learned_step(x: Tensor, start: Tensor, factor: Tensor, zero: Tensor, axis: int | None, low: int, high: int) -> Tensor:
    """``x`` rounded to codes ``low`` to ``high`` of the step ``start * factor``, and back, with a gradient for step and zero point.

    Gradients: for ``x`` straight through where it is not clipped; for ``factor`` that of the learned step size, ``start * g * sum of grad *
    (round(v) - v, or the clipped code)`` with ``v = x / step`` and ``g = 1 / sqrt(N * high)``, N the elements of a row, or of a sample where there
    is one step (Esser et al. 2020, arXiv 1902.08153); for ``zero``, which is rounded here, ``-step * g * sum of grad`` over what is clipped
    (Bhalgat et al. 2020, arXiv 2004.09576, who learn an offset that is no whole number of steps).
    """
    return _LearnedStep.apply(x, start, factor, zero, axis, low, high)  # type: ignore[no-any-return]


class _LearnedStep(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, start: Tensor, factor: Tensor, zero: Tensor, axis: int | None, low: int, high: int) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(x, start, factor, zero)
        ctx.grid = axis, low, high
        step, below, above = _bounds(x, start * factor, zero, axis, low, high)
        return torch.div(wide(x), step).round_().clamp_(below, above).mul_(step).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        x, start, factor, zero = ctx.saved_tensors
        axis, low, high = ctx.grid
        step, below, above = _bounds(x, start * factor, zero, axis, low, high)
        exact = torch.div(wide(x), step)
        rounded = exact.round()
        codes = rounded.clamp(below, above)
        inside = rounded == codes
        weight = 1 / (_elements(x, axis) * high) ** 0.5
        to_x = grad * inside
        # Inside round(v) - v, outside the clipped code: codes * grad - v * (grad inside).
        error = _rows(codes.mul_(grad).sub_(exact.mul_(to_x)), axis).sum(1)
        to_factor = start * weight * error.reshape(start.shape)
        to_zero = None
        if ctx.needs_input_grad[3]:
            to_zero = (start * factor * -weight * _rows(grad - to_x, axis).sum(1).reshape(start.shape)).to(zero.dtype)
        return to_x, None, to_factor.to(factor.dtype), to_zero, None, None, None


def _bounds(x: Tensor, step: Tensor, zero: Tensor, axis: int | None, low: int, high: int) -> tuple[Tensor, Any, Any]:
    """The step, and the least and largest code as it is before the zero point is added."""
    if axis is None:
        offset = whole_zero(zero, low, high)
        return step, low - int(offset), high - int(offset)
    offset = per_axis(whole_zero(zero, low, high), axis, x.dim())
    return per_axis(step, axis, x.dim()), low - offset, high - offset


def whole_zero(zero: Tensor, low: int, high: int) -> Tensor:
    """The integer that a learned zero point stands for."""
    return zero.detach().round().clamp(low, high)


def _elements(x: Tensor, axis: int | None) -> int:
    return max(1, x.numel() // max(1, x.shape[0 if axis is None else axis]) if x.dim() else 1)


def ternary_weight(weight: Tensor, axis: int | None, masked: bool) -> Tensor:
    """:func:`ternary_codes` times their step; the gradient goes straight through, as in Li et al. 2016."""
    return _straight(weight, *ternary_codes(weight.detach(), axis, masked), axis)


def binary_weight(weight: Tensor, axis: int | None, masked: bool) -> Tensor:
    """:func:`binary_codes` times their step. The gradient goes straight through, and through the step, which is the mean magnitude, as in
    Rastegari et al. 2016: ``grad + sign(w) / n * sum of grad * sign(w)``."""
    codes, step = binary_codes(weight, axis, masked)
    moving = per_axis(step - step.detach(), axis, weight.dim())  # exactly zero
    return _straight(weight, codes.detach(), step.detach(), axis) + codes.detach() * moving


def binary_connect(weight: Tensor, start: Tensor, axis: int | None, masked: bool) -> Tensor:
    """The weight's signs times a fixed step, with the gradient straight through (Courbariaux et al. 2015, arXiv 1511.00363, where the step is 1:
    here it is the mean magnitude of the weights that training starts from, so that no batch norm need follow)."""
    return _straight(weight, _signs(weight.detach(), masked), start, axis)


def trained_ternary(weight: Tensor, start: Tensor, factor: Tensor, axis: int | None, masked: bool) -> Tensor:
    """:func:`two_sided_codes` times their step, for the learned magnitudes ``start * factor`` [2, n] (Zhu et al. 2017, arXiv 1612.01064; the
    threshold is that of Li et al. 2016).

    Gradients: for the weight as there, times ``factor`` of its level where it is not zero; for ``factor`` that of the values of the level.
    """
    return _TrainedTernary.apply(weight, start, factor, axis, masked)  # type: ignore[no-any-return]


class _TrainedTernary(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, start: Tensor, factor: Tensor, axis: int | None, masked: bool) -> Tensor:  # type: ignore[override]
        codes, step = two_sided_codes(weight, start * factor, axis, masked)
        ctx.save_for_backward(codes, start, factor)
        ctx.axis = axis
        return codes * per_axis(step, axis, weight.dim())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        codes, start, factor = ctx.saved_tensors
        sides = codes > 0, codes < 0
        up, down = (per_axis(_shaped(one, ctx.axis), ctx.axis, grad.dim()) for one in factor)
        to_weight = grad * torch.where(sides[0], up, torch.where(sides[1], down, 1.0))
        to_factor = torch.stack([sign * _sum(grad * side, ctx.axis).reshape(-1) for sign, side in zip((1, -1), sides, strict=True)])
        return to_weight, None, start * to_factor, None, None


class _Straight(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, value: Tensor) -> Tensor:  # type: ignore[override]
        return value

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        return grad, None


def _straight(weight: Tensor, codes: Tensor, step: Tensor, axis: int | None) -> Tensor:
    return _Straight.apply(weight, codes * per_axis(step, axis, weight.dim()))  # type: ignore[no-any-return]


# What they settle to ------------------------------------------------------------------------------------------------------------------


def _of_learned_step(x: Tensor, start: Tensor, factor: Tensor, zero: Tensor, axis: int | None, low: int, high: int) -> tuple[Tensor, Tensor]:
    step, below, above = _bounds(x, start * factor, zero, axis, low, high)
    return (x / step).round().clamp(below, above), start * factor


# By function of a weight: its codes, and their step, for the arguments of the function.
SETTLED: dict[object, Callable[..., tuple[Tensor, Tensor]]] = {
    learned_step: _of_learned_step,
    ternary_weight: ternary_codes,
    binary_weight: binary_codes,
    binary_connect: lambda weight, start, axis, masked: (_signs(weight, masked), start),
    trained_ternary: lambda weight, start, factor, axis, masked: two_sided_codes(weight, start * factor, axis, masked),
}


def codes_of(function: object, *arguments: Any) -> tuple[Tensor, Tensor]:
    """The codes that a weight has by one of the functions above, called with these arguments (the axis among them), and their step.

    Rows whose step is zero beside the largest one's, to float precision, get the codes of zeros and that step.
    """
    axis = next(one for one in arguments if not isinstance(one, Tensor))
    with torch.no_grad():
        codes, step = SETTLED[function](*arguments)
        alive = step == filled(step)
        return codes.detach() * per_axis(alive, axis, codes.dim()), filled(step).detach()

"""Quantization grids: ranges, scales and codes, and the fake-quantization operator that carries them in a graph.

An affine grid maps a real ``x`` to an integer code ``q = clamp(round(x / scale) + zero_point, low, high)`` and back to
``scale * (q - zero_point)`` (Jacob et al. 2018, arXiv 1712.05877). Rounding is half to even, as in ONNX QuantizeLinear.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# Scales below this would make x / scale overflow; a tensor of zeros gets it, which is exact.
SMALLEST_SCALE = 1e-12


@dataclass(frozen=True)
class Grid:
    """A range of integer codes: ``Grid(0, 255)`` is uint8, ``Grid(-127, 127)`` narrow int8 (symmetric around zero)."""

    low: int
    high: int

    @property
    def dtype(self) -> torch.dtype:
        """The integer type that holds the codes."""
        return torch.uint8 if self.low >= 0 else torch.int8


UINT8 = Grid(0, 255)
INT8 = Grid(-128, 127)
SYMMETRIC_INT8 = Grid(-127, 127)
BITS = range(2, 9)


def weight_grid(bits: int) -> Grid:
    """The signed grid of that many bits, 2 to 8: at 8 narrow, so that it is symmetric; below all codes are needed, -2, -1, 0, 1 at 2 bits."""
    return SYMMETRIC_INT8 if bits == 8 else Grid(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)


def activation_grid(bits: int) -> Grid:
    """The unsigned grid of that many bits, 2 to 8."""
    return Grid(0, 2**bits - 1)


def affine(low: Tensor, high: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """Scale and zero point of the asymmetric grid that covers [low, high] and holds zero exactly (padding must stay zero).

    The scale is smaller than (high - low) / levels by a millionth, so that both ends take the outermost codes also where rounding
    errors decide between two: then nothing need clip to [low, high] before.

    Args: ``low``, ``high``: any equal shape. Returns: ``scale`` float32 and ``zero_point`` int32 of that shape.
    """
    low, high = torch.clamp(low, max=0.0).double(), torch.clamp(high, min=0.0).double()
    scale = ((high - low) * (1 - 1e-6) / (grid.high - grid.low)).clamp(min=SMALLEST_SCALE)
    zero_point = (grid.low - low / scale).round().clamp(grid.low, grid.high)
    return scale.float(), zero_point.int()


def symmetric(extreme: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """Scale and zero point of the symmetric grid that covers [-extreme, extreme].

    A row of zeros takes the largest scale of the others: any scale is exact for it, and a tiny one would overflow the integer bias
    that has the scale ``input scale * weight scale``.
    """
    scale = filled(extreme.double() / grid.high)
    return scale.float(), torch.zeros_like(scale, dtype=torch.int32)


def covering(low: Tensor, high: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """The grid over [low, high]: an unsigned one asymmetric, a signed one symmetric, its zero point 0."""
    return affine(low, high, grid) if grid.low >= 0 else symmetric(torch.maximum(-low, high).clamp(min=SMALLEST_SCALE), grid)


def filled(scale: Tensor) -> Tensor:
    """Scales of rows, those of rows of zeros replaced by the largest."""
    fallback = scale.max() if scale.numel() and float(scale.max()) > 0 else torch.ones((), dtype=scale.dtype)
    return torch.where(scale > fallback * 1e-7, scale, fallback)


def per_axis(values: Tensor, axis: int | None, rank: int) -> Tensor:
    """Reshape a vector so that it broadcasts along ``axis`` of a tensor of that rank."""
    if axis is None:
        return values
    shape = [1] * rank
    shape[axis] = -1
    return values.reshape(shape)


def codes(x: Tensor, scale: Tensor, zero_point: Tensor, axis: int | None, grid: Grid) -> Tensor:
    """Integer codes of ``x``: same shape, dtype ``grid.dtype``. ``scale`` and ``zero_point`` are scalars, or vectors along ``axis``."""
    s, z = per_axis(scale, axis, x.dim()), per_axis(zero_point, axis, x.dim())
    return (torch.round(x / s) + z).clamp_(grid.low, grid.high).to(grid.dtype)


def values(q: Tensor, scale: Tensor, zero_point: Tensor, axis: int | None) -> Tensor:
    """Real values of integer codes: ``scale * (q - zero_point)``, float32, same shape."""
    s, z = per_axis(scale, axis, q.dim()), per_axis(zero_point, axis, q.dim())
    return (q.to(torch.int32) - z).float() * s


@torch.library.custom_op("downsize::fake_quantize", mutates_args=())
def fake_quantize(x: Tensor, scale: Tensor, zero_point: Tensor, axis: int | None, low: int, high: int) -> Tensor:
    """Round ``x`` to the grid and back, in float: what an integer runtime computes, in a graph that can still be trained.

    Gradient: straight through for ``x`` inside the range, and the learned step size for ``scale``
    (Esser et al. 2020, arXiv 1902.08153, without its gradient scaling).
    """
    s, z = per_axis(scale, axis, x.dim()), per_axis(zero_point, axis, x.dim())
    rounded = torch.div(wide(x), s).round_()
    clipped = rounded.clamp_(low - int(z), high - int(z)) if axis is None else rounded.add_(z).clamp_(low, high).sub_(z)
    return clipped.mul_(s).to(x.dtype)


def wide(x: Tensor) -> Tensor:
    """At least float32: half the codes would be rounded wrongly in 16 bits."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


@fake_quantize.register_fake
def _(x: Tensor, scale: Tensor, zero_point: Tensor, axis: int | None, low: int, high: int) -> Tensor:
    return torch.empty_like(x)


def _save(ctx, inputs, output) -> None:
    x, scale, zero_point, ctx.axis, ctx.low, ctx.high = inputs
    ctx.save_for_backward(x, scale, zero_point)


def _gradient(ctx, grad: Tensor):
    x, scale, zero_point = ctx.saved_tensors
    s, z = per_axis(scale, ctx.axis, x.dim()), per_axis(zero_point, ctx.axis, x.dim())
    steps = wide(x) / s
    rounded = torch.round(steps) + z
    inside = (rounded >= ctx.low) & (rounded <= ctx.high)
    to_scale = grad * (rounded.clamp(ctx.low, ctx.high) - z - torch.where(inside, steps, 0.0))
    if ctx.axis is None:
        to_scale = to_scale.sum().reshape(scale.shape)
    else:
        to_scale = to_scale.transpose(0, ctx.axis).flatten(1).sum(1) if x.dim() > 1 else to_scale
    return grad * inside, to_scale.to(scale.dtype), None, None, None, None


fake_quantize.register_autograd(_gradient, setup_context=_save)


@torch.library.custom_op("downsize::fake_quantize_dynamic", mutates_args=())
def fake_quantize_dynamic(x: Tensor) -> Tensor:
    """Fake-quantize to uint8 with the range of this very tensor, as ONNX DynamicQuantizeLinear does: one scale for the whole tensor.

    The scale and zero point are computed in float32, as its definition says.
    """
    wide = x.float()
    low, high = wide.amin().clamp(max=0.0), wide.amax().clamp(min=0.0)
    scale = (high - low) / 255
    scale = torch.where(scale > 0, scale, 1.0)
    zero_point = (-low / scale).clamp(0, 255).round()
    return (torch.div(wide, scale).round_().add_(zero_point).clamp_(0, 255).sub_(zero_point)).mul_(scale).to(x.dtype)


@fake_quantize_dynamic.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


fake_quantize_dynamic.register_autograd(lambda ctx, grad: grad, setup_context=lambda ctx, inputs, output: None)

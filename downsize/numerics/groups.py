"""Weights quantized in groups: runs of consecutive columns of a row, each with a scale and a zero point of its own.

A weight of any shape is read as a matrix [rows, columns]: its first dimension, and all others in order. The last group of a row may be
shorter. Values are ``scale * (q - zero_point)`` as on every grid; or, with a codebook, ``scale * levels[q]``.

What such a weight multiplies can be rounded in the same blocks of columns, by their own ranges at run time.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .grids import Grid, wide

# The largest code of a block of an input; and the least magnitude it can stand for: blocks below become zeros, and zeros stay.
LARGEST_CODE = 127
SMALLEST_EXTREME = 1e-30


def group_count(columns: int, group: int) -> int:
    """How many groups a row of so many columns has."""
    return -(-columns // group)


def spread(values: Tensor, columns: int, group: int) -> Tensor:
    """One value a group [rows, groups] as one a column [rows, columns]."""
    return values[:, torch.arange(columns, device=values.device) // group]


def group_codes(weight: Tensor, scale: Tensor, zero_point: Tensor, group: int, grid: Grid) -> Tensor:
    """Integer codes of a weight: [rows, columns], dtype ``grid.dtype``. ``scale`` float and ``zero_point`` int32: [rows, groups]."""
    matrix = weight.flatten(1)
    s, z = (spread(each, matrix.shape[1], group) for each in (scale, zero_point))
    return (torch.round(matrix / s) + z).clamp_(grid.low, grid.high).to(grid.dtype)


def group_values(q: Tensor, scale: Tensor, zero_point: Tensor, group: int) -> Tensor:
    """Real values of codes: float32 [rows, columns]."""
    s, z = (spread(each, q.shape[1], group) for each in (scale, zero_point))
    return (q.to(torch.int32) - z).float() * s


def level_codes(weight: Tensor, scale: Tensor, levels: Tensor, group: int) -> Tensor:
    """The nearest level's number for each weight: uint8 [rows, columns]. ``levels`` rise; ``scale``: [rows, groups]."""
    matrix = weight.flatten(1)
    middles = (levels[1:] + levels[:-1]) / 2
    return torch.bucketize(matrix / spread(scale, matrix.shape[1], group), middles).to(torch.uint8)


def level_values(q: Tensor, scale: Tensor, levels: Tensor, group: int) -> Tensor:
    """Real values of level numbers: float32 [rows, columns]."""
    return levels[q.long()].float() * spread(scale, q.shape[1], group)


@torch.library.custom_op("downsize::fake_quantize_groups", mutates_args=())
def fake_quantize_groups(x: Tensor, scale: Tensor, zero_point: Tensor, group: int, low: int, high: int) -> Tensor:
    """Round a weight to the grid of its groups and back, in float, same shape. ``scale`` and ``zero_point``: [rows, groups]."""
    q = group_codes(x, scale, zero_point, group, Grid(low, high))
    return group_values(q, scale, zero_point, group).reshape(x.shape).to(x.dtype)


@fake_quantize_groups.register_fake
def _(x: Tensor, scale: Tensor, zero_point: Tensor, group: int, low: int, high: int) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("downsize::fake_quantize_levels", mutates_args=())
def fake_quantize_levels(x: Tensor, scale: Tensor, levels: Tensor, group: int) -> Tensor:
    """Round a weight to the nearest of ``levels`` times the scale of its group, in float, same shape. ``scale``: [rows, groups]."""
    return level_values(level_codes(x, scale, levels, group), scale, levels, group).reshape(x.shape).to(x.dtype)


@fake_quantize_levels.register_fake
def _(x: Tensor, scale: Tensor, levels: Tensor, group: int) -> Tensor:
    return torch.empty_like(x)


def _straight(ctx, grad: Tensor):
    return grad, None, None, None, None, None


fake_quantize_groups.register_autograd(_straight, setup_context=lambda ctx, inputs, output: None)
fake_quantize_levels.register_autograd(lambda ctx, grad: (grad, None, None, None), setup_context=lambda ctx, inputs, output: None)


@torch.library.custom_op("downsize::fake_quantize_blocks", mutates_args=())
def fake_quantize_blocks(x: Tensor, group: int) -> Tensor:
    """Round ``x`` [..., columns] to int8 and back, in float, same shape: every ``group`` columns of every row by their own largest magnitude.

    Symmetric, 127 codes on either side of zero, half to even: what ONNX Runtime's MatMulNBits does to its input where it multiplies in integers
    (accuracy level 4). A block with NaN or infinity becomes NaN, at these places at least. Gradient: straight through.
    """
    columns = x.shape[-1]
    # A longer block than the row would only be filled up.
    group = max(1, min(group, columns))
    blocks = torch.nn.functional.pad(wide(x), (0, -columns % group)).unflatten(-1, (group_count(columns, group), group))
    extreme = blocks.abs().amax(-1, keepdim=True).clamp(min=SMALLEST_EXTREME)
    # A number divided by a tensor would be a product with its reciprocal, which decides ties differently.
    most = extreme.new_tensor(LARGEST_CODE)
    rounded = (blocks * (most / extreme)).round_().mul_(extreme / most)
    return rounded.flatten(-2)[..., :columns].to(x.dtype).contiguous()


@fake_quantize_blocks.register_fake
def _(x: Tensor, group: int) -> Tensor:
    torch._check(x.dim() > 0 and x.is_floating_point() and group > 0, lambda: f"blocks of {group} columns of {x.dtype}{list(x.shape)}")
    return x.new_empty(x.shape)


fake_quantize_blocks.register_autograd(lambda ctx, grad: (grad, None), setup_context=lambda ctx, inputs, output: None)


def block_steps(x: Tensor, group: int) -> Tensor:
    """The step of each entry's block in :func:`fake_quantize_blocks`: [..., columns], float32."""
    columns = x.shape[-1]
    blocks = torch.nn.functional.pad(x.float(), (0, -columns % group)).unflatten(-1, (group_count(columns, group), group))
    extreme = blocks.abs().amax(-1, keepdim=True).clamp(min=SMALLEST_EXTREME)
    return (extreme / LARGEST_CODE).expand(blocks.shape).flatten(-2)[..., :columns]

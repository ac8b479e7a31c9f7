"""A weight and its format: which steps it gets, what it becomes, and the fake quantizer that says so in the graph."""

# pyright: reportArgumentType=false, reportCallIssue=false, reportAttributeAccessIssue=false

from __future__ import annotations

import torch
from torch import Tensor

from ..network.network import Network
from ..network.rewrite import add_constant, insert_after
from ..numerics.clipping import Encoding, full_range, least_error
from ..numerics.groups import group_codes, group_values, level_codes, level_values
from ..numerics.hessian import compensated
from ..numerics.levels import level_scale, normal_float
from .formats import Format
from .insertion import FAKE
from .placement import WeightPoint

GROUPED = torch.ops.downsize.fake_quantize_groups.default
LEVELS = torch.ops.downsize.fake_quantize_levels.default
Steps = Encoding


def steps_of(matrix: Tensor, wanted: Format, importance: Tensor | None = None) -> Steps:
    """Scales and zero points [rows, groups] of a weight [rows, columns]: with the least squared error; of 8 bits, of the whole range.

    ``importance``: what an error of each column counts [columns].
    """
    group = wanted.columns_of_group(matrix.shape[1])
    if wanted.levels == "nf4":
        scale = level_scale(matrix, normal_float(), group, importance, half=True)
        return Steps(scale, torch.zeros_like(scale, dtype=torch.int32))
    if wanted.bits == 8:
        return full_range(matrix, group, wanted.grid, wanted.symmetric, half=not wanted.is_plain)
    return least_error(matrix, group, wanted.grid, wanted.symmetric, half=True, importance=importance)


def nearest(matrix: Tensor, wanted: Format, steps: Steps) -> Tensor:
    """The values nearest to a weight [rows, columns]."""
    group = wanted.columns_of_group(matrix.shape[1])
    if wanted.levels == "nf4":
        levels = normal_float()
        return level_values(level_codes(matrix, steps.scale, levels, group), steps.scale, levels, group)
    return group_values(group_codes(matrix, *steps, group, wanted.grid), *steps, group)


def solved(weight: Tensor, gram: Tensor, wanted: Format, steps: Steps) -> Tensor:
    """A weight [groups, rows, columns] rounded by GPTQ for inputs with these Gram matrices [groups, columns, columns]."""
    columns = weight.shape[2]
    group = wanted.columns_of_group(columns)
    scale, zero_point = (each.reshape(*weight.shape[:2], -1) for each in steps)
    levels = normal_float()
    middles = (levels[1:] + levels[:-1]) / 2
    every = torch.arange(weight.shape[0])

    def round_column(column: Tensor, place: Tensor) -> Tensor:
        s, z = scale[every, :, place // group], zero_point[every, :, place // group]
        if wanted.levels == "nf4":
            return levels[torch.bucketize(column / s, middles)] * s
        return ((column / s).round() + z).clamp(wanted.grid.low, wanted.grid.high).sub(z) * s

    return compensated(weight, gram, round_column)


def quantize(network: Network, point: WeightPoint, wanted: Format, steps: Steps) -> None:
    """Fake-quantize a weight in place, with these steps."""
    name, first = str(point.node.target), min(point.node.users)

    def kept(what: str, tensor: Tensor) -> object:
        return add_constant(network, f"{name}_{what}", tensor, first)

    group = wanted.columns_of_group(network.tensor(name)[0].numel())
    scale = kept("step", steps.scale[:, 0] if wanted.is_plain else steps.scale)
    if wanted.levels == "nf4":
        insert_after(network, point.node, LEVELS, (scale, kept("levels", normal_float()), group))
        return
    zero = kept("offset", steps.zero_point[:, 0] if wanted.is_plain else steps.zero_point)
    if wanted.is_plain:
        insert_after(network, point.node, FAKE, (scale, zero, 0, wanted.grid.low, wanted.grid.high))
    else:
        insert_after(network, point.node, GROUPED, (scale, zero, group, wanted.grid.low, wanted.grid.high))

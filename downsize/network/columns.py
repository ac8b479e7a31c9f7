"""Linear layers and convolutions as what they are to a solver: a matrix, times columns of inputs, gives columns of outputs."""

# pyright: reportArgumentType=false, reportCallIssue=false, reportAttributeAccessIssue=false

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional

from .rewrite import argument, aten

# The layers that this file can unfold.
MATRIX_LAYERS = (aten.linear.default, aten.conv1d.default, aten.conv2d.default)
# A convolution's columns are taken from a window of this many output positions a side, which wanders over the image.
WINDOW = 24


def groups_of(node: fx.Node) -> int:
    """The groups of a layer; a linear layer has one."""
    return 1 if node.target is aten.linear.default else int(argument(node, 6, "groups", 1))


def weight_matrix(weight: Tensor, groups: int) -> Tensor:
    """A layer's weight [outputs, inputs / groups, ...] as a matrix a group: [groups, outputs / groups, columns]."""
    return weight.reshape(groups, weight.shape[0] // groups, -1)


def weight_from_matrix(matrix: Tensor, shape: torch.Size) -> Tensor:
    """The inverse of :func:`weight_matrix`: the weight of that shape."""
    return matrix.reshape(shape)


def input_rows(node: fx.Node, args: tuple[Any, ...], groups: int, visit: int) -> Tensor:
    """What a layer's weight matrix is multiplied with: [groups, columns, positions]. Large images give one window, another at each visit."""
    x, weight = args[0], args[1]
    if node.target is aten.linear.default:
        return x.reshape(1, -1, x.shape[-1]).mT
    x = x if x.dim() == weight.dim() else x[None]
    stride, padding, dilation = (
        _pair(argument(node, i, name, default)) for i, name, default in ((3, "stride", 1), (4, "padding", 0), (5, "dilation", 1))
    )
    if x.dim() == 3:  # a 1-D convolution is a 2-D one of height 1
        x, weight = x[:, :, None], weight[:, :, None]
        stride, padding, dilation = (1, stride[0]), (0, padding[0]), (1, dilation[0])
    x = functional.pad(x, (padding[1], padding[1], padding[0], padding[0]))
    kernel = weight.shape[2:]
    for d in (0, 1):
        span = dilation[d] * (kernel[d] - 1) + 1
        outputs = (x.shape[2 + d] - span) // stride[d] + 1
        if outputs > WINDOW:
            x = x.narrow(2 + d, _first(outputs, visit) * stride[d], (WINDOW - 1) * stride[d] + span)
    columns = functional.unfold(x, kernel, dilation=dilation, stride=stride)
    return columns.reshape(columns.shape[0], groups, -1, columns.shape[2]).permute(1, 2, 0, 3).flatten(2)


def output_rows(node: fx.Node, value: Tensor, groups: int, visit: int) -> Tensor:
    """A layer's outputs, or others of their shape, at the positions of :func:`input_rows` at that visit: [groups, rows, positions].

    With ``value`` the layer's own output it is ``weight_matrix(weight, groups) @ input_rows(...)`` plus the bias.
    """
    if node.target is aten.linear.default:
        return value.reshape(1, -1, value.shape[-1]).mT
    value = value if channel_axis(node, value.dim()) else value[None]
    for d in range(2, value.dim()):
        if value.shape[d] > WINDOW:
            value = value.narrow(d, _first(value.shape[d], visit), WINDOW)
    return value.flatten(2).unflatten(1, (groups, -1)).permute(1, 2, 0, 3).flatten(2)


def channel_axis(node: fx.Node, dims: int) -> int:
    """The dimension that holds the channels of a layer's output of so many dimensions: of a linear layer the last, of a convolution 1, or
    0 without a batch."""
    if node.target is aten.linear.default:
        return dims - 1
    return dims - (2 if node.target is aten.conv1d.default else 3)


def _first(outputs: int, visit: int) -> int:
    """Where the window of a visit begins, of that many output positions a side."""
    return (visit * 7919) % (outputs - WINDOW + 1)


def _pair(value: Any) -> tuple[int, int]:
    values = [value] if isinstance(value, int) else list(value)
    return (values[0], values[0]) if len(values) == 1 else (values[0], values[1])

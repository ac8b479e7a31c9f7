"""Linear layers and convolutions as what they are to a solver: a matrix, times columns of inputs, gives columns of outputs."""

# pyright: reportArgumentType=false, reportCallIssue=false, reportAttributeAccessIssue=false

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional

from ..numerics.transposed import cropped
from .rewrite import TRANSPOSED, argument, aten

# The layers that this file can unfold.
MATRIX_LAYERS = (aten.linear.default, aten.conv1d.default, aten.conv2d.default, aten.conv3d.default)
DIRECTIONS = {
    aten.linear.default: 0,
    **dict.fromkeys((aten.conv1d.default, aten.conv_transpose1d.default), 1),
    **dict.fromkeys((aten.conv2d.default, aten.conv_transpose2d.input), 2),
    **dict.fromkeys((aten.conv3d.default, aten.conv_transpose3d.input), 3),
}
# A convolution's columns are taken from a window of this many output positions a side, which wanders over the image.
WINDOW, SMALL_WINDOW = 24, 8


def groups_of(node: fx.Node) -> int:
    """The groups of a layer; a linear layer has one."""
    return 1 if node.target is aten.linear.default else int(argument(node, 6, "groups", 1))


def weight_matrix(weight: Tensor, groups: int) -> Tensor:
    """A layer's weight [outputs, inputs / groups, ...] as a matrix a group: [groups, outputs / groups, columns]."""
    return weight.reshape(groups, weight.shape[0] // groups, -1)


def weight_from_matrix(matrix: Tensor, shape: torch.Size) -> Tensor:
    """The inverse of :func:`weight_matrix`: the weight of that shape."""
    return matrix.reshape(shape)


def can_unfold(node: fx.Node) -> bool:
    """Whether :func:`input_rows` can tell what the node's weight is multiplied with: a layer whose stride, padding and so on are numbers."""
    options = [*node.args[3:], *(value for name, value in node.kwargs.items() if name != "bias")]
    return node.target in DIRECTIONS and all(map(_is_plain, options))


def _is_plain(value: Any) -> bool:
    return isinstance(value, int) or (isinstance(value, (list, tuple)) and all(isinstance(one, int) for one in value))


def input_rows(node: fx.Node, args: tuple[Any, ...], groups: int, visit: int) -> Tensor:
    """What a layer's weight matrix is multiplied with: [groups, columns, positions]. Large images give one window, another at each visit.

    Of transposed convolutions what the convolution reads that they are: their input with zeros between, for a weight [outputs,
    inputs / groups, *kernel] with the kernel turned round.
    """
    x, weight = args[0], args[1]
    if node.target is aten.linear.default:
        return x.reshape(1, -1, x.shape[-1]).mT
    x = x if x.dim() == weight.dim() else x[None]
    kernel, dims, turned = weight.shape[2:], weight.dim() - 2, node.target in TRANSPOSED
    places = (("stride", 3, 1), ("padding", 4, 0), ("dilation", 7 if turned else 5, 1), ("output_padding", 5, 0))
    stride, padding, dilation, more = (each(argument(node, place, name, default), dims) for name, place, default in places)
    spread, step, around = (stride, (1,) * dims, cropped(kernel, padding, dilation)) if turned else ((1,) * dims, stride, padding)
    spans = [d * (k - 1) + 1 for k, d in zip(kernel, dilation, strict=True)]
    for d in range(dims):
        places_there = (x.shape[2 + d] - 1) * spread[d] + 1 + (more[d] if turned else 0) + 2 * around[d]
        outputs = (places_there - spans[d]) // step[d] + 1
        side = min(outputs, window_of(dims, spread[d]))
        first = _first(outputs, visit, side) * step[d] - around[d]
        x = _part(x, 2 + d, first, first + (side - 1) * step[d] + spans[d], spread[d])
    if dims == 1:  # a 1-D convolution is a 2-D one of height 1
        x, kernel, dilation, step = x[:, :, None], (1, *kernel), (1, *dilation), (1, *step)
    columns = functional.unfold(x, kernel, dilation=dilation, stride=step) if dims < 3 else _unfolded(x, spans, dilation, step)
    return columns.reshape(columns.shape[0], groups, -1, columns.shape[2]).permute(1, 2, 0, 3).flatten(2)


def _part(x: Tensor, dim: int, start: int, stop: int, spread: int) -> Tensor:
    """The places from ``start`` to ``stop`` along a dimension whose values stand ``spread`` places apart, the first at place 0, zeros elsewhere."""
    if spread == 1 and start >= 0 and stop <= x.shape[dim]:
        return x.narrow(dim, start, stop - start)
    first, last = -(-max(start, 0) // spread), (min(stop, (x.shape[dim] - 1) * spread + 1) - 1) // spread
    made = x.new_zeros(*x.shape[:dim], stop - start, *x.shape[dim + 1 :])
    if last >= first:
        slots = slice(first * spread - start, last * spread - start + 1, spread)
        made[(slice(None),) * dim + (slots,)] = x.narrow(dim, first, last - first + 1)
    return made


def _unfolded(x: Tensor, spans: Sequence[int], dilation: Sequence[int], stride: Sequence[int]) -> Tensor:
    """What a kernel of any number of directions reads at each place: [batch, channels * kernel, places]."""
    dims = len(spans)
    for d in range(dims):
        x = x.unfold(2 + d, spans[d], stride[d])[..., :: dilation[d]]
    order = [0, 1, *range(2 + dims, 2 + 2 * dims), *range(2, 2 + dims)]
    return x.permute(order).flatten(2 + dims).flatten(1, 1 + dims)


def output_rows(node: fx.Node, value: Tensor, groups: int, visit: int) -> Tensor:
    """A layer's outputs, or others of their shape, at the positions of :func:`input_rows` at that visit: [groups, rows, positions].

    With ``value`` the layer's own output it is ``weight_matrix(weight, groups) @ input_rows(...)`` plus the bias.
    """
    if node.target is aten.linear.default:
        return value.reshape(1, -1, value.shape[-1]).mT
    value = value if channel_axis(node, value.dim()) else value[None]
    spread = each(argument(node, 3, "stride", 1), value.dim() - 2) if node.target in TRANSPOSED else (1,) * (value.dim() - 2)
    for d in range(2, value.dim()):
        side = min(value.shape[d], window_of(value.dim() - 2, spread[d - 2]))
        value = value.narrow(d, _first(value.shape[d], visit, side), side)
    return value.flatten(2).unflatten(1, (groups, -1)).permute(1, 2, 0, 3).flatten(2)


def channel_axis(node: fx.Node, dims: int) -> int:
    """The dimension that holds the channels of a layer's output of so many dimensions: of a linear layer the last, of a convolution 1, or
    0 without a batch."""
    return dims - 1 - DIRECTIONS[node.target]


def window_of(dims: int, spread: int = 1) -> int:
    """Output positions a side of the window, for so many directions: about as many in three as in two; never fewer than inputs are apart, so
    that it meets every position of a kernel."""
    return max(WINDOW if dims < 3 else SMALL_WINDOW, spread)


def _first(outputs: int, visit: int, window: int) -> int:
    """Where the window of a visit begins, of that many output positions a side."""
    return (visit * 7919) % (outputs - window + 1)


def each(value: Any, dims: int) -> tuple[int, ...]:
    """A number for each direction, from torch's one for all or list."""
    values = [value] if isinstance(value, int) else list(value)
    return tuple(values * dims if len(values) == 1 else values)

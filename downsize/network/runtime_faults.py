"""What runtimes get wrong in integer graphs, said in another way that they get right.

Each of these was found by comparing files with their simulation; `tests/test_runtime_faults.py` shows every one of them. The float
function stays what it was.
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportOptionalIterable=false, reportGeneralTypeIssues=false
# pyright: reportAttributeAccessIssue=false, reportOptionalMemberAccess=false, reportIndexIssue=false, reportReturnType=false
# (torch.fx types every argument as a union of everything)

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, fx

from ..errors import ExportError
from ..numerics import grids
from .clean import at
from .dry import dry_walk
from .lower import dequantized, insert_call
from .network import Network
from .rewrite import argument, aten, constant

ours = torch.ops.downsize
# Average pools, each with the convolution of as many dimensions.
AVERAGE_POOLS = {
    aten.avg_pool1d.default: (aten.conv1d.default, 1),
    aten.avg_pool2d.default: (aten.conv2d.default, 2),
    aten.avg_pool3d.default: (aten.conv3d.default, 3),
}
POOL_SIZES = ((1, "kernel_size", None), (2, "stride", []), (3, "padding", 0))
REDUCTIONS = {aten.mean.dim, aten.sum.dim_IntList, aten.amax.default, aten.amin.default, aten.logsumexp.default}
Facts = dict[fx.Node, Tensor]


def avoid(network: Network) -> None:
    """Rewrite, in place, what runtimes get wrong in a lowered network; one without integers stays as it is.

    Raises:
        ExportError: no other way to say it is known.
    """
    if not any(node.target is ours.dequantize.default for node in network.graph.nodes):
        return
    facts = _facts(network)
    for node in list(network.graph.nodes):
        if node.target in AVERAGE_POOLS:
            _average_by_convolution(network, node, facts)
        elif node.target in REDUCTIONS and node in facts:
            _keep_reduced_dimensions(network, node, facts)
        elif node.target is aten.pad.default:
            _pad_with_zeros(network, node)
    network.recompile()


def _facts(network: Network) -> Facts:
    """The value of every tensor node as a tensor without data: shape and type at the example's sizes."""
    facts: Facts = {}

    def record(node: fx.Node) -> Any:
        return lambda args, value: facts.__setitem__(node, value) if isinstance(value, Tensor) else None

    dry_walk(network, {node: record(node) for node in network.graph.nodes})
    return facts


def _average_by_convolution(network: Network, pool: fx.Node, facts: Facts) -> None:
    """An average pool that counts its padding becomes a convolution with equal integer weights, unless zero is the lowest code.

    OpenVINO pads an integer pool with code 0, also where that is not zero; ONNX Runtime's integer pool counts what ``ceil_mode`` adds.
    """
    source, convolution, rank = pool.args[0], *AVERAGE_POOLS[pool.target]
    kernel, stride, padding = (_of_rank(argument(pool, i, name, default), rank) for i, name, default in POOL_SIZES)
    counted = argument(pool, 5, "count_include_pad", True)
    before = source.target is aten.pad.default  # runtimes merge it into the pool
    if argument(pool, 6, "divisor_override") is not None or (any(padding) and not counted):
        return
    if not before and not any(padding):
        pool.args, pool.kwargs = (source, kernel, stride or kernel, padding, bool(argument(pool, 4, "ceil_mode", False)), False), {}
        return
    origin = source.args[0] if before else source
    if origin.target is ours.dequantize.default and int(constant(network, origin.args[2])) == 0:
        return
    if argument(pool, 4, "ceil_mode", False):
        raise ExportError(
            f"An average pool counts its padding and rounds its size up, which runtimes get wrong in int8.\n{at(pool)}Set one to False."
        )
    channels, count = facts[pool].shape[-rank - 1], math.prod(kernel)
    largest = grids.SYMMETRIC_INT8.high
    q = torch.full((channels, 1, *kernel), largest, dtype=torch.int8)
    scale, zero = torch.full((channels,), 1 / (largest * count)), torch.zeros(channels, dtype=torch.int32)
    weight = dequantized(network, f"{pool.name}_average", q, scale, zero, 0, pool)
    pool.target, pool.kwargs = convolution, {}
    pool.args = (source, weight, None, stride or kernel, padding, [1] * rank, channels)


def _of_rank(value: object, rank: int) -> list[int]:
    """A size given as one number or as a list, as a list of that length; an empty one stays empty."""
    given = [value] if isinstance(value, int) else list(value)
    return given * rank if len(given) == 1 else given


def _keep_reduced_dimensions(network: Network, node: fx.Node, facts: Facts) -> None:
    """A reduction to 2-D keeps its dimensions, and they are squeezed out behind it.

    OpenVINO merges a factor a channel and the quantizer behind it into the reduction, and takes the wrong axis for the channels.
    """
    dims = _of_rank(argument(node, 1, "dim", []), 1)
    if facts[node].dim() != 2 or argument(node, 2, "keepdim", False) or not dims:
        return
    kept = insert_call(network, node, node.target, (node.args[0], dims, True))
    kept.kwargs = {key: value for key, value in node.kwargs.items() if key not in ("dim", "keepdim")}
    rank = facts[node.args[0]].dim()
    node.replace_all_uses_with(insert_call(network, node, aten.squeeze.dims, (kept, [dim % rank for dim in dims])))
    network.graph.erase_node(node)


def _pad_with_zeros(network: Network, pad: fx.Node) -> None:
    """Padding with a number other than zero becomes padding with zeros of what lies above that number.

    OpenVINO otherwise takes the first channel's scale for all channels of convolutions before.
    """
    value = argument(pad, 3, "value")
    if argument(pad, 2, "mode", "constant") != "constant" or not value:
        return
    shifted = insert_call(network, pad, aten.sub.Tensor, (pad.args[0], value))
    padded = insert_call(network, pad, aten.pad.default, (shifted, pad.args[1]))
    pad.replace_all_uses_with(insert_call(network, pad, aten.add.Tensor, (padded, value)))
    network.graph.erase_node(pad)

"""Put fake quantizers into a graph, at the points and on the grids that were decided."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from ..network.lower import GROUPED
from ..network.network import Network
from ..network.rewrite import add_constant, constant, insert_after, set_constant
from ..numerics import grids
from ..numerics.grids import SYMMETRIC_INT8, Grid
from ..numerics.lowbit import (
    TERNARY,
    TWO_SIDED,
    Levels,
    binary_codes,
    binary_connect,
    binary_weight,
    codes_of,
    least_error_step,
    ternary_weight,
    trained_ternary,
    two_magnitudes,
)
from .placement import Placement, WeightPoint
from .ranges import Range

FAKE = torch.ops.downsize.fake_quantize.default
DYNAMIC = torch.ops.downsize.fake_quantize_dynamic.default


def quantize_weights(network: Network, points: list[WeightPoint], grid: Grid) -> None:
    """Fake-quantize the weights in place: symmetric, one scale along the point's axis (or one for all).

    On the grid of int8 it covers the largest value; on a smaller one it has the least squared error.
    """
    for point in points:
        weight = network.tensor(str(point.node.target)).detach()
        if grid == SYMMETRIC_INT8:
            scale, _ = grids.symmetric(extremes(weight, point.axis), grid)
        else:
            scale = least_error_step(weight, point.axis, grid)
        _quantize_weight(network, point, scale, grid)


def quantize_to_levels(network: Network, points: list[WeightPoint], levels: Levels) -> None:
    """Give the weights two or three values a row, in place, and fake-quantize them on the grid of these values."""
    for point in points:
        name = str(point.node.target)
        weight = network.tensor(name).detach()
        codes, scale = codes_of(*function_of(levels, weight, point.axis, name in network.sparse))
        set_constant(network, point.node, codes * grids.per_axis(scale, point.axis, weight.dim()))
        _quantize_weight(network, point, scale, TWO_SIDED if levels == "ttq" else TERNARY)


def function_of(levels: Levels, weight: Tensor, axis: int | None, masked: bool) -> tuple[Any, ...]:
    """The function that gives a weight such levels (see ``numerics/lowbit.py``), and its arguments as training begins; ``masked``: zeros stay."""
    if levels == "ttq":
        start = two_magnitudes(weight, axis, masked)
        return trained_ternary, weight, start, torch.ones_like(start), axis, masked
    if levels == "binary_connect":
        return binary_connect, weight, binary_codes(weight, axis, masked)[1], axis, masked
    return {"twn": ternary_weight, "xnor": binary_weight}[levels], weight, axis, masked


def _quantize_weight(network: Network, point: WeightPoint, scale: Tensor, grid: Grid) -> None:
    first = min(point.node.users)
    name = str(point.node.target)
    parts = ("step", scale), ("offset", torch.zeros_like(scale, dtype=torch.int32))
    made = [add_constant(network, f"{name}_{what}", tensor, first) for what, tensor in parts]
    insert_after(network, point.node, FAKE, (*made, point.axis, grid.low, grid.high))


def extremes(weight: Tensor, axis: int | None) -> Tensor:
    """The largest magnitude along ``axis`` ([n] for n rows), or over all (a scalar)."""
    if axis is None:
        return weight.abs().amax()
    return weight.abs().transpose(0, axis).flatten(1).amax(1)


def quantize_activations(network: Network, placement: Placement, ranges: dict[fx.Node, Range], grid: Grid) -> None:
    """Fake-quantize the activations in place, one range a tensor: asymmetric on an unsigned grid, symmetric on a signed one."""
    made: dict[fx.Node, tuple[fx.Node, fx.Node]] = {}
    for point in placement.activations:
        source = point.like or point.node
        if source not in made:
            scale, zero_point = grids.covering(torch.tensor(ranges[source][0]), torch.tensor(ranges[source][1]), grid)
            before = point.node.next
            while before.op == "placeholder":
                before = before.next
            pair = [add_constant(network, f"{source.name}_{what}", tensor, before) for what, tensor in (("step", scale), ("offset", zero_point))]
            made[source] = pair[0], pair[1]
        insert_after(network, point.node, FAKE, (*made[source], None, grid.low, grid.high), point.readers)


def quantize_dynamically(network: Network, placement: Placement, linear: list[fx.Node]) -> None:
    """Fake-quantize the inputs of ``linear`` by their own range at run time, in place."""
    for point in placement.activations:
        readers = [user for user in (point.readers or tuple(point.node.users)) if user in linear]
        if readers:
            insert_after(network, point.node, DYNAMIC, (), readers)


def grid_of(fake: fx.Node) -> Grid:
    """The grid of a ``fake_quantize`` node."""
    return Grid(int(fake.args[4]), int(fake.args[5]))  # type: ignore[arg-type]


def settle(network: Network) -> Network:
    """A fork that only runs, faster: fake-quantized weights are constants already, activations are rounded by torch's own operator."""
    settled = network.fork()
    for node in [n for n in settled.graph.nodes if n.target is FAKE or n.target in GROUPED]:
        weight, *parts = (constant(settled, argument) for argument in node.args[:3])
        if weight is not None:
            with torch.no_grad():
                value = node.target(weight, *parts, *node.args[3:])  # type: ignore[operator]
            node.replace_all_uses_with(add_constant(settled, f"{node.args[0].target}_settled", value, node))  # type: ignore[union-attr]
            settled.graph.erase_node(node)
        elif node.target is FAKE and node.args[3] is None:
            node.target = torch.ops.aten.fake_quantize_per_tensor_affine.tensor_qparams
            node.args = (*node.args[:3], *node.args[4:])
    settled.recompile()
    return settled

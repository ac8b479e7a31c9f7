"""Put fake quantizers into a graph, at the points and on the grids that were decided."""

from __future__ import annotations

import torch
from torch import Tensor, fx

from ..network.network import Network
from ..network.rewrite import add_constant, constant, insert_after
from ..numerics import grids
from ..numerics.grids import Grid
from .placement import Placement, WeightPoint
from .ranges import Range

FAKE = torch.ops.downsize.fake_quantize.default
DYNAMIC = torch.ops.downsize.fake_quantize_dynamic.default


def quantize_weights(network: Network, points: list[WeightPoint], grid: Grid) -> None:
    """Fake-quantize the weights in place: symmetric, one scale along the point's axis (or one for all), covering the largest value."""
    for point in points:
        weight = network.tensor(str(point.node.target)).detach()
        scale, zero_point = grids.symmetric(extremes(weight, point.axis), grid)
        first = next(iter(point.node.users))
        name = str(point.node.target)
        made = [add_constant(network, f"{name}_{what}", tensor, first) for what, tensor in (("step", scale), ("offset", zero_point))]
        insert_after(network, point.node, FAKE, (*made, point.axis, grid.low, grid.high))


def extremes(weight: Tensor, axis: int | None) -> Tensor:
    """The largest magnitude along ``axis`` ([n] for n rows), or over all (a scalar)."""
    if axis is None:
        return weight.abs().amax()
    return weight.abs().transpose(0, axis).flatten(1).amax(1)


def quantize_activations(network: Network, placement: Placement, ranges: dict[fx.Node, Range], grid: Grid) -> None:
    """Fake-quantize the activations in place, asymmetric, one range a tensor."""
    made: dict[fx.Node, tuple[fx.Node, fx.Node]] = {}
    for point in placement.activations:
        source = point.like or point.node
        if source not in made:
            scale, zero_point = grids.affine(torch.tensor(ranges[source][0]), torch.tensor(ranges[source][1]), grid)
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
    for node in [n for n in settled.graph.nodes if n.target is FAKE]:
        weight, scale, zero_point = (constant(settled, argument) for argument in node.args[:3])
        if weight is not None:
            with torch.no_grad():
                value = FAKE(weight, scale, zero_point, *node.args[3:])
            node.replace_all_uses_with(add_constant(settled, f"{node.args[0].target}_settled", value, node))  # type: ignore[union-attr]
            settled.graph.erase_node(node)
        elif node.args[3] is None:
            node.target = torch.ops.aten.fake_quantize_per_tensor_affine.tensor_qparams
            node.args = (*node.args[:3], *node.args[4:])
    settled.recompile()
    return settled

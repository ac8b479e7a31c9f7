"""Latency as something that widths can be allocated under: the sum over layers of what their shapes take on this machine."""

# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportOptionalMemberAccess=false

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import fx

from ..errors import TaskError
from ..network.columns import MATRIX_LAYERS, channel_axis
from ..network.empty import shrunk
from ..network.lineage import Lineage
from ..network.network import Network
from ..numerics.allocation import Term
from .choice import Amount
from .costs import Costs, Polynomial, evaluate
from .latency import Clock, LayerShape, latency_table, layer_shapes, predicted
from .sites import Site


def need_clock(clock: Clock | None) -> Clock:
    """The clock.

    Raises:
        TaskError: there is none.
    """
    if clock is None:
        raise TaskError(
            "latency= needs latencies measured in a runtime: use downsize.fit or downsize.run, or give the task a clock (docs/pruning.md)."
        )
    return clock


def whole_latency(network: Network, clock: Clock | None, inputs: Any) -> float:
    """Milliseconds of all layers with products."""
    return predicted(need_clock(clock), network, inputs)


def latency_amount(lineage: Lineage, found: Sequence[Site], most: float, clock: Clock | None, inputs: Any) -> Amount:
    """At most ``most`` milliseconds in all layers with products, on ``inputs``."""
    clock = need_clock(clock)
    costs = Costs(lineage, [site.axis for site in found])
    shapes = layer_shapes(lineage.network, inputs)
    macs = {node.name: polynomial for node, polynomial in costs.macs_by_node().items()}
    nodes = {node.name: node for node in lineage.network.graph.nodes}

    def terms(widths: Sequence[np.ndarray]) -> tuple[Term, ...]:
        made: list[Term] = []
        for name, shape in shapes.items():
            made += _layer_terms(costs, nodes[name], shape, macs.get(name, {(): 1.0}), widths, clock)
        return tuple(made)

    return Amount("latency", most, terms, lambda dead: predicted(clock, shrunk(lineage, dead), inputs))


def _layer_terms(costs: Costs, node: fx.Node, shape: LayerShape, macs: Polynomial, widths: Sequence[np.ndarray], clock: Clock) -> Sequence[Term]:
    """Measured over the widths of the axis it reads and of the one it makes; a layer of another form takes time as it takes MACs."""
    dims = costs.lineage.dims
    if node.target in MATRIX_LAYERS and node.args[1].op == "get_attr" and shape.operands[1].constant:
        channel = channel_axis(node, len(dims[node.args[0]]))
        incoming, outgoing = costs.size(dims[node.args[0]][channel]), costs.size(dims[node.args[1]][0])
        one, two = ({axis for key in polynomial for axis in key} for polynomial in (incoming, outgoing))
        if len(one) <= 1 and len(two) <= 1:
            return [_measured(shape, incoming, outgoing, one, two, widths, clock)]
    (time,), whole = clock.milliseconds([shape]), evaluate(macs, [1.0] * len(widths))
    return costs.terms({key: factor * time / max(whole, 1.0) for key, factor in macs.items()}, widths)


def _measured(
    shape: LayerShape, incoming: Polynomial, outgoing: Polynomial, one: set[int], two: set[int], widths: Sequence[np.ndarray], clock: Clock
) -> Term:
    inputs, outputs = (_counts(polynomial, axes, widths) for polynomial, axes in ((incoming, one), (outgoing, two)))
    if one == two and one:  # depthwise, or a stream that a layer both reads and makes
        times = clock.milliseconds([shape.widened(i, o) for i, o in zip(inputs, outputs, strict=True)])
        return Term((*one,), np.minimum.accumulate(np.array(times)))
    table = latency_table(clock, shape, inputs, outputs)
    table = table if one else table[0]
    return Term((*one, *two), table if two else table[..., 0])


def _counts(polynomial: Polynomial, axes: set[int], widths: Sequence[np.ndarray]) -> list[int]:
    """The channels at each level of the one axis; a single number where there is none."""
    if not axes:
        return [round(evaluate(polynomial, [1.0] * len(widths)))]
    (axis,) = axes
    return [round(evaluate(polynomial, [1.0] * axis + [float(share)] + [1.0] * (len(widths) - axis - 1))) for share in widths[axis]]

"""The oracle of cutting: the uncut graph, in which what the READERS take of dead positions is zero.

The makers are left alone: a maker's bias and the shift of a batch norm would leak otherwise. A statistic (a layer norm, a mean over channels)
is taken over the living positions only.
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportAttributeAccessIssue=false, reportOptionalMemberAccess=false

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
import torch
from torch import fx

from .cut import REWRITES, Survivors
from .lineage import Lineage
from .lineage_rules import operator_name
from .network import Network
from .rewrite import add_constant, aten, insert_after


def masked(network: Network | Lineage, dead: Mapping[str, Iterable[int]]) -> Network:
    """The network that ``cut(network, dead)`` must compute the same as, at full size.

    Args and Raises: as of :func:`~downsize.network.cut.cut`; but an axis may lose all its units (see ``empty.py``).
    """
    lineage = network if isinstance(network, Lineage) else Lineage(network)
    survivors = Survivors(lineage, dead, allow_empty=True)
    made = lineage.network.fork()
    twins = dict(zip(lineage.network.graph.nodes, made.graph.nodes, strict=True))
    statistics = {read.node for read in lineage.reads if read.statistic}
    held: dict[tuple[fx.Node, fx.Node], fx.Node] = {}  # what a reader is given instead of its source, so far
    for read in lineage.reads:
        alive = survivors.of(lineage.dims[read.source][read.dim])
        if read.node not in statistics and not alive.all():
            shape = [1] * len(lineage.dims[read.source])
            shape[read.dim] = -1
            mask = add_constant(made, f"{read.node.name}_dead", torch.from_numpy(~alive).reshape(shape), twins[read.node])
            given = held.get((read.node, read.source), twins[read.source])
            held[read.node, read.source] = _insert(made, given, aten.masked_fill.Scalar, (mask, 0), twins[read.node])
    for node in [node for node in lineage.network.graph.nodes if node in statistics]:
        twins[node] = _over_the_living(made, survivors, node, twins)
    made.recompile()
    return made


def _insert(made: Network, source: fx.Node, target: object, args: tuple[object, ...], reader: fx.Node) -> fx.Node:
    """``reader`` reads ``target(source, *args)`` instead of ``source``, however far behind it was read before."""
    with made.graph.inserting_before(reader):
        node = made.graph.call_function(target, (source, *args))
    reader.replace_input_with(source, node)
    return node


def _over_the_living(made: Network, survivors: Survivors, node: fx.Node, twins: Mapping[fx.Node, fx.Node]) -> fx.Node:
    """Cut one operator's operands, and spread its result over the full width again; what stands at dead positions is never read.

    Returns: the node that now gives the operator's value.
    """
    for source in node.all_input_nodes:
        position = twins[source]
        for dim, alive in enumerate(survivors.dims(source)):
            if not alive.all():
                index = add_constant(made, f"{node.name}_living", torch.from_numpy(np.flatnonzero(alive)), twins[node])
                position = _insert(made, position, aten.index_select.default, (dim, index), twins[node])
    rewrite = REWRITES.get(operator_name(node))
    if rewrite is not None:
        rewrite(survivors, node, twins[node])
    end = twins[node]
    for dim, alive in enumerate(survivors.dims(node)):
        if not alive.all():
            places = torch.from_numpy(np.where(alive, np.cumsum(alive) - 1, 0))
            index = add_constant(made, f"{node.name}_places", places, end.next)
            end = insert_after(made, end, aten.index_select.default, (dim, index))
    return end

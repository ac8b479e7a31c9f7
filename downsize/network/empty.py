"""Sub-layers that lost their last unit: what is left of them is the bias of the layer that read it, and the residual around."""

# pyright: reportArgumentType=false, reportCallIssue=false, reportAttributeAccessIssue=false, reportOptionalMemberAccess=false

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, fx

from ..errors import CutError
from .columns import MATRIX_LAYERS, groups_of
from .cut import cut
from .lineage import Axis, Lineage
from .network import Network
from .rewrite import IDENTITIES, add_constant, argument, aten, constant

SUMS = (aten.add.Tensor, aten.add_.Tensor, aten.sub.Tensor)


def can_empty(lineage: Lineage, axis: Axis) -> bool:
    """Whether all units of an axis may go: whatever reads them is a layer that reads nothing else, and whose output is added to something of
    its own shape."""
    readers = _readers(lineage, axis)
    return axis.exact and bool(readers) and all(_stands_alone(lineage, axis, node) and _is_added(lineage, node) for node in readers)


def emptied(network: Network | Lineage, name: str) -> Network:
    """A fork without any unit of the axis ``name``: its readers give their bias, and what made it is gone.

    Raises:
        CutError: this axis cannot lose all its units, see :func:`can_empty`.
    """
    lineage = network if isinstance(network, Lineage) else Lineage(network)
    axis = lineage.axis(name)
    if not can_empty(lineage, axis):
        raise CutError(f"axis {name!r} cannot lose its last unit: what reads it is not a layer whose output is added to a residual stream.")
    made = lineage.network.fork()
    twins = {node.name: node for node in made.graph.nodes}
    for node in _readers(lineage, axis):
        twin = twins[node.name]
        value = _bias(made, twin, node, lineage)
        twin.replace_all_uses_with(add_constant(made, f"{node.args[1].target}_left", value, twin))
    made.recompile()
    return made


def shrunk(lineage: Lineage, dead: Mapping[str, Sequence[int]], changed: Network | None = None) -> Network:
    """The network without those units: :func:`~downsize.network.cut.cut`, and where all units of an axis go, :func:`emptied`."""
    units = {axis.name: axis.units for axis in lineage.axes}
    empty = [name for name, gone in dead.items() if len(gone) == units[name]]
    made = cut(lineage, {name: gone for name, gone in dead.items() if name not in empty}, changed)
    for name in empty:
        made = emptied(made, name)
    return made


def _readers(lineage: Lineage, axis: Axis) -> list[fx.Node]:
    atoms = set(axis.atoms.tolist())

    def reads(vector: np.ndarray) -> bool:
        return any(not atoms.isdisjoint(lineage.atoms.leaves(one)) for one in np.unique(lineage.atoms.find(vector)).tolist())

    return list(dict.fromkeys(read.node for read in lineage.reads if reads(lineage.dims[read.source][read.dim])))


def _stands_alone(lineage: Lineage, axis: Axis, node: fx.Node) -> bool:
    """Whether a node is a layer of one group, all of whose columns are of the axis."""
    if node.target not in MATRIX_LAYERS or groups_of(node) != 1 or node.args[1].op != "get_attr":
        return False
    atoms = set(axis.atoms.tolist())
    columns = lineage.atoms.find(lineage.dims[node.args[1]][1]).tolist()
    return all(not atoms.isdisjoint(lineage.atoms.leaves(one)) for one in columns)


def _is_added(lineage: Lineage, node: fx.Node) -> bool:
    """Whether the output goes, through operators that hand it on, only into sums with other values of its shape."""
    for user in node.users:
        if user.target in IDENTITIES:
            if not _is_added(lineage, user):
                return False
            continue
        others = [one for one in user.all_input_nodes if one is not node]
        into_itself = str(user.target).startswith("aten.add_") and user.args[0] is node
        if user.target not in SUMS or len(others) != 1 or lineage.shapes[others[0]] != lineage.shapes[node] or into_itself:
            return False
    return bool(node.users)


def _bias(network: Network, twin: fx.Node, node: fx.Node, lineage: Lineage) -> Tensor:
    """What a layer gives for inputs of zero: its bias, shaped to be broadcast over its output."""
    bias = constant(network, argument(twin, 2, "bias"))
    weight = network.tensor(str(twin.args[1].target))
    value = torch.zeros(weight.shape[0], dtype=weight.dtype) if bias is None else bias.detach().clone()
    spatial = 0 if node.target is aten.linear.default else weight.dim() - 2
    value = value.reshape(-1, *[1] * spatial)
    return torch.nn.Parameter(value) if isinstance(bias, torch.nn.Parameter) else value

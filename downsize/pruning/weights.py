"""The weights of a network that can be made sparse, and what their layers' errors are: as matrices, whatever the layer."""

# pyright: reportArgumentType=false, reportCallIssue=false, reportAttributeAccessIssue=false, reportOptionalMemberAccess=false
# pyright: reportIndexIssue=false, reportGeneralTypeIssues=false
# (torch.fx types every argument as a union of everything)

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from ..network.columns import can_unfold, groups_of, input_rows
from ..network.frontier import Frontier
from ..network.lower import PRODUCTS
from ..network.network import Network
from ..network.parts import assign
from ..network.rewrite import CONVOLUTIONS, TRANSPOSED, aten, constant, set_constant
from ..network.statistics import walk
from ..numerics.sparsity import Quadratic

Pieces = Sequence[list[Tensor]]


@dataclass(frozen=True)
class Weight:
    """A weight tensor that one layer reads, or several in the same way.

    ``names``: all that it has in the network; ``readers``: the names of the layers' nodes, in the graph's order; ``position``: of the
    weight among their arguments; ``source``: of their input; ``layout``: "rows" when the outputs lie along its first dimension,
    "columns" when along its second; ``kernel``: positions of the kernel, 1 in a linear layer. With ``inputs_last`` the columns of
    its matrix run over the inputs of one position of the kernel, then of the next (as sparse tensor cores take them); else over the
    positions of one input.
    """

    names: tuple[str, ...]
    readers: tuple[str, ...]
    shape: torch.Size
    groups: int
    position: int
    source: int
    layout: str
    kernel: int
    inputs_last: bool = False

    @property
    def name(self) -> str:
        """The first of its names."""
        return self.names[0]

    @property
    def inputs(self) -> int:
        """How many inputs, of a group, a row reads at each position of the kernel."""
        return (self.shape[1] if self.layout == "rows" else self.shape[0] // self.groups) if len(self.shape) > 1 else 1

    @property
    def rows(self) -> int:
        """How many outputs it makes."""
        return self.shape[0] if self.layout == "rows" else self.shape[1] * self.groups

    def matrix(self, tensor: Tensor) -> Tensor:
        """The tensor as a matrix: [groups, rows, columns]."""
        if self.layout == "rows":
            parts = tensor.reshape(self.groups, self.shape[0] // self.groups, self.inputs, self.kernel)
        else:
            # A transposed convolution is a convolution with the kernel turned round.
            parts = tensor.reshape(self.groups, self.inputs, self.shape[1], self.kernel).transpose(1, 2).flip(-1)
        return self.ordered(parts).contiguous()

    def ordered(self, parts: Tensor) -> Tensor:
        """[..., inputs, kernel] as columns."""
        return (parts.transpose(-2, -1) if self.inputs_last else parts).flatten(-2)

    def tensor(self, matrix: Tensor) -> Tensor:
        """The inverse of :meth:`matrix`."""
        parts = matrix.unflatten(2, (self.kernel, self.inputs)).transpose(2, 3) if self.inputs_last else matrix.unflatten(2, (self.inputs, -1))
        return (parts if self.layout == "rows" else parts.flip(-1).transpose(1, 2)).reshape(self.shape)


def weights_of(network: Network) -> list[Weight]:
    """The weights of linear layers, products and convolutions that are constants, floating point, and read as nothing else; in the order in
    which they are first read."""
    names: dict[int, list[str]] = {}
    readings: dict[int, list[tuple[fx.Node, int]]] = {}
    for node in network.graph.nodes:
        if node.op == "get_attr":
            names.setdefault(id(network.tensor(node.target)), []).append(str(node.target))
        for at, value in _arguments(node):
            if constant(network, value) is not None:
                readings.setdefault(id(network.tensor(value.target)), []).append((node, at))
    found = []
    for key, read in readings.items():
        kinds = {_kind(network, node, at) for node, at in read}
        if len(kinds) == 1 and (kind := kinds.pop()) is not None:
            tensor = network.tensor(names[key][0])
            readers = tuple(node.name for node, _ in read)
            found.append(Weight(tuple(dict.fromkeys(names[key])), readers, tensor.shape, *kind))
    return found


def _arguments(node: fx.Node) -> Iterator[tuple[int, Any]]:
    """The nodes among a node's arguments with their position; -1 for those inside lists and keywords."""
    for at, value in enumerate(node.args):
        if isinstance(value, fx.Node):
            yield at, value
    direct = [value for value in node.args if isinstance(value, fx.Node)]
    for value in node.all_input_nodes:
        if value not in direct:
            yield -1, value


def _kind(network: Network, node: fx.Node, at: int) -> tuple[int, int, int, str, int] | None:
    """How a layer reads its weight: groups, position of the weight and of the input, layout, kernel; None when it is no such reading."""
    tensor = constant(network, node.args[at]) if at >= 0 else None
    if tensor is None or not tensor.is_floating_point():
        return None
    if node.target in PRODUCTS and tensor.dim() == 2:
        source, position, _, axis = PRODUCTS[node.target]
        return (1, position, source, "rows" if axis == 0 else "columns", 1) if at == position else None
    if node.target in CONVOLUTIONS | TRANSPOSED and at == 1:
        groups = groups_of(node) if node.target in CONVOLUTIONS else int(node.args[6] if len(node.args) > 6 else node.kwargs.get("groups", 1))
        return groups, 1, 0, "rows" if node.target in CONVOLUTIONS else "columns", tensor[0, 0].numel()
    return None


def ends(network: Network, weights: Sequence[Weight]) -> set[str]:
    """The first names of the first and the last weight, by where they are first read; a layer behind an embedding is not the first."""
    order = {node.name: i for i, node in enumerate(network.graph.nodes)}
    tables = [order[node.name] for node in network.graph.nodes if node.target is aten.embedding.default]
    if not weights:
        return set()
    first = weights[0] if not tables or order[weights[0].readers[0]] < min(tables) else None
    last = max(weights, key=lambda weight: order[weight.readers[-1]])
    return {weight.name for weight in (first, last) if weight is not None}


def replace_weight(network: Network, weight: Weight, matrix: Tensor) -> None:
    """Give the network the weight of that matrix, under all its names, in the old one's type and layout in memory."""
    new = torch.empty_like(network.tensor(weight.name).detach()).copy_(weight.tensor(matrix))
    node = next(node for node in network.graph.nodes if node.op == "get_attr" and node.target == weight.name)
    set_constant(network, node, new)
    for name in weight.names[1:]:
        assign(network.graph_module, name, network.tensor(weight.name))


# Errors ----------------------------------------------------------------------------------------------------------------------------


def has_columns(network: Network, weight: Weight) -> bool:
    """Whether the inputs of all layers that read it can be had as columns."""
    return all(node.target in PRODUCTS or can_unfold(node) for node in network.graph.nodes if node.name in weight.readers)


def columns_of(weight: Weight, node: fx.Node, x: Tensor, tensor: Tensor, visit: int) -> Tensor:
    """What the weight's matrix is multiplied with when its layer reads ``x``: [groups, columns, positions]."""
    if node.target in PRODUCTS:
        return x.reshape(1, -1, x.shape[-1]).mT
    columns = input_rows(node, (x, tensor), weight.groups, visit)
    return weight.ordered(columns.mT.unflatten(2, (weight.inputs, weight.kernel))).mT if weight.inputs_last else columns


class Errors:
    """What solvers need to know of each weight, collected on the way through the network while its weights are replaced one after another.

    A weight's layer reads in the ``student`` what the layers before it make of their replaced weights; what it should give is what it gives
    in the ``teacher``. Weights must be asked for in the order of :func:`weights_of`. One that several layers read is judged by the teacher
    alone, with all its readings: those behind are not yet what they will be.

    Args:
        parts: data to fit on, and data to judge by: flat inputs of the networks.
    """

    def __init__(self, teacher: Network, student: Network, parts: tuple[Pieces, Pieces]) -> None:
        self.teacher, self.parts = teacher, parts
        self.lengths = [len(part) for part in parts]
        self.frontiers = [(Frontier(teacher, part), Frontier(student, part)) for part in parts]
        self.nodes = [{node.name: node for node in network.graph.nodes} for network in (teacher, student)]

    def __call__(self, weight: Weight) -> tuple[Quadratic, Quadratic]:
        """The weight's error on the data to fit on, and on the data to judge by."""
        tensor = self.teacher.tensor(weight.name).detach()
        matrix = weight.matrix(tensor)
        found = []
        for part, frontiers in zip(self.parts, self.frontiers, strict=True):
            quadratic = Quadratic.of(*matrix.shape)
            pairs = self._own(weight, tensor, frontiers) if len(weight.readers) == 1 else self._shared(weight, tensor, part)
            for before, now in pairs:
                quadratic.add(now, matrix @ before)
            found.append(quadratic)
        return found[0], found[1]

    def _own(self, weight: Weight, tensor: Tensor, frontiers: tuple[Frontier, Frontier]) -> Iterator[tuple[Tensor, Tensor]]:
        values: list[Iterable[Any]] = []
        node = self.nodes[0][weight.readers[0]]
        for frontier, nodes in zip(frontiers, self.nodes, strict=True):
            frontier.advance(nodes[node.name])
            values.append(frontier.values(nodes[node.name].args[weight.source]))
        for visit, (before, now) in enumerate(zip(*values, strict=True)):
            yield columns_of(weight, node, before, tensor, visit), columns_of(weight, node, now, tensor, visit)

    def _shared(self, weight: Weight, tensor: Tensor, part: Pieces) -> Iterator[tuple[Tensor, Tensor]]:
        met: list[tuple[fx.Node, Tensor]] = []
        hooks = {
            self.nodes[0][name]: lambda args, value, node=self.nodes[0][name]: met.append((node, args[weight.source]))  # type: ignore[misc]
            for name in weight.readers
        }
        for visit, leaves in enumerate(part):
            walk(self.teacher, leaves, hooks)
            for node, x in met:
                columns = columns_of(weight, node, x, tensor, visit)
                yield columns, columns
            met.clear()

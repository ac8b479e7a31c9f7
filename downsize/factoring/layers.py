"""The layers of a network that can be replaced by factors, and why the others cannot."""

# pyright: reportArgumentType=false, reportCallIssue=false, reportAttributeAccessIssue=false, reportOptionalMemberAccess=false
# pyright: reportReturnType=false, reportGeneralTypeIssues=false
# (torch.fx types every argument as a union of everything)

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from ..network.columns import MATRIX_LAYERS, can_unfold, each
from ..network.lower_weights import PRODUCTS
from ..network.memory import is_written
from ..network.network import Network
from ..network.rewrite import CONVOLUTIONS, TRANSPOSED, add_constant, argument, aten, constant
from ..numerics.lowrank_convolutions import Convolution, transposed

KINDS = {aten.linear.default: "linear", aten.embedding.default: "embedding", **dict.fromkeys(CONVOLUTIONS | TRANSPOSED, "conv")}
# A weight may have readers of both: the table of a language model that is its last layer, too (Press & Wolf, 2017, arXiv 1608.05859).
TIED = {aten.embedding.default, aten.linear.default}
CELLS = (aten.lstm_cell.default, aten.gru_cell.default, aten.rnn_tanh_cell.default, aten.rnn_relu_cell.default)
RECURRENT = {aten.lstm.input, aten.gru.input, aten.rnn_tanh.input, aten.rnn_relu.input, *CELLS}
# Of these a reason is told where they are left as they are.
LAYERS = {*KINDS, *PRODUCTS, *RECURRENT, aten.conv1d.padding, aten.conv2d.padding, aten.conv3d.padding}
# What solvers need of a convolution that reads more values at a place than this takes gigabytes and many minutes.
MOST_COLUMNS = 2**14
# Operators that may transpose a matrix, and whether they do with these arguments.
TURNS: dict[object, Callable[..., bool]] = {
    **dict.fromkeys((aten.t.default, aten.numpy_T.default, aten.mT.default), lambda: True),
    aten.permute.default: lambda axes: [axis % 2 for axis in axes] == [1, 0],
    aten.transpose.int: lambda one, two: (one - two) % 2 == 1,
}


@dataclass(frozen=True, eq=False)
class Layer:
    """A linear layer, convolution or embedding, or several nodes that use one weight in the same way.

    ``readers``: the names of the nodes, in the graph's order; ``dense``: what they compute, a linear layer or table as a convolution
    without a kernel, weight [outputs, inputs] (of a table [tokens, width]); of a table and the linear layer that has its weight the same.
    """

    name: str
    kind: str
    readers: tuple[str, ...]
    dense: Convolution

    @property
    def width(self) -> int:
        """The outputs."""
        return self.dense.weight.shape[1 if self.kind == "embedding" else 0]


def layers_of(network: Network, what: Sequence[str]) -> tuple[list[Layer], dict[str, str]]:
    """The layers of these kinds (``linear``, ``conv``, ``embedding``), in the graph's order; and by name of weight (of node, where it is computed)
    why others are left."""
    readings: dict[int, list[fx.Node]] = {}
    for node in network.graph.nodes:
        if node.op == "get_attr":
            readings.setdefault(id(network.tensor(str(node.target))), []).extend(node.users)
    rank = {node: number for number, node in enumerate(network.graph.nodes)}
    found: dict[tuple[int, str], Layer] = {}
    dense: dict[int, Convolution] = {}
    left: dict[str, str] = {}
    for node in network.graph.nodes:
        if node.target not in LAYERS or KINDS.get(node.target, "linear" if node.target in RECURRENT else what[0]) not in what:
            continue
        weight = constant(network, node.args[_position(node)])
        if weight is None and node.target in PRODUCTS and node.target not in KINDS:
            continue  # a product of two activations
        reason = _reason(network, node, weight, readings.get(id(weight), []), what)
        if reason:
            left.setdefault(node.name if weight is None or node.target in RECURRENT else str(weight_node(node).target), reason)
        elif (id(weight), KINDS[node.target]) not in found:
            readers = sorted((one for one in readings[id(weight)] if one.target is node.target), key=rank.__getitem__)
            same = dense.setdefault(id(weight), _dense(node, weight))
            kind = KINDS[node.target]
            found[id(weight), kind] = Layer(str(weight_node(node).target), kind, tuple(one.name for one in readers), same)
    return list(found.values()), left


def weight_node(node: fx.Node) -> fx.Node:
    """The node that gives a layer its weight or table."""
    return node.args[_position(node)]


def input_node(node: fx.Node) -> fx.Node:
    """The node that gives a layer its input."""
    return node.args[1 - _position(node)]


def _position(node: fx.Node) -> int:
    return 0 if node.target is aten.embedding.default else 1


def _reason(network: Network, node: fx.Node, weight: Tensor | None, readers: Sequence[fx.Node], what: Sequence[str]) -> str:
    """Why a node cannot be factored; empty where it can."""
    if node.target not in KINDS:
        return f"{node.target} has no factored form here"
    if weight is None:
        return "its weight is computed"
    if not weight.is_floating_point():
        return f"its weight is of {str(weight.dtype).removeprefix('torch.')}"
    if is_written(weight_node(node)):
        return "its weight is written into"
    names = {str(one.target) for one in network.graph.nodes if one.op == "get_attr" and network.tensor(str(one.target)) is weight}
    if names & network.sparse.keys():
        return "the zeros of its weight must stay: factorize first, then sparsify"
    operators = {one.target for one in readers}
    alike = len(operators) == 1 or operators == TIED
    if not alike or any(constant(network, weight_node(one)) is not weight for one in readers):
        return "its weight is read in other ways, too"
    if not {KINDS[operator] for operator in operators} <= set(what):
        return "its weight is a table and a linear layer's in one: what must name both kinds"
    if any(one.args[3:] != node.args[3:] for one in readers if one.target is node.target):
        return "its weight is read in other ways, too"
    if not all(_is_given(network, one) for one in readers):
        return "its bias is computed"
    if KINDS[node.target] != "conv":
        return ""
    if not can_unfold(node):
        return "its sizes are computed"
    columns = _dense(node, weight).weight[0].numel()
    return f"it reads {columns} values at each place; more than {MOST_COLUMNS} take too long to solve for" if columns > MOST_COLUMNS else ""


def _is_given(network: Network, node: fx.Node) -> bool:
    """Whether a layer has no bias or one that is a constant."""
    bias = None if node.target is aten.embedding.default else argument(node, 2, "bias")
    return bias is None or constant(network, bias) is not None


def _dense(node: fx.Node, weight: Tensor) -> Convolution:
    if node.target not in CONVOLUTIONS | TRANSPOSED:
        return Convolution(weight.detach(), (), (), (), 1)
    dims = weight.dim() - 2
    if node.target in TRANSPOSED:
        options = (("stride", 1), ("padding", 0), ("output_padding", 0), ("groups", 1), ("dilation", 1))
        stride, padding, more, groups, dilation = (argument(node, 3 + place, *option) for place, option in enumerate(options))
        return transposed(weight.detach(), each(stride, dims), each(padding, dims), each(more, dims), int(groups), each(dilation, dims))
    stride, padding, dilation = (
        each(argument(node, place, name, default), dims) for place, name, default in ((3, "stride", 1), (4, "padding", 0), (5, "dilation", 1))
    )
    return Convolution(weight.detach(), stride, padding, dilation, int(argument(node, 6, "groups", 1)))


def joined(network: Network, layers: Sequence[Layer]) -> list[tuple[Layer, ...]]:
    """The layers in groups: linear layers that read the same value, a table with the linear layer that has its weight, each other one alone."""
    nodes = {node.name: node for node in network.graph.nodes}
    tables = {id(layer.dense) for layer in layers if layer.kind == "embedding"}
    groups: dict[object, list[Layer]] = {}
    for layer in layers:
        alone = layer.kind != "linear" or len(layer.readers) > 1 or id(layer.dense) in tables
        groups.setdefault(id(layer.dense) if alone else input_node(nodes[layer.readers[0]]), []).append(layer)
    return [tuple(sorted(group, key=lambda layer: layer.kind)) for group in groups.values()]


def is_tied(layers: Sequence[Layer]) -> bool:
    """Whether they are a table and the linear layer that has its weight, in this order."""
    return len({layer.kind for layer in layers}) > 1


def say_as_linear(network: Network) -> None:
    """Products with a constant matrix (``addmm``, ``mm``, ``matmul``) become linear layers, in place: with a transposed weight where nothing else
    reads the matrix and its zeros need not stay; with the weight itself where the matrix is one that is transposed in the graph."""
    for node in list(network.graph.nodes):
        if node.target in MATRIX_LAYERS or node.target not in PRODUCTS or node.kwargs:
            continue
        source, at_weight, at_bias, _ = PRODUCTS[node.target]
        bias = constant(network, node.args[at_bias]) if at_bias is not None else None
        adds_vector = at_bias is None or (bias is not None and bias.dim() == 1)
        if adds_vector and (weight := _turned(network, node.args[at_weight])) is not None:
            node.args = (node.args[source], weight, *([node.args[at_bias]] if at_bias is not None else []))
            node.target = aten.linear.default
            continue
        matrix = constant(network, node.args[at_weight])
        own = [user for one in network.graph.nodes if one.op == "get_attr" and network.tensor(str(one.target)) is matrix for user in one.users]
        plain = matrix is not None and matrix.dim() == 2 and own == [node] and adds_vector
        name = str(node.args[at_weight].target) if plain else ""
        if not plain or name in network.sparse:
            continue
        turned = matrix.detach().T.contiguous()
        turned = torch.nn.Parameter(turned, matrix.requires_grad) if isinstance(matrix, torch.nn.Parameter) else turned
        weight = add_constant(network, part_name(network, name, "transposed"), turned, node)
        node.args = (node.args[source], weight, *([node.args[at_bias]] if at_bias is not None else []))
        node.target = aten.linear.default
    network.recompile()


def _turned(network: Network, node: fx.Node) -> fx.Node | None:
    """The node of a constant matrix that this one transposes; None for anything else."""
    if node.op != "call_function" or node.target not in TURNS or (matrix := constant(network, node.args[0])) is None or matrix.dim() != 2:
        return None
    return node.args[0] if TURNS[node.target](*node.args[1:]) else None


def part_name(network: Network, name: str, part: str) -> str:
    """What a part of a weight is called: ``fc.weight`` has ``fc.first.weight``, ``table`` has ``table_first``."""
    base = name.removesuffix(".weight")
    # Below a tensor there are no names.
    blocked = any(other == f"{base}.{part}" for other, _ in network.named_tensors())
    return f"{name}_{part}" if base == name or blocked else f"{base}.{part}.weight"

"""A layer's factors as plain nodes of the graph."""

# pyright: reportArgumentType=false, reportCallIssue=false, reportAttributeAccessIssue=false, reportOptionalMemberAccess=false

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from ..network.network import Network
from ..network.rewrite import add_constant, argument, aten, constant, set_bias
from ..numerics.lowrank_convolutions import Convolution
from ..numerics.transposed import cropped
from .layers import Layer, input_node, part_name

PLACES = ("first", "second", "third", "fourth", "fifth")
# By the dimensions of the weight.
OPERATORS = {2: aten.linear.default, 3: aten.conv1d.default, 4: aten.conv2d.default, 5: aten.conv3d.default}
TURNED = {3: aten.conv_transpose1d.default, 4: aten.conv_transpose2d.input, 5: aten.conv_transpose3d.input}


@dataclass(frozen=True, eq=False)
class Product:
    """What takes a layer's place: factors, applied in order with nothing between, and what is added to the bias ([outputs]).

    Of an embedding the first factor is the narrow table, [tokens, rank]. Layers that read the same value may have the same first factor.
    ``places``: what the factors' weights are called.
    """

    layer: Layer
    factors: tuple[Convolution, ...]
    shift: Tensor
    places: tuple[str, ...] = PLACES


def put(network: Network, products: Sequence[Product]) -> None:
    """Replace layers by their factors, in place: ``fc.weight`` makes way for ``fc.first.weight`` and ``fc.second.weight``.

    The last factor keeps the name of the layer's node and its bias; the others stand before it. A first factor that several products have
    (the same object) is one node, before the first of them.
    """
    writer = _Writer(network)
    rank = {node.name: number for number, node in enumerate(network.graph.nodes)}
    nodes = {node.name: node for node in network.graph.nodes}
    calls = [(nodes[name], product) for product in products for name in product.layer.readers]
    for node, product in sorted(calls, key=lambda call: rank[call[0].name]):
        writer.replace(node, product)
    network.recompile()


class _Writer:
    """Writes factors into a graph: each tensor, and each first factor of several layers, once."""

    def __init__(self, network: Network) -> None:
        self.network = network
        self.constants: dict[int, fx.Node] = {}
        self.calls: dict[tuple[int, fx.Node], fx.Node] = {}
        self.biases: dict[tuple[int, int], fx.Node] = {}

    def replace(self, node: fx.Node, product: Product) -> None:
        """One call of a layer."""
        name, value, is_table = product.layer.name, input_node(node), product.layer.kind == "embedding"
        old, rest = self.network.tensor(name), node.args[2:]
        for place, factor in zip(product.places, product.factors[:-1], strict=False):
            if (id(factor), value) not in self.calls:
                weight = self.constant(name, place, factor, old, node)
                args = (weight, value, *rest) if is_table else (value, weight, None, *geometry(factor))
                with self.network.graph.inserting_before(node):
                    made = self.network.graph.call_function(aten.embedding.default if is_table else operator_of(factor), args)
                made.meta = {key: node.meta[key] for key in ("module", "source") if key in node.meta}
                self.calls[id(factor), value] = made
            value, is_table = self.calls[id(factor), value], False
        weight = self.constant(name, product.places[len(product.factors) - 1], product.factors[-1], old, node)
        bias = None if node.target is aten.embedding.default else argument(node, 2, "bias")
        node.target = operator_of(product.factors[-1])
        node.args, node.kwargs = (value, weight, bias, *geometry(product.factors[-1])), {}
        if bool(product.shift.any()):
            self.shift(node, bias, product, old)

    def shift(self, node: fx.Node, bias: fx.Node | None, product: Product, old: Tensor) -> None:
        """Add a product's shift to a node's bias; calls that had the same bias have the same new one."""
        before = constant(self.network, bias)
        key = id(product), id(before)
        if key in self.biases:
            node.update_arg(2, self.biases[key])
            return
        shift = product.shift if before is None else before.detach().double() + product.shift
        set_bias(self.network, node, shift.to(old.dtype))
        self.biases[key] = node.args[2]

    def constant(self, name: str, place: str, factor: Convolution, old: Tensor, before: fx.Node) -> fx.Node:
        """The node that reads a factor's weight: trainable, and of the type, as the layer's was."""
        if id(factor) not in self.constants:
            tensor = factor.stored(factor.weight.detach().to(old.dtype)).contiguous()
            tensor = torch.nn.Parameter(tensor, old.requires_grad) if isinstance(old, torch.nn.Parameter) else tensor
            self.constants[id(factor)] = add_constant(self.network, part_name(self.network, name, place), tensor, before)
        return self.constants[id(factor)]


def operator_of(factor: Convolution) -> object:
    """The operator that computes a factor (of a table the one behind it)."""
    return (TURNED if factor.spread else OPERATORS)[factor.weight.dim()]


def geometry(factor: Convolution) -> tuple[object, ...]:
    """What stands behind the bias among the arguments of a convolution, plain or transposed; nothing for a linear layer."""
    if factor.weight.dim() == 2:
        return ()
    if not factor.spread:
        return (list(factor.stride), list(factor.padding), list(factor.dilation), factor.groups)
    padding = cropped(factor.kernel, factor.padding, factor.dilation)
    return (list(factor.spread), list(padding), list(factor.more), factor.groups, list(factor.dilation))

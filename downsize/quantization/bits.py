"""How many bits each weight and each activation gets: the ends of a network are wider, and what no layer reads as its input is."""

# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false, reportUnhashable=false
# pyright: reportOptionalMemberAccess=false
# (torch.fx types every argument as a union of everything)

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from torch import fx

from ..network.network import Network
from ..network.rewrite import aten
from ..numerics.grids import BITS, INT8, Grid, activation_grid
from .placement import WEIGHT_LAYERS, Placement, WeightPoint, is_transparent

FLOAT = 32  # bits of what is not quantized
# Of activations that only sums, pools and the outputs of the network read.
BETWEEN = 8


@dataclass(frozen=True)
class Bits:
    """The bits of weights, of the inputs of layers, and of both in the first and the last layer; 32: not quantized. Tables are a first layer.

    ``signed``: activations are int8, symmetric, instead of unsigned and asymmetric; then they all have 8 bits. ``room``: the most bits that a
    quantized weight may have, at the ends too; activations have theirs all the same.
    """

    weights: int
    activations: int
    ends: int
    signed: bool = False
    room: int = 8

    def groups(self, network: Network, placement: Placement) -> list[tuple[Grid, Placement]]:
        """The activations of a placement by their grid, without those that are not quantized."""
        readers = _readers(placement)
        last = ends(network, placement)

        def bits(own: fx.Node) -> int:
            read = readers.get(own, set())
            return BETWEEN if not read else self.ends if read & last else self.activations

        by_bits: dict[int, list] = {}
        for point in placement.activations:
            by_bits.setdefault(bits(point.like or point.node), []).append(point)
        return [
            (INT8 if self.signed else activation_grid(count), replace(placement, activations=points))
            for count, points in by_bits.items()
            if count in BITS
        ]

    def parts(self, network: Network, placement: Placement, wanted: Callable[[WeightPoint], bool]) -> tuple[list[WeightPoint], list[WeightPoint]]:
        """The weights that have the bits of the ends, and those that have the bits of the others."""
        last = ends(network, placement)
        at_end = {layer.args[WEIGHT_LAYERS[layer.target][1]] for layer in last}
        at_end |= {node.args[0] for node in network.graph.nodes if node.target is aten.embedding.default}
        points = [point for point in placement.weights if wanted(point)]
        return [p for p in points if p.node in at_end], [p for p in points if p.node not in at_end]

    def shares(
        self, network: Network, placement: Placement, wanted: Callable[[WeightPoint], bool], own: Mapping[str, int]
    ) -> dict[int, list[WeightPoint]]:
        """The weights by their bits; ``own``: those of single weights, by name."""
        found: dict[int, list[WeightPoint]] = {}
        for points, bits in zip(self.parts(network, placement, wanted), self.of_weights, strict=True):
            for point in points:
                found.setdefault(own.get(str(point.node.target), bits), []).append(point)
        return found

    def of_inputs(self, network: Network, placement: Placement) -> dict[fx.Node, int]:
        """The bits of each layer's input."""
        last = ends(network, placement)
        return {layer: self.ends if layer in last else self.activations for layer in placement.layers}

    @property
    def of_weights(self) -> tuple[int, int]:
        """The bits of the weights at the ends, and of the others."""
        at_ends, inner = (bits if bits == FLOAT else min(bits, self.room) for bits in (self.ends, self.weights))
        return at_ends, inner


def ends(network: Network, placement: Placement) -> set[fx.Node]:
    """The first and the last layer, in the order of the graph; where a table is read before, it is the first, and no layer is."""
    order = {node: i for i, node in enumerate(network.graph.nodes)}
    tables = [order[node] for node in network.graph.nodes if node.target is aten.embedding.default]
    layers = sorted(placement.layers, key=order.__getitem__)
    first = {layer for layer in layers[:1] if not tables or order[layer] < min(tables)}
    return first | set(layers[-1:])


def _readers(placement: Placement) -> dict[fx.Node, set[fx.Node]]:
    """For each activation with a grid of its own the layers whose input has that grid."""
    own = {point.node: point.like or point.node for point in placement.activations}
    found: dict[fx.Node, set[fx.Node]] = {}
    for layer in placement.layers:
        source = layer.args[WEIGHT_LAYERS[layer.target][0]]
        while source not in own and is_transparent(source):
            source = source.args[0]
        if source in own:
            found.setdefault(own[source], set()).add(layer)
    return found

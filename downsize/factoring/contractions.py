"""Which outputs of which layers meet in nothing but a product over a small inner dimension: queries with keys, values with the layer behind.

Whatever else reads a channel on its way there (a rotary embedding, a norm, an activation) binds it.
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportAttributeAccessIssue=false, reportOptionalMemberAccess=false
# pyright: reportGeneralTypeIssues=false, reportReturnType=false
# (torch.fx types every argument as a union of everything)

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

from torch import fx

from ..network.lower_weights import PRODUCTS
from ..network.network import Network
from ..network.rewrite import argument, constant
from .tracing import Layer, Pair, Side, Trace, facts_of


@dataclass(frozen=True)
class Contraction:
    """Sides that meet only each other: another basis on the left with its counterpart on the right changes nothing.

    ``scores``: outputs of layers, queries on the left, keys on the right. ``values``: outputs on the left, on the right inputs of the layers
    that read what attention made of them. Several on a side share the basis: heads that share keys and values.
    """

    kind: Literal["scores", "values"]
    left: tuple[Side, ...]
    right: tuple[Side, ...]


def contractions(network: Network) -> list[Contraction]:
    """All that are free, in the graph's order, with two positions a side or more. Sparse weights are left out: another basis fills their zeros."""
    layers = _layers(network)
    pairs: dict[Pair, None] = {}
    bound: set[int] = set()
    read: list[set[fx.Node]] = []
    for facts in facts_of(network):
        trace = Trace(network, layers, facts)
        pairs |= trace.pairs
        bound |= trace.bound
        read.append(trace.read)
    by_name = {layer.weight: layer for layer in layers}

    def free(side: Side) -> bool:
        layer = by_name[side.weight]
        if side.dim == layer.dim:
            return not any(layer.first + position in bound for position in side.positions)
        return all(set(layer.nodes) <= one for one in read)

    owners = _owners(pairs)
    found = []
    for kind, left, right in _components(pairs):
        sides = [*left, *right]
        alone = all(owners[side.weight, side.dim, position] == {side} for side in sides for position in side.positions)
        apart = not set(left) & set(right) and all(len(set(side.positions)) == len(side.positions) for side in sides)
        if kind is not None and alone and apart and len(sides[0].positions) > 1 and all(map(free, sides)):
            found.append(Contraction(kind, tuple(left), tuple(right)))
    return found


def _owners(pairs: Iterable[Pair]) -> dict[tuple[str, int, int], set[Side]]:
    owners: dict[tuple[str, int, int], set[Side]] = {}
    for _, *sides in pairs:
        for side in sides:
            for position in side.positions:
                owners.setdefault((side.weight, side.dim, position), set()).add(side)
    return owners


def _components(pairs: Iterable[Pair]) -> Iterator[tuple[Literal["scores", "values"] | None, list[Side], list[Side]]]:
    """Pairs that share a side are one; of both kinds: no kind."""
    meets: dict[Side, list[Pair]] = {}
    for pair in pairs:
        for side in pair[1:]:
            meets.setdefault(side, []).append(pair)
    seen: set[Side] = set()
    for start in meets:
        kinds, ends, todo = set(), ({}, {}), [] if start in seen else [start]
        while todo:
            side = todo.pop()
            if side in seen:
                continue
            seen.add(side)
            for kind, *sides in meets[side]:
                kinds.add(kind)
                for end, one in zip(ends, sides, strict=True):
                    end[one] = None
                todo += sides
        if kinds:
            yield (kinds.pop() if len(kinds) == 1 else None), list(ends[0]), list(ends[1])


# Layers -----------------------------------------------------------------------------------------------------------------------------


def _layers(network: Network) -> list[Layer]:
    reading: dict[int, list[fx.Node]] = {}
    for node in network.graph.nodes:
        if node.op == "get_attr":
            reading.setdefault(id(network.tensor(str(node.target))), []).extend(node.users)
    sparse = {id(network.tensor(name)) for name in network.sparse}
    made: dict[int, Layer] = {}
    first = 0
    for node in network.graph.nodes:
        weight = constant(network, _parts(node)[1]) if node.target in PRODUCTS else None
        if weight is None or id(weight) in made or id(weight) in sparse or weight.dim() != 2 or not weight.is_floating_point():
            continue
        nodes = tuple(dict.fromkeys(reading[id(weight)]))
        if all(one.target is node.target and _is_alike(network, one, node, reading) for one in nodes):
            _, own, bias = _parts(node)
            dim = PRODUCTS[node.target][3]
            made[id(weight)] = Layer(str(own.target), dim, weight.shape[dim], None if bias is None else str(bias.target), nodes, first)
            first += weight.shape[dim]
    return list(made.values())


def _parts(node: fx.Node) -> tuple[fx.Node, fx.Node, fx.Node | None]:
    """Input, weight and bias of a layer."""
    x, weight, bias, _ = PRODUCTS[node.target]
    return node.args[x], node.args[weight], None if bias is None else argument(node, bias, "bias")


def _is_alike(network: Network, node: fx.Node, first: fx.Node, reading: dict[int, list[fx.Node]]) -> bool:
    """Whether a node is a layer with the weight and bias of the first, and these are read by such layers alone."""
    (x, own, bias), (_, weight, other) = (_parts(one) for one in (node, first))
    tensor = constant(network, weight)
    if constant(network, own) is not tensor or constant(network, x) is tensor or set(node.kwargs) - {"bias"} or (bias is None) != (other is None):
        return False
    shift = constant(network, bias)
    if bias is None:
        return True
    fits = shift is not None and shift is constant(network, other) and tuple(shift.shape) == (tensor.shape[PRODUCTS[node.target][3]],)
    return fits and set(reading[id(shift)]) == set(reading[id(tensor)])

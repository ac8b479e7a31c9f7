"""Where the outputs of layers go in a graph: its own views, transposes and splits move the numbers of the channels instead of activations."""

# pyright: reportArgumentType=false, reportCallIssue=false, reportAttributeAccessIssue=false, reportOptionalMemberAccess=false
# pyright: reportGeneralTypeIssues=false, reportOptionalIterable=false, reportIndexIssue=false, reportOptionalSubscript=false
# pyright: reportUnhashable=false
# (torch.fx types every argument as a union of everything)

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, fx

from ..network.attention import ATTENTION
from ..network.dry import dry_walk
from ..network.flow import SHAPE_READERS
from ..network.lineage_rules import operator_name
from ..network.lower_weights import PRODUCTS
from ..network.memory import writes
from ..network.network import Network
from ..network.positions import getitem
from ..network.rewrite import argument, aten, constant
from ..network.statistics import Hook

MATMULS = {aten.matmul.default: 0, aten.bmm.default: 0, aten.mm.default: 0, aten.baddbmm.default: 1}
# Operators that only move what is in their first argument.
_MOVING = """
    view _unsafe_view reshape flatten unflatten ravel squeeze unsqueeze permute transpose swapaxes swapdims mT t numpy_T movedim moveaxis
    contiguous clone alias detach lift_fresh_copy split split_with_sizes chunk unsafe_split unsafe_chunk unbind slice narrow select expand
    repeat_interleave
    """
MOVING = frozenset(_MOVING.split())
# The channels were contracted: what comes out is of no channel.
ENDS = ()
DROPOUTS = ("dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout")


@dataclass(frozen=True)
class Side:
    """The part of a layer in a product: ``positions`` along dimension ``dim`` of the tensor ``weight``, in the order in which they meet the
    other side's; ``bias`` goes with them (None: there is none, or they are inputs). ``readers``: the nodes of the layers."""

    weight: str
    dim: int
    positions: tuple[int, ...]
    bias: str | None
    readers: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Layer:
    """A weight that only layers read, all in the same way; the codes of its outputs begin with ``first``."""

    weight: str
    dim: int  # of the outputs
    outputs: int
    bias: str | None
    nodes: tuple[fx.Node, ...]
    first: int

    def rows(self, codes: Sequence[int]) -> Side:
        return Side(self.weight, self.dim, tuple(code - self.first for code in codes), self.bias, self._names())

    def columns(self, positions: Iterable[int]) -> Side:
        return Side(self.weight, 1 - self.dim, tuple(positions), None, self._names())

    def _names(self) -> tuple[str, ...]:
        return tuple(node.name for node in self.nodes)


Pair = tuple[Literal["scores", "values"], Side, Side]

Facts = dict[fx.Node, tuple[tuple[Any, ...], Any]]


def facts_of(network: Network) -> Iterator[Facts]:
    """The arguments and value of every node, as tensors without data: at the example's sizes, and at others that the network takes.

    A batch that is merged with heads looks like heads alone where it is of one sample.
    """
    examples = [list(port.example) for port in network.ports]
    yield _recorded(network, examples)
    for most in (max((len(port.dims) for port in network.ports), default=0), 1):
        sizes = [
            [2 * n + 1 if isinstance(d, str) and i < most else n for i, (n, d) in enumerate(zip(p.example, p.dims, strict=True))]
            for p in network.ports
        ]
        with contextlib.suppress(Exception):  # whatever a guard or an operator says of sizes that it does not take
            yield _recorded(network, sizes)
            return


def _recorded(network: Network, sizes: Sequence[Sequence[int]]) -> Facts:
    found: Facts = {}

    def recorder(node: fx.Node) -> Hook:
        return lambda args, value: found.__setitem__(node, (args, value))

    dry_walk(network, {node: recorder(node) for node in network.graph.nodes}, sizes)
    return found


class Trace:
    """One walk of the channels' codes over a graph.

    A channel is coded by its number among the outputs of all layers; behind a product with attention weights, ``total`` times the number of
    that product's head (counted from 1, over the batch too) is added, so that a reader's inputs can be told apart by head.

    Attributes:
        pairs: sides that met. bound: channels that something else reads. read: the layers whose inputs are sides, as ``pairs`` says.
    """

    def __init__(self, network: Network, layers: Sequence[Layer], facts: Facts) -> None:
        self.network, self.facts = network, facts
        self.layers = {node: layer for layer in layers for node in layer.nodes}
        self.owner = [layer for layer in layers for _ in range(layer.outputs)]
        self.total = len(self.owner)
        self.pairs: dict[Pair, None] = {}
        self.bound: set[int] = set()
        self.read: set[fx.Node] = set()
        self.codes: dict[fx.Node, Any] = {}
        self.heads = 0
        last = {source: node for node in network.graph.nodes for source in node.all_input_nodes}
        for node in network.graph.nodes:
            self._visit(node)
            for source in node.all_input_nodes:
                if last[source] is node:
                    self.codes.pop(source, None)

    def _visit(self, node: fx.Node) -> None:
        coded = [source for source in node.all_input_nodes if source in self.codes]
        if coded and node.target not in SHAPE_READERS:
            made = None if writes(node) else self._given(node, coded)
            if made is None:
                for source in coded:
                    self._bind(self.codes[source])
            elif made is not ENDS:
                self.codes[node] = made
        if node in self.layers:
            layer, shape = self.layers[node], self.facts[node][1].shape
            self.codes[node] = torch.arange(layer.first, layer.first + layer.outputs).expand(shape)

    def _bind(self, codes: Any) -> None:
        for part in codes if isinstance(codes, (tuple, list)) else [codes]:
            self.bound.update((part % self.total).unique().tolist())

    def _given(self, node: fx.Node, coded: list[fx.Node]) -> Any:
        """The codes of a node's value, ``ENDS`` where none go on; None: the node does something else with its inputs."""
        if getitem(node):
            return self.codes[node.args[0]][node.args[1]]
        if node.target in PRODUCTS and constant(self.network, node.args[PRODUCTS[node.target][1]]) is not None:
            return self._columns(node, coded)
        if node.target is ATTENTION:
            return self._attention(node, coded)
        if node.target in MATMULS:
            return self._matmul(node, coded)
        return self._moved(node, coded)

    def _moved(self, node: fx.Node, coded: list[fx.Node]) -> Any:
        name, (args, value) = operator_name(node), self.facts[node]
        if name == "cat":
            return self._cat(node, coded)
        if coded != [node.args[0]] or any(isinstance(one, fx.Node) for one in node.kwargs.values()):
            return None
        codes, rest = self.codes[node.args[0]], args[1:]
        if isinstance(codes, (tuple, list)) or any(isinstance(one, Tensor) for one in rest):
            return None
        if name in MOVING:
            target = aten.reshape.default if name in ("view", "_unsafe_view") else node.target
            return target(codes, *rest, **node.kwargs)
        scaled = name in ("mul", "div") and len(rest) == 1 and isinstance(rest[0], (int, float)) and not node.kwargs
        dropped = name in DROPOUTS and not argument(node, 2, "train")
        cast = name in ("to", "_to_copy") and value.is_floating_point() and value.shape == codes.shape
        return codes if scaled or dropped or cast else None

    def _cat(self, node: fx.Node, coded: list[fx.Node]) -> Tensor | None:
        """An empty cache before the keys."""
        others = [part for part, fact in zip(node.args[0], self.facts[node][0][0], strict=True) if part not in self.codes and fact.numel()]
        return self.codes[coded[0]] if len(coded) == 1 and not others and node.args[0].count(coded[0]) == 1 else None

    def _matmul(self, node: fx.Node, coded: list[fx.Node]) -> Any:
        first = MATMULS[node.target]
        left, right = node.args[first : first + 2]
        if set(coded) - {left, right} or any(len(self.facts[part][1].shape) < 2 for part in (left, right)):
            return None
        lead = self.facts[node][1].shape[:-2]
        if left in self.codes and right in self.codes:
            return self._scores(_table(self.codes[left]), _table(self.codes[right].mT), lead)
        return self._values(_table(self.codes[right]), self.facts[node][1].shape) if right in self.codes else None

    def _attention(self, node: fx.Node, coded: list[fx.Node]) -> Any:
        query, key, value = node.args[:3]
        tables = [_table(self.codes[part]) if part in self.codes else None for part in (query, key, value)]
        shape = self.facts[node][1].shape
        if argument(node, 7, "enable_gqa", False):
            tables[1:] = [one if one is None else one.repeat_interleave(shape[-3] // one.shape[-2], -2) for one in tables[1:]]
        met, made = self._scores(*tables[:2], shape[:-2]), self._values(tables[2], shape)
        for part in coded:
            if part not in (query, key, value) or (part is value and made is None) or (part in (query, key) and met is None):
                self._bind(self.codes[part])
        return ENDS if made is None else made

    def _scores(self, left: Tensor | None, right: Tensor | None, lead: Sequence[int]) -> Any:
        """Two tables [..., d] are contracted over d, head by head."""
        if left is None or right is None or left.shape[-1] != right.shape[-1]:
            return None
        width = left.shape[-1]
        rows = torch.cat([one.expand(*lead, width).reshape(-1, width) for one in (left, right)], 1).unique(dim=0).tolist()
        sides = [(self._rows(row[:width]), self._rows(row[width:])) for row in rows]
        if any(one is None or other is None for one, other in sides):
            return None
        self.pairs |= {("scores", one, other): None for one, other in sides}
        return ENDS

    def _values(self, table: Tensor | None, shape: Sequence[int]) -> Tensor | None:
        """A table [..., d] under weights of attention: each head of the value [..., positions, d] is told apart."""
        if table is None or table.shape[-1] != shape[-1] or bool((table >= self.total).any()):
            return None
        lead = shape[:-2]
        numbers = 1 + self.heads + torch.arange(math.prod(lead)).reshape(lead)
        self.heads += math.prod(lead)
        return (table.expand(*lead, shape[-1]) + self.total * numbers[..., None])[..., None, :].expand(shape)

    def _columns(self, node: fx.Node, coded: list[fx.Node]) -> Any:
        """A layer reads what attention made of values."""
        x = node.args[PRODUCTS[node.target][0]]
        if coded != [x] or node not in self.layers:
            return None
        rows = self.codes[x].reshape(-1, self.codes[x].shape[-1]).unique(dim=0)
        channels, heads = (rows % self.total), rows // self.total
        groups = {_grouped(row) for row in heads.tolist()}
        if len(groups) > 1 or not bool((heads > 0).all()) or not bool((channels == channels[0]).all()):
            return None
        (columns,) = groups
        sides = [(self._rows(channels[0, list(own)].tolist()), self.layers[node].columns(own)) for own in columns]
        if any(one is None for one, _ in sides):
            return None
        self.pairs |= {("values", one, other): None for one, other in sides if one is not None}
        self.read.add(node)
        return ENDS

    def _rows(self, codes: Sequence[int]) -> Side | None:
        """The side of these codes; None if they are not outputs of one layer, as it gives them."""
        if max(codes) >= self.total or len({self.owner[code].first for code in codes}) > 1:
            return None
        return self.owner[codes[0]].rows(codes)


def _table(codes: Any) -> Tensor | None:
    """[..., d] of codes [..., positions, d] that are the same at all positions."""
    if not isinstance(codes, Tensor) or codes.dim() < 2 or not codes.numel() or not bool((codes == codes[..., :1, :]).all()):
        return None
    return codes[..., 0, :]


def _grouped(heads: Sequence[int]) -> tuple[tuple[int, ...], ...]:
    """The positions of each head, in the order in which heads begin."""
    found: dict[int, list[int]] = {}
    for position, head in enumerate(heads):
        found.setdefault(head, []).append(position)
    return tuple(map(tuple, found.values()))

"""Which values of a Network depend on which, what they look like, and what goes when a region is taken out.

Sets of nodes are whole numbers with a bit for each node, so that asking is fast in graphs of thousands of nodes.
"""

# pyright: reportArgumentType=false, reportAttributeAccessIssue=false

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import Parameter

from .cost import COUNTED
from .memory import sharers, writes
from .network import Network
from .quiet import quiet
from .rewrite import aten
from .statistics import Hook, walk

# Operators whose result depends on the shape (dtype, layout) of their first argument, not on its values.
SHAPE_READERS = {
    aten.sym_size.int, aten.zeros_like.default, aten.ones_like.default, aten.full_like.default, aten.empty_like.default,
    aten.new_zeros.default, aten.new_ones.default, aten.new_full.default, aten.new_empty.default,
}  # fmt: skip


class Flow:
    """The graph of a network as it is now; edits do not show in it."""

    def __init__(self, network: Network) -> None:
        self.network = network
        self.nodes = list(network.graph.nodes)
        self.place = {node: number for number, node in enumerate(self.nodes)}
        self.forms, self.strides, self.macs = _facts(network)
        self.writers = [node for node in self.nodes if writes(node)]
        self.nameless = self.set_of(node for node in self.nodes if not node.meta.get("module"))
        self._above = [0] * len(self.nodes)
        for number, node in enumerate(self.nodes):
            for source in () if node.target in SHAPE_READERS else node.all_input_nodes:
                self._above[number] |= self._above[self.place[source]] | self.bit(source)
        self._below = [0] * len(self.nodes)
        for number in range(len(self.nodes) - 1, -1, -1):
            for user in self.nodes[number].users:
                if user.target not in SHAPE_READERS:
                    self._below[number] |= self._below[self.place[user]] | self.bit(user)

    def bit(self, node: fx.Node) -> int:
        """The set of one node."""
        return 1 << self.place[node]

    def set_of(self, nodes: Iterable[fx.Node]) -> int:
        """The set of the nodes."""
        found = 0
        for node in nodes:
            found |= self.bit(node)
        return found

    def nodes_of(self, members: int) -> list[fx.Node]:
        """The nodes of a set, in the graph's order."""
        found = []
        while members:
            lowest = members & -members
            found.append(self.nodes[lowest.bit_length() - 1])
            members ^= lowest
        return found

    def before(self, node: fx.Node) -> int:
        """What the node's value is computed from."""
        return self._above[self.place[node]]

    def reaches(self, source: fx.Node, node: fx.Node) -> bool:
        """Whether the values of ``node`` depend on those of ``source``, another node or itself."""
        return source is node or bool(self.before(node) & self.bit(source))

    def between(self, source: fx.Node, node: fx.Node) -> int:
        """What is computed from ``source`` on the way to ``node``, which is among it; ``source`` is not."""
        return self._below[self.place[source]] & (self.before(node) | self.bit(node))

    def alike(self, one: fx.Node, two: fx.Node) -> bool:
        """Whether both are tensors of the same dtype, and of the same shape at all sizes tried."""
        return one in self.forms and self.forms[one] == self.forms.get(two)

    def dying(self, entry: fx.Node, leaving: fx.Node, inner: int) -> int:
        """What nothing reads once the readers of ``leaving`` read ``entry``.

        Shapes that others read from nodes in ``inner`` do not keep these alive where the entry has the same shape.
        """
        gone = self.bit(leaving)
        for number in range(self.place[leaving] - 1, -1, -1):
            node = self.nodes[number]
            if node is entry or node.op == "placeholder" or not node.users:
                continue
            spared = inner & self.bit(node) and self.alike(node, entry)
            if all(self.bit(user) & gone or (spared and user.target in SHAPE_READERS) for user in node.users):
                gone |= self.bit(node)
        return gone

    def waists(self, entry: fx.Node, leaving: fx.Node) -> list[fx.Node]:
        """The values that everything on the way from ``entry`` to ``leaving`` passes through, both among them."""
        inner = self.between(entry, leaving)
        found, reach = [entry], self._last_reader(entry, inner)
        for node in self.nodes_of(inner):
            if reach <= self.place[node]:
                found.append(node)
            reach = max(reach, self._last_reader(node, inner))
        return found

    def _last_reader(self, node: fx.Node, inner: int) -> int:
        return max((self.place[user] for user in node.users if self.bit(user) & inner and user.target not in SHAPE_READERS), default=-1)

    def signature(self, entry: fx.Node, leaving: fx.Node, tensors: bool) -> tuple[Any, ...]:
        """The form of a region: its operators, and their results' shapes or, with ``tensors``, the tensors they read."""
        signs = []
        for node in self.nodes_of(self.between(entry, leaving)):
            read = [source for source in node.all_input_nodes if source.op == "get_attr"]
            signs.append((node.target, tuple(source.target for source in read) if tensors else (self.forms.get(node), len(read))))
        return tuple(signs)

    def macs_of(self, members: int) -> int:
        """The MACs of a set of nodes at the example's sizes."""
        return sum(self.macs.get(node, 0) for node in self.nodes_of(members))

    def parameters_of(self, nodes: Iterable[fx.Node]) -> int:
        """The elements of the parameters that only these nodes read, each once."""
        inside = {node for node in nodes if node.op == "get_attr"}
        kept = {id(self.network.tensor(node.target)) for node in self.nodes if node.op == "get_attr" and node not in inside}
        read = {id(tensor): tensor for tensor in (self.network.tensor(node.target) for node in inside)}
        return sum(tensor.numel() for key, tensor in read.items() if key not in kept and isinstance(tensor, Parameter))

    def memory(self, node: fx.Node) -> int:
        """The nodes that may share memory with this one."""
        return self.set_of(sharers(node))

    def written_by(self, node: fx.Node) -> int:
        """The nodes whose memory an operator may change."""
        found = 0
        for value in writes(node):
            found |= self.memory(value)
        return found


def macs(network: Network) -> dict[str, int]:
    """The MACs of every node that computes products, by its name, at the example's sizes."""
    return {node.name: count for node, count in _facts(network)[2].items()}


def _facts(network: Network) -> tuple[dict[fx.Node, tuple[Any, ...]], dict[fx.Node, tuple[int, ...]], dict[fx.Node, int]]:
    """Of every tensor node the dtype with its shapes at all sizes tried, and its strides; and the MACs: without computing anything."""
    forms: dict[fx.Node, tuple[Any, ...]] = {}
    strides: dict[fx.Node, tuple[int, ...]] = {}
    counts: dict[fx.Node, int] = {}

    def at_example(node: fx.Node, args: tuple[Any, ...], value: Any) -> None:
        if isinstance(value, Tensor):
            forms[node], strides[node] = (value.dtype, tuple(value.shape)), tuple(value.stride())
        if node.target in COUNTED:
            counts[node] = COUNTED[node.target](args, value)

    _fake_walk(network, {}, at_example)
    others: dict[fx.Node, tuple[int, ...]] = {}

    def elsewhere(node: fx.Node, args: tuple[Any, ...], value: Any) -> None:
        if isinstance(value, Tensor):
            others[node] = tuple(value.shape)

    # Two shapes that are the same by chance differ at other sizes. Not every model takes all sizes.
    symbols = {dim: size for port in network.ports for dim, size in zip(port.dims, port.example, strict=True) if isinstance(dim, str)}
    for sizes in ({dim: size + 1 if dim == "batch" else 2 * size for dim, size in symbols.items()}, {"batch": symbols.get("batch", 0) + 1}):
        others.clear()
        with contextlib.suppress(Exception):
            _fake_walk(network, sizes, elsewhere)
            break
    return {node: (*form, others.get(node)) for node, form in forms.items()}, strides, counts


def _fake_walk(network: Network, sizes: dict[str, int], see: Any) -> None:
    """Walk on fake tensors, whose strides are those of a run, at the example's sizes but for the dimensions named."""

    def hook(node: fx.Node) -> Hook:
        return lambda args, value: see(node, args, value)

    with FakeTensorMode(allow_non_fake_inputs=True), quiet():
        shapes = [[sizes.get(str(dim), size) for dim, size in zip(port.dims, port.example, strict=True)] for port in network.ports]
        leaves = [torch.empty(shape, dtype=port.dtype) for shape, port in zip(shapes, network.ports, strict=True)]
        walk(network, leaves, {node: hook(node) for node in network.graph.nodes if node.op != "output"})

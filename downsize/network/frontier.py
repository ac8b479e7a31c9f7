"""A network run over all calibration data a stretch of its graph at a time, so that its layers can be changed in order in one pass."""

# pyright: reportArgumentType=false, reportCallIssue=false, reportAttributeAccessIssue=false, reportOptionalMemberAccess=false
# (torch.fx types every argument as a union of everything)

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from ..spool import Spool, tree_map
from .memory import is_written, writes
from .network import Network
from .statistics import Hook

# What a frontier keeps in memory, in bytes, of the values between two stretches; the rest lies in temporary files.
HELD_BYTES = 2**28


class Joined(Sequence[list[Tensor]]):
    """Several lists of pieces as one, read as they are asked for."""

    def __init__(self, *parts: Sequence[list[Tensor]]) -> None:
        self._places = [(part, i) for part in parts for i in range(len(part))]

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int) -> list[Tensor]:  # type: ignore[override]
        part, place = self._places[index]
        return part[place]


class Frontier:
    """The values of a network's graph for every piece of data, at one place in it that moves on.

    Where a solver changes layer after layer, each by what it meets behind the changed ones, running from the start for every layer is
    work that grows with the square of the depth. Here every node runs once for each piece, and between two stretches only those values
    are held that nodes ahead will read: in memory up to ``memory`` bytes, beyond that in temporary files that go with their last value.

    The graph's constants are read when a node uses them: a tensor that is replaced before its readers run is the new one. Nodes ahead may
    be edited between two stretches, nodes behind may not. Results are bit-equal to those of :func:`~downsize.network.statistics.walk`,
    but for random operators (dropout in training), whose numbers are drawn in another order.

    Args:
        network: in evaluation mode.
        pieces: flat inputs, see :func:`~downsize.network.statistics.chunks`; read again by every stretch that uses an input.
        memory: bytes of values to keep in memory; a view counts with all the memory that it keeps from being freed. ``bytes`` says how
            many they are now.
    """

    def __init__(self, network: Network, pieces: Sequence[list[Tensor]], memory: int = HELD_BYTES) -> None:
        self.network, self.pieces, self.memory = network, pieces, memory
        nodes = list(network.graph.nodes)
        self.next: fx.Node | None = nodes[0]
        self.ports = {node: i for i, node in enumerate(node for node in nodes if node.op == "placeholder")}
        self.written = {node for node in nodes if is_written(node)} if any(map(writes, nodes)) else set()
        self.bytes = 0
        self._held: list[dict[fx.Node, _Held]] = [{} for _ in pieces]

    def advance(self, before: fx.Node | None, hooks: Mapping[fx.Node, Hook] | None = None) -> None:
        """Run every node up to, and without, ``before`` (None: to the end) for every piece, calling ``hooks[node](args, value)`` behind
        each node named there, as ``walk`` does: what a hook returns, unless None, replaces the value.

        Raises:
            ValueError: ``before`` lies behind, or a node with a hook is not in the stretch.
        """
        hooks = hooks or {}
        stretch = self._stretch(before)
        if missing := [node.name for node in hooks if node not in stretch]:
            raise ValueError(f"{missing[0]} has a hook but is not among the nodes from {self.next} to before {before}.")
        last = self._last_readings(stretch, before)
        spool = Spool()
        with torch.no_grad():
            for number, held in enumerate(self._held):
                values = _Values(self, number, held)
                for node in stretch:
                    values.run(node, hooks.get(node))
                    values.drop(last.get(node, ()))
                self.bytes -= sum(one.bytes for one in held.values())
                self._held[number] = values.kept(spool, self.memory - self.bytes)
                self.bytes += sum(one.bytes for one in self._held[number].values())
        self.next = before

    def values(self, node: fx.Node) -> Iterator[Any]:
        """The value of ``node`` for each piece, in order: a constant, an input, what a node behind gave and a node ahead reads; or, of a
        node ahead whose arguments are such, what it would give now.

        Raises:
            ValueError: it is none of these.
        """
        for number, held in enumerate(self._held):
            with torch.no_grad():
                value = _Values(self, number, held).peek(node)
            yield value

    def outputs(self) -> Iterator[tuple[Tensor, ...]]:
        """The network's flat outputs for each piece, in order; what has not run yet runs first."""
        if self.next is not None:
            self.advance(None)
        return map(tuple, self.values(self.network.graph.output_node()))

    @property
    def live(self) -> set[fx.Node]:
        """The nodes whose values are held."""
        return set().union(*self._held)

    def _stretch(self, before: fx.Node | None) -> dict[fx.Node, int]:
        """The nodes to run, with their ranks."""
        stretch: dict[fx.Node, int] = {}
        node = self.next
        while node is not before:
            if node is None:
                raise ValueError(f"{before} does not lie ahead: the frontier stands before {self.next}.")
            stretch[node] = len(stretch)
            node = None if node.op == "output" else node.next
        return stretch

    def _last_readings(self, stretch: dict[fx.Node, int], before: fx.Node | None) -> dict[fx.Node, list[fx.Node]]:
        """Per node of the stretch the values that nothing reads after it has run."""
        ahead = set(_from(before))
        found: dict[fx.Node, list[fx.Node]] = {}
        for node in [*self.live, *stretch]:
            if node.op != "output" and not any(user in ahead for user in node.users):
                ranks = [stretch[one] for one in (node, *node.users) if one in stretch]
                found.setdefault(list(stretch)[max(ranks)] if ranks else next(iter(stretch)), []).append(node)
        return found


def _from(node: fx.Node | None) -> Iterator[fx.Node]:
    """The node and all behind it in the graph's order."""
    while node is not None:
        yield node
        node = None if node.op == "output" else node.next


class _Held(NamedTuple):
    """A value between two stretches: itself, or its place in a file. ``bytes``: of memory."""

    value: Any
    bytes: int = 0
    spool: Spool | None = None

    def read(self) -> Any:
        return self.value if self.spool is None else _unpacked(self.spool.read(self.value))


class _Values:
    """What the nodes have given for one piece, while others run."""

    def __init__(self, frontier: Frontier, number: int, held: dict[fx.Node, _Held]) -> None:
        self._frontier, self._number, self._held = frontier, number, dict(held)
        self._loaded: dict[fx.Node, Any] = {}
        self._leaves: list[Tensor] | None = None

    def run(self, node: fx.Node, hook: Hook | None) -> None:
        lazy = node.op == "get_attr" or (node.op == "placeholder" and node not in self._frontier.written)
        if lazy and hook is None:
            return
        args, value = self._compute(node)
        replaced = hook(args, value) if hook else None
        if replaced is not None or not lazy:
            self._loaded[node] = value if replaced is None else replaced

    def _compute(self, node: fx.Node) -> tuple[tuple[Any, ...], Any]:
        if node.op in ("get_attr", "placeholder"):
            return (), self.look(node)
        args, kwargs = fx.map_arg((node.args, node.kwargs), self.look)
        return args, args[0] if node.op == "output" else node.target(*args, **kwargs)

    def look(self, node: fx.Node) -> Any:
        """The value of a node that has run, an input or a constant."""
        if node in self._loaded:
            return self._loaded[node]
        if node in self._held:
            return self._loaded.setdefault(node, self._held[node].read())
        if node.op == "get_attr":
            return self._frontier.network.tensor(str(node.target))
        if node.op != "placeholder":
            raise ValueError(f"the value of {node} is not known where the frontier stands, before {self._frontier.next}.")
        if self._leaves is None:
            self._leaves = self._frontier.pieces[self._number]
        return self._leaves[self._frontier.ports[node]]

    def peek(self, node: fx.Node) -> Any:
        ahead = node.op == "call_function" and node not in self._held and not writes(node)
        return self._compute(node)[1] if ahead else self.look(node)

    def drop(self, nodes: Sequence[fx.Node]) -> None:
        for node in nodes:
            self._loaded.pop(node, None)
            self._held.pop(node, None)

    def kept(self, spool: Spool, room: int) -> dict[fx.Node, _Held]:
        """Everything to hold: what is held already as it is, what is new in memory if there is room for it, else in the file."""
        room -= sum(held.bytes for held in self._held.values())
        for node, value in self._loaded.items():
            if node not in self._held:
                size = sum(leaf.untyped_storage().nbytes() for leaf in _tensors(value))
                if size > room and node not in self._frontier.written:
                    spool.append(tree_map(_packed, value))
                    self._held[node] = _Held(len(spool) - 1, 0, spool)
                else:
                    self._held[node] = _Held(value, size)
                    room -= size
        return self._held


def _tensors(value: Any) -> list[Tensor]:
    found: list[Tensor] = []
    tree_map(lambda leaf: found.append(leaf) if isinstance(leaf, Tensor) else None, value)
    return found


def _packed(leaf: Any) -> Any:
    """A tensor as its bytes without gaps, and how it lay in memory: kernels may round by that."""
    if not isinstance(leaf, Tensor):
        return leaf
    once = leaf.detach()
    for d, stride in enumerate(leaf.stride()):
        once = once.narrow(d, 0, 1) if stride == 0 and leaf.shape[d] else once
    data = once.contiguous().reshape(-1).view(torch.uint8)
    return {"data": data, "dtype": leaf.dtype, "once": tuple(once.shape), "size": tuple(leaf.shape), "stride": leaf.stride()}


def _unpacked(tree: Any) -> Any:
    if isinstance(tree, (tuple, list)):
        return type(tree)(map(_unpacked, tree))
    if not isinstance(tree, dict):
        return tree
    made = torch.empty_strided(tree["once"], tree["stride"], dtype=tree["dtype"])
    return made.copy_(tree["data"].view(tree["dtype"]).reshape(tree["once"])).expand(tree["size"])

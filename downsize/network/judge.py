"""How much a changed network has lost, by its outputs on data that the change was not fitted on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from .frontier import Frontier
from .network import Network
from .statistics import walk


class Judge:
    """How far a network's outputs are from the reference's on held-back data: sum |other - reference|^2 / sum |reference|^2.

    Args:
        reference: runs once over the data, when the judge is made; its outputs are kept in memory.
        pieces: flat inputs, see :func:`~downsize.network.statistics.chunks`.
        prepare: makes of a network the one to run, with the same outputs, such as a faster one.
    """

    def __init__(self, reference: Network, pieces: Sequence[list[Tensor]], prepare: Callable[[Network], Network] | None = None) -> None:
        self.pieces, self.prepare = pieces, prepare
        self.expected = [walk(reference, leaves, {}) for leaves in pieces]

    def __call__(self, other: Network) -> float:
        """The squared relative error, a fraction: over all float outputs, where the reference's are finite."""
        runs = self.prepare(other) if self.prepare else other
        return self.compare(walk(runs, leaves, {}) for leaves in self.pieces)

    def compare(self, outputs: Iterable[Sequence[Tensor]]) -> float:
        """The same for flat outputs of the pieces, in their order."""
        error = norm = 0.0
        for expected, found in zip(self.expected, outputs, strict=True):
            for one, two in zip(expected, found, strict=True):
                if one.is_floating_point():
                    finite = torch.isfinite(one)
                    error += float((two - one)[finite].double().square().sum())
                    norm += float(one[finite].double().square().sum())
        return error / max(norm, 1e-30)


class TailJudge:
    """A :class:`Judge` of networks that are the reference up to a node that moves on: only what follows it runs.

    Args: as of :class:`Judge`; the values at the node are held for all pieces (see :class:`~downsize.network.frontier.Frontier`).
    """

    def __init__(self, reference: Network, pieces: Sequence[list[Tensor]]) -> None:
        self.judge = Judge(reference, pieces)
        self.frontier = Frontier(reference, pieces)

    def move(self, node: fx.Node) -> None:
        """From now on networks may differ in the constants that are read by ``node``, a node of the reference, or behind it."""
        if self.frontier.next is not node:
            self.frontier.advance(node)

    def __call__(self, other: Network) -> float:
        """The squared relative error of a fork of the reference."""
        return self.judge.compare(self._outputs(other))

    def _outputs(self, other: Network) -> Iterator[tuple[Tensor, ...]]:
        nodes = {node.name: node for node in other.graph.nodes}
        live = [(node, self.frontier.values(node)) for node in self.frontier.live]
        inputs = [node for node in other.graph.nodes if node.op == "placeholder"]
        assert self.frontier.next is not None  # the end is no place to judge from
        start = nodes[self.frontier.next.name]
        frees = _last_readings(start)
        for leaves in self.frontier.pieces:
            known: dict[fx.Node, Any] = {nodes[node.name]: next(values) for node, values in live}
            known |= dict(zip(inputs, leaves, strict=True))
            yield _run(other, start, known, frees)


def _last_readings(start: fx.Node) -> dict[fx.Node, list[fx.Node]]:
    """Per node from ``start`` on the values that nothing reads after it."""
    last: dict[fx.Node, fx.Node] = {}
    node = start
    while node.op != "output":
        last.update(dict.fromkeys(node.all_input_nodes, node))
        node = node.next
    found: dict[fx.Node, list[fx.Node]] = {}
    for source, reader in last.items():
        if source not in node.all_input_nodes:
            found.setdefault(reader, []).append(source)
    return found


def _run(network: Network, start: fx.Node, known: dict[fx.Node, Any], frees: dict[fx.Node, list[fx.Node]]) -> tuple[Tensor, ...]:
    """The flat outputs, from ``start`` on; ``known`` holds what comes before it, and loses what is read for the last time."""
    node = start
    with torch.no_grad():
        while node.op != "output":
            if node.op == "call_function":
                args, kwargs = fx.map_arg((node.args, node.kwargs), lambda one: _value(network, known, one))
                known[node] = node.target(*args, **kwargs)  # type: ignore[operator]
                for source in frees.get(node, ()):
                    known.pop(source, None)
            node = node.next
        return tuple(fx.map_arg(node.args[0], lambda one: _value(network, known, one)))  # type: ignore[arg-type]


def _value(network: Network, known: dict[fx.Node, Any], node: fx.Node) -> Any:
    return network.tensor(str(node.target)) if node.op == "get_attr" else known[node]

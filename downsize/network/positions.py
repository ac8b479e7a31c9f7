"""What is known of the positions of every tensor while the rules go over a graph: the vectors of ids, and who reads them."""

from __future__ import annotations

import contextlib
import copy
import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor, fx

from .atoms import NEVER, Atoms, Ids
from .dry import dry_walk
from .network import Network

Dims = tuple[Ids, ...]


@dataclass(frozen=True)
class Read:
    """An operator that reads what lives in a dimension of ``source`` and gives something else: a product, a sum, a statistic.

    ``statistic``: dead positions cannot simply be read as zeros, because the operator counts them (a mean, a layer norm).
    """

    node: fx.Node
    source: fx.Node
    dim: int
    statistic: bool


class Positions:
    """The ids of every tensor dimension of a network, filled in node by node.

    Attributes:
        dims: [dimension] of vectors for every node, or a list of them for operators with several outputs.
        shapes: of every node's value, see :func:`output_shapes`.
        others: the same for inputs of other sizes; a dimension that differs is open.
        constants: ``id(tensor)`` -> its name and vectors.
        reads: who reads what, and does not pass it on as it is.
        frozen_by: operators that froze something because no rule knew them, with how often.
    """

    def __init__(self, network: Network) -> None:
        self.network = network
        self.atoms = Atoms()
        self.shapes = output_shapes(network)
        self.others = _other_shapes(network) or self.shapes
        self.dims: dict[fx.Node, Any] = {}
        self.reads: list[Read] = []
        self.frozen_by: dict[str, int] = {}
        self.constants: dict[int, tuple[str, Dims]] = {}
        self._kinds: list[tuple[Ids, str]] = []

    def constant(self, name: str) -> Dims:
        """The vectors of a constant tensor; one tensor under two names has the same."""
        tensor = self.network.tensor(name)
        if id(tensor) not in self.constants:
            dims = tuple(self.atoms.fresh(size, name) for size in tensor.shape)
            self.constants[id(tensor)] = name, dims
        return self.constants[id(tensor)][1]

    def fresh(self, count: int, node: fx.Node) -> Ids:
        """New free positions that ``node`` makes."""
        return self.atoms.fresh(count, node.meta.get("module") or node.name)

    def freeze(self, *nodes: fx.Node) -> None:
        """No position of these values may go."""
        for node in nodes:
            for vector in vectors(self.dims.get(node, ())):
                self.atoms.freeze(vector)

    def read(self, node: fx.Node, source: fx.Node, dim: int, statistic: bool = False) -> None:
        """``node`` reads dimension ``dim`` of ``source`` and does not pass it on as it is."""
        vector = self.dims[source][dim]
        if vector.any():
            self.reads.append(Read(node, source, dim % len(self.dims[source]), statistic))

    def at_other_sizes(self) -> Positions:
        """The same atoms and constants, with nothing known yet of the operators, for inputs of the other sizes."""
        made = copy.copy(self)
        made.shapes, made.others = self.others, self.shapes
        made.dims, made.reads, made.frozen_by, made._kinds = {}, [], {}, []
        return made

    def close(self, source: fx.Node, dim: int) -> None:
        """An open dimension stays whole under an operator that counts along it: what is cut would be spelled for one size only."""
        if self.is_open(source, dim):
            self.atoms.freeze(self.dims[source][dim])

    def is_open(self, node: fx.Node, dim: int) -> bool:
        """Whether the size of a dimension follows the sizes of the inputs."""
        return self.shapes[node][dim] != self.others[node][dim]

    def open_vectors(self) -> Iterator[Ids]:
        """The vectors of all open dimensions."""
        for node, dims in self.dims.items():
            yield from _differing(dims, self.shapes[node], self.others[node])

    def name_kind(self, vector: Ids, kind: str) -> None:
        """What the units of a vector are called."""
        self._kinds.append((vector, kind))


def vectors(dims: Any) -> Iterator[Ids]:
    """All id vectors of a value: of a tensor, or of a tuple of tensors."""
    if isinstance(dims, np.ndarray):
        yield dims
    else:
        for part in dims:
            yield from vectors(part)


def _differing(dims: Any, shape: Any, other: Any) -> Iterator[Ids]:
    if isinstance(shape, list):
        for parts in zip(dims, shape, other, strict=False):  # a split may give another number of parts
            yield from _differing(*parts)
    elif shape is not None:
        yield from (vector for vector, one, two in zip(dims, shape, other, strict=True) if one != two)


def _other_shapes(network: Network) -> dict[fx.Node, Any] | None:
    """The shapes at other sizes of the inputs: of all open dimensions if the network can run so, else of the first ones; None if neither."""
    for most in (max((len(port.dims) for port in network.ports), default=0), 1):
        sizes = [[2 * n + 1 if isinstance(port.dims[i], str) and i < most else n for i, n in enumerate(port.example)] for port in network.ports]
        with contextlib.suppress(Exception):  # whatever a guard or an operator says of sizes that it does not take
            return output_shapes(network, sizes)
    return None


def output_shapes(network: Network, sizes: Sequence[Sequence[int]] | None = None) -> dict[fx.Node, Any]:
    """The shape of every node's value, computed without data; a list of shapes for operators with several outputs.

    Args:
        sizes: of the inputs, else those of the example.
    """
    found: dict[fx.Node, Any] = {}

    def shape(value: Any) -> Any:
        if isinstance(value, Tensor):
            return tuple(value.shape)
        return [shape(item) for item in value] if isinstance(value, (tuple, list)) and any(isinstance(item, Tensor) for item in value) else None

    def recorder(node: fx.Node) -> Any:
        def record(args: tuple[Any, ...], value: Any) -> None:
            found[node] = shape(value)

        return record

    dry_walk(network, {node: recorder(node) for node in network.graph.nodes}, sizes)
    return {node: value for node, value in found.items() if value is not None}


def getitem(node: fx.Node) -> bool:
    """Whether a node picks one of several outputs."""
    return node.target is operator.getitem


def never(count: int) -> Ids:
    """A vector of positions that cannot go."""
    return np.full(count, NEVER, np.int64)

"""Lineage: which positions of which tensors live and die together, found by one walk over the graph.

Every tensor dimension is a vector of ids (see ``atoms.py``); the rules in ``lineage_rules.py`` say what each operator does to the vectors.
An operator without a rule freezes what it touches: it costs coverage, never correctness.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode

from .atoms import NEVER, Atoms, Ids
from .network import Network
from .statistics import walk

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


@dataclass(frozen=True, eq=False)
class Axis:
    """A set of units, each of which can be cut: channels, heads, neurons.

    Attributes:
        name: where it was born: the module path of the tensor that makes it, with ``#`` and a number where one module bears several.
        kind: ``channels`` (of convolutions), ``heads``, ``head_dims``, ``neurons`` (of linear layers), or ``width`` (of a stream that
            crosses a normalisation over it).
        atoms: [units], the atom of each unit.
        exact: cutting equals masking to rounding; else it crosses a statistic over its positions (a layer norm), which then changes.
        carriers: tensor name and dimension -> [positions of that dimension], the unit of each position, -1 where it is of no unit.
    """

    name: str
    kind: str
    atoms: Ids
    exact: bool
    carriers: dict[tuple[str, int], np.ndarray] = field(repr=False)

    @property
    def units(self) -> int:
        """How many units there are."""
        return len(self.atoms)


class Lineage:
    """The ids of every tensor dimension of a network: ``dims[node]`` ([dimension] of vectors, or a list of them), and who reads what.

    Raises nothing on unknown operators: they are listed in :attr:`frozen_by`, with how often each froze something.
    """

    def __init__(self, network: Network) -> None:
        from .lineage_rules import apply_rule

        self.network = network
        self.atoms = Atoms()
        self.shapes = output_shapes(network)
        self.dims: dict[fx.Node, Any] = {}
        self.reads: list[Read] = []
        self.frozen_by: dict[str, int] = {}
        self._kinds: list[tuple[Ids, str]] = []
        self.constants: dict[int, tuple[str, Dims]] = {}
        for node in network.graph.nodes:
            if node.op == "placeholder":
                self.dims[node] = tuple(np.zeros(size, np.int64) for size in self.shapes[node])
            elif node.op == "get_attr":
                self.dims[node] = self._constant(str(node.target))
            elif node.op == "call_function" and node in self.shapes:
                self.dims[node] = apply_rule(self, node)
            elif node.op == "output":
                self.freeze(*node.all_input_nodes)

    def _constant(self, name: str) -> Dims:
        tensor = self.network.tensor(name)
        if id(tensor) not in self.constants:
            dims = tuple(self.atoms.fresh(size, name) for size in tensor.shape)
            self.constants[id(tensor)] = name, dims
        return self.constants[id(tensor)][1]

    # What rules say ---------------------------------------------------------------------------------------------------------------

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

    def name_kind(self, vector: Ids, kind: str) -> None:
        """What the units of a vector are called."""
        self._kinds.append((vector, kind))

    # What is found ------------------------------------------------------------------------------------------------------------------

    @cached_property
    def axes(self) -> tuple[Axis, ...]:
        """What can be cut, in the order of birth."""
        return tuple(_axes(self))

    def axis(self, name: str) -> Axis:
        """The axis of that name. Raises KeyError, naming those there are."""
        found = next((axis for axis in self.axes if axis.name == name), None)
        if found is None:
            raise KeyError(f"there is no axis {name!r}; there are {', '.join(axis.name for axis in self.axes) or 'none'}")
        return found

    def coverage(self) -> float:
        """The share of parameter elements that a cut could remove: at least one of their positions can go."""
        total = free = 0
        for key, (name, dims) in self.constants.items():
            tensor = self.network.tensor(name)
            if isinstance(tensor, torch.nn.Parameter) and key == id(tensor):
                total += tensor.numel()
                frozen = 1
                for vector in dims:
                    frozen *= int((self.living_without_all()[vector]).sum())
                free += tensor.numel() - frozen
        return free / max(total, 1)

    def living_without_all(self) -> np.ndarray:
        """Which ids live even when everything dies that can."""
        every = {leaf for _, dims in self.constants.values() for vector in dims for leaf in np.unique(self.atoms.find(vector)).tolist()}
        return self.atoms.living({leaf for one in every for leaf in self.atoms.leaves(one)})

    def inexact(self) -> frozenset[int]:
        """The atoms whose cut crosses a statistic over them."""
        found: set[int] = set()
        for read in self.reads:
            if read.statistic:
                for one in np.unique(self.atoms.find(self._counted(read))).tolist():
                    found |= self.atoms.leaves(one)
        return frozenset(found)

    def _counted(self, read: Read) -> Ids:
        vector = self.dims[read.source][read.dim]
        groups = read.node.args[1] if "group_norm" in str(read.node.target) else 1
        return self.atoms.factor(vector, groups, len(vector) // groups)[1]  # type: ignore[operator,arg-type]

    def kinds(self) -> dict[int, set[str]]:
        """What rules called the atoms."""
        found: dict[int, set[str]] = {}
        for vector, kind in self._kinds:
            for one in np.unique(self.atoms.find(vector)).tolist():
                for leaf in self.atoms.leaves(one):
                    found.setdefault(leaf, set()).add(kind)
        return found


def vectors(dims: Any) -> Iterator[Ids]:
    """All id vectors of a value: of a tensor, or of a tuple of tensors."""
    if isinstance(dims, np.ndarray):
        yield dims
    else:
        for part in dims:
            yield from vectors(part)


def output_shapes(network: Network) -> dict[fx.Node, Any]:
    """The shape of every node's value at the example's sizes, computed without data; a list of shapes for operators with several outputs."""
    found: dict[fx.Node, Any] = {}

    def shape(value: Any) -> Any:
        if isinstance(value, Tensor):
            return tuple(value.shape)
        return [shape(item) for item in value] if isinstance(value, (tuple, list)) and any(isinstance(item, Tensor) for item in value) else None

    def recorder(node: fx.Node) -> Any:
        def record(args: tuple[Any, ...], value: Any) -> None:
            found[node] = shape(value)

        return record

    with FakeTensorMode(allow_non_fake_inputs=True):
        leaves = [torch.empty(port.example, dtype=port.dtype) for port in network.ports]
        walk(network, leaves, {node: recorder(node) for node in network.graph.nodes})
    return {node: value for node, value in found.items() if value is not None}


def getitem(node: fx.Node) -> bool:
    """Whether a node picks one of several outputs."""
    return node.target is operator.getitem


# Axes -------------------------------------------------------------------------------------------------------------------------------


Key = tuple[str, int]  # a constant tensor and one of its dimensions


def _axes(lineage: Lineage) -> Iterator[Axis]:
    tables = _leaf_tables(lineage)
    blocks: dict[int, dict[int, int]] = {}
    for leaf in sorted({leaf for sets in tables.values() for leaves in sets for leaf in leaves}):
        units = blocks.setdefault(lineage.atoms.block(leaf), {})
        units[leaf] = len(units)
    inexact, kinds = lineage.inexact(), lineage.kinds()
    carried = _carriers(lineage, tables, blocks)
    names: dict[str, int] = {}
    for block, units in blocks.items():
        exact = inexact.isdisjoint(units)
        kind = _kind(set[str]().union(*(kinds.get(leaf, set()) for leaf in units)), exact)
        name = _name(lineage.atoms.births[block], kind)
        names[name] = names.get(name, 0) + 1
        name = name if names[name] == 1 else f"{name}#{names[name]}"
        yield Axis(name, kind, np.array(list(units), np.int64), exact, carried[block])


def _leaf_tables(lineage: Lineage) -> dict[Key, list[frozenset[int]]]:
    """For each dimension of each constant the atoms that each position needs; two units of one axis in one position are tied."""
    atoms, tables, known = lineage.atoms, {}, {}
    for name, dims in lineage.constants.values():
        for dim, vector in enumerate(dims):
            found = atoms.find(vector).tolist()
            known.update({one: atoms.leaves(one) for one in set(found) - set(known)})
            if any(known[one] for one in found):
                tables[name, dim] = [known[one] for one in found]
    for leaves in {leaves for sets in tables.values() for leaves in sets}:
        if len({atoms.block(leaf) for leaf in leaves}) < len(leaves):
            tied = np.array(sorted(leaves), np.int64)
            atoms.unify(tied, np.full_like(tied, tied[0]))
            return _leaf_tables(lineage)
    return tables


def _carriers(lineage: Lineage, tables: dict[Key, list[frozenset[int]]], blocks: dict[int, dict[int, int]]) -> dict[int, dict[Key, np.ndarray]]:
    carried: dict[int, dict[Key, np.ndarray]] = {block: {} for block in blocks}
    for key, sets in tables.items():
        owners = {block: np.full(len(sets), -1) for block in {lineage.atoms.block(leaf) for leaves in sets for leaf in leaves}}
        for position, leaves in enumerate(sets):
            for leaf in leaves:
                block = lineage.atoms.block(leaf)
                owners[block][position] = blocks[block][leaf]
        for block, units in owners.items():
            carried[block][key] = units
    return carried


def _name(birth: str, kind: str) -> str:
    module = birth.rpartition(".")[0] if birth.endswith((".weight", ".bias")) else birth
    return f"{module}.{kind}" if kind in ("heads", "head_dims") else module


def _kind(called: Iterable[str], exact: bool) -> str:
    called = set(called)
    if "heads" in called:
        return "heads"
    if "head_dims" in called:
        return "head_dims"
    if not exact:
        return "width"
    return "channels" if "channels" in called else "neurons"


def axes(network: Network) -> tuple[Axis, ...]:
    """What can be cut of a network: see :class:`Axis`.

    Example: of ``Sequential(Linear(8, 16), ReLU(), Linear(16, 4))`` one axis, ``0``, with 16 neurons, carried by dimension 0 of ``0.weight``
    and ``0.bias`` and dimension 1 of ``2.weight``.
    """
    return Lineage(network).axes


def never(count: int) -> Ids:
    """A vector of positions that cannot go."""
    return np.full(count, NEVER, np.int64)

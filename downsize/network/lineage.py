"""Lineage: which positions of which tensors live and die together, found by one walk over the graph.

Every tensor dimension is a vector of ids (see ``atoms.py``); the rules in ``lineage_rules.py`` say what each operator does to the vectors.
An operator without a rule freezes what it touches: it costs coverage, never correctness.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch

from .atoms import NEVER, Ids
from .lineage_rules import apply_rule
from .network import Network
from .positions import Positions, Read, never

Key = tuple[str, int]  # a constant tensor and one of its dimensions


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


class Lineage(Positions):
    """The ids of every tensor dimension of a network, and the axes along which it can be cut."""

    def __init__(self, network: Network) -> None:
        super().__init__(network)
        _walk(self)
        if any(vector.any() for vector in self.open_vectors()):
            # Where the batch is merged with units, what lives together must do so at other sizes too.
            _walk(self.at_other_sizes())

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
        """The share of parameter elements that a cut could remove: at least one of their positions is of an axis of two units or more."""
        total = free = 0
        carried: dict[Key, list[np.ndarray]] = {}
        for axis in self.axes:
            for key, unit in axis.carriers.items() if axis.units > 1 else ():
                carried.setdefault(key, []).append(unit < 0)
        for name, dims in self.constants.values():
            tensor = self.network.tensor(name)
            if isinstance(tensor, torch.nn.Parameter):
                stays = [np.logical_and.reduce([np.ones(len(v), bool), *carried.get((name, dim), [])]).sum() for dim, v in enumerate(dims)]
                total += tensor.numel()
                free += tensor.numel() - math.prod(map(int, stays))
        return free / max(total, 1)

    def inexact(self) -> frozenset[int]:
        """The atoms whose cut crosses a statistic over them."""
        return frozenset().union(*(self._leaves(self._counted(read)) for read in self.reads if read.statistic))

    def _leaves(self, vector: Ids) -> frozenset[int]:
        return frozenset().union(*map(self.atoms.leaves, np.unique(self.atoms.find(vector)).tolist()))

    def _counted(self, read: Read) -> Ids:
        vector = self.dims[read.source][read.dim]
        groups = read.node.args[1] if "group_norm" in str(read.node.target) else 1
        return self.atoms.factor(vector, groups, len(vector) // groups)[1]  # type: ignore[operator,arg-type]

    def kinds(self) -> dict[int, set[str]]:
        """What rules called the atoms."""
        found: dict[int, set[str]] = {}
        for vector, kind in self._kinds:
            for leaf in self._leaves(vector):
                found.setdefault(leaf, set()).add(kind)
        return found


def _walk(lineage: Positions) -> None:
    for node in lineage.network.graph.nodes:
        if node.op == "placeholder":
            lineage.dims[node] = tuple(map(never, lineage.shapes[node]))
        elif node.op == "get_attr":
            lineage.dims[node] = lineage.constant(str(node.target))
        elif node.op == "call_function" and node in lineage.shapes:
            lineage.dims[node] = apply_rule(lineage, node)
        elif node.op == "output":
            lineage.freeze(*node.all_input_nodes)


# Axes -------------------------------------------------------------------------------------------------------------------------------


def _axes(lineage: Lineage) -> Iterator[Axis]:
    atoms, members = lineage.atoms, _members(lineage)
    tables = {(name, dim): members[vector] for name, dims in lineage.constants.values() for dim, vector in enumerate(dims)}
    leaves = np.unique(np.concatenate([np.zeros(1, np.int64), *(table.ravel() for table in tables.values())]))[1:]
    block, unit = _groups(tables, leaves, atoms.block(leaves), len(members)), np.full(len(members), -1)
    units = {int(one): leaves[block[leaves] == one] for one in np.unique(block[leaves])}
    for own in units.values():
        unit[own] = np.arange(len(own))
    carried = _carriers(tables, block, unit)
    inexact, kinds = lineage.inexact(), lineage.kinds()
    names: dict[str, int] = {}
    for one, own in units.items():
        if not any(isinstance(lineage.network.tensor(name), torch.nn.Parameter) for name, _ in carried[one]):
            continue  # positions of tables that nothing was learned in
        exact = inexact.isdisjoint(own.tolist())
        kind = _kind(set[str]().union(*(kinds.get(leaf, set()) for leaf in own.tolist())), exact)
        name = _name(_born(lineage, atoms.births[int(atoms.block(own[0]))], carried[one]), kind)
        names[name] = names.get(name, 0) + 1
        name = name if names[name] == 1 else f"{name}#{names[name]}"
        yield Axis(name, kind, own, exact, carried[one])


def _groups(tables: dict[Key, np.ndarray], leaves: np.ndarray, blocks: np.ndarray, ids: int) -> np.ndarray:
    """The axis of each atom, [ids], -1 for others: atoms are of one axis if they were born together and the same tensors carry them.

    So each tensor that carries an axis carries all of its units, and keeps one if the axis does.
    """
    # Which tensors carry an atom, as the sum of random numbers of theirs.
    random, carriers = np.random.default_rng(0), np.zeros(ids, np.int64)
    for table in tables.values():
        carriers[np.unique(table)] += random.integers(2**62)
    pairs = np.stack([blocks, carriers[leaves]])
    _, first, group = np.unique(pairs, axis=1, return_index=True, return_inverse=True)
    found = np.full(ids, -1)
    found[leaves] = np.argsort(np.argsort(first))[group.reshape(-1)]  # numbered in the order of birth
    return found


def _born(lineage: Lineage, birth: str, carried: dict[Key, np.ndarray]) -> str:
    """The name of the tensor in which an axis was born, or, if that carries other axes too, of the first whose rows are its units alone."""
    if any(name == birth and bool((unit >= 0).all()) for (name, _), unit in carried.items()):
        return birth
    made = (name for (name, dim), unit in carried.items() if dim == 0 and bool((unit >= 0).all()) and lineage.network.tensor(name).dim() > 1)
    return next(made, birth)


def _members(lineage: Lineage) -> np.ndarray:
    """The free atoms of every id; where a position of a constant needs two units of one axis, these are tied."""
    atoms = lineage.atoms
    members = atoms.members()
    used = np.unique(np.concatenate([np.zeros(1, np.int64), *(vector for _, dims in lineage.constants.values() for vector in dims)]))
    blocks = np.sort(np.where(members[used] == NEVER, -1 - np.arange(members.shape[1]), atoms.block(members[used])), axis=1)
    twice = used[(blocks[:, 1:] == blocks[:, :-1]).any(1)]
    for row in members[twice]:
        tied = row[row != NEVER]
        atoms.unify(tied, np.full_like(tied, tied[0]))
    return _members(lineage) if len(twice) else members


def _carriers(tables: dict[Key, np.ndarray], block: np.ndarray, unit: np.ndarray) -> dict[int, dict[Key, np.ndarray]]:
    carried: dict[int, dict[Key, np.ndarray]] = {}
    for key, table in tables.items():
        for column in table.T:
            owners = block[column]
            for one in np.unique(owners[owners >= 0]).tolist():
                own = carried.setdefault(one, {}).setdefault(key, np.full(len(column), -1))
                own[owners == one] = unit[column[owners == one]]
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

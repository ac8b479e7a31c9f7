"""Atoms: what lives or dies together. Every position of every tensor dimension is an id, and a position survives if its atoms do.

An id is a free atom, another name of an id (after unification), or a *conjunction*: a set of atoms that survives only if all of them do
(position (head, member) of a merged dimension). Id 0 never dies. A dimension is a vector of ids; views, splits and permutations of
a dimension are the same indexing applied to its vector.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

Ids = np.ndarray  # int64 [positions]
NEVER = 0


class Atoms:
    """A union-find over ids in which a free atom may be replaced by a conjunction of others.

    Example: ``a = atoms.fresh(6, "fc")``, ``outer, inner = atoms.factor(a, 2, 3)``: position 4 now lives if outer[1] and inner[1] do.
    """

    def __init__(self) -> None:
        self._parent = np.zeros(1024, np.int64)
        self._count = 1
        self._parts: dict[int, tuple[int, ...]] = {}
        self._known: dict[tuple[int, ...], int] = {}
        self._starts: list[int] = []  # of the blocks of atoms that were born together
        self.births: list[str] = []

    def fresh(self, count: int, birth: str) -> Ids:
        """``count`` new free atoms, born together; a dimension of one position cannot be cut and gets id 0."""
        if count <= 1:
            return np.zeros(count, np.int64)
        self._starts.append(self._count)
        self.births.append(birth)
        return self._new(count)

    def block(self, atoms: Ids) -> Ids:
        """Which of :attr:`births` each atom comes from."""
        return np.searchsorted(self._starts, atoms, side="right") - 1

    def find(self, ids: Ids) -> Ids:
        """The ids that stand for these now."""
        found = self._parent[ids]
        while True:
            further = self._parent[found]
            if np.array_equal(further, found):
                return found
            found = further

    def leaves(self, one: int) -> frozenset[int]:
        """The free atoms that all must live for this id to live; empty for what never dies."""
        while one != self._parent[one]:
            one = int(self._parent[one])
        parts = self._parts.get(one)
        if parts is not None:
            return frozenset().union(*map(self.leaves, parts))
        return frozenset((one,)) if one != NEVER else frozenset()

    def members(self) -> np.ndarray:
        """The free atoms of every id, [ids, most atoms of one id], filled up with 0."""
        found = {one: sorted(self.leaves(one)) for one in self._parts}
        table = np.zeros((self._count, max([1, *map(len, found.values())])), np.int64)
        table[:, 0] = self.find(np.arange(self._count))
        for one, leaves in found.items():
            table[one] = leaves + [NEVER] * (table.shape[1] - len(leaves))
        return table[self.find(np.arange(self._count))]

    def conjunction(self, atoms: Iterable[int]) -> int:
        """The id that lives if all of these free atoms do."""
        key = tuple(sorted(set(atoms) - {NEVER}))
        if len(key) < 2:
            return key[0] if key else NEVER
        if key not in self._known:
            self._known[key] = int(self._new(1)[0])
            self._parts[self._known[key]] = key
        return self._known[key]

    def product(self, outer: Ids, inner: Ids) -> Ids:
        """The vector of the dimension that two dimensions make when they are merged, [outer * inner]."""
        outer, inner = self.find(outer), self.find(inner)
        if not inner.any():
            return np.repeat(outer, len(inner))
        if not outer.any():
            return np.tile(inner, len(outer))
        rows, columns = ([self.leaves(int(one)) for one in vector] for vector in (outer, inner))
        return np.array([self.conjunction(row | column) for row in rows for column in columns], np.int64)

    def factor(self, ids: Ids, outer: int, inner: int) -> tuple[Ids, Ids]:
        """The vectors of the two dimensions that a dimension of outer * inner positions is split into; what cannot be split is frozen."""
        table = self.find(ids).reshape(outer, inner)
        if inner == 1 or (table == table[:, :1]).all():
            return table[:, 0].copy(), np.zeros(inner, np.int64)
        if outer == 1 or (table == table[:1]).all():
            return np.zeros(outer, np.int64), table[0].copy()
        if self._are_free(table.reshape(-1)):
            return self._substitute(table)
        for _ in range(2):
            sets = [[self.leaves(int(one)) for one in row] for row in table]
            rows = [frozenset.intersection(*row) for row in sets]
            columns = [frozenset.intersection(*column) for column in zip(*sets, strict=True)]
            if all(sets[x][y] == rows[x] | columns[y] for x in range(outer) for y in range(inner)):
                return self._ids(rows), self._ids([column - frozenset.intersection(*rows) for column in columns])
            self._freeze_extras(table, rows)
        self.freeze(table.reshape(-1))
        return np.zeros(outer, np.int64), np.zeros(inner, np.int64)

    def _are_free(self, ids: Ids) -> bool:
        return bool(ids.all()) and len(np.unique(ids)) == len(ids) and not any(int(one) in self._parts for one in ids)

    def _substitute(self, table: np.ndarray) -> tuple[Ids, Ids]:
        """Free atoms become conjunctions of a new atom of their row and a new one of their column."""
        birth = self.births[int(self.block(table[0, 0]))]
        rows, columns = self.fresh(table.shape[0], birth), self.fresh(table.shape[1], birth)
        for x, row in enumerate(rows):
            for y, column in enumerate(columns):
                self._parent[table[x, y]] = self.conjunction((int(row), int(column)))
        return rows, columns

    def _freeze_extras(self, table: np.ndarray, rows: list[frozenset[int]]) -> None:
        """Keep what a whole row has in common, freeze the rest: rows can go, columns cannot."""
        if all(rows):
            for row, common in zip(table, rows, strict=True):
                self._freeze_atoms(frozenset().union(*(self.leaves(int(one)) for one in row)) - common)

    def _ids(self, sets: Iterable[frozenset[int]]) -> Ids:
        return np.array([self.conjunction(one) for one in sets], np.int64)

    def unify(self, one: Ids, two: Ids) -> None:
        """From now on, position by position, the two live and die together. Where that cannot be said otherwise, their atoms are tied."""
        if one is two:
            return
        one, two = self.find(one), self.find(two)
        differ = one != two
        if not differ.any():
            return
        one, two = one[differ], two[differ]
        for free, other in ((one, two), (two, one)):
            if self._can_point(free, other):
                self._parent[free] = other
                return
        for a, b in zip(one.tolist(), two.tolist(), strict=True):
            self._unify_sets(a, b)

    def _can_point(self, free: Ids, other: Ids) -> bool:
        """Whether each of ``free`` is an atom of its own that can become another name of ``other`` at once: younger, and not part of it."""
        if not self._are_free(free):
            return False
        if not any(int(one) in self._parts for one in other):
            return not np.isin(free, other).any() and bool((other < free).all())
        return frozenset(free.tolist()).isdisjoint(frozenset().union(*(self.leaves(int(one)) for one in np.unique(other))))

    def _unify_sets(self, one: int, two: int) -> None:
        a, b = self.leaves(one), self.leaves(two)
        if a == b:
            return
        for free, other in ((a, b), (b, a)):
            if len(free) == 1 and not free & other:
                (atom,) = free
                (single,) = other if len(other) == 1 else (NEVER,)
                # The older atom stays, so that what is born first names the axis.
                if len(other) != 1 or single < atom:
                    self._parent[atom] = self.conjunction(other)
                    return
        if not a or not b:
            self._freeze_atoms(a | b)
            return
        # Equal atoms make equal conjunctions. Pairing them by age matches heads with heads, members with members.
        rest = sorted(a - b), sorted(b - a)
        tied = zip(*rest, strict=True) if len(rest[0]) == len(rest[1]) else ((min(a | b), atom) for atom in a | b)
        for pair in tied:
            self._parent[max(pair)] = min(pair)

    def freeze(self, ids: Ids) -> None:
        """These positions never die."""
        found = np.unique(self.find(ids))
        free = np.array([one for one in found.tolist() if one not in self._parts], np.int64)
        self._parent[free] = NEVER
        for one in found.tolist():
            if one in self._parts:
                self._freeze_atoms(self.leaves(one))

    def _freeze_atoms(self, atoms: Iterable[int]) -> None:
        for atom in atoms:
            self._parent[atom] = NEVER

    def _new(self, count: int) -> Ids:
        while self._count + count > len(self._parent):
            self._parent = np.concatenate([self._parent, np.zeros_like(self._parent)])
        made = np.arange(self._count, self._count + count)
        self._parent[made] = made
        self._count += count
        return made

    def living(self, dead: Iterable[int]) -> np.ndarray:
        """For every id whether it lives when the free atoms ``dead`` die, bool [ids]; a conjunction dies with any of its atoms."""
        alive = np.ones(self._count, bool)
        alive[np.array(list(dead), np.int64)] = False
        for one in self._parts:
            alive[one] = all(alive[leaf] for leaf in self.leaves(one))
        return alive[self.find(np.arange(self._count))]

"""Atoms against brute force: a position is a set of things that must all live, and random histories of operations are replayed on such sets."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from downsize.network.atoms import NEVER, Atoms


def alive(atoms: Atoms, ids: np.ndarray, dead: set[int]) -> list[bool]:
    return atoms.living(dead)[ids].tolist()


def free(atoms: Atoms, *vectors: np.ndarray) -> list[int]:
    """The free atoms that any of these positions needs."""
    return sorted(frozenset[int]().union(*(atoms.leaves(int(one)) for vector in vectors for one in vector)))


def deaths(atoms: Atoms, *vectors: np.ndarray):
    """Every set of free atoms that can die."""
    all_of_them = free(atoms, *vectors)
    for count in range(len(all_of_them) + 1):
        yield from map(set, itertools.combinations(all_of_them, count))


def test_fresh_atoms_die_alone():
    atoms = Atoms()
    ids = atoms.fresh(5, "layer")
    assert len(set(ids.tolist())) == 5 and NEVER not in ids
    for dead in deaths(atoms, ids):
        assert alive(atoms, ids, dead) == [one not in dead for one in ids.tolist()]


@pytest.mark.parametrize("count", [0, 1])
def test_a_dimension_of_one_position_never_dies(count):
    assert Atoms().fresh(count, "layer").tolist() == [NEVER] * count


def test_a_product_lives_where_both_do():
    atoms = Atoms()
    outer, inner = atoms.fresh(3, "outer"), atoms.fresh(2, "inner")
    merged = atoms.product(outer, inner)
    for dead in deaths(atoms, outer, inner):
        expected = [x and y for x in alive(atoms, outer, dead) for y in alive(atoms, inner, dead)]
        assert alive(atoms, merged, dead) == expected


def test_a_product_with_what_never_dies_is_the_other():
    atoms = Atoms()
    ids = atoms.fresh(3, "layer")
    never = np.zeros(2, np.int64)
    assert atoms.product(ids, never).tolist() == np.repeat(ids, 2).tolist()
    assert atoms.product(never, ids).tolist() == np.tile(ids, 2).tolist()
    assert not atoms.product(never, never).any()


@pytest.mark.parametrize(("outer", "inner"), [(2, 3), (3, 2), (6, 1), (1, 6)])
def test_factors_of_free_atoms_are_free_and_make_the_whole(outer, inner):
    atoms = Atoms()
    ids = atoms.fresh(6, "layer")
    rows, columns = atoms.factor(ids, outer, inner)
    assert (len(rows), len(columns)) == (outer, inner)
    assert len(free(atoms, rows)) == (outer if outer > 1 else 0) and len(free(atoms, columns)) == (inner if inner > 1 else 0)
    for dead in deaths(atoms, rows, columns):
        assert alive(atoms, ids, dead) == [x and y for x in alive(atoms, rows, dead) for y in alive(atoms, columns, dead)]


def test_a_product_is_factored_into_what_it_was_made_of():
    atoms = Atoms()
    outer, inner = atoms.fresh(3, "outer"), atoms.fresh(4, "inner")
    rows, columns = atoms.factor(atoms.product(outer, inner), 3, 4)
    for dead in deaths(atoms, outer, inner):
        assert alive(atoms, rows, dead) == alive(atoms, outer, dead)
        assert alive(atoms, columns, dead) == alive(atoms, inner, dead)


def test_what_is_factored_twice_differently_is_still_a_rectangle():
    """12 positions as 3 x 4 and then as 6 x 2: whichever way is left, both views agree on who lives."""
    atoms = Atoms()
    ids = atoms.fresh(12, "layer")
    one, two = atoms.factor(ids, 3, 4), atoms.factor(ids, 6, 2)
    for dead in deaths(atoms, ids):
        for rows, columns in (one, two):
            assert alive(atoms, ids, dead) == [x and y for x in alive(atoms, rows, dead) for y in alive(atoms, columns, dead)]


def test_what_cannot_be_factored_is_frozen():
    atoms = Atoms()
    a, b = atoms.fresh(4, "a"), atoms.fresh(2, "b")
    ids = np.concatenate([a, b])  # a split into rows of 3 runs through both
    rows, columns = atoms.factor(atoms.find(np.concatenate([ids[:3], ids[1:4]])), 2, 3)
    for dead in deaths(atoms, a, b):
        expected = [x and y for x in alive(atoms, rows, dead) for y in alive(atoms, columns, dead)]
        assert alive(atoms, np.concatenate([ids[:3], ids[1:4]]), dead) == expected
    assert not free(atoms, a) and len(free(atoms, b)) == 2


def test_unified_positions_live_together_and_the_older_atom_stays():
    atoms = Atoms()
    old, young = atoms.fresh(3, "old"), atoms.fresh(3, "young")
    atoms.unify(young, old)
    assert atoms.find(young).tolist() == old.tolist()
    assert {atoms.births[block] for block in atoms.block(atoms.find(young))} == {"old"}


def test_unifying_crosswise_ties():
    atoms = Atoms()
    ids = atoms.fresh(4, "layer")
    atoms.unify(ids, ids[[1, 0, 3, 2]])
    assert len(free(atoms, ids)) == 2
    assert alive(atoms, ids, {int(atoms.find(ids)[0])}) == [False, False, True, True]


def test_frozen_positions_never_die_and_take_their_kin_along():
    atoms = Atoms()
    outer, inner = atoms.fresh(2, "outer"), atoms.fresh(3, "inner")
    merged = atoms.product(outer, inner)
    atoms.freeze(merged[:1])  # position (0, 0)
    assert free(atoms, outer) == [outer[1]] and free(atoms, inner) == inner[1:].tolist()


def test_members_are_the_leaves():
    atoms = Atoms()
    outer, inner = atoms.fresh(2, "outer"), atoms.fresh(3, "inner")
    merged = atoms.product(outer, inner)
    atoms.freeze(inner[:1])
    table = atoms.members()
    for one in (*outer, *inner, *merged):
        assert set(table[one].tolist()) - {NEVER} == atoms.leaves(int(one))


def test_many_atoms_grow_the_table():
    atoms = Atoms()
    vectors = [atoms.fresh(700, str(i)) for i in range(5)]
    assert len(np.unique(np.concatenate(vectors))) == 3500
    assert atoms.block(np.array([one[0] for one in vectors])).tolist() == list(range(5))


# Random histories --------------------------------------------------------------------------------------------------------------------

STEPS = st.lists(
    st.tuples(st.sampled_from(("unify", "product", "factor", "freeze", "part", "flip", "join")), st.integers(0, 99), st.integers(0, 99)), max_size=9
)


@given(STEPS)
def test_every_relation_that_was_asked_for_holds_after_any_history(steps):
    """What was unified, merged, split or frozen at any time is so at the end, for every single atom that dies, and every two."""
    atoms = Atoms()
    known = [atoms.fresh(4, "a"), atoms.fresh(4, "b"), atoms.fresh(2, "c")]
    laws: list[tuple] = []
    for word, i, j in steps:
        one, two = known[i % len(known)], known[j % len(known)]
        if word == "unify" and len(one) == len(two):
            atoms.unify(one, two)
            laws.append(("same", one, two))
        elif word == "product" and len(one) * len(two) <= 16:
            known.append(atoms.product(one, two))
            laws.append(("product", known[-1], one, two))
        elif word == "factor" and len(one) % 2 == 0:
            rows, columns = atoms.factor(one, 2, len(one) // 2) if j % 2 else atoms.factor(one, len(one) // 2, 2)
            known += [rows, columns]
            laws.append(("product", one, rows, columns))
        elif word == "freeze":
            atoms.freeze(one[: 1 + j % len(one)])
            laws.append(("never", one[: 1 + j % len(one)]))
        else:
            known.append({"part": one[: max(1, len(one) // 2)], "flip": one[::-1], "join": np.concatenate([one, two])[:16]}.get(word, one))
    of_all = free(atoms, *known)
    table = atoms.members()
    for dead in [set(), *({a} for a in of_all), *(set(pair) for pair in itertools.combinations(of_all, 2))]:
        lives = atoms.living(dead)
        assert all(lives[one] == dead.isdisjoint(set(table[one].tolist()) - {NEVER}) for vector in known for one in vector)
        for law, first, *others in laws:
            if law == "same":
                assert (lives[first] == lives[others[0]]).all()
            elif law == "never":
                assert lives[first].all()
            else:
                assert (lives[first] == np.logical_and.outer(lives[others[0]], lives[others[1]]).reshape(-1)).all()

"""Allocation against brute force over all assignments and against dynamic programming; limits hold exactly."""

from __future__ import annotations

import itertools
from math import fsum, inf, nan

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from downsize.errors import AllocationError
from downsize.numerics.allocation import Allocation, Choice, Limit, Term, allocate, uniform


def cost_of(limit: Limit, levels: tuple[int, ...]) -> float:
    return fsum(float(np.asarray(term.table)[tuple(levels[number] for number in term.choices)]) for term in limit.terms)


def brute_force(choices: list[Choice], limits: list[Limit]) -> float | None:
    """The least error of all assignments that meet the limits."""
    best = None
    for levels in itertools.product(*(range(len(choice.errors)) for choice in choices)):
        error = fsum(choice.errors[level] for choice, level in zip(choices, levels, strict=True))
        if error < inf and all(cost_of(limit, levels) <= limit.most for limit in limits):
            best = error if best is None else min(best, error)
    return best


def check(choices: list[Choice], limits: list[Limit], found: Allocation) -> None:
    """What is said of an assignment is so, and every limit holds, up to the rounding of a sum in another order."""
    assert found.error == fsum(choice.errors[level] for choice, level in zip(choices, found.levels, strict=True))
    for limit in limits:
        cost = cost_of(limit, found.levels)
        assert found.costs[limit.name] == pytest.approx(cost, rel=1e-12)
        assert cost <= limit.most + 1e-12 * abs(limit.most)


def widths(levels: int) -> np.ndarray:
    return np.linspace(1.0, 0.1, levels)


def drawn(seed: int, count: int = 5, levels: int = 4, pairs: int = 5, scale: float = 1.0) -> tuple[list[Choice], tuple[Term, ...], tuple[Term, ...]]:
    """Random choices whose errors are whole multiples of ``scale``, and two sets of terms in whole numbers, the first with pairs."""
    random = np.random.default_rng(seed)
    choices = [Choice(f"c{i}", tuple(scale * float(e) for e in np.cumsum(random.integers(0, 50, levels)))) for i in range(count)]
    first = [Term((), np.array(float(random.integers(0, 20))))]
    for _ in range(pairs):
        a, b = random.integers(0, count, 2)
        first.append(Term((int(a), int(b)), random.integers(-5, 100, (levels, levels)).astype(float)))
    second = [Term((i,), np.sort(random.integers(0, 30, levels))[::-1].astype(float)) for i in range(count)]
    return choices, tuple(first), tuple(second)


# Against brute force ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1.0, 1e-9, 1e9])
@pytest.mark.parametrize("seed", range(12))
def test_two_limits_and_pairs_as_brute_force(seed, scale):
    choices, first, second = drawn(seed, scale=scale)
    random = np.random.default_rng(seed)
    limits = []
    for name, terms in (("macs", first), ("bytes", second)):
        costs = sorted(cost_of(Limit(name, 0.0, terms), levels) for levels in itertools.product(range(4), repeat=5))
        limits.append(Limit(name, costs[int(random.uniform(0.1, 0.6) * len(costs))], terms))  # some assignment meets it exactly
    expected = brute_force(choices, limits)
    if expected is None:
        with pytest.raises(AllocationError, match="cannot be met"):
            allocate(choices, limits, gap=0.0)
        return
    found = allocate(choices, limits, gap=0.0)
    check(choices, limits, found)
    assert found.optimal
    assert found.error == pytest.approx(expected, rel=1e-5)


@given(st.integers(0, 10**6), st.floats(0.05, 1.0), st.booleans())
def test_never_over_a_limit_and_never_worse_than_the_gap(seed, part, two):
    choices, first, second = drawn(seed, count=4, levels=3, pairs=4)
    random = np.random.default_rng(seed)
    first = tuple(Term(term.choices, term.table * random.uniform(0.5, 2.0)) for term in first)  # no whole numbers
    costs = [cost_of(Limit("a", 0.0, first), levels) for levels in itertools.product(range(3), repeat=4)]
    limits = [Limit("a", min(costs) + part * (max(costs) - min(costs)), first), Limit("b", 60.0, second)][: 1 + two]
    expected = brute_force(choices, limits)
    if expected is None:
        with pytest.raises(AllocationError):
            allocate(choices, limits)
        return
    found = allocate(choices, limits)
    check(choices, limits, found)
    least = fsum(min(choice.errors) for choice in choices)
    assert expected - 1e-9 <= found.error <= expected + 2e-3 * (expected - least) + 1e-6


@pytest.mark.parametrize("seed", range(4))
def test_the_smallest_reachable_value_is_that_of_brute_force(seed):
    choices, first, second = drawn(seed)
    grid = list(itertools.product(range(4), repeat=5))
    least = min(cost_of(Limit("", 0.0, first), levels) for levels in grid)
    with pytest.raises(AllocationError, match=rf"macs <= {least - 1:g} cannot be met: the smallest value it can reach is {least:g}\."):
        allocate(choices, [Limit("bytes", inf, second), Limit("macs", least - 1.0, first)])


def test_limits_that_only_exclude_each_other():
    choice = [Choice("width", (0.0, 1.0))]
    up, down = Term((0,), np.array([1.0, 3.0])), Term((0,), np.array([5.0, 2.0]))
    with pytest.raises(AllocationError, match=r"b <= 4 cannot be met: the smallest value it can reach with a <= 2 is 5"):
        allocate(choice, [Limit("a", 2.0, (up,)), Limit("b", 4.0, (down,))])


# Against dynamic programming --------------------------------------------------------------------------------------------------------


def knapsack(errors: np.ndarray, costs: np.ndarray, most: int) -> float:
    """The least sum of errors [choices, levels] with whole costs of at most ``most``: the classical table over what is spent."""
    table = np.zeros(most + 1)
    for own_errors, own_costs in zip(errors, costs, strict=True):
        after = np.full(most + 1, inf)
        for error, cost in zip(own_errors, own_costs, strict=True):
            if cost <= most:
                after[cost:] = np.minimum(after[cost:], table[: most + 1 - cost] + error)
        table = after
    return float(table[most])


@pytest.mark.parametrize("part", [0.9, 0.5, 0.25])
def test_separable_as_dynamic_programming(part):
    random = np.random.default_rng(int(100 * part))
    costs = np.round(random.uniform(50, 500, (40, 1)) * widths(8)).astype(int)
    errors = random.lognormal(0, 2, (40, 1)) * (1 / widths(8) - 1) ** 1.5
    most = int(part * costs[:, 0].sum())
    choices = [Choice(str(i), tuple(map(float, row))) for i, row in enumerate(errors)]
    limits = [Limit("bytes", float(most), tuple(Term((i,), row.astype(float)) for i, row in enumerate(costs)))]
    found = allocate(choices, limits, gap=1e-4)
    check(choices, limits, found)
    expected = knapsack(errors, costs, most)
    assert expected * (1 - 1e-9) <= found.error <= expected * (1 + 2e-4)


# Other properties -------------------------------------------------------------------------------------------------------------------


def chain(count: int, seed: int) -> tuple[list[Choice], tuple[Term, ...], list[list[float]]]:
    """A network in a row: MACs of a layer are the product of its two widths."""
    random = np.random.default_rng(seed)
    choices = [Choice(str(i), tuple(map(float, random.lognormal(0, 1.5) * (1 / widths(6) - 1)))) for i in range(count)]
    terms = [Term((i, i + 1), random.lognormal() * np.outer(widths(6), widths(6))) for i in range(count - 1)]
    return choices, tuple(terms), [list(widths(6))] * count


def test_everything_whole_when_all_of_it_is_allowed():
    choices, terms, _ = chain(12, seed=1)
    found = allocate(choices, [Limit("macs", cost_of(Limit("macs", 0.0, terms), (0,) * 12), terms)])
    assert found == Allocation((0,) * 12, 0.0, found.costs, True)


def test_without_limits_the_least_errors():
    found = allocate([Choice("a", (3.0, 1.0, 2.0)), Choice("b", (inf, 5.0))], [])
    assert (found.levels, found.error, found.optimal) == ((1, 1), 6.0, True)


def test_no_worse_than_uniform():
    choices, terms, sizes = chain(20, seed=2)
    whole = cost_of(Limit("macs", 0.0, terms), (0,) * 20)
    for part in (0.8, 0.5, 0.2):
        limits = [Limit("macs", part * whole, terms)]
        control = uniform(choices, limits, sizes)
        check(choices, limits, control)
        assert allocate(choices, limits).error < control.error


def test_uniform_is_the_largest_level_that_fits():
    choices, terms, sizes = chain(6, seed=3)
    costs = [cost_of(Limit("macs", 0.0, terms), (level,) * 6) for level in range(6)]
    for level in range(6):
        assert uniform(choices, [Limit("macs", costs[level], terms)], sizes).levels == (level,) * 6
    with pytest.raises(AllocationError, match="the same for all"):
        uniform(choices, [Limit("macs", 0.9 * costs[5], terms)], sizes)


def test_uniform_with_unlike_ladders_rounds_down():
    choices = [Choice("a", (0.0, 1.0, 2.0)), Choice("b", (0.0, 1.0)), Choice("c", (0.0, inf, 2.0))]
    terms = tuple(Term((i,), np.arange(len(choice.errors), 0.0, -1.0)) for i, choice in enumerate(choices))
    found = uniform(choices, [Limit("n", 5.0, terms)], [[64, 48, 32], [8, 4], [100, 75, 25]])
    assert found.levels == (1, 1, 2)


def test_errors_of_very_different_size():
    """Some choices cost a million times what others do: the small ones are still chosen right."""
    choices = [Choice("large", (0.0, 1e6)), *(Choice(str(i), (0.0, 1.0 + i)) for i in range(8))]
    terms = (Term((0,), np.array([1.0, 0.0])), *(Term((i + 1,), np.array([1.0, 0.0])) for i in range(8)))
    found = allocate(choices, [Limit("n", 5.0, terms)], gap=0.0)
    assert (found.levels, found.error) == ((0, 1, 1, 1, 1, 0, 0, 0, 0), 10.0)


@pytest.mark.parametrize("count", [2, 12, 40])
def test_a_limit_missed_by_less_than_the_solver_sees(count):
    """Every choice saves a ten-millionth of the cost or nothing, and all of them must save: 2^count - 1 assignments are nearly good enough."""
    choices = [Choice(str(i), (0.0, 1.0)) for i in range(count)]
    terms = tuple(Term((i,), np.array([10_000_000.0, 9_999_999.0])) for i in range(count))
    found = allocate(choices, [Limit("n", count * 9_999_999.0, terms)])
    assert found.levels == (1,) * count
    with pytest.raises(AllocationError, match="cannot be met"):
        allocate(choices, [Limit("n", count * 9_999_999.0 - 1.0, terms)])


def test_what_is_dominated_is_not_taken():
    """A wider level that is slower and no better (a measured latency) loses to the one that is."""
    table = np.array([[4.0, 6.0, 2.0], [4.0, 6.0, 2.0]])
    found = allocate([Choice("a", (0.0, 3.0)), Choice("b", (1.0, 1.0, 2.0))], [Limit("ms", 5.0, (Term((0, 1), table),))])
    assert (found.levels, found.costs) == ((0, 0), {"ms": 4.0})


def test_a_pair_in_either_order_and_with_itself():
    choices, table = [Choice("a", (0.0, 1.0)), Choice("b", (0.0, 1.0, 2.0))], np.arange(6.0).reshape(2, 3)
    both = (Term((0, 1), table), Term((1, 0), table.T), Term((1, 1), np.diag([5.0, 7.0, 9.0]) + 100 * (1 - np.eye(3))))
    found = allocate(choices, [Limit("n", 100.0, both)])
    assert found.costs == {"n": 5.0}


def test_out_of_time_is_an_error_or_not_called_optimal():
    choices, terms, _ = chain(60, seed=4)
    limits = [Limit("macs", 0.4 * cost_of(Limit("macs", 0.0, terms), (0,) * 60), terms)]
    with pytest.raises(AllocationError, match="more time"):
        allocate(choices, limits, seconds=1e-9)


@pytest.mark.parametrize(
    ("choice", "limit", "words"),
    [
        (Choice("a", (inf, inf)), Limit("n", 1.0, ()), "'a'.*finite"),
        (Choice("a", (nan, 0.0)), Limit("n", 1.0, ()), "'a'.*finite"),
        (Choice("a", ()), Limit("n", 1.0, ()), "'a'.*finite"),
        (Choice("a", (0.0, 1.0)), Limit("n", nan, ()), "'n' is NaN"),
        (Choice("a", (0.0, 1.0)), Limit("n", 1.0, (Term((0,), np.zeros(3)),)), r"shape \(3,\)"),
        (Choice("a", (0.0, 1.0)), Limit("n", 1.0, (Term((1,), np.zeros(2)),)), r"choices \(1,\)"),
        (Choice("a", (0.0, 1.0)), Limit("n", 1.0, (Term((0,), np.array([inf, 0.0])),)), "finite table"),
        (Choice("a", (0.0, 1.0)), Limit("n", -1.0, (Term((), np.array(2.0)),)), "n <= -1 cannot be met.* is 2"),
    ],
)
def test_refusals(choice, limit, words):
    with pytest.raises(AllocationError, match=words):
        allocate([choice], [limit])


@pytest.mark.slow
def test_sixty_axes_with_a_hundred_layers():
    random = np.random.default_rng(5)
    choices, chained, sizes = chain(60, seed=5)
    across = [sorted(random.choice(60, 2, replace=False)) for _ in range(41)]
    terms = (*chained, *(Term((int(a), int(b)), random.lognormal() * np.outer(widths(6), widths(6))) for a, b in across))
    own = tuple(Term((i,), random.lognormal() * widths(6)) for i in range(60))
    limits = [Limit(name, 0.5 * cost_of(Limit(name, 0.0, part), (0,) * 60), part) for name, part in (("macs", terms), ("bytes", own))]
    found = allocate(choices, limits, seconds=300.0)
    check(choices, limits, found)
    assert found.optimal
    assert found.error < 0.8 * uniform(choices, limits, sizes).error

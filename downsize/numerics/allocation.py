"""Which level every choice takes, so that the summed error is least and every limit is met: one integer program for all dials.

A *choice* is anything with levels (the width of an axis, the rank or the bits of a layer); each level has an error. What a limit counts
(MACs, bytes, milliseconds) is a sum of *terms*: a table over the levels of one choice, or of two (a convolution's MACs depend on its
input's and on its output's width), or a constant. This is the multiple-choice knapsack problem with pairwise terms; HiGHS solves it as a
mixed integer program, in which a pair is said by its local marginals (Wainwright and Jordan, 2008, section 4.1), exact at integer points.
"""

# pyright: reportArgumentType=false
# (scipy types the bounds of an integer program as single numbers)

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import fsum, inf, isfinite, isnan

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import coo_array

from ..errors import AllocationError

ROUNDING = 1e-12  # by what part sums of the same numbers may differ
TOLERANCE = 2e-6  # by what part of a limit the solver's tolerance (1e-6) may let a cost exceed it
CUTS = 20  # how many assignments that came through that tolerance are forbidden one by one, before all limits are tightened by it
SMALLEST = 0.1  # of the scale: below it the solver's absolute gap (1e-6) would count, so that it solves again with a finer scale


@dataclass(frozen=True)
class Choice:
    """``errors[i]`` is the error of level i; infinite where the level may not be taken."""

    name: str
    errors: tuple[float, ...]


@dataclass(frozen=True, eq=False)
class Term:
    """A part of a cost: ``table`` is indexed by the levels of the choices with the numbers ``choices`` (none, one or two of them)."""

    choices: tuple[int, ...]
    table: np.ndarray


@dataclass(frozen=True)
class Limit:
    """The sum of ``terms`` may be at most ``most``."""

    name: str
    most: float
    terms: tuple[Term, ...]


@dataclass(frozen=True)
class Allocation:
    """The level of every choice, the summed error, the cost by name of limit; ``optimal``: none is better by more than the gap."""

    levels: tuple[int, ...]
    error: float
    costs: dict[str, float]
    optimal: bool


def allocate(choices: Sequence[Choice], limits: Sequence[Limit], gap: float = 1e-3, seconds: float = 30.0) -> Allocation:
    """The levels of least summed error that meet all limits (exactly, up to the rounding of a sum).

    Args:
        gap: what is good enough, as a part of the error that the limits cost: (error - optimum) / (error - least error without limits).
        seconds: after about this time the best assignment so far is returned, with ``optimal=False``.

    Raises:
        AllocationError: the tables do not fit the choices; or no assignment meets all limits (the message has the smallest value that the
            limit in the way can reach); or none was found in time.
    """
    costs = _checked(choices, limits)
    until = time.monotonic() + seconds
    program = _Program(choices, costs)
    levels, optimal, scale = None, False, program.spread
    while True:
        found, proven, infeasible = program.solve(program.errors / (scale or 1.0), gap, until - time.monotonic(), finest=scale)
        if infeasible and levels is None:
            levels = _cheapest(program, seconds)
        if found is None:
            break
        levels, optimal = found, proven
        extra = program.extra(found)
        if extra >= SMALLEST * scale or extra <= ROUNDING * program.spread:
            break
        scale = extra
    if levels is None:
        raise AllocationError(f"No assignment of {len(choices)} choices was found in {seconds:g} s; give more time or looser limits.")
    return _allocation(choices, costs, levels, optimal)


def uniform(choices: Sequence[Choice], limits: Sequence[Limit], sizes: Sequence[Sequence[float]]) -> Allocation:
    """The control: all choices at the same relative level, the largest with which all limits are met.

    Args:
        sizes: per choice the size of every level (widths, ranks, bits). At the relative level r a choice takes its largest level of at most
            r times its largest size, or else its smallest.

    Raises:
        AllocationError: the tables do not fit the choices, or no relative level meets all limits.
    """
    costs = _checked(choices, limits)
    relative = [np.asarray(size, dtype=float) / max(size) for size in sizes]
    if [len(size) for size in sizes] != [len(choice.errors) for choice in choices]:
        raise AllocationError(f"sizes has {[len(size) for size in sizes]} levels; expected {[len(choice.errors) for choice in choices]}.")
    for choice, size in zip(choices, relative, strict=True):
        size[~np.isfinite(choice.errors)] = inf
    for level in sorted({part for size in relative for part in size if part < inf}, reverse=True):
        levels = tuple(int(np.argmax(np.where(size <= level, size, -size - 1e9))) for size in relative)
        if all(cost.met(levels) for cost in costs):
            return _allocation(choices, costs, levels, False)
    raise AllocationError(f"No level that is the same for all meets {', '.join(f'{limit.name} <= {limit.most:g}' for limit in limits)}.")


def _allocation(choices: Sequence[Choice], costs: Sequence[_Cost], levels: tuple[int, ...], optimal: bool) -> Allocation:
    error = fsum(choice.errors[level] for choice, level in zip(choices, levels, strict=True))
    return Allocation(levels, error, {cost.name: cost.of(levels) for cost in costs}, optimal)


# What is given ----------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Cost:
    """A limit with its terms added up: by choice [levels], and by pair (a < b) [levels of a, levels of b]."""

    name: str
    most: float
    constant: float
    single: dict[int, np.ndarray]
    pairs: dict[tuple[int, int], np.ndarray]

    def of(self, levels: Sequence[int]) -> float:
        """The cost of an assignment."""
        single = (float(table[levels[a]]) for a, table in self.single.items())
        return fsum([self.constant, *single, *(float(table[levels[a], levels[b]]) for (a, b), table in self.pairs.items())])

    def met(self, levels: Sequence[int]) -> bool:
        """Whether an assignment meets the limit."""
        return self.of(levels) <= self.most + ROUNDING * abs(self.most)


def _checked(choices: Sequence[Choice], limits: Sequence[Limit]) -> list[_Cost]:
    for choice in choices:
        if any(isnan(error) or error == -inf for error in choice.errors) or not any(map(isfinite, choice.errors)):
            raise AllocationError(f"Choice {choice.name!r} has the errors {choice.errors}; expected numbers, at least one of them finite.")
    return [_cost(limit, choices) for limit in limits]


def _cost(limit: Limit, choices: Sequence[Choice]) -> _Cost:
    constant: list[float] = []
    single: dict[int, np.ndarray] = {}
    pairs: dict[tuple[int, int], np.ndarray] = {}
    if isnan(limit.most):
        raise AllocationError(f"Limit {limit.name!r} is NaN; expected a number.")
    for term in limit.terms:
        table = np.asarray(term.table, dtype=float)
        known = len(term.choices) <= 2 and all(0 <= number < len(choices) for number in term.choices)
        if not known or table.shape != tuple(len(choices[number].errors) for number in term.choices) or not np.isfinite(table).all():
            raise AllocationError(
                f"A term of {limit.name!r} over the choices {term.choices} has a table of shape {table.shape}; expected at most two choices "
                f"of {len(choices)}, and a finite table of one entry for each of their levels."
            )
        if not term.choices:
            constant.append(float(table))
        elif len(term.choices) == 1 or term.choices[0] == term.choices[1]:  # twice the same choice: the diagonal
            own = table.diagonal() if table.ndim == 2 else table
            single[term.choices[0]] = single.get(term.choices[0], 0.0) + own
        else:
            a, b = sorted(term.choices)
            pairs[a, b] = pairs.get((a, b), 0.0) + (table if term.choices == (a, b) else table.T)
    return _Cost(limit.name, limit.most, fsum(constant), single, pairs)


def _undominated(number: int, choice: Choice, costs: Sequence[_Cost]) -> np.ndarray:
    """The levels worth a thought: not those for which another has no more error, and costs no more whatever the other choices take."""
    features = [np.asarray(choice.errors)[:, None]]
    for cost in costs:
        features += [cost.single[number][:, None]] if number in cost.single else []
        features += [table if number == a else table.T for (a, b), table in cost.pairs.items() if number in (a, b)]
    all_features = np.concatenate(features, axis=1)
    no_worse = (all_features[:, None] <= all_features[None]).all(-1)  # [i, j]: i is no worse than j
    earlier = np.tri(len(all_features), k=-1, dtype=bool).T
    dominated = (no_worse & (~no_worse.T | earlier)).any(0)
    return np.flatnonzero(~dominated & np.isfinite(choice.errors))


# The integer program ----------------------------------------------------------------------------------------------------------------


class _Program:
    """Columns: one for every allowed level of every choice (0 or 1), then for every pair one for every two levels (their product)."""

    def __init__(self, choices: Sequence[Choice], costs: Sequence[_Cost]) -> None:
        self.costs = costs
        self.allowed = [_undominated(number, choice, costs) for number, choice in enumerate(choices)]
        self.starts = np.cumsum([0, *map(len, self.allowed)])
        self.pairs: dict[tuple[int, int], int] = {}
        self.columns = int(self.starts[-1])
        for pair in {pair: None for cost in costs for pair in cost.pairs}:
            self.pairs[pair] = self.columns
            self.columns += len(self.allowed[pair[0]]) * len(self.allowed[pair[1]])
        # Over the least error without limits.
        over = [np.asarray(choice.errors)[kept] - np.min(choice.errors) for choice, kept in zip(choices, self.allowed, strict=True)]
        self.errors = np.concatenate([*over, np.zeros(self.columns - self.starts[-1])])
        self.spread = fsum(map(np.max, over))
        self.cuts: list[tuple[int, ...]] = []

    def extra(self, levels: Sequence[int]) -> float:
        """The error of an assignment over the least without limits."""
        return fsum(self.errors[self._taken(levels)])

    def solve(
        self, objective: np.ndarray, gap: float, seconds: float, finest: float | None = None, limits: Iterable[int] | None = None
    ) -> tuple[tuple[int, ...] | None, bool, bool]:
        """The assignment of least ``objective`` [columns] that meets the limits numbered ``limits`` (None: all).

        ``finest``: errors above it are not looked at. Returns (levels or None, whether it is proven, whether there is none).
        """
        limits = range(len(self.costs)) if limits is None else list(limits)
        stop = time.monotonic() + seconds
        upper = np.ones(self.columns)
        upper[: self.starts[-1]] = 1.0 if finest is None else self.errors[: self.starts[-1]] <= finest * (1 + ROUNDING)
        integrality = (np.arange(self.columns) < self.starts[-1]).astype(int)
        cuts: list[np.ndarray] = []
        while (left := stop - time.monotonic()) > 0:
            rows = [*self._structure, *self._limit_rows(limits, 0.0 if len(cuts) < CUTS else TOLERANCE), *self._cut_rows(cuts)]
            options = {"mip_rel_gap": gap, "time_limit": left}
            result = milp(objective, integrality=integrality, bounds=Bounds(0.0, upper), constraints=rows, options=options)
            if result.x is None:
                return None, False, result.status == 2
            levels = self._levels(result.x)
            if all(self.costs[number].met(levels) for number in limits):
                return levels, result.status == 0 and len(cuts) < CUTS, False
            cuts.append(self._taken(levels))
            if len(cuts) > CUTS + 1:
                break
        return None, False, False

    def cost_row(self, cost: _Cost) -> np.ndarray:
        """What every column adds to a cost, [columns]."""
        row = np.zeros(self.columns)
        for a, table in cost.single.items():
            row[self.starts[a] : self.starts[a + 1]] = table[self.allowed[a]]
        for (a, b), table in cost.pairs.items():
            part = table[np.ix_(self.allowed[a], self.allowed[b])].ravel()
            row[self.pairs[a, b] : self.pairs[a, b] + len(part)] = part
        return row

    @cached_property
    def _structure(self) -> list[LinearConstraint]:
        """Every choice takes one level, and the products of a pair add up to the levels of its two choices."""
        rows: list[int] = []
        columns: list[int] = []
        values: list[float] = []
        wanted: list[float] = []

        def add(plus: Iterable[int], minus: Iterable[int], right: float) -> None:
            for column, sign in [*((column, 1.0) for column in plus), *((column, -1.0) for column in minus)]:
                rows.append(len(wanted))
                columns.append(column)
                values.append(sign)
            wanted.append(right)

        for start, end in zip(self.starts[:-1], self.starts[1:], strict=True):
            add(range(start, end), (), 1.0)
        for (a, b), start in self.pairs.items():
            grid = start + np.arange(len(self.allowed[a]) * len(self.allowed[b])).reshape(len(self.allowed[a]), -1)
            for i, products in enumerate(grid):
                add(products, [self.starts[a] + i], 0.0)
            for j, products in enumerate(grid.T):
                add(products, [self.starts[b] + j], 0.0)
        matrix = coo_array((values, (rows, columns)), shape=(len(wanted), self.columns)).tocsr()
        return [LinearConstraint(matrix, wanted, wanted)]

    def _limit_rows(self, limits: Iterable[int], tighter: float) -> list[LinearConstraint]:
        made = []
        for number in limits:
            cost = self.costs[number]
            row, right = self.cost_row(cost), cost.most - cost.constant
            # The solver's tolerances are absolute: a limit is about 1.
            size = max(abs(right), 1e-3 * float(np.abs(row).max(initial=0.0))) if right < inf else inf
            if 0 < size < inf:
                made.append(LinearConstraint(row[None] / size, -inf, right / size - tighter))
        return made

    def _cut_rows(self, cuts: Sequence[np.ndarray]) -> list[LinearConstraint]:
        made = []
        for taken in cuts:
            row = np.zeros(self.columns)
            row[taken] = 1.0
            made.append(LinearConstraint(row[None], -inf, len(taken) - 1.0))
        return made

    def _levels(self, solution: np.ndarray) -> tuple[int, ...]:
        bounds = zip(self.allowed, self.starts[:-1], self.starts[1:], strict=True)
        return tuple(int(kept[np.argmax(solution[start:end])]) for kept, start, end in bounds)

    def _taken(self, levels: Sequence[int]) -> np.ndarray:
        """The columns of the levels of an assignment."""
        return np.array([start + np.searchsorted(kept, level) for level, kept, start in zip(levels, self.allowed, self.starts, strict=False)], int)


def _cheapest(program: _Program, seconds: float) -> tuple[int, ...] | None:
    """An assignment that meets all limits after all, when only the solver's tolerance had hidden it.

    Raises:
        AllocationError: the first limit that cannot be met alone, or else together with those before it, and what it can reach.
    """
    levels = None
    for together in (False, True):
        for number, cost in enumerate(program.costs):
            row = program.cost_row(cost)
            others = range(number) if together else ()
            levels, proven, _ = program.solve(row / (np.abs(row).max(initial=0.0) or 1.0), 1e-9, seconds, limits=others)
            if levels is not None and not cost.met(levels):
                kept = [f"{other.name} <= {other.most:g}" for other in program.costs[: len(others)]]
                where = f" with {' and '.join(kept)}" if kept else ""
                smallest = "the smallest value it can reach" if proven else f"the smallest value found in {seconds:g} s"
                raise AllocationError(f"{cost.name} <= {cost.most:.6g} cannot be met: {smallest}{where} is {cost.of(levels):.6g}.")
    return levels

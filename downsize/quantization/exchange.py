"""Levels exchanged between choices as long as a true loss falls, when the estimate they were chosen by is only nearly right."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import isfinite

import numpy as np

from ..numerics.allocation import Limit, Term
from ..progress import Progress

Errors = Sequence[Sequence[float]]  # by choice and level
ROUNDING = 1e-12  # by what part sums of the same numbers may differ


@dataclass(frozen=True)
class Budget:
    """The summed costs, ``costs[i][level]`` of choice i and ``pairs[i, j][level of i][level of j]``, may be at most ``most``."""

    name: str
    most: float
    costs: Sequence[Sequence[float]]
    pairs: Mapping[tuple[int, int], Sequence[Sequence[float]]] = field(default_factory=dict)

    def of(self, levels: Sequence[int]) -> float:
        """What an assignment takes."""
        alone = sum(row[level] for row, level in zip(self.costs, levels, strict=True))
        return alone + sum(table[levels[i]][levels[j]] for (i, j), table in self.pairs.items())

    def change(self, levels: Sequence[int], number: int, new: int) -> float:
        """What an assignment takes more when one choice takes another level."""
        old, more = levels[number], 0.0
        for (i, j), table in self.pairs.items():
            if i == number:
                more += table[new][levels[j]] - table[old][levels[j]]
            elif j == number:
                more += table[levels[i]][new] - table[levels[i]][old]
        return self.costs[number][new] - self.costs[number][old] + more

    @property
    def limit(self) -> Limit:
        """The same for the integer program."""
        terms = [Term((i,), np.asarray(costs)) for i, costs in enumerate(self.costs)]
        return Limit(self.name, self.most, (*terms, *(Term(pair, np.asarray(table)) for pair, table in self.pairs.items())))

    def allows(self, cost: float) -> bool:
        """Whether the budget is met, up to the rounding of a sum."""
        return cost <= self.most * (1 + ROUNDING)


def exchanged(
    levels: Sequence[int],
    errors: Errors,
    budgets: Sequence[Budget],
    loss: Callable[[Sequence[int]], float],
    trials: int,
    progress: Progress | None = None,
) -> tuple[tuple[int, ...], float, float]:
    """Better levels near ``levels``, which meet the budgets: each exchange makes one choice cheaper and others dearer, or the other way round,
    and is kept where the loss falls. Those of least estimated error come first.

    Args:
        errors: the estimate, ``errors[i][level]``.
        loss: the truth, of all levels.
        trials: how many exchanges are tried at most.

    Returns: the levels, the loss before, the loss after.
    """
    best, before = tuple(levels), loss(levels)
    least, tried, done = before, {tuple(levels)}, 0
    options = _options(best, errors, budgets)
    with (progress or Progress(quiet=True)).counting("exchanging", "trial", trials) as show:
        while done < trials and (option := next((one for one in options if one not in tried), None)) is not None:
            tried.add(option)
            found = loss(option)
            done += 1
            if found < least:
                best, least = option, found
                options = _options(best, errors, budgets)
            show(done, f"loss {least:.4g}")
    return best, before, least


def _options(levels: tuple[int, ...], errors: Errors, budgets: Sequence[Budget]) -> list[tuple[int, ...]]:
    """All assignments where one choice has its next level up or down in cost, and others follow; those of least estimated error first."""
    found: list[tuple[int, ...]] = []
    for number in range(len(levels)):
        for dearer in (False, True):
            level = _next(levels[number], number, budgets, dearer)
            made = None if level is None else _given_up(_with(levels, number, level), number, errors, budgets)
            if made is not None:
                found.append(_filled(made, levels, errors, budgets))
    summed = {one: sum(row[level] for row, level in zip(errors, one, strict=True)) for one in found}
    return sorted((one for one, error in summed.items() if isfinite(error)), key=summed.__getitem__)


def _next(level: int, number: int, budgets: Sequence[Budget], dearer: bool) -> int | None:
    """The level of next higher or lower cost of a choice; None where there is none."""
    costs = [sum(row) for row in zip(*(budget.costs[number] for budget in budgets), strict=True)]
    sign = 1 if dearer else -1
    others = [one for one in range(len(costs)) if sign * (costs[one] - costs[level]) > 0]
    return min(others, key=lambda one: sign * costs[one]) if others else None


def _with(levels: tuple[int, ...], number: int, level: int) -> tuple[int, ...]:
    return (*levels[:number], level, *levels[number + 1 :])


def _given_up(levels: tuple[int, ...], fixed: int, errors: Errors, budgets: Sequence[Budget]) -> tuple[int, ...] | None:
    """With other choices made cheaper, those that lose least for it first, until the budgets are met; None where that is not possible."""
    while over := [budget for budget in budgets if not budget.allows(budget.of(levels))]:
        best = None
        for number in set(range(len(levels))) - {fixed}:
            old, new = levels[number], _next(levels[number], number, budgets, dearer=False)
            freed = 0.0 if new is None else -sum(budget.change(levels, number, new) for budget in over)
            if new is not None and freed > 0:
                option = (errors[number][new] - errors[number][old]) / freed, number, new
                best = option if best is None else min(best, option)
        if best is None:
            return None
        levels = _with(levels, *best[1:])
    return levels


def _filled(levels: tuple[int, ...], before: tuple[int, ...], errors: Errors, budgets: Sequence[Budget]) -> tuple[int, ...]:
    """With what is left spent: choices that were not changed made dearer, those that gain most first."""
    while True:
        used = [budget.of(levels) for budget in budgets]
        best = None
        for number in [i for i in range(len(levels)) if levels[i] == before[i]]:
            old, new = levels[number], _next(levels[number], number, budgets, dearer=True)
            if new is not None and all(b.allows(each + b.change(levels, number, new)) for b, each in zip(budgets, used, strict=True)):
                option = errors[number][old] - errors[number][new], number, new
                best = option if best is None else max(best, option)
        if best is None or best[0] <= 0:
            return levels
        levels = _with(levels, *best[1:])

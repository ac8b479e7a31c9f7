"""Which width each axis gets, so that the network meets an amount with the least error."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import inf

import numpy as np

from ..errors import AllocationError
from ..numerics.allocation import Choice, Limit, Term, allocate, uniform
from .ladder import Ladder

# How near the real cost must come to what was asked for, as a share of it, when rounding made the two differ.
NEAR = 0.005
ROUNDS = 8


@dataclass(frozen=True, eq=False)
class Amount:
    """What may be left: ``terms(widths)`` gives the cost over the relative widths of each axis' levels, ``most`` is its limit, and
    ``real(dead)`` counts the cost of the network that was really cut."""

    name: str
    most: float
    terms: Callable[[Sequence[np.ndarray]], tuple[Term, ...]]
    real: Callable[[dict[str, list[int]]], float]


def choose(ladders: Sequence[Ladder], amount: Amount, scope: str) -> dict[str, list[int]]:
    """The units that go, by name of axis; axes that stay whole are not named.

    Args:
        scope: ``global`` (least summed error, by integer programming) or ``layer`` (the same share of every axis).

    Raises:
        AllocationError: no widths on the ladders leave so little; the message says how little they can.
    """
    relative = [np.array(ladder.widths) / ladder.site.axis.units for ladder in ladders]
    choices = [Choice(ladder.site.axis.name, ladder.errors) for ladder in ladders]
    terms, most, step = amount.terms(relative), amount.most, NEAR / 4
    best, least, real = None, inf, 0.0
    for _ in range(ROUNDS):
        limits = [Limit(amount.name, most, terms)]
        try:
            found = uniform(choices, limits, [ladder.widths for ladder in ladders]) if scope == "layer" else allocate(choices, limits)
        except AllocationError:
            if most >= amount.most:
                raise
            break  # less than was asked for cannot be had: what was found before stands
        dead = {ladder.site.axis.name: ladder.dead(level) for ladder, level in zip(ladders, found.levels, strict=True) if level}
        real = amount.real(dead)
        if real <= amount.most:
            error = sum(ladder.errors[level] for ladder, level in zip(ladders, found.levels, strict=True))
            best, least = (dead, error) if best is None or error < least else (best, least)
            if real >= amount.most * (1 - NEAR) or most >= amount.most:
                break
        # The terms count a little too much or too little where units have different numbers of positions, or latency is interpolated: aim
        # beside the mark, and farther each time, because a few widths or microseconds are a coarse staircase.
        most *= amount.most / real
        if real > amount.most:
            most, step = most * (1 - step), 2 * step
    if best is None:
        raise AllocationError(f"{amount.name}: the widths found leave {real:.6g}, more than {amount.most:.6g}; ask for a little less.")
    return best

"""Which width each axis gets, so that the network meets an amount with the least error."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from ..errors import AllocationError
from ..numerics.allocation import Choice, Limit, Term, allocate, uniform
from .ladder import Ladder

# How near the real cost must come to what was asked for, as a share of it, when rounding made the two differ.
NEAR = 0.005
ROUNDS = 6


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
    terms, most, dead = amount.terms(relative), amount.most, dict[str, list[int]]()
    best: dict[str, list[int]] | None = None
    for _ in range(ROUNDS):
        limits = [Limit(amount.name, most, terms)]
        found = uniform(choices, limits, [ladder.widths for ladder in ladders]) if scope == "layer" else allocate(choices, limits)
        dead = {ladder.site.axis.name: ladder.dead(level) for ladder, level in zip(ladders, found.levels, strict=True) if level}
        real = amount.real(dead)
        if real <= amount.most:
            best = dead
            if real >= amount.most * (1 - NEAR) or most >= amount.most:
                return dead
        # The terms count a little too much or too little where units have different numbers of positions: aim beside the mark.
        most *= amount.most / real * (1 - NEAR / 4 if real > amount.most else 1)
    if best is None:
        raise AllocationError(f"{amount.name}: the widths found leave {amount.real(dead):.6g}, more than {amount.most:.6g}; ask for a little less.")
    return best

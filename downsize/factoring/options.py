"""The ways in which a layer, or several that read the same value, can be done, and which of them the network takes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import inf

import numpy as np

from ..numerics.allocation import Choice, Limit, Term, allocate
from .layers import Layer

# More ways of one site than this are thinned out: those between are no better by much.
MOST_WAYS = 48


@dataclass(frozen=True, eq=False)
class Option:
    """One way to do ``layers`` together.

    form: ``dense`` (as they are), ``matrix`` (two factors, several layers with the same first one), ``table``, ``tied`` (a table and the linear
    layer that has its weight), or the form of a convolution.
    ranks: of that form. own: the squared error of the layers' outputs, as a part of their energy, in the unchanged network. cost: in the
    measure asked for. error: of the network's outputs, in the currency of all layers.
    """

    layers: tuple[Layer, ...]
    form: str
    ranks: tuple[int, ...]
    own: float
    cost: float
    error: float = 0.0

    def __str__(self) -> str:
        return f"{self.form} {' x '.join(map(str, self.ranks))}".strip()


# One option for each layer of a site, or one for several.
Way = tuple[Option, ...]


def cost_of(way: Way) -> float:
    """Of all its layers."""
    return sum(option.cost for option in way)


def error_of(way: Way) -> float:
    """As if errors added up."""
    return sum(option.error for option in way)


def undominated(options: Sequence[Option], by: Callable[[Option], float] = lambda option: option.own) -> list[Option]:
    """Those than which none costs no more and errs no more, the dearest first."""
    return [options[number] for number in _front([option.cost for option in options], [by(option) for option in options])]


def ways_of(alone: Sequence[Sequence[Option]], together: Sequence[Option]) -> list[Way]:
    """The ways of a site of which none is dominated: each layer alone (``alone``: the options of each), or all of them together."""
    found: list[Way] = [()]
    for options in alone:
        found = _thinned([(*way, option) for way in found for option in options])
    return _thinned([*found, *((option,) for option in together)])


def _thinned(ways: Sequence[Way]) -> list[Way]:
    front = _front([cost_of(way) for way in ways], [error_of(way) for way in ways])
    picked = np.unique(np.linspace(0, len(front) - 1, min(len(front), MOST_WAYS)).round().astype(int))
    return [ways[front[number]] for number in picked]


def _front(costs: Sequence[float], errors: Sequence[float]) -> list[int]:
    """The numbers of those that are dominated by none, the dearest first."""
    kept: list[int] = []
    best = inf
    for number in sorted(range(len(costs)), key=lambda number: (costs[number], errors[number])):
        if errors[number] < best:
            kept.append(number)
            best = errors[number]
    return kept[::-1]


def by_program(sites: Sequence[Sequence[Way]], measure: str, most: float, rest: float) -> list[Option]:
    """The options with the least summed error that leave at most ``most``, of which ``rest`` is no layer's that has options.

    Raises:
        AllocationError: so little cannot remain; the message says how little can.
    """
    choices = [Choice(str(number), tuple(map(error_of, ways))) for number, ways in enumerate(sites)]
    terms = [Term((number,), np.array([cost_of(way) for way in ways])) for number, ways in enumerate(sites)]
    found = allocate(choices, [Limit(measure, most, (Term((), np.asarray(rest)), *terms))])
    return [option for ways, level in zip(sites, found.levels, strict=True) for option in ways[level]]


def by_share(sites: Sequence[Sequence[Way]], share: float) -> list[Option]:
    """In each site the way with the least error among those that cost at most that share of the dearest, or else the cheapest."""
    found: list[Option] = []
    for ways in sites:
        most = share * max(map(cost_of, ways)) * (1 + 1e-9)
        within = [way for way in ways if cost_of(way) <= most]
        found += min(within, key=error_of) if within else min(ways, key=cost_of)
    return found


def by_error(sites: Sequence[Sequence[Way]], most: float) -> list[Option]:
    """In each site the cheapest way of which no layer's own error is above ``most``."""
    return [option for ways in sites for option in min((w for w in ways if all(one.own <= most for one in w)), key=cost_of)]

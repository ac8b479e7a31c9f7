"""Which layers compute in 8 bits and which in float, so that a file takes at most a given time and its outputs lose least.

What a layer takes is read off profiles of whole files: all in 8 bits, all in float, and two in which neighbours differ, because a change of
type costs time of its own. From these an integer program predicts; what it proposes is written and timed beside the float file, and its
limit moved until the file's own time is what was allowed.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import inf
from typing import Protocol

from ..errors import AllocationError, SpecError
from ..numerics.allocation import Choice, allocate
from ..progress import Progress
from ..target import parse_fraction, parse_time, show_time
from .exchange import Budget, exchanged
from .mixed import Losses
from .timing import Spent, Timed

INTEGER, FLOATING = 0, 1  # the levels of a weight
ROUNDS = 5  # files proposed by the program, each of which is written and timed
AIM, NEAR = 0.99, 0.97  # the part of the limit that is aimed at, and what is near enough to stop
TRIALS = 32


@dataclass(frozen=True)
class TimeLimit:
    """At most ``share`` of the float file's time, or ``seconds``."""

    share: float = inf
    seconds: float = inf

    @classmethod
    def of(cls, latency: str | float) -> TimeLimit:
        """From a part up to 1, text with a percent sign, or a time with its unit.

        Raises:
            TargetError: it is none of these. SpecError: a number that might mean milliseconds.
        """
        if isinstance(latency, str) and not latency.strip().endswith("%"):
            return cls(seconds=parse_time(latency, "latency"))
        share = parse_fraction(latency, "latency")
        if share <= 0 or (share > 1 and not isinstance(latency, str)):
            raise SpecError(f"quantize: latency={latency!r} came; expected a part of the float file's time, e.g. 0.6 or 60%, or a time, e.g. '3 ms'.")
        return cls(share=share)

    def used(self, timed: Timed) -> float:
        """What a file takes as a part of the limit."""
        return timed.ratio / self.share if self.share < inf else timed.seconds / self.seconds

    def __str__(self) -> str:
        return f"{self.share:.3g} of the float file's time" if self.share < inf else show_time(self.seconds)


class Stopwatch(Protocol):
    """Files of the network with these weights in float and the others in 8 bits."""

    def spent(self, kept: Collection[str]) -> Mapping[str, Spent]:
        """By weight; under "" what belongs to none."""
        ...

    def timed(self, kept: Collection[str]) -> Timed:
        """Beside the float file."""
        ...


@dataclass(frozen=True)
class Layers:
    """Weights in the order of the graph, the number of the one that is computed last before each (None: there is none), and whether each may
    stay in float."""

    names: Sequence[str]
    parents: Sequence[int | None]
    free: Sequence[bool]

    def kept(self, levels: Sequence[int]) -> frozenset[str]:
        """The names of those in float."""
        return frozenset(name for name, level in zip(self.names, levels, strict=True) if level == FLOATING)


def costs_of(layers: Layers, watch: Stopwatch) -> Budget:
    """Seconds of each weight at its levels, and of each weight and its parent where these differ, without a limit.

    Where types change, the reader pays for what runs before it; and for what its parent's kernel takes longer because its output is of another
    type, its part of that, if it is one of several.
    """
    colours: list[int] = []
    for parent in layers.parents:
        colours.append(0 if parent is None else 1 - colours[parent])
    whole = [watch.spent(frozenset()), watch.spent(frozenset(layers.names))]
    parted = [watch.spent({n for n, c, free in zip(layers.names, colours, layers.free, strict=True) if free and c == colour}) for colour in (0, 1)]
    costs = [[whole[level].get(name, Spent()).all for level in (INTEGER, FLOATING)] for name in layers.names]
    rest = [whole[level].get("", Spent()).all for level in (INTEGER, FLOATING)]
    costs[0] = [cost + min(rest) for cost in costs[0]]  # what belongs to no weight is the same in all
    pairs: dict[tuple[int, int], Sequence[Sequence[float]]] = {}
    for number, parent in enumerate(layers.parents):
        if parent is None:
            continue
        own, read = layers.names[number], layers.names[parent]
        readers = sum(other == parent for other in layers.parents)

        def more(at_parent: int, at_own: int, own: str = own, read: str = read, readers: int = readers, colour: int = colours[number]) -> float:
            found = parted[colour if at_own == FLOATING else 1 - colour]
            before = found.get(own, Spent()).before - whole[at_own].get(own, Spent()).before
            return before + (found.get(read, Spent()).own - whole[at_parent].get(read, Spent()).own) / readers

        pairs[parent, number] = [[0.0, more(INTEGER, FLOATING)], [more(FLOATING, INTEGER), 0.0]]
    return Budget("latency", inf, costs, pairs)


def fastest(budget: Budget, layers: Layers) -> tuple[int, ...]:
    """The levels of least cost: each weight's given its parent's, from the last to the first."""
    best = [
        [cost if level == INTEGER or free else inf for level, cost in enumerate(row)] for row, free in zip(budget.costs, layers.free, strict=True)
    ]
    taken: list[list[int]] = [[] for _ in best]
    for number in reversed(range(len(best))):
        parent = layers.parents[number]
        for level in (INTEGER, FLOATING):
            table = [0.0, 0.0] if parent is None else budget.pairs[parent, number][level]
            own = min((INTEGER, FLOATING), key=lambda each, table=table, number=number: table[each] + best[number][each])
            taken[number].append(own)
            if parent is not None:
                best[parent][level] += table[own] + best[number][own]
    levels: list[int] = []
    for number, parent in enumerate(layers.parents):
        levels.append(taken[number][INTEGER if parent is None else levels[parent]])
    return tuple(levels)


@dataclass
class Search:
    """Assignments that were timed: ``used[levels]`` of the limit."""

    layers: Layers
    limit: TimeLimit
    watch: Stopwatch
    say: Callable[[str], None]
    used: dict[tuple[int, ...], float] = field(default_factory=dict)
    times: dict[tuple[int, ...], Timed] = field(default_factory=dict)

    def time(self, levels: tuple[int, ...]) -> float:
        """What an assignment uses of the limit; timed once."""
        if levels not in self.used:
            timed = self.times[levels] = self.watch.timed(self.layers.kept(levels))
            self.used[levels] = self.limit.used(timed)
            self.say(f"{levels.count(FLOATING)} of {len(levels)} weights in float: {show_time(timed.seconds)}, {timed.ratio:.3f} of the float file's")
        return self.used[levels]

    @property
    def within(self) -> list[tuple[int, ...]]:
        """Those that meet the limit."""
        return [levels for levels, used in self.used.items() if used <= 1]

    def refuse(self) -> None:
        """Refuse a limit that no file has met so far."""
        if not self.within:
            quickest = self.times[min(self.used, key=self.used.__getitem__)]
            raise AllocationError(
                f"quantize: latency of at most {self.limit} cannot be reached: the fastest of {len(self.used)} files takes "
                f"{show_time(quickest.seconds, up=True)}, {quickest.ratio:.3f} of the float file's time; allow more, or a smaller network."
            )


def choose_types(
    layers: Layers, limit: TimeLimit, watch: Stopwatch, losses: Callable[[], Losses] | None, progress: Progress | None = None
) -> dict[str, int]:
    """The level of each weight, of ``INTEGER`` and ``FLOATING``, with the least loss among the files that were timed and met the limit.

    Args:
        losses: measures what each costs at its levels, which takes long; None: all are in 8 bits, and only the time is looked at.

    Raises:
        AllocationError: the fastest file takes longer; before anything else is measured.
    """
    progress = progress or Progress(quiet=True)
    search, count = Search(layers, limit, watch, progress.say), len(layers.names)
    integers, floats = (INTEGER,) * count, (FLOATING,) * count
    if losses is not None and search.time(floats) <= 1:
        return dict.fromkeys(layers.names, FLOATING)
    search.time(integers)
    if losses is None:
        search.refuse()
        return dict.fromkeys(layers.names, INTEGER)
    budget = costs_of(layers, watch)
    search.time(fastest(budget, layers))
    search.refuse()
    found = losses()
    most = approach(search, budget, found)
    whole = {levels: found.whole(levels) for levels in search.within}
    best = min(whole, key=whole.__getitem__)
    better, _, loss = exchanged(best, found.alone, [replace(budget, most=max(most, budget.of(best)))], found.whole, TRIALS, progress)
    if loss < whole[best] and search.time(better) <= 1:
        best = better
    return dict(zip(layers.names, best, strict=True))


def approach(search: Search, budget: Budget, losses: Losses) -> float:
    """Time what the program proposes at predicted times between those of the nearest files on both sides of the limit, a few times.

    Returns: the last prediction that the limit allowed.
    """
    choices = [Choice(name, tuple(row)) for name, row in zip(losses.names, losses.alone, strict=True)]
    most = -inf
    for _ in range(ROUNDS):
        below = max(search.within, key=search.used.__getitem__)
        over = [levels for levels, used in search.used.items() if used > 1]
        above = min(over, key=search.used.__getitem__, default=None)
        if above is None or search.used[below] >= NEAR or budget.of(above) <= budget.of(below):
            break
        part = (AIM - search.used[below]) / (search.used[above] - search.used[below])
        target = budget.of(below) + part * (budget.of(above) - budget.of(below))
        levels = allocate(choices, [replace(budget, most=target).limit]).levels
        known = levels in search.used
        if search.time(levels) <= 1:
            most = max(most, target)
        if known:
            break
    return most

"""Ranges of all activations of a network: plain ones, and sets of them to choose between."""

from __future__ import annotations

from collections.abc import Iterable

from torch import fx

from ..network.network import Network
from ..network.statistics import Distribution, Pieces, distributions
from ..numerics.grids import INT8, UINT8, Grid
from .bits import Bits
from .placement import Placement
from .ranges import Range, candidates, choose, mean_squared_error

# How many pieces (of one sample or a few) are enough to compare choices.
TRIAL_PIECES = 8


def plain_ranges(network: Network, placement: Placement, bits: Bits, fit: Pieces) -> dict[fx.Node, Range]:
    """The full range of each activation on a few pieces, or, where there are few codes, the one with the least squared error."""
    measured = distributions(network, spread(fit, TRIAL_PIECES), own(placement))
    grids = {node: grid for grid, part in bits.groups(network, placement) for node in own(part)}
    return {node: _plain(found, grids[node]) for node, found in measured.items()}


def ranges_to_try(
    network: Network, placement: Placement, bits: Bits, data: tuple[Pieces, Pieces], estimators: Iterable[str]
) -> list[dict[fx.Node, Range]]:
    """Ranges of all activations to choose between: the full ones, and those that each cause the least error on held-back data."""
    fit, held = data
    measured = distributions(network, fit, own(placement)) if placement.activations else {}
    full: dict[fx.Node, Range] = {}
    chosen: dict[fx.Node, Range] = {}
    for grid, part in bits.groups(network, placement):
        options = {node: candidates(measured[node], grid, estimators) for node in own(part)}
        full |= {node: ranges[0] for node, ranges in options.items()}
        chosen |= choose(network, part.activations, options, spread(held, TRIAL_PIECES), grid)
    return [full, chosen] if "minmax" in estimators and placement.activations else [chosen]


def _plain(distribution: Distribution, grid: Grid) -> Range:
    return (distribution.low, distribution.high) if grid in (UINT8, INT8) else mean_squared_error(distribution, grid)


def spread(pieces: Pieces, count: int) -> Pieces:
    """At most ``count`` of the pieces, evenly over the data."""
    return pieces[:: max(1, -(-len(pieces) // count))]


def own(placement: Placement) -> list[fx.Node]:
    """The activations with grids of their own."""
    return [point.node for point in placement.activations if point.like is None]

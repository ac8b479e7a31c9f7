"""Which range of an activation to quantize: candidates from its distribution, chosen by the error they cause in the layers that read it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from ..network.network import Network
from ..network.statistics import Distribution, walk
from ..numerics import grids
from ..numerics.grids import Grid
from .placement import WEIGHT_LAYERS, Point

Range = tuple[float, float]
ESTIMATORS = ("minmax", "percentile", "mse", "entropy")
PERCENTILES = (1e-5, 1e-4)
# Bins of a distribution taken together when divergences are compared.
MERGED = 4
# Clipping candidates: the range shrunk to these fractions.
FRACTIONS = torch.linspace(0.2, 1.0, 81, dtype=torch.float64)


def candidates(distribution: Distribution, grid: Grid, estimators: Iterable[str] = ESTIMATORS) -> list[Range]:
    """Ranges (low, high) worth trying, the full one first, without repeats. All hold zero."""
    full = min(distribution.low, 0.0), max(distribution.high, 0.0)
    found: list[Range] = [full]
    if full[0] == full[1]:
        return found
    for estimator in estimators:
        if estimator == "percentile":
            found += [percentile(distribution, tail) for tail in PERCENTILES]
        elif estimator == "mse":
            found.append(mean_squared_error(distribution, grid))
        elif estimator == "entropy":
            found.append(entropy(distribution, grid))
    width = (full[1] - full[0]) / (grid.high - grid.low)
    distinct: list[Range] = []
    for low, high in found:
        if all(abs(low - a) > width or abs(high - b) > width for a, b in distinct):
            distinct.append((low, high))
    return distinct


def percentile(distribution: Distribution, tail: float) -> Range:
    """The range that leaves out a fraction ``tail`` of the values at each end."""
    total = distribution.counts.sum()
    cumulated = distribution.counts.cumsum(0) / total
    centers = distribution.centers()
    low = float(centers[int(torch.searchsorted(cumulated, tail))])
    high = float(centers[min(int(torch.searchsorted(cumulated, 1 - tail)), len(centers) - 1)])
    return min(max(low, distribution.low), 0.0), max(min(high, distribution.high), 0.0)


def mean_squared_error(distribution: Distribution, grid: Grid) -> Range:
    """The shrunk range with the least expected squared error of rounding and clipping, each end in turn (Banner et al. 2019, arXiv 1810.05723)."""
    low, high = min(distribution.low, 0.0), max(distribution.high, 0.0)
    for _ in range(2):
        high = _best_end([(low, high * f) for f in FRACTIONS.tolist()], distribution, grid)[1] if high > 0 else high
        low = _best_end([(low * f, high) for f in FRACTIONS.tolist()], distribution, grid)[0] if low < 0 else low
    return low, high


def _best_end(ranges: list[Range], distribution: Distribution, grid: Grid) -> Range:
    occupied = distribution.counts > 0
    weight, x = distribution.counts[occupied], distribution.centers()[occupied]
    low = torch.tensor([r[0] for r in ranges], dtype=torch.float64)[:, None]
    high = torch.tensor([r[1] for r in ranges], dtype=torch.float64)[:, None]
    step = (high - low).clamp(min=1e-30) / (grid.high - grid.low)
    clipped = torch.minimum(torch.maximum(x, low), high) - x
    # Inside the range the rounding error is uniform over a step.
    error = (clipped.square() + torch.where(clipped == 0, step.square() / 12, 0.0)) @ weight
    return ranges[int(error.argmin())]


def entropy(distribution: Distribution, grid: Grid) -> Range:
    """The shrunk range whose quantized distribution is nearest to the clipped one in Kullback-Leibler divergence (Migacz 2017, GTC)."""
    low, high = min(distribution.low, 0.0), max(distribution.high, 0.0)
    levels = grid.high - grid.low + 1
    # Coarser bins: eight a level are enough to compare distributions.
    x, counts = distribution.centers().reshape(-1, MERGED).mean(1), distribution.counts.reshape(-1, MERGED).sum(1)
    best, least = (low, high), float("inf")
    for fraction in FRACTIONS[::5].tolist():
        a, b = low * fraction, high * fraction
        inside = (x >= a) & (x <= b)
        if int(inside.sum()) < 2:
            continue
        p = counts[inside].clone()
        p[0] += counts[x < a].sum()
        p[-1] += counts[x > b].sum()
        bins = ((x[inside] - a) / max(b - a, 1e-30) * levels).long().clamp(0, levels - 1)
        present = (counts[inside] > 0).double()
        mass = torch.zeros(levels, dtype=torch.float64).index_add_(0, bins, counts[inside])
        number = torch.zeros(levels, dtype=torch.float64).index_add_(0, bins, present)
        q = (mass / number.clamp(min=1))[bins] * present
        p, q = p / p.sum(), q / q.sum().clamp(min=1e-30)
        seen = p > 0
        divergence = float((p[seen] * (p[seen] / q[seen].clamp(min=1e-12)).log()).sum())
        if divergence < least:
            best, least = (a, b), divergence
    return best


def choose(
    network: Network, points: list[Point], options: dict[fx.Node, list[Range]], data: Sequence[list[Tensor]], grid: Grid
) -> dict[fx.Node, Range]:
    """For every point the range with the least output error of the weight layers that read it, over held-back inputs.

    A tensor that no weight layer reads (it goes into a sum or a pool) is judged by its own error. Ties go to the wider range.
    """
    own = [point for point in points if point.like is None]
    errors = {point.node: torch.zeros(len(options[point.node]), dtype=torch.float64) for point in own}
    by_source = {point.node: point for point in own}
    readers: dict[fx.Node, list[fx.Node]] = {node: [] for node in by_source}
    hooks: dict[fx.Node, Any] = {}
    for node in network.graph.nodes:
        if node.target in WEIGHT_LAYERS:
            source = node.args[WEIGHT_LAYERS[node.target][0]]
            point = by_source.get(source)
            if point is not None and len(options[source]) > 1 and (point.readers is None or node in point.readers):
                readers[source].append(node)
                hooks[node] = _layer_error(node, errors[source], options[source], grid)
    for node, point in by_source.items():
        if not readers[node] and len(options[node]) > 1 and point is not None:
            hooks[node] = _own_error(errors[node], options[node], grid)
    for leaves in data:
        walk(network, leaves, hooks)
    return {node: options[node][int(error.argmin())] for node, error in errors.items()}


def fake(x: Tensor, bounds: Range, grid: Grid) -> Tensor:
    """``x`` rounded to the grid over ``bounds``, in float."""
    scale, zero_point = grids.covering(torch.tensor(bounds[0]), torch.tensor(bounds[1]), grid)
    return torch.ops.downsize.fake_quantize(x, scale, zero_point, None, grid.low, grid.high)


def _layer_error(node: fx.Node, errors: Tensor, options: list[Range], grid: Grid) -> Any:
    position = WEIGHT_LAYERS[node.target][0]

    def measure(args: tuple[Any, ...], value: Tensor) -> None:
        norm = float(value.square().sum()) + 1e-30
        for number, bounds in enumerate(options):
            changed = list(args)
            changed[position] = fake(args[position], bounds, grid)
            errors[number] += float((node.target(*changed) - value).square().sum()) / norm  # type: ignore[operator]

    return measure


def _own_error(errors: Tensor, options: list[Range], grid: Grid) -> Any:
    def measure(args: tuple[Any, ...], value: Tensor) -> None:
        norm = float(value.square().sum()) + 1e-30
        for number, bounds in enumerate(options):
            errors[number] += float((fake(value, bounds, grid) - value).square().sum()) / norm

    return measure

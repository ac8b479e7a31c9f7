"""Range estimators against brute force on the values themselves, and the choice among ranges against the errors of layers."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from small_nets import conv, plain
from torch import Tensor, nn

from downsize.errors import TaskError
from downsize.network.statistics import Distribution, distributions
from downsize.numerics.grids import UINT8
from downsize.quantization.placement import place
from downsize.quantization.ranges import candidates, choose, entropy, fake, mean_squared_error, percentile

LEVELS = 255
DRAW = torch.Generator().manual_seed(3)
NORMAL = torch.randn(20_000, generator=DRAW)
SHAPES = {
    "normal": NORMAL,
    "outliers": torch.cat([NORMAL, torch.tensor([60.0, -35.0])]),
    "heavy tails": NORMAL / torch.rand(20_000, generator=DRAW).clamp(min=0.02),
    "rectified": NORMAL.clamp(min=0),
    "uniform": torch.rand(20_000, generator=DRAW) * 6 - 1,
    "negative": -NORMAL.abs() - 0.5,
}


def distribution(values: Tensor, parts: int = 7) -> Distribution:
    found = Distribution()
    for part in values.chunk(parts):
        found.add(part)
    return found


def true_error(values: Tensor, bounds: tuple[float, float]) -> float:
    """The mean squared error of rounding the values themselves."""
    return float((fake(values, bounds, UINT8) - values).double().square().mean())


@pytest.mark.parametrize("name", SHAPES)
def test_extremes_are_exact_and_every_value_is_counted(name):
    values = SHAPES[name]
    found = distribution(values)
    assert (found.low, found.high) == (float(values.min()), float(values.max()))
    assert float(found.counts.sum()) == len(values)
    width = 2 * found.limit / len(found.counts)
    mean = float((found.counts * found.centers()).sum() / found.counts.sum())
    assert mean == pytest.approx(float(values.double().mean()), abs=width)


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("tail", [1e-4, 1e-3, 1e-2])
def test_percentile_is_that_of_the_sorted_values(name, tail):
    values, found = SHAPES[name], distribution(SHAPES[name])
    low, high = percentile(found, tail)
    width = 2 * found.limit / len(found.counts)
    ordered = np.sort(values.numpy())
    leave = round(tail * len(values))
    assert low == pytest.approx(min(float(ordered[leave]), 0.0), abs=width * 2 + abs(float(ordered[leave + 2] - ordered[max(leave - 2, 0)])))
    assert high == pytest.approx(max(float(ordered[-1 - leave]), 0.0), abs=width * 2 + abs(float(ordered[-leave - 3] - ordered[-max(leave - 1, 1)])))


@pytest.mark.parametrize("name", SHAPES)
def test_mean_squared_error_is_near_the_best_of_all_ranges(name):
    values = SHAPES[name]
    low, high = min(float(values.min()), 0.0), max(float(values.max()), 0.0)
    grid = np.linspace(0.04, 1.0, 49)
    best = min(true_error(values, (low * a, high * b)) for a, b in itertools.product(grid if low else [1.0], grid if high else [1.0]))
    found = mean_squared_error(distribution(values), UINT8)
    assert low <= found[0] <= 0 <= found[1] <= high
    # The estimator shrinks each end to no less than a fifth.
    floor = min(true_error(values, (low * a, high * b)) for a, b in itertools.product(grid[8:] if low else [1.0], grid[8:] if high else [1.0]))
    assert true_error(values, found) <= 1.1 * floor
    assert true_error(values, found) <= true_error(values, (low, high)) * 1.001
    assert best <= floor


def divergence(values: Tensor, bounds: tuple[float, float], limit: float) -> float:
    """KL of the values clipped to the bounds from what 256 levels keep of them: Migacz's construction with 2048 fixed bins over +-limit."""
    low, high = bounds
    centers = -limit + 2 * limit / 2048 * (np.arange(2048) + 0.5)
    kept = (centers >= low) & (centers <= high)
    counts = np.histogram(values.numpy(), 2048, (-limit, limit))[0].astype("float64")
    p = counts[kept]
    p[0] += counts[centers < low].sum()
    p[-1] += counts[centers > high].sum()
    inside, level = counts[kept], np.clip(((centers[kept] - low) / (high - low) * (LEVELS + 1)).astype(int), 0, LEVELS)
    q = np.zeros_like(p)
    for one in range(LEVELS + 1):
        here = (level == one) & (inside > 0)
        q[here] = inside[level == one].sum() / max(here.sum(), 1)
    p, q = p / p.sum(), q / q.sum()
    seen = p > 0
    return float((p[seen] * np.log(p[seen] / np.maximum(q[seen], 1e-12))).sum())


@pytest.mark.parametrize("name", ["outliers", "heavy tails", "normal"])
def test_entropy_takes_the_fraction_that_brute_force_does(name):
    values, found = SHAPES[name], distribution(SHAPES[name])
    by_hand = {f: divergence(values, (found.low * f, found.high * f), found.limit) for f in np.arange(0.2, 1.01, 0.05)}
    got = entropy(found, UINT8)
    assert divergence(values, got, found.limit) <= min(by_hand.values()) * 1.05 + 1e-6
    assert divergence(values, got, found.limit) <= by_hand[max(by_hand)]


def test_entropy_keeps_all_of_a_flat_distribution():
    values = SHAPES["uniform"]
    low, high = entropy(distribution(values), UINT8)
    assert low == pytest.approx(float(values.min()), rel=0.06) and high == pytest.approx(float(values.max()), rel=0.06)


@pytest.mark.parametrize("name", SHAPES)
def test_candidates_hold_zero_begin_with_the_full_range_and_do_not_repeat(name):
    found = candidates(distribution(SHAPES[name]), UINT8)
    assert found[0] == (min(float(SHAPES[name].min()), 0.0), max(float(SHAPES[name].max()), 0.0))
    assert all(low <= 0.0 <= high for low, high in found) and len(set(found)) == len(found)


def test_a_tensor_of_zeros_has_one_range():
    assert candidates(distribution(torch.zeros(50)), UINT8) == [(0.0, 0.0)]


def test_choice_is_the_range_with_the_least_error_in_the_layer_that_reads():
    torch.manual_seed(0)
    network = plain(nn.Sequential(conv(3, 6)), torch.randn(2, 3, 8, 8))
    points = place(network).activations
    source = next(point.node for point in points if point.readers is not None)
    data = [[torch.randn(4, 3, 8, 8, generator=DRAW) * torch.tensor([1.0, 1.0, 20.0]).reshape(3, 1, 1)] for _ in range(3)]
    options = {point.node: [(-1.0, 1.0)] for point in points} | {source: [(-100.0, 100.0), (-60.0, 60.0), (-3.0, 3.0), (-10.0, 60.0)]}
    layer = nn.functional.conv2d
    weight, bias = network.tensor("0.weight").detach(), network.tensor("0.bias").detach()
    exact = [layer(x, weight, bias, padding=1) for (x,) in data]
    errors = [
        sum(
            float((layer(fake(x, bounds, UINT8), weight, bias, padding=1) - y).square().sum() / y.square().sum())
            for (x,), y in zip(data, exact, strict=True)
        )
        for bounds in options[source]
    ]
    chosen = choose(network, points, options, data, UINT8)
    assert chosen[source] == options[source][int(np.argmin(errors))] and int(np.argmin(errors)) == 1


def test_nan_in_what_the_network_makes_is_refused_with_the_place():
    network = plain(nn.Sequential(nn.Linear(4, 4)), torch.randn(2, 4))
    node = next(node for node in network.graph.nodes if node.op == "placeholder")
    with pytest.raises(TaskError, match="NaN or infinite"):
        distributions(network, [[torch.tensor([[1.0, float("nan"), 2.0, 3.0]])]], [node])

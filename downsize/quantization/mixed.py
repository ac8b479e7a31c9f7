"""Mixed precision: how many bits each weight gets under a limit, so that the outputs lose least.

What every width of every weight costs the outputs is measured, the widths of least summed loss under the limits are found by an integer
program, and then exchanged as long as the true loss of the whole network falls: losses do not quite add up.
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportAttributeAccessIssue=false

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from math import inf
from typing import Literal

import torch
from torch import fx

from ..errors import AllocationError, TaskError
from ..network.cost import COUNTED
from ..network.judge import Judge
from ..network.network import Network
from ..network.packed import OPERATORS_TAKE
from ..network.statistics import Hook, walk
from ..numerics.allocation import Choice, allocate
from ..progress import Progress
from ..target import parse_fraction, parse_size, show_size
from .bits import FLOAT
from .exchange import Budget, exchanged
from .formats import Format
from .placement import WeightPoint
from .sensitivities import Change, Changes, Found, changed, fisher, format_at, losses, matrix_shape, nearest_changes
from .solving import solved_changes
from .weight_only import Data

By = Literal["loss", "fisher"]
# From the names of the weights that stay in float to the network that will run, its other weights in float too.
Shell = Callable[[Collection[str]], Network]
# Formats to choose among, by bits; None: float.
Ways = Mapping[int, "Format | None"]
# Pieces to solve weights on, and to measure each width by; and how many exchanges of widths are tried.
SOLVING_PIECES, MEASURING_PIECES, TRIALS = 40, 8, 32


@dataclass(frozen=True)
class Amount:
    """What may be used at most: ``bytes`` of weights with their scales, packed; ``operations``, multiply-accumulates times the bits of both
    factors, of which one bit of a weight is ``per_bit``, and a weight in float, whose layers' inputs are float too, ``in_float``, by name."""

    bytes: float | None = None
    operations: float | None = None
    per_bit: Mapping[str, float] = field(default_factory=dict)
    in_float: Mapping[str, float] = field(default_factory=dict)


def size_limit(size: str | float, at_8_bits: float) -> float:
    """Bytes from text with a unit, a number of bytes above 1, or a part of what the weights take at 8 bits.

    Raises:
        TargetError: it is neither.
    """
    if isinstance(size, str) and not size.strip().endswith("%"):
        return float(parse_size(size))
    value = parse_fraction(size, "size")
    return value if value > 1 and not isinstance(size, str) else value * at_8_bits


def stored_bytes(rows: int, columns: int, wanted: Format | None) -> float:
    """What a weight takes in a file, packed where that makes the file smaller: unpacked codes take a byte each; None: in float."""
    if wanted is None:
        return rows * columns * FLOAT / 8
    packed = wanted.bytes(rows, columns)
    saved = rows * columns * (8 - wanted.bits) / 8
    return packed if saved > OPERATORS_TAKE else packed + saved


def bytes_at_8_bits(network: Network, points: Sequence[WeightPoint]) -> float:
    """What the weights take with 8 bits and a scale a row."""
    return sum(Format(8).bytes(*matrix_shape(network.tensor(str(point.node.target)), point)) for point in points)


def amount_of(network: Network, points: Sequence[WeightPoint], size: str | float | None, bops: float | None, layers: Mapping[fx.Node, int]) -> Amount:
    """What ``size`` (see :func:`size_limit`) and ``bops``, a part of the operations at 8 bits, allow; ``layers``: the bits of their inputs."""
    most = None if size is None else size_limit(size, bytes_at_8_bits(network, points))
    if bops is None:
        return Amount(most)
    macs, names = _macs(network), {str(point.node.target) for point in points}
    per_bit, in_float, whole = dict.fromkeys(names, 0.0), dict.fromkeys(names, 0.0), 0.0
    for layer, bits in layers.items():
        for name in names & {str(source.target) for source in layer.all_input_nodes if source.op == "get_attr"}:
            per_bit[name] += macs[layer] * bits
            in_float[name] += macs[layer] * FLOAT * FLOAT
            whole += macs[layer] * 8 * 8
    return Amount(most, bops * whole, per_bit, in_float)


def _macs(network: Network) -> dict[fx.Node, int]:
    """The multiply-accumulates of each layer at the example's sizes."""
    found: dict[fx.Node, int] = {}
    hooks: dict[fx.Node, Hook] = {
        node: lambda args, value, node=node: found.__setitem__(node, COUNTED[node.target](args, value))
        for node in network.graph.nodes
        if node.target in COUNTED
    }
    walk(network, [torch.zeros(port.example, dtype=port.dtype) for port in network.ports], hooks)
    return found


@dataclass(frozen=True)
class Losses:
    """What the outputs lose: ``alone[i][level]``, weight i at a level and nothing else changed; ``whole(levels)``, all weights at theirs."""

    names: Sequence[str]
    widths: Sequence[int]
    alone: Sequence[Sequence[float]]
    whole: Callable[[Sequence[int]], float]

    def bits(self, levels: Sequence[int]) -> dict[str, int]:
        """The bits of each weight."""
        return {name: self.widths[level] for name, level in zip(self.names, levels, strict=True)}


def choose_bits(
    network: Network, points: Sequence[WeightPoint], ways: Ways, amount: Amount, losses: Callable[[], Losses], progress: Progress | None = None
) -> dict[str, int]:
    """The bits of each weight with the least loss of the held-back outputs.

    Args:
        network: the float network. points: its weights. ways: the formats to choose among, by bits.
        losses: measures what each costs, which takes long; see :func:`measured`.

    Raises:
        AllocationError: the amount is less than the fewest bits take; the message says how much that is.
        TaskError: there is no weight.
    """
    if not points:
        raise TaskError("The network has no weight to quantize: there is nothing to choose bits for.")
    budgets = _budgets(network, points, ways, amount)
    if len(ways) == 1:
        return dict.fromkeys([str(point.node.target) for point in points], *ways)
    found = losses()
    choices = [Choice(name, tuple(row)) for name, row in zip(found.names, found.alone, strict=True)]
    first = allocate(choices, [budget.limit for budget in budgets]).levels
    levels, _, _ = exchanged(first, found.alone, budgets, found.whole, TRIALS, progress)
    return found.bits(levels)


def measured(
    network: Network,
    shell: Shell,
    points: Sequence[WeightPoint],
    ways: Ways,
    data: Data,
    by: By = "loss",
    solve: bool = True,
    spared: Mapping[str, float] | None = None,
    progress: Progress | None = None,
) -> Losses:
    """What each width of each weight costs the outputs.

    Args:
        by: what a width costs: ``loss``, measured with each alone; ``fisher``, estimated from derivatives.
        solve: weights are rounded by GPTQ, else to nearest.
        spared: of the weights that may stay in float, what the outputs lose by the rounding of their layers' inputs alone.
    """
    names, spared = [str(point.node.target) for point in points], spared or {}
    rounded = {bits: wanted for bits, wanted in ways.items() if wanted is not None}
    changes, found = _changes(network, points, rounded, data, by, solve, progress)

    def cost(name: str, bits: int) -> float:
        if bits == FLOAT:
            return 0.0 if name in spared else inf
        return found.get(name, {}).get(bits, 0.0) + (spared.get(name, 0.0) if FLOAT in ways else 0.0)

    all_changes = [[changes[name].get(bits, {}) for bits in ways] for name in names]
    whole = _whole_loss(network, shell, data, names, list(ways), all_changes)
    return Losses(names, list(ways), [[cost(name, bits) for bits in ways] for name in names], whole)


def _changes(
    network: Network, points: Sequence[WeightPoint], ways: Mapping[int, Format], data: Data, by: By, solve: bool, progress: Progress | None
) -> tuple[Changes[int], Found[int]]:
    """What each weight becomes with each number of bits, and what the outputs lose by it."""
    names = [str(point.node.target) for point in points]
    changes: dict[str, Mapping[int, Change]] = {**nearest_changes(network, points, dict.fromkeys(names, ways))}
    measure = spread(data.held, MEASURING_PIECES)
    found = fisher(network, measure, changes) if by == "fisher" else {}
    if solve:
        rowwise = {str(point.node.target): ways for point in points if point.axis == 0}
        changes |= solved_changes(network, rowwise, spread(data.fit, SOLVING_PIECES), progress)
    return changes, found or losses(network, measure, changes, progress)


def _budgets(network: Network, points: Sequence[WeightPoint], ways: Ways, amount: Amount) -> list[Budget]:
    """What each width of each weight takes of what is limited."""
    found, names = [], [str(point.node.target) for point in points]
    if amount.bytes is not None:
        shapes = [matrix_shape(network.tensor(name), point) for name, point in zip(names, points, strict=True)]
        costs = [
            [stored_bytes(*shape, wanted and format_at(point, wanted)) for wanted in ways.values()]
            for point, shape in zip(points, shapes, strict=True)
        ]
        fewer = [
            [stored_bytes(*shape, format_at(point, wanted)) for wanted in ways.values() if wanted and wanted.bits < 8]
            for point, shape in zip(points, shapes, strict=True)
        ]
        small = sum(min(one, default=0) >= stored_bytes(*shape, Format(8)) for one, shape in zip(fewer, shapes, strict=True))
        why = f" ({small} of {len(points)} weights are too small: scales and what decodes them take more than is saved)" if small else ""
        found.append(_reachable(Budget("size", amount.bytes, costs), bytes_at_8_bits(network, points), show_size, why))
    if amount.operations is not None:
        each = [amount.per_bit.get(name, 0.0) for name in names]
        costs = [[amount.in_float.get(name, 0.0) if bits == FLOAT else one * bits for bits in ways] for name, one in zip(names, each, strict=True)]
        found.append(_reachable(Budget("bops", amount.operations, costs), 8 * sum(each), lambda value, up: f"{value:.4g} bit operations"))
    return found


def _reachable(budget: Budget, at_8_bits: float, show: Callable[..., str], why: str = "") -> Budget:
    least = sum(min(costs) for costs in budget.costs)
    if least > budget.most:
        raise AllocationError(
            f"quantize: {budget.name} of at most {show(budget.most, up=False)} cannot be reached: with the fewest bits of widths all weights take "
            f"{show(least, up=True)}, {least / max(at_8_bits, 1e-30):.3f} of what they take at 8 bits{why}; allow more, or fewer bits."
        )
    return budget


def _whole_loss(
    network: Network, shell: Shell, data: Data, names: Sequence[str], widths: Sequence[int], ways: Sequence[Sequence[Change]]
) -> Callable[[Sequence[int]], float]:
    """The loss of the network with all weights at these levels."""
    judge, shells = Judge(network, data.held), {}

    def loss(levels: Sequence[int]) -> float:
        kept = frozenset(name for name, level in zip(names, levels, strict=True) if widths[level] == FLOAT)
        if kept not in shells:
            shells.clear()  # the last one is the one most likely to be needed again
            shells[kept] = shell(kept).fork()
        with ExitStack() as stack:
            for changes, level in zip(ways, levels, strict=True):
                stack.enter_context(changed(shells[kept], changes[level]))
            return judge(shells[kept])

    return loss


def spread(pieces: Sequence[list], count: int) -> Sequence[list]:
    """At most ``count`` of the pieces, evenly over the data."""
    return pieces[:: max(1, -(-len(pieces) // count))]

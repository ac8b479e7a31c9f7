"""Which layers suffer from few bits: for each weight what is lost at each width, and for large losses the reason and the mend."""

# pyright: reportArgumentType=false, reportCallIssue=false, reportAttributeAccessIssue=false, reportReturnType=false

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from torch import fx

from ..network.network import Network
from ..network.statistics import distributions
from ..progress import Progress
from .formats import Format
from .mixed import By
from .placement import WEIGHT_LAYERS, Placement, WeightPoint, place
from .reasons import LARGE, of_input, of_weight
from .sensitivities import Changes, fisher, input_losses, losses, nearest_changes, output_errors, rounded
from .solving import solved_changes
from .weight_only import Data

WIDTHS, INPUT_WIDTHS = (8, 6, 4, 3, 2), (8, 4)
GROUP = 32  # columns, of the mend that is tried
MEND_FROM = 3  # bits: losses of fewer need no reason


@dataclass(frozen=True)
class Sensitivity:
    """What fewer bits cost where one weight is rounded to nearest, with one scale a row, and nothing else.

    ``output``: by bits, the squared error of what the layer gives over its square. ``loss``: the same of the network's outputs. ``inputs``:
    what the outputs lose when the layer's input alone is quantized on its full range; empty for tables. ``reasons``: one for each large loss.
    """

    weight: str
    module: str
    operator: str
    output: dict[int, float]
    loss: dict[int, float]
    inputs: dict[int, float]
    reasons: tuple[str, ...] = ()


def diagnose(network: Network, data: Data, widths: Sequence[int] = WIDTHS, by: By = "loss", progress: Progress | None = None) -> list[Sensitivity]:
    """The sensitivity of each weight that can be quantized, in the graph's order.

    Args:
        network: in float, batch norms folded. data: to solve and measure ranges on, and to measure losses on.
        by: ``loss``, or estimated from derivatives, ``fisher``: then inputs are not looked at.
    """
    placement = place(network)
    formats = {str(point.node.target): {bits: Format(bits) for bits in widths} for point in placement.weights}
    changes = nearest_changes(network, placement.weights, formats)
    own = output_errors(network, data.held, changes)
    whole = losses(network, data.held, changes, progress) if by == "loss" else fisher(network, data.held, changes)
    inputs, clipped = _inputs(network, placement, data, progress) if by == "loss" else ({}, {})
    found = []
    for point in sorted(placement.weights, key=lambda one: min(one.node.users)):
        name = str(point.node.target)
        reader = next(iter(point.node.users))
        operator = str(reader.target).removeprefix("aten.").split(".")[0]
        taken = inputs.get(reader.name, {})
        found.append(Sensitivity(name, str(reader.meta.get("module") or name), operator, own[name], whole.get(name, {}), taken))
    return _explained(network, placement, data, found, clipped)


def _inputs(
    network: Network, placement: Placement, data: Data, progress: Progress | None
) -> tuple[dict[str, dict[int, float]], dict[str, dict[int, float]]]:
    """By layer what its input costs on its full range, and, where that is much, on the range of least squared error."""
    order = {node: i for i, node in enumerate(network.graph.nodes)}
    layers = sorted(placement.layers, key=order.__getitem__)
    measured = distributions(network, data.fit, {_source(layer) for layer in layers})
    full = input_losses(network, layers, data.held, measured, INPUT_WIDTHS, progress=progress)
    large = [layer for layer in layers if full[layer.name][INPUT_WIDTHS[0]] > LARGE]
    return full, input_losses(network, large, data.held, measured, INPUT_WIDTHS[:1], clipped=True) if large else {}


def _source(layer: fx.Node) -> fx.Node:
    return layer.args[WEIGHT_LAYERS[layer.target][0]]


def _explained(
    network: Network, placement: Placement, data: Data, found: list[Sensitivity], clipped: dict[str, dict[int, float]]
) -> list[Sensitivity]:
    points = {str(point.node.target): point for point in placement.weights}
    large = {one.weight: bits for one in found if (bits := _widest_large(one.loss)) is not None}
    mended = output_errors(network, data.held, _mends(network, [points[name] for name in large], large, data))
    made = []
    for one in found:
        point = points[one.weight]
        reasons = []
        if one.weight in large:
            reasons.append(of_weight(network, point, one.loss, one.output, large[one.weight], mended[one.weight], _place(placement, point)))
        bits = INPUT_WIDTHS[0]
        readers = [layer for layer in placement.layers if point.node in layer.all_input_nodes and layer.name in clipped]
        reasons += [of_input(network, layer, _source(layer), data.held, one.inputs[bits], clipped[layer.name][bits]) for layer in readers[:1]]
        made.append(replace(one, reasons=tuple(reasons)))
    return made


def _widest_large(loss: dict[int, float]) -> int | None:
    """The most bits whose loss is large; None: few bits enough do not matter here."""
    return max((bits for bits, each in loss.items() if each > LARGE and bits >= MEND_FROM), default=None)


def _mends(network: Network, points: Iterable[WeightPoint], bits: dict[str, int], data: Data) -> Changes[str]:
    """What the weight is with the same bits and something else done: a scale for fewer columns, zero points, errors made up for."""
    points = list(points)
    found: dict[str, dict[str, dict]] = {}
    for point in points:
        name = str(point.node.target)
        weight = network.tensor(name).detach()
        found[name] = {}
        if point.axis == 0:
            found[name]["symmetric=False"] = {name: rounded(weight, point, Format(bits[name], None, False))}
            if weight[0].numel() > GROUP:
                found[name][f"group={GROUP}"] = {name: rounded(weight, point, Format(bits[name], GROUP))}
    solve = {str(point.node.target): {"rounding='gptq'": Format(bits[str(point.node.target)])} for point in points if point.axis == 0}
    for name, ways in (solved_changes(network, solve, data.fit) if solve else {}).items():
        found[name] |= ways
    return found


def _place(placement: Placement, point: WeightPoint) -> str:
    """What a weight is among the layers: ``first``, ``last``, or neither."""
    layers = sorted(placement.layers)
    at = [i for i, layer in enumerate(layers) if point.node in layer.all_input_nodes]
    return "first" if 0 in at else "last" if len(layers) - 1 in at else ""

"""Weights quantized while activations stay as they are: tables by what the outputs notice of them, layers in order, others to nearest."""

# pyright: reportArgumentType=false, reportCallIssue=false, reportAttributeAccessIssue=false

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, fx

from ..network.network import Network
from ..network.rewrite import aten, set_constant
from ..numerics.hqq import hqq
from ..progress import Progress
from .formats import Format
from .grouped import Steps, nearest, quantize, solved, steps_of
from .in_order import round_in_order
from .insertion import quantize_weights
from .placement import Placement, WeightPoint
from .protecting import protect
from .sensitivity import output_grams
from .states import round_recurrent

Rounding = Literal["nearest", "hqq", "awq", "gptq"]
# Pieces on which derivatives of the outputs are taken.
GRADIENT_PIECES = 64


@dataclass(frozen=True)
class Data:
    """Flat inputs to solve on, and others to choose by."""

    fit: Sequence[list[Tensor]]
    held: Sequence[list[Tensor]]


def quantize_weight_only(
    reference: Network,
    placement: Placement,
    formats: Mapping[str, Format],
    rounding: Rounding,
    data: Data | None,
    refit: bool = True,
    progress: Progress | None = None,
) -> Network:
    """The network with the weights of ``formats`` in these formats.

    Args:
        reference: the float network, batch norms folded.
        placement: of its weights. One whose outputs do not lie along its first dimension gets one scale an output, on a symmetric grid.
        rounding: ``nearest`` and ``hqq`` (Badri and Shaji 2023) need no data. ``awq``: see :func:`.protecting.protect`, then to nearest.
            ``gptq``: see :mod:`.in_order`; tables by the derivatives of the outputs, see :func:`.sensitivity.output_grams`; recurrent layers before
            all others, see :func:`.states.round_recurrent`.
        refit: with ``gptq``, fit weights to the original's outputs before they are rounded.
    """
    made = reference.fork()
    if rounding == "awq" and data is not None:
        protect(made, formats, data.fit)
    points = {str(point.node.target): point for point in placement.on(made).weights if str(point.node.target) in formats}
    rowwise = {name: point for name, point in points.items() if point.axis == 0}
    steps: dict[str, Steps] = {}
    if rounding == "gptq" and data is not None:
        steps |= _tables(reference, made, rowwise, formats, data)
        steps |= round_recurrent(made, {name: formats[name] for name in rowwise}, data.fit, data.held)
        layers = {name: formats[name] for name in rowwise if name not in steps}
        steps |= {name: found.steps for name, found in round_in_order(reference, made, layers, data.fit, data.held, refit, progress).items()}
    for name, point in points.items():
        if name not in rowwise:
            quantize_weights(made, [point], Format(formats[name].bits).grid)
            continue
        if name not in steps:
            steps[name] = _without_data(made, point, formats[name], rounding)
        quantize(made, point, formats[name], steps[name])
    made.recompile()
    return made


def _without_data(network: Network, point: WeightPoint, wanted: Format, rounding: Rounding) -> Steps:
    """Round a weight by itself, in place."""
    weight = network.tensor(str(point.node.target)).detach()
    matrix = weight.flatten(1)
    if rounding == "hqq" and not wanted.symmetric and wanted.levels == "uniform":
        steps = hqq(matrix, wanted.columns_of_group(matrix.shape[1]), wanted.grid, half=True, rounded=True)
    else:
        steps = steps_of(matrix, wanted)
    set_constant(network, point.node, nearest(matrix, wanted, steps).reshape(weight.shape))
    return steps


def _tables(reference: Network, made: Network, points: Mapping[str, WeightPoint], formats: Mapping[str, Format], data: Data) -> dict[str, Steps]:
    """Round the tables that nothing else reads, in place: GPTQ with the derivatives of the outputs in the place of inputs."""
    readers: dict[str, list[fx.Node]] = {}
    for node in reference.graph.nodes:
        if node.target is aten.embedding.default and str(node.args[0].target) in points and len(node.args[0].users) == 1:
            readers.setdefault(str(node.args[0].target), []).append(node)
    wanted = [nodes[0] for name, nodes in readers.items() if formats[name].bits < 8 and len(nodes) == 1]
    grams = output_grams(reference, wanted, data.fit[:: max(1, -(-len(data.fit) // GRADIENT_PIECES))]) if wanted else {}
    found = {}
    for name in readers:
        gram = grams.get(readers[name][0])
        if gram is None or name in reference.sparse:
            continue
        matrix = made.tensor(name).detach()
        found[name] = steps_of(matrix, formats[name], gram.diagonal())
        set_constant(made, points[name].node, solved(matrix[None], gram[None], formats[name], found[name])[0].to(matrix.dtype))
    return found

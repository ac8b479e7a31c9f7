"""Smoothing: move the spread of an activation's channels into the weight that reads it, where that makes both easier to round.

A linear layer computes ``x @ W.T = (x / s) @ (W * s).T`` for every positive ``s`` [channels]. With
``s = max|x|^strength / max|W|^(1 - strength)`` outlier channels of ``x`` shrink (Xiao et al. 2023, arXiv 2211.10438). The factor stays in the
graph as one multiplication before the quantizer, so it also serves where no normalisation could take it (post-norm transformers, GELU).
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportAttributeAccessIssue=false, reportOptionalSubscript=false, reportOptionalMemberAccess=false

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional

from ..network.network import Network
from ..network.rewrite import add_constant, aten, constant, insert_after, set_constant
from ..network.statistics import walk
from ..numerics import grids
from ..numerics.grids import SYMMETRIC_INT8, UINT8
from .insertion import extremes
from .placement import Placement
from .ranges import fake

STRENGTHS = (0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
# Inputs of a layer that its error is judged on.
ROWS = 1024
# The multiplication costs time: it must take off at least this part of the layer's squared error.
WORTH = 0.6


def smooth(network: Network, placement: Placement, fit: Sequence[list[Tensor]], held: Sequence[list[Tensor]]) -> int:
    """Smooth the inputs of linear layers where that lowers their output error on held-back data, in place; the function stays.

    Returns how many inputs were smoothed. Layers that share an input share its factor.
    """
    groups = _groups(network, placement)
    peaks = _channel_extremes(network, list(groups), fit)
    rows = _sample_rows(network, list(groups), held)
    smoothed = 0
    for source, layers in groups.items():
        options = _factors(network, layers, peaks[source])
        errors = _errors(network, layers, options, peaks[source], rows.pop(source))
        best = int(errors.argmin())
        if best and float(errors[best]) < (1 - WORTH) * float(errors[0]):
            _apply(network, source, layers, options[best])
            smoothed += 1
    network.recompile()
    return smoothed


def _groups(network: Network, placement: Placement) -> dict[fx.Node, list[fx.Node]]:
    """Inputs read (for their quantized form) by linear layers alone, each with a weight of its own."""
    found = {}
    for point in placement.activations:
        layers = list(point.readers or ())
        alone = all(layer.target is aten.linear.default and layer.args[0] is point.node and len(layer.args[1].users) == 1 for layer in layers)
        if layers and alone:
            found[point.node] = layers
    return found


def _channel_extremes(network: Network, nodes: list[fx.Node], pieces: Sequence[list[Tensor]]) -> dict[fx.Node, tuple[Tensor, Tensor]]:
    """Per channel (the last dimension) the lowest and highest value over the data."""
    found: dict[fx.Node, tuple[Tensor, Tensor]] = {}

    def recorder(node: fx.Node) -> Any:
        def record(args: tuple[Any, ...], value: Tensor) -> None:
            low, high = torch.aminmax(value.reshape(-1, value.shape[-1]), dim=0)
            if node in found:
                low, high = torch.minimum(low, found[node][0]), torch.maximum(high, found[node][1])
            found[node] = low, high

        return record

    for leaves in pieces:
        walk(network, leaves, {node: recorder(node) for node in nodes})
    return found


def _factors(network: Network, layers: list[fx.Node], peaks: tuple[Tensor, Tensor]) -> list[Tensor]:
    """Candidate factors [channels]; the first is no smoothing."""
    activation = torch.maximum(peaks[0].abs(), peaks[1].abs())
    weight = torch.stack([extremes(constant(network, layer.args[1]).detach(), 1) for layer in layers]).amax(0)
    usable = (activation > 0) & (weight > 0)
    found = [torch.ones_like(activation)]
    for strength in STRENGTHS:
        factor = torch.where(usable, activation.clamp(min=1e-8) ** strength / weight.clamp(min=1e-8) ** (1 - strength), 1.0)
        # Only the spread between channels matters: keep the factors around one.
        found.append(torch.where(usable, factor / factor[usable].log().mean().exp(), 1.0) if bool(usable.any()) else factor)
    return found


def _sample_rows(network: Network, nodes: list[fx.Node], pieces: Sequence[list[Tensor]]) -> dict[fx.Node, Tensor]:
    """About ROWS inputs of every layer, evenly over the data: [rows, channels]."""
    share = max(1, ROWS // max(1, len(pieces)))
    found: dict[fx.Node, list[Tensor]] = {node: [] for node in nodes}

    def recorder(node: fx.Node) -> Any:
        def record(args: tuple[Any, ...], value: Tensor) -> None:
            rows = value.reshape(-1, value.shape[-1])
            found[node].append(rows[:: max(1, rows.shape[0] // share)].clone())

        return record

    for leaves in pieces:
        walk(network, leaves, {node: recorder(node) for node in nodes})
    return {node: torch.cat(rows) for node, rows in found.items()}


def _errors(network: Network, layers: list[fx.Node], options: list[Tensor], peaks: tuple[Tensor, Tensor], rows: Tensor) -> Tensor:
    """The squared output error of the quantized layers, relative, under each candidate factor: [factors]."""
    errors = torch.zeros(len(options))
    for layer in layers:
        weight = constant(network, layer.args[1]).detach()
        exact = functional.linear(rows, weight)
        for number, factor in enumerate(options):
            bounds = float((peaks[0] / factor).min().clamp(max=0)), float((peaks[1] / factor).max().clamp(min=0))
            got = functional.linear(fake(rows / factor, bounds, UINT8), _rounded(weight * factor))
            errors[number] += float((got - exact).square().sum() / exact.square().sum().clamp(min=1e-30))
    return errors


def _rounded(weight: Tensor) -> Tensor:
    scale, zero_point = grids.symmetric(extremes(weight, 0), SYMMETRIC_INT8)
    return grids.values(grids.codes(weight, scale, zero_point, 0, SYMMETRIC_INT8), scale, zero_point, 0)


def _apply(network: Network, source: fx.Node, layers: list[fx.Node], factor: Tensor) -> None:
    inverse = add_constant(network, f"{source.name}_smoothing", 1 / factor, layers[0])
    insert_after(network, source, aten.mul.Tensor, (inverse,), layers)
    for layer in layers:
        set_constant(network, layer.args[1], constant(network, layer.args[1]).detach() * factor)

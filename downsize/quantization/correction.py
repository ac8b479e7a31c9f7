"""Bias correction: give every quantized layer back the mean output that quantization took from it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from ..network.lower import finer
from ..network.network import Network
from ..network.rewrite import argument, constant, set_bias
from ..network.statistics import walk
from ..numerics.grids import INT8, UINT8
from .insertion import FAKE, grid_of, settle
from .placement import WEIGHT_LAYERS, is_transparent

FIRST_ROUND = 16


def correct_biases(reference: Network, quantized: Network, data: Sequence[list[Tensor]]) -> None:
    """Shift the biases of ``quantized`` so that every layer's mean output, per channel, is the reference's (Nagel et al. 2019, arXiv 1906.04721).

    The empirical form, in the network as it runs: while samples pass through, each layer's running mean error is taken off at once, so
    that the layers behind it see corrected inputs. A first round over a few pieces brings all layers near; the means of the second decide.
    Layers are matched by node name; those whose output has no channel mean (nothing to average), or whose bias is computed, are left.
    """
    running = settle(quantized)
    names = {node.name: node for node in running.graph.nodes if _has_own_bias(running, node)}
    references = {node.name: node for node in reference.graph.nodes if node.name in names}
    means = _reference_means(reference, list(references.values()), data)
    corrections: dict[str, Tensor] = {}
    for count in (min(FIRST_ROUND, len(data)), len(data)):
        sums = {name: torch.zeros(1) for name in references}
        for number in range(count):
            leaves = data[number]
            hooks = {names[name]: _shift(names[name], sums, corrections, means[name][number], number) for name in references}
            walk(running, leaves, hooks)
    twins = {node.name: node for node in quantized.graph.nodes}
    for name, correction in corrections.items():
        node = twins[name]
        position = WEIGHT_LAYERS[node.target][2]
        assert position is not None
        bias = constant(quantized, argument(node, position, "bias"))
        set_bias(quantized, node, correction if bias is None else bias.detach() + correction, position)
    quantized.recompile()


def _has_own_bias(network: Network, node: fx.Node) -> bool:
    """Whether a node is a layer whose bias can be set: it has a constant one, or none."""
    position = WEIGHT_LAYERS[node.target][2] if node.target in WEIGHT_LAYERS else None
    if position is None:
        return False
    bias = argument(node, position, "bias")
    return bias is None or constant(network, bias) is not None


def round_biases(network: Network) -> None:
    """Give layers whose inputs have fewer than 8 bits, in place, the biases that integer kernels have: whole multiples of input step x weight step
    (as ``network/lower.py`` writes them), which with so few bits is no small step."""
    for layer in [node for node in network.graph.nodes if node.target in WEIGHT_LAYERS and WEIGHT_LAYERS[node.target][2] is not None]:
        at_source, at_weight, at_bias, _ = WEIGHT_LAYERS[layer.target]
        assert at_bias is not None
        source, weight, bias = layer.args[at_source], layer.args[at_weight], constant(network, argument(layer, at_bias, "bias"))
        while isinstance(source, fx.Node) and is_transparent(source):
            source = source.args[0]
        if bias is None or not all(isinstance(node, fx.Node) and node.target is FAKE for node in (source, weight)):
            continue
        scales = [constant(network, node.args[1]) for node in (source, weight)]  # type: ignore[union-attr]
        if grid_of(source) not in (UINT8, INT8) and None not in scales and bias.dim() == 1:  # type: ignore[arg-type]
            step = (scales[0].double() * scales[1].double() / finer(grid_of(weight))).expand(bias.shape)  # type: ignore[union-attr, arg-type]
            set_bias(network, layer, ((bias.detach().double() / step).round() * step).to(bias.dtype), at_bias)
    network.recompile()


def channel_means(node: fx.Node, value: Tensor) -> Tensor:
    """The mean of a layer's output over everything but its channels: [channels]."""
    axis = channel_axis(node, value)
    return value.transpose(0, axis).flatten(1).mean(1)


def channel_axis(node: fx.Node, value: Tensor) -> int:
    """The dimension of a layer's output that its bias runs along."""
    return 1 if str(node.target).startswith("aten.conv") and value.dim() > 2 else value.dim() - 1


def _reference_means(reference: Network, nodes: list[fx.Node], pieces: Sequence[list[Tensor]]) -> dict[str, list[Tensor]]:
    means: dict[str, list[Tensor]] = {node.name: [] for node in nodes}

    def recorder(node: fx.Node) -> Any:
        return lambda args, value: means[node.name].append(channel_means(node, value))

    for leaves in pieces:
        walk(reference, leaves, {node: recorder(node) for node in nodes})
    return means


def _shift(node: fx.Node, sums: dict[str, Tensor], corrections: dict[str, Tensor], wanted: Tensor, number: int) -> Any:
    """A hook that updates the layer's running correction with this piece and applies it to the piece."""
    name = node.name

    def apply(args: tuple[Any, ...], value: Tensor) -> Tensor:
        sums[name] = sums[name] + (wanted - channel_means(node, value))
        corrections[name] = sums[name] / (number + 1)
        shape = [1] * value.dim()
        shape[channel_axis(node, value)] = -1
        return value + corrections[name].reshape(shape)

    return apply

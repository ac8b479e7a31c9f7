"""Cross-layer equalization: even out the channel ranges of two layers in a row, without changing what they compute."""

from __future__ import annotations

import torch
from torch import Tensor, fx

from ..network.network import Network
from ..network.rewrite import CONVOLUTIONS, argument, aten, constant, only_user, set_bias, set_constant
from .insertion import extremes

# Functions with f(s * x) = s * f(x) for every s > 0.
HOMOGENEOUS = {aten.relu.default, aten.leaky_relu.default, aten.dropout.default}
# The same of each channel of a convolution; behind a linear layer they would mix features.
POOLS = {aten.max_pool2d.default}
ROUNDS = 10


def equalize(network: Network) -> int:
    """Scale every pair layer -> (ReLU) -> layer so that each channel has the same range on both sides, in place (Nagel et al. 2019,
    arXiv 1906.04721, section 4.1). Returns the number of pairs; 0 leaves the network untouched.
    """
    pairs = [(layer, reader) for layer in network.graph.nodes if (reader := _reader(network, layer)) is not None]
    for _ in range(ROUNDS if pairs else 0):
        if max(_balance(network, first, second) for first, second in pairs) < 1.01:
            break
    if pairs:
        network.recompile()
    return len(pairs)


def _reader(network: Network, layer: fx.Node) -> fx.Node | None:
    """The layer that alone reads this one as its input, through functions that a positive factor a channel passes through."""
    if not _is_layer(network, layer):
        return None
    convolution = layer.target in CONVOLUTIONS
    passed = HOMOGENEOUS | POOLS if convolution else HOMOGENEOUS
    before, node = layer, only_user(layer)
    while node is not None and node.target in passed and node.args[0] is before:
        before, node = node, only_user(node)
    if node is None or not _is_layer(network, node) or (node.target in CONVOLUTIONS) != convolution or node.args[0] is not before:
        return None
    return node


def _is_layer(network: Network, node: fx.Node) -> bool:
    """Whether the node is a layer with a weight of its own, and a bias that can be scaled with it."""
    if node.target not in CONVOLUTIONS and node.target is not aten.linear.default:
        return False
    weight, bias = node.args[1], argument(node, 2, "bias")
    known = constant(network, weight) is not None and (bias is None or constant(network, bias) is not None)
    return known and only_user(weight) is node  # type: ignore[arg-type]


def _balance(network: Network, first: fx.Node, second: fx.Node) -> float:
    """One step for one pair; returns the largest factor that was applied."""
    one, two = constant(network, first.args[1]), constant(network, second.args[1])
    assert one is not None and two is not None
    groups = int(argument(second, 6, "groups", 1)) if second.target in CONVOLUTIONS else 1  # type: ignore[call-overload]
    out_range, in_range = extremes(one.detach(), 0), _input_extremes(two.detach(), groups)
    factor = torch.where((out_range > 0) & (in_range > 0), (out_range / in_range.clamp(min=1e-12)).sqrt(), 1.0)
    with torch.no_grad():
        set_constant(network, first.args[1], one / _rows(factor, one.dim()))  # type: ignore[arg-type]
        bias = constant(network, argument(first, 2, "bias"))
        if bias is not None:
            set_bias(network, first, bias.detach() / factor)
        set_constant(network, second.args[1], _scale_inputs(two, factor, groups))  # type: ignore[arg-type]
    return float(torch.maximum(factor, 1 / factor).max())


def _rows(factor: Tensor, dims: int) -> Tensor:
    return factor.reshape(-1, *[1] * (dims - 1))


def _input_extremes(weight: Tensor, groups: int) -> Tensor:
    """The largest magnitude that each input channel meets: [inputs]."""
    grouped = weight.reshape(groups, weight.shape[0] // groups, weight.shape[1], -1)
    return grouped.abs().amax(dim=(1, 3)).reshape(-1)


def _scale_inputs(weight: Tensor, factor: Tensor, groups: int) -> Tensor:
    grouped = weight.reshape(groups, weight.shape[0] // groups, weight.shape[1], -1)
    return (grouped * factor.reshape(groups, 1, -1, 1)).reshape(weight.shape)

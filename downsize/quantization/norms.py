"""Batch norms behind layers with learned quantizers: brought back for the first part of a training, and folded again, without moving a code.

A quantized weight ``W`` behind which a batch norm multiplies each output channel by ``f > 0`` is, folded, the weight ``f W`` on a grid with
steps ``f`` times as large: the same codes (Krishnamoorthi 2018, arXiv 1806.08342, section 3.2.2).
"""

# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false, reportOptionalMemberAccess=false
# pyright: reportOperatorIssue=false
# (torch.fx types every argument as a union of everything)

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, fx, nn

from ..network.network import Network
from ..network.rewrite import CONVOLUTIONS, add_constant, argument, aten, constant, insert_after, set_bias, set_constant
from ..numerics.grids import per_axis
from ..numerics.lowbit import SETTLED

# Where a factor is less than this part of the largest, dividing by it would lose the weight.
SMALLEST_FACTOR = 1e-6
SETTINGS = ((6, "momentum", 0.1), (7, "eps", 1e-5), (8, "cudnn_enabled", True))


def unfold(network: Network, original: Network) -> list[str]:
    """Put back, in place, the batch norms that were folded into layers with learned weights; the function stays.

    Their gains are positive: the sign of a negative one moves into the weight and the mean. A layer whose weight others read too, or is not one
    step a row, keeps its norm folded.

    Args:
        network: the learnable network.
        original: the network before its batch norms were folded, with the same names.

    Returns: the names of the norms' nodes.
    """
    twins = {node.name: node for node in network.graph.nodes}
    made = []
    for norm in [node for node in original.graph.nodes if node.target is aten.batch_norm.default and node.name not in twins]:
        layer = twins.get(norm.args[0].name)
        if layer is not None and _has_learned_rows(layer) and (factor := _factor(original, norm)) is not None and _is_sound(factor):
            made.append(_unfold(network, layer, original, norm, factor))
    network.recompile()
    return made


def _has_learned_rows(layer: fx.Node) -> bool:
    """Whether a layer reads a learned weight with a step for each of its outputs, and alone."""
    if layer.target not in CONVOLUTIONS | {aten.linear.default}:
        return False
    node = layer.args[1]
    return node.target in SETTLED and _axis(node) == 0 and len(node.users) == len(node.args[0].users) == 1


def _axis(node: fx.Node) -> object:
    return next(value for value in node.args if not isinstance(value, fx.Node))


def _factor(network: Network, norm: fx.Node) -> Tensor | None:
    """What a norm multiplies each channel by, float64; None where its tensors are no constants."""
    gain, variance = constant(network, argument(norm, 1, "weight")), constant(network, argument(norm, 4, "var"))
    if variance is None:
        return None
    factor = torch.rsqrt(variance.detach().double() + float(argument(norm, 7, "eps", 1e-5)))
    return factor if gain is None else factor * gain.detach().double()


def _is_sound(factor: Tensor) -> bool:
    return float(factor.abs().min()) > SMALLEST_FACTOR * float(factor.abs().max())


def _unfold(network: Network, layer: fx.Node, original: Network, norm: fx.Node, factor: Tensor) -> str:
    gain, mean, variance = (constant(original, argument(norm, at, name)) for at, name in ((1, "weight"), (3, "mean"), (4, "var")))
    before = constant(original, argument(norm.args[0], 2, "bias"))
    centre = mean.detach().double() - (0.0 if before is None else before.detach().double())
    centre = centre * factor.sign()
    _rescale(network, layer.args[1], 1 / factor.abs())
    bias = constant(network, argument(layer, 2, "bias"))
    shift = (0.0 if bias is None else bias.detach().double()) + centre * factor.abs()
    layer.args = (*layer.args[:2], None, *layer.args[3:])
    layer.kwargs = {key: value for key, value in layer.kwargs.items() if key != "bias"}
    parts = {
        "gain": nn.Parameter(torch.ones_like(variance) if gain is None else gain.detach().abs().clone(), gain is not None),
        "shift": nn.Parameter(shift.to(variance.dtype)),
        "mean": centre.to(variance.dtype),
        "variance": variance.detach().clone(),
    }
    constants = [add_constant(network, f"{norm.name}_{what}", tensor, layer) for what, tensor in parts.items()]
    made = insert_after(network, layer, aten.batch_norm.default, (*constants, False, *(argument(norm, at, *rest) for at, *rest in SETTINGS)))
    return made.name


def fold(network: Network, names: Sequence[str]) -> None:
    """Fold these batch norms into the layers before them, in place: weights and steps are multiplied, codes stay."""
    for norm in [node for node in network.graph.nodes if node.name in names]:
        layer, factor = norm.args[0], _factor(network, norm)
        shift, mean = (constant(network, norm.args[at]).detach() for at in (2, 3))
        _rescale(network, layer.args[1], factor)
        set_bias(network, layer, (shift.double() - mean.double() * factor).to(shift.dtype))
        norm.replace_all_uses_with(layer)
        network.graph.erase_node(norm)
    network.recompile()


def _rescale(network: Network, learned: fx.Node, factor: Tensor) -> None:
    """Multiply the rows of a learned weight, and its steps, by positive factors [outputs]."""
    weight, *rest = learned.args
    tensor = network.tensor(str(weight.target)).detach()
    set_constant(network, weight, (tensor.double() * per_axis(factor, 0, tensor.dim())).to(tensor.dtype))
    start = constant(network, rest[0])
    if start is not None:
        set_constant(network, rest[0], (start.double() * factor).to(start.dtype))

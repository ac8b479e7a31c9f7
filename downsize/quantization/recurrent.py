"""Recurrent layers whose inputs and states are quantized by their own ranges at run time."""

# pyright: reportArgumentType=false, reportCallIssue=false, reportOptionalIterable=false, reportGeneralTypeIssues=false
# pyright: reportAttributeAccessIssue=false, reportOptionalMemberAccess=false, reportIndexIssue=false, reportReturnType=false
# pyright: reportOptionalSubscript=false, reportOperatorIssue=false
# (torch.fx types every argument as a union of everything)

from __future__ import annotations

import torch
from torch import fx

from ..network.network import Network
from ..network.rewrite import aten, constant
from ..numerics import recurrent as recurrent  # registers the operator
from .placement import Placement

DYNAMIC = torch.ops.downsize.dynamic_lstm.default


def compute_dynamically(network: Network, placement: Placement) -> None:
    """Let every LSTM whose matrices are all quantized take its inputs and states in 8 bits, in place.

    What is left, GRU and plain recurrent layers too, has quantized weights alone; ``origin["weights_alone"]`` names these layers.
    """
    found = dynamic_layers(network, placement)
    for node in found:
        node.target = DYNAMIC
    alone = [str(node.meta.get("module") or node.name) for node in placement.recurrent if node not in found]
    network.origin |= {"weights_alone": alone} if alone else {}


def dynamic_layers(network: Network, placement: Placement) -> list[fx.Node]:
    """The LSTM layers in evaluation whose matrices are all to be quantized, but are not yet."""
    quantized = {point.node for point in placement.weights}
    return [node for node in placement.recurrent if _is_plain_lstm(network, node) and set(matrices(network, node)) <= quantized]


def matrices(network: Network, node: fx.Node) -> list[fx.Node]:
    """The weights of a recurrent layer for its input and its state, of every layer and direction."""
    return [one for one in node.args[2] if constant(network, one).dim() == 2]


def _is_plain_lstm(network: Network, node: fx.Node) -> bool:
    """Whether it is an LSTM in evaluation, its parameters constants, without projections."""
    if node.target is not aten.lstm.input or node.args[6] or any(constant(network, one) is None for one in node.args[2]):
        return False
    return len(node.args[2]) == (4 if node.args[3] else 2) * node.args[4] * (2 if node.args[7] else 1)

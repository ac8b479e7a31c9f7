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
    quantized = {point.node for point in placement.weights}
    alone = []
    for node in placement.recurrent:
        if _is_plain_lstm(network, node) and {one for one in node.args[2] if constant(network, one).dim() == 2} <= quantized:
            node.target = DYNAMIC
        else:
            alone.append(str(node.meta.get("module") or node.name))
    network.origin |= {"weights_alone": alone} if alone else {}


def _is_plain_lstm(network: Network, node: fx.Node) -> bool:
    """Whether it is an LSTM in evaluation, its parameters constants, without projections."""
    if node.target is not aten.lstm.input or node.args[6] or any(constant(network, one) is None for one in node.args[2]):
        return False
    return len(node.args[2]) == (4 if node.args[3] else 2) * node.args[4] * (2 if node.args[7] else 1)

"""Weights rounded to 16 bits become constants of 16 bits, which runtimes widen once, when they load the file."""

# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false, reportOptionalMemberAccess=false

from __future__ import annotations

import torch
from torch import Tensor, fx

from ..numerics import halves as halves
from .lower_groups import insert_call
from .network import Network
from .rewrite import add_constant, constant

ours = torch.ops.downsize
ROUND = ours.round_to.default
# As OpenVINO spells them.
PRECISIONS = {torch.float16: "f16", torch.bfloat16: "bf16"}


@torch.library.custom_op("downsize::widen", mutates_args=())
def widen(x: Tensor) -> Tensor:
    """``x`` in float32."""
    return x.to(torch.float32, copy=True)


@widen.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x, dtype=torch.float32)


def lower_halves(network: Network) -> str:
    """Put 16-bit constants in the place of rounded weights, in place, and take the rounding of activations out.

    Returns: "f16" or "bf16", in which the file is to be computed where a runtime can (activations were rounded); else "".
    """
    precision = without_rounding(network)
    stored: dict[tuple[str, torch.dtype], str] = {}
    for node in _roundings(network):
        weight, dtype = constant(network, node.args[0]), node.args[1]
        key = str(node.args[0].target), dtype
        if key in stored:
            with network.graph.inserting_before(node):
                made = network.graph.get_attr(stored[key])
        else:
            made = add_constant(network, f"{key[0]}_{PRECISIONS[dtype]}", weight.detach().to(dtype), node)
            stored[key] = str(made.target)
        node.replace_all_uses_with(insert_call(network, node, ours.widen.default, (made,)))
        network.graph.erase_node(node)
    network.recompile()
    return precision


def without_rounding(network: Network) -> str:
    """Take the rounding of activations out, in place: what a runtime computes that stays in float32. Returns what was there, as above."""
    found = [node for node in _roundings(network) if constant(network, node.args[0]) is None]
    for node in found:
        node.replace_all_uses_with(node.args[0])
        network.graph.erase_node(node)
    network.recompile()
    return PRECISIONS[found[0].args[1]] if found else ""


def _roundings(network: Network) -> list[fx.Node]:
    return [node for node in network.graph.nodes if node.target is ROUND]

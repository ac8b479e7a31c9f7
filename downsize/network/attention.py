"""Attention in the plain operators that a model file is made of."""

# pyright: reportArgumentType=false, reportCallIssue=false, reportOptionalIterable=false, reportGeneralTypeIssues=false
# pyright: reportAttributeAccessIssue=false, reportOptionalMemberAccess=false, reportIndexIssue=false, reportReturnType=false
# (torch.fx types every argument as a union of everything)

from __future__ import annotations

import math

import torch
from torch import fx

from .dry import dry_walk
from .lower import insert_call
from .network import Network
from .rewrite import argument, aten

ATTENTION = aten.scaled_dot_product_attention.default


def spell_attention(network: Network) -> None:
    """Write every attention as softmax(q k^T / sqrt(d) + mask) v, in place (Vaswani et al. 2017, arXiv 1706.03762).

    A row that the mask leaves nothing to read gives zeros, as torch does. The exporter's own spelling takes 4-D tensors only, gives
    other results for such rows, and lies otherwise in memory than the code behind it was captured with.
    """
    found = [node for node in network.graph.nodes if node.target is ATTENTION and not argument(node, 4, "dropout_p", 0.0)]
    facts = _facts(network, found)
    for node in found:
        node.replace_all_uses_with(_spelled(network, node, facts))
        network.graph.erase_node(node)
    if found:
        network.recompile()


def _facts(network: Network, found: list[fx.Node]) -> dict[fx.Node, list[torch.Tensor]]:
    """The arguments of each attention, as tensors without data."""
    facts: dict[fx.Node, list[torch.Tensor]] = {}
    if found:
        dry_walk(network, {node: lambda args, value, node=node: facts.__setitem__(node, list(args)) for node in found})
    return facts


def _spelled(network: Network, node: fx.Node, facts: dict[fx.Node, list[torch.Tensor]]) -> fx.Node:
    def call(target: object, *args: object) -> fx.Node:
        return insert_call(network, node, target, args)

    query, key, value = node.args[:3]
    mask, scale = argument(node, 3, "attn_mask"), argument(node, 6, "scale")
    q, k = facts[node][:2]
    if argument(node, 7, "enable_gqa", False) and q.shape[-3] != k.shape[-3]:
        key, value = (call(aten.repeat_interleave.self_int, part, q.shape[-3] // k.shape[-3], q.dim() - 3) for part in (key, value))
    scaled = call(aten.mul.Tensor, query, 1 / math.sqrt(q.shape[-1]) if scale is None else scale)
    scores = call(aten.matmul.default, scaled, call(aten.transpose.int, key, -2, -1))
    if argument(node, 5, "is_causal", False):
        mask = _causal(network, node, query, key)
    if mask is not None:
        given = facts[node][3] if argument(node, 3, "attn_mask") is not None else None
        if given is None or given.dtype is torch.bool:
            mask = call(aten.where.Scalar, mask, 0.0, float("-inf"))
        scores = call(aten.add.Tensor, scores, mask)
    weights = call(aten.softmax.int, scores, -1)
    if mask is not None and not argument(node, 5, "is_causal", False):
        weights = call(aten.masked_fill.Scalar, weights, call(aten.isnan.default, weights), 0.0)
    return call(aten.matmul.default, weights, value)


def _causal(network: Network, node: fx.Node, query: fx.Node, key: fx.Node) -> fx.Node:
    """Which keys each query may read: those at its own position and before, [queries, keys]."""
    rows, columns = (
        insert_call(network, node, aten.arange.default, (insert_call(network, node, aten.sym_size.int, (part, -2)),)) for part in (query, key)
    )
    return insert_call(network, node, aten.le.Tensor, (columns, insert_call(network, node, aten.unsqueeze.default, (rows, 1))))

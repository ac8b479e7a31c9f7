"""Columns of weights that large inputs meet, scaled up before they are rounded, and the inputs scaled down (Lin et al. 2023, AWQ, arXiv
2306.00978)."""

# pyright: reportArgumentType=false, reportCallIssue=false, reportAttributeAccessIssue=false, reportOptionalMemberAccess=false
# pyright: reportReturnType=false

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from ..network.network import Network
from ..network.padding import padding_port
from ..network.rewrite import add_constant, argument, aten, constant, insert_after, set_constant
from ..network.statistics import walk
from ..numerics.awq import awq_scales
from ..numerics.hessian import output_error
from .formats import Format
from .grouped import nearest, steps_of

# Wider inputs are left: their products with one another would not fit.
LARGEST_COLUMNS = 8192
# A multiplication in the graph must take off at least this part of the layers' squared error; where a norm takes the factor, any part will do.
WORTH = 0.1


@dataclass
class _Seen:
    """Of the inputs of layers: sums of ``x x^T`` [columns, columns] and of ``|x|`` [columns], double precision."""

    gram: Tensor
    magnitude: Tensor
    count: int = 0


def protect(network: Network, formats: Mapping[str, Format], pieces: Sequence[list[Tensor]]) -> int:
    """Give the inputs of linear layers a factor a channel, in place, where rounding their weights to nearest then errs less; the function stays.

    A layer norm that nothing else reads takes the factor, else it is a multiplication in the graph. Layers that read the same value share it.

    Args:
        formats: of the weights that will be rounded. Returns: how many inputs got a factor.
    """
    groups = _groups(network, formats)
    seen = _seen(network, list(groups), pieces)
    protected = 0
    for source, layers in groups.items():
        weights = [constant(network, layer.args[1]).detach() for layer in layers]
        wanted = formats[str(layers[0].args[1].target)]
        found = seen[source]
        scale = awq_scales(
            torch.cat(weights), found.gram, found.magnitude / max(1, found.count), lambda matrix, wanted=wanted: _rounded(matrix, wanted)
        )
        before, after = (_error(weights, wanted, found.gram, factor) for factor in (torch.ones_like(scale), scale))
        norm = _norm(network, source, layers)
        if after < (1 - (0.0 if norm else WORTH)) * before:
            _apply(network, source, layers, scale, norm)
            protected += 1
    network.recompile()
    return protected


def _groups(network: Network, formats: Mapping[str, Format]) -> dict[fx.Node, list[fx.Node]]:
    """By input the linear layers that read it, each with a weight of its own to be rounded, all in one format."""
    groups: dict[fx.Node, list[fx.Node]] = {}
    for node in network.graph.nodes:
        weight = node.args[1] if node.target is aten.linear.default else None
        known = isinstance(weight, fx.Node) and weight.op == "get_attr" and str(weight.target) in formats and str(weight.target) not in network.sparse
        if known and len(weight.users) == 1 and constant(network, weight).shape[1] <= LARGEST_COLUMNS and isinstance(node.args[0], fx.Node):
            groups.setdefault(node.args[0], []).append(node)
    return {source: layers for source, layers in groups.items() if len({formats[str(layer.args[1].target)] for layer in layers}) == 1}


def _seen(network: Network, sources: Sequence[fx.Node], pieces: Sequence[list[Tensor]]) -> dict[fx.Node, _Seen]:
    found: dict[fx.Node, _Seen] = {}
    port = padding_port(network, pieces)

    def recorder(node: fx.Node, mask: Tensor | None) -> Any:
        def record(args: tuple[Any, ...], value: Tensor) -> None:
            rows = value[mask] if mask is not None and value.shape[:2] == mask.shape and value.dim() == 3 else value.reshape(-1, value.shape[-1])
            gram, size = (rows.mT @ rows).double(), rows.abs().double().sum(0)
            one = found.setdefault(node, _Seen(torch.zeros_like(gram), torch.zeros_like(size)))
            one.gram, one.magnitude, one.count = one.gram + gram, one.magnitude + size, one.count + len(rows)

        return record

    for leaves in pieces:
        mask = leaves[port].bool() if port is not None else None
        walk(network, leaves, {node: recorder(node, mask) for node in sources})
    return found


def _rounded(matrix: Tensor, wanted: Format) -> Tensor:
    return nearest(matrix, wanted, steps_of(matrix, wanted))


def _error(weights: Sequence[Tensor], wanted: Format, gram: Tensor, scale: Tensor) -> float:
    return sum(float(output_error(_rounded(weight * scale, wanted) / scale - weight, gram).sum()) for weight in weights)


def _norm(network: Network, source: fx.Node, layers: Sequence[fx.Node]) -> tuple[fx.Node, fx.Node] | None:
    """The gain and shift of a layer norm that gives the input to these layers alone, and has them for itself."""
    if source.target is not aten.layer_norm.default or set(source.users) != set(layers):
        return None
    gain, shift = argument(source, 2, "weight"), argument(source, 3, "bias")
    readings = [str(node.target) for node in network.graph.nodes if node.op == "get_attr"]
    own = [
        isinstance(one, fx.Node) and constant(network, one) is not None and len(one.users) == readings.count(str(one.target)) == 1
        for one in (gain, shift)
    ]
    return (gain, shift) if all(own) and constant(network, gain).dim() == 1 else None


def _apply(network: Network, source: fx.Node, layers: Sequence[fx.Node], scale: Tensor, norm: tuple[fx.Node, fx.Node] | None) -> None:
    if norm is not None:
        for one in norm:
            set_constant(network, one, constant(network, one).detach() / scale)
    else:
        inverse = add_constant(network, f"{source.name}_protection", 1 / scale, layers[0])
        insert_after(network, source, aten.mul.Tensor, (inverse,), list(layers))
    for layer in layers:
        set_constant(network, layer.args[1], constant(network, layer.args[1]).detach() * scale)

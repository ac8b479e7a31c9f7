"""Constants that are computed from constants, computed once: weight norm, spectral norm and other parametrizations become plain weights."""

# pyright: reportArgumentType=false, reportCallIssue=false, reportAttributeAccessIssue=false

from __future__ import annotations

import torch
from torch import Tensor, fx

from .memory import may_alias, writes
from .network import Network
from .rewrite import add_constant

RANDOM = ("rand", "randn", "dropout", "bernoulli", "normal", "uniform")


def fold_constants(network: Network) -> int:
    """Replace every parameter that the graph computes from parameters alone by its value, in place. Returns how many.

    Only where the value is no larger than what it is made from, so that no file grows by it. What was trainable stays so.
    """
    folded = 0
    values: dict[fx.Node, Tensor] = {}
    with torch.no_grad():
        for node in network.graph.nodes:
            value = _value(network, node, values)
            if value is not None:
                values[node] = value
    for node in list(values):
        outside = [user for user in node.users if user not in values]
        if node.op == "get_attr" or not outside or may_alias(node):
            continue
        sources = _sources(node)
        if values[node].numel() <= sum(network.tensor(str(source.target)).numel() for source in sources):
            trainable = any(isinstance(network.tensor(str(source.target)), torch.nn.Parameter) for source in sources)
            value = torch.nn.Parameter(values[node]) if trainable else values[node]
            made = add_constant(network, _name(sources), value, node)
            node.replace_all_uses_with(made)
            folded += 1
    if folded:
        network.recompile()
    return folded


def _value(network: Network, node: fx.Node, values: dict[fx.Node, Tensor]) -> Tensor | None:
    """The value of a node that depends on parameters alone; None for others."""
    if node.op == "get_attr":
        tensor = network.tensor(str(node.target))
        return tensor.detach() if tensor.is_floating_point() and not any(writes(user) for user in node.users) else None
    known = node.op == "call_function" and node.all_input_nodes and all(source in values for source in node.all_input_nodes)
    if not known or writes(node) or any(word in str(node.target) for word in RANDOM):
        return None
    args, kwargs = fx.map_arg((node.args, node.kwargs), values.__getitem__)
    value = node.target(*args, **kwargs)
    return value if isinstance(value, Tensor) and value.is_floating_point() else None


def _sources(node: fx.Node) -> list[fx.Node]:
    """The constants that a node is computed from."""
    found: dict[fx.Node, None] = {}
    todo = [node]
    while todo:
        one = todo.pop()
        todo += one.all_input_nodes
        if one.op == "get_attr":
            found[one] = None
    return list(found)


def _name(sources: list[fx.Node]) -> str:
    """The largest common module path, and ``weight``: what a parametrization was put on."""
    path = str(sources[0].target).split(".parametrizations.")[0].rpartition(".")[0]
    return f"{path}.weight" if path else "weight"

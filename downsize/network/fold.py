"""Constants that are computed from constants, computed once: weight norm, spectral norm and other parametrizations become plain weights."""

# pyright: reportArgumentType=false, reportCallIssue=false, reportAttributeAccessIssue=false

from __future__ import annotations

import operator
from collections import Counter

import torch
from torch import Tensor, fx

from .memory import is_written, writes
from .network import Network
from .rewrite import add_constant, aten, only_user

SPLITS = (aten.split_with_sizes.default, aten.split.Tensor, aten.chunk.default, aten.unbind.int)
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
        if node.op == "get_attr" or not outside or is_written(node):
            continue
        sources = _sources(node)
        tensors = [network.tensor(str(source.target)) for source in sources]
        if not _is_view(values[node], tensors) and values[node].numel() <= sum(tensor.numel() for tensor in tensors):
            trainable = any(isinstance(tensor, torch.nn.Parameter) for tensor in tensors)
            value = torch.nn.Parameter(values[node]) if trainable else values[node]
            made = add_constant(network, _name(sources), value, node)
            node.replace_all_uses_with(made)
            folded += 1
    if folded:
        network.recompile()
    return folded


def part_constants(network: Network) -> int:
    """Replace every parameter that is read in parts alone (the projections of an attention whose queries come from elsewhere) by these parts, in
    place, named ``<name>_<number>``. Returns how many were parted.

    One that must keep zeros stays whole.
    """
    read = Counter(str(node.target) for node in network.graph.nodes if node.op == "get_attr")
    parted = 0
    for node in [node for node in network.graph.nodes if node.op == "get_attr"]:
        name, split = str(node.target), only_user(node)
        if split is None or split.target not in SPLITS or read[name] > 1 or name in network.sparse or is_written(node):
            continue
        readers = list(split.users)
        if any(reader.target is not operator.getitem or is_written(reader) for reader in readers):
            continue
        tensor = network.tensor(name)
        parts = split.target(tensor.detach(), *split.args[1:], **split.kwargs)
        for reader in readers:
            part = parts[reader.args[1]].clone()
            value = torch.nn.Parameter(part, tensor.requires_grad) if isinstance(tensor, torch.nn.Parameter) else part
            reader.replace_all_uses_with(add_constant(network, f"{name}_{reader.args[1]}", value, node))
        parted += 1
    if parted:
        network.recompile()
    return parted


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


def _is_view(value: Tensor, sources: list[Tensor]) -> bool:
    """Whether a value is no other numbers than one of the constants it is made from, only seen otherwise."""
    return any(value.untyped_storage().data_ptr() == source.untyped_storage().data_ptr() for source in sources)


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
    """What a parametrization was put on, where that can be told; else ``weight`` of the module that holds the first source."""
    module, parametrized, rest = str(sources[0].target).partition(".parametrizations.")
    if parametrized:
        return f"{module}.{rest.partition('.')[0]}"
    path = module.rpartition(".")[0]
    return f"{path}.weight" if path else "weight"

"""Edits of a Network's graph that keep what it computes, and the few verbs that all edits are made of."""

# pyright: reportArgumentType=false, reportCallIssue=false, reportOptionalIterable=false, reportGeneralTypeIssues=false
# pyright: reportAttributeAccessIssue=false, reportOptionalMemberAccess=false, reportIndexIssue=false, reportReturnType=false
# (torch.fx and onnxscript type every argument as a union of everything)

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, fx

from .network import Network
from .parts import assign

aten = torch.ops.aten
CONVOLUTIONS = {aten.conv1d.default, aten.conv2d.default, aten.conv3d.default}
TRANSPOSED = {aten.conv_transpose1d.default, aten.conv_transpose2d.input, aten.conv_transpose3d.input}
IDENTITIES = {
    aten.dropout.default,
    aten.feature_dropout.default,
    aten.alias.default,
    aten.detach.default,
    aten.lift_fresh_copy.default,
    aten.clone.default,
}


def argument(node: fx.Node, position: int, name: str, default: object = None) -> object:
    """The argument of an operator whether it was given by position, by name, or left to its default."""
    if len(node.args) > position:
        return node.args[position]
    return node.kwargs.get(name, default)


def constant(network: Network, node: object) -> Tensor | None:
    """The tensor behind a ``get_attr`` node; None for anything else."""
    return network.tensor(str(node.target)) if isinstance(node, fx.Node) and node.op == "get_attr" else None


def set_constant(network: Network, node: fx.Node, tensor: Tensor) -> None:
    """Replace the tensor that a ``get_attr`` node reads, under its own name; a parameter stays trainable."""
    old = network.tensor(str(node.target))
    if isinstance(old, torch.nn.Parameter):
        tensor = torch.nn.Parameter(tensor.detach(), requires_grad=old.requires_grad and tensor.is_floating_point())
    assign(network.graph_module, str(node.target), tensor)


def add_constant(network: Network, name: str, tensor: Tensor, before: fx.Node) -> fx.Node:
    """A new ``get_attr`` node before ``before`` that reads ``tensor``, stored under ``name`` or, if taken, the name with a number."""
    unique, number = name, 1
    while _taken(network, unique):
        number += 1
        unique = f"{name}_{number}"
    assign(network.graph_module, unique, tensor)
    with network.graph.inserting_before(before):
        node = network.graph.get_attr(unique)
    node.meta = {"module": before.meta.get("module", ""), "source": before.meta.get("source", "")}
    return node


def _taken(network: Network, name: str) -> bool:
    *path, leaf = name.split(".")
    module: torch.nn.Module = network.graph_module
    for part in path:
        if part not in module._modules:
            return hasattr(module, part)
        module = module.get_submodule(part)
    return hasattr(module, leaf)


def insert_after(network: Network, node: fx.Node, target: object, args: tuple[object, ...], users: Iterable[fx.Node] | None = None) -> fx.Node:
    """Insert ``target(node, *args)`` behind ``node`` and let ``users`` (default: all) read it instead."""
    readers = list(node.users if users is None else users)
    position = node
    for other in args:
        # The call must come behind everything it reads.
        if isinstance(other, fx.Node) and other > position:
            position = other
    with network.graph.inserting_after(position):
        made = network.graph.call_function(target, (node, *args))
    made.meta = {"module": node.meta.get("module", ""), "source": node.meta.get("source", "")}
    for user in readers:
        user.replace_input_with(node, made)
    return made


def only_user(node: fx.Node) -> fx.Node | None:
    """The single reader of a node, or None."""
    return next(iter(node.users)) if len(node.users) == 1 else None


def drop_identities(network: Network) -> None:
    """Remove dropout that is switched off, and other operators that hand their input on."""
    for node in list(network.graph.nodes):
        switched_on = node.target in (aten.dropout.default, aten.feature_dropout.default) and argument(node, 2, "train")
        if node.op == "call_function" and node.target in IDENTITIES and not switched_on and not _written(node):
            node.replace_all_uses_with(node.args[0])
            network.graph.erase_node(node)
    network.recompile()


def _written(node: fx.Node) -> bool:
    """Whether an in-place operator changes this node or its source: then a copy is not an identity."""
    readers = [*node.users, *(node.args[0].users if isinstance(node.args[0], fx.Node) else ())]
    return any(getattr(getattr(user.target, "_schema", None), "is_mutable", False) for user in readers)


def fold_batch_norm(network: Network) -> int:
    """Fold every batch norm in evaluation that directly follows a convolution or linear layer into its weight and bias. Returns how many."""
    folded = 0
    for node in list(network.graph.nodes):
        if node.target is not aten.batch_norm.default or argument(node, 5, "training"):
            continue
        producer = node.args[0]
        if isinstance(producer, fx.Node) and _foldable(network, producer, node):
            _fold(network, producer, node)
            folded += 1
    network.recompile()
    return folded


def _foldable(network: Network, producer: fx.Node, norm: fx.Node) -> bool:
    ungrouped = producer.target in TRANSPOSED and argument(producer, 6, "groups", 1) == 1
    known = producer.target in CONVOLUTIONS or producer.target is aten.linear.default or ungrouped
    constants = [constant(network, producer.args[1]) if known else None, constant(network, norm.args[3]), constant(network, norm.args[4])]
    # A batch norm behind a linear layer of 3-D input normalises dimension 1, not the features.
    if producer.target is aten.linear.default and only_user(producer) is norm:
        return all(c is not None for c in constants) and norm.meta.get("module", "") != "" and _is_matrix(producer)
    return only_user(producer) is norm and all(c is not None for c in constants)


def _is_matrix(producer: fx.Node) -> bool:
    """Whether a linear layer's input is known to be 2-D: it comes from a flatten, a view to two sizes, or another such layer."""
    source = producer.args[0]
    while isinstance(source, fx.Node) and source.target in (aten.relu.default, aten.batch_norm.default, aten.dropout.default, aten.linear.default):
        source = source.args[0]
    if not isinstance(source, fx.Node):
        return False
    if source.target is aten.flatten.using_ints:
        return source.args[1:] in ((1,), (1, -1))
    return source.target in (aten.view.default, aten.reshape.default) and len(source.args[1]) == 2


def _fold(network: Network, producer: fx.Node, norm: fx.Node) -> None:
    gain, shift, mean, variance = (constant(network, argument(norm, i, n)) for i, n in ((1, "weight"), (2, "bias"), (3, "mean"), (4, "var")))
    assert mean is not None and variance is not None
    factor = torch.rsqrt(variance.double() + float(argument(norm, 7, "eps", 1e-5)))
    factor = factor * gain.double() if gain is not None else factor
    weight, bias = producer.args[1], argument(producer, 2, "bias")
    assert isinstance(weight, fx.Node)
    old = network.tensor(str(weight.target))
    shape = [1] * old.dim()
    shape[1 if producer.target in TRANSPOSED else 0] = -1
    offset = constant(network, bias)
    offset = -mean.double() if offset is None else offset.double() - mean.double()
    offset = offset * factor + (shift.double() if shift is not None else 0.0)
    with torch.no_grad():
        new_weight, new_bias = (old.double() * factor.reshape(shape)).to(old.dtype), offset.to(old.dtype)
    _own_weight(network, producer, new_weight)
    set_bias(network, producer, new_bias)
    norm.replace_all_uses_with(producer)
    network.graph.erase_node(norm)


def _own_weight(network: Network, layer: fx.Node, tensor: Tensor) -> None:
    """Give ``layer`` the weight ``tensor``; a weight that others read too stays theirs."""
    node = layer.args[1]
    assert isinstance(node, fx.Node)
    if len(node.users) == 1 and [n.target for n in network.graph.nodes if n.op == "get_attr"].count(node.target) == 1:
        set_constant(network, node, tensor)
    else:
        layer.update_arg(1, add_constant(network, f"{node.target}_of_{layer.name}", torch.nn.Parameter(tensor), layer))


def set_bias(network: Network, layer: fx.Node, tensor: Tensor, position: int = 2) -> None:
    """Give a layer the bias ``tensor`` [outputs], whether it had one or not; ``position`` is the bias among its arguments."""
    node = argument(layer, position, "bias")
    shared = isinstance(node, fx.Node) and len(node.users) > 1
    if isinstance(node, fx.Node) and not shared:
        set_constant(network, node, tensor)
        return
    weight = layer.args[1]
    while isinstance(weight, fx.Node) and weight.op != "get_attr":
        weight = weight.args[0]
    name = str(weight.target) if isinstance(weight, fx.Node) else layer.name
    name = f"{name.removesuffix('.weight')}.bias" if name.endswith(".weight") else f"{name}_bias"
    made = add_constant(network, f"{name}_of_{layer.name}" if shared else name, torch.nn.Parameter(tensor.detach()), layer)
    args = list(layer.args) + [None] * (position + 1 - len(layer.args))
    args[position] = made
    layer.args = tuple(args)
    layer.kwargs = {key: value for key, value in layer.kwargs.items() if key != "bias"}


def fold_padding(network: Network) -> int:
    """Move symmetric zero padding into the convolutions that read it. Returns how many pads went."""
    folded = 0
    for node in list(network.graph.nodes):
        if node.target is not aten.pad.default or not is_zero_padding(node):
            continue
        amounts = list(node.args[1])
        dims = len(amounts) // 2
        symmetric = all(amounts[2 * i] == amounts[2 * i + 1] for i in range(dims))
        users = list(node.users)
        if symmetric and users and all(_padded_convolution(user, node, dims) for user in users):
            for user in users:
                before = list(argument(user, 4, "padding", [0] * dims))
                before = before * dims if len(before) == 1 else before
                args = list(user.args) + [[1] * dims, [0] * dims][len(user.args) - 3 :] if len(user.args) < 5 else list(user.args)
                args[4] = [before[i] + amounts[2 * (dims - 1 - i)] for i in range(dims)]
                args[0] = node.args[0]
                user.args = tuple(args)
            network.graph.erase_node(node)
            folded += 1
    network.recompile()
    return folded


def is_zero_padding(node: fx.Node) -> bool:
    """Whether an ``aten.pad`` adds only zeros."""
    amounts = node.args[1]
    constant_mode = argument(node, 2, "mode", "constant") == "constant" and not argument(node, 3, "value")
    return constant_mode and isinstance(amounts, (list, tuple)) and all(isinstance(a, int) and a >= 0 for a in amounts)


def _padded_convolution(user: fx.Node, pad: fx.Node, dims: int) -> bool:
    spatial = {aten.conv1d.default: 1, aten.conv2d.default: 2, aten.conv3d.default: 3}.get(user.target)
    fits = spatial == dims and user.args[0] is pad and pad not in user.args[1:]
    return fits and not set(user.kwargs) & {"stride", "padding"} and (len(user.args) >= 4 or len(user.args) <= 3)

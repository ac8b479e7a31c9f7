"""Edits of a Network's graph that keep what it computes, and the few verbs that all edits are made of."""

# pyright: reportArgumentType=false, reportCallIssue=false, reportOptionalIterable=false, reportGeneralTypeIssues=false
# pyright: reportAttributeAccessIssue=false, reportOptionalMemberAccess=false, reportIndexIssue=false, reportReturnType=false
# (torch.fx and onnxscript type every argument as a union of everything)

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, fx

from .dry import shapes
from .memory import is_written
from .network import Network
from .parts import assign
from .repeats import merge_repeats

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
    """A new ``get_attr`` node before ``before`` that reads ``tensor``, stored under ``name`` or, if taken, the name with a number.

    Where a part of the path is a tensor, which has no parts, the name has ``_`` for its dots.
    """
    name = name.replace(".", "_") if _is_blocked(network, name) else name
    unique, number = name, 1
    while _taken(network, unique):
        number += 1
        unique = f"{name}_{number}"
    assign(network.graph_module, unique, tensor)
    with network.graph.inserting_before(before):
        node = network.graph.get_attr(unique)
    node.meta = {"module": before.meta.get("module", ""), "source": before.meta.get("source", "")}
    return node


def _is_blocked(network: Network, name: str) -> bool:
    """Whether something before the last part of the path is there, and no module."""
    module: torch.nn.Module = network.graph_module
    for part in name.split(".")[:-1]:
        if part not in module._modules:
            return hasattr(module, part)
        module = module.get_submodule(part)
    return False


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
    """Remove dropout that is switched off, and other operators that hand their input on; calls that are equal without them become one."""
    for node in list(network.graph.nodes):
        if node.op != "call_function" or node.target not in IDENTITIES:
            continue
        switched_on = node.target in (aten.dropout.default, aten.feature_dropout.default) and argument(node, 2, "train")
        # Where an in-place operator changes one of the two, a copy is not an identity.
        if not switched_on and not is_written(node) and not is_written(node.args[0]):
            node.replace_all_uses_with(node.args[0])
            network.graph.erase_node(node)
    merge_repeats(network.graph)
    network.recompile()


def reshape_views(network: Network) -> None:
    """A view asks for a layout in memory that other sizes, or another kernel before it, may not give; a reshape has the same values from any."""
    for node in network.graph.nodes:
        if node.target in (aten.view.default, aten._unsafe_view.default) and not is_written(node):
            node.target = aten.reshape.default


def fold_batch_norm(network: Network) -> int:
    """Fold every batch norm in evaluation that directly follows a convolution or linear layer into its weight and bias. Returns how many."""
    folded = 0
    norms = [node for node in network.graph.nodes if node.target is aten.batch_norm.default and not argument(node, 5, "training")]
    behind_linear = any(getattr(norm.args[0], "target", None) is aten.linear.default for norm in norms)
    sizes = shapes(network) if behind_linear else {}
    for norm in norms:
        producer = norm.args[0]
        # A batch norm behind a linear layer of 3-D input normalises dimension 1, not the features.
        if _foldable(network, producer, norm) and (producer.target is not aten.linear.default or len(sizes[producer]) == 2):
            _fold(network, producer, norm)
            folded += 1
    network.recompile()
    return folded


def _foldable(network: Network, producer: fx.Node, norm: fx.Node) -> bool:
    if producer.target not in CONVOLUTIONS | TRANSPOSED | {aten.linear.default} or only_user(producer) is not norm:
        return False
    needed = [producer.args[1], norm.args[3], norm.args[4]]
    optional = [argument(producer, 2, "bias"), argument(norm, 1, "weight"), argument(norm, 2, "bias")]
    return all(constant(network, value) is not None for value in [*needed, *(value for value in optional if value is not None)])


def _fold(network: Network, producer: fx.Node, norm: fx.Node) -> None:
    gain, shift, mean, variance = (constant(network, argument(norm, i, n)) for i, n in ((1, "weight"), (2, "bias"), (3, "mean"), (4, "var")))
    assert mean is not None and variance is not None
    factor = torch.rsqrt(variance.double() + float(argument(norm, 7, "eps", 1e-5)))
    factor = factor * gain.double() if gain is not None else factor
    weight, bias = producer.args[1], argument(producer, 2, "bias")
    assert isinstance(weight, fx.Node)
    old = network.tensor(str(weight.target))
    offset = constant(network, bias)
    offset = -mean.double() if offset is None else offset.double() - mean.double()
    offset = offset * factor + (shift.double() if shift is not None else 0.0)
    with torch.no_grad():
        new_weight, new_bias = _scaled(producer, old.double(), factor).to(old.dtype), offset.to(old.dtype)
    _own_weight(network, producer, new_weight)
    set_bias(network, producer, new_bias)
    norm.replace_all_uses_with(producer)
    network.graph.erase_node(norm)


def _scaled(layer: fx.Node, weight: Tensor, factor: Tensor) -> Tensor:
    """The weight with each output channel multiplied by its factor [outputs]."""
    if layer.target not in TRANSPOSED:
        return weight * factor.reshape(-1, *[1] * (weight.dim() - 1))
    # [inputs, outputs / groups, ...]: the inputs of group g feed the outputs of group g.
    groups = argument(layer, 6, "groups", 1)
    by_group = weight.reshape(groups, -1, *weight.shape[1:]) * factor.reshape(groups, 1, -1, *[1] * (weight.dim() - 2))
    return by_group.reshape(weight.shape)


def _own_weight(network: Network, layer: fx.Node, tensor: Tensor) -> None:
    """Give ``layer`` the weight ``tensor``; a weight that others read too stays theirs."""
    node = layer.args[1]
    assert isinstance(node, fx.Node)
    old = network.tensor(str(node.target))
    if not _is_shared(network, node):
        set_constant(network, node, tensor)
        return
    own = torch.nn.Parameter(tensor, requires_grad=old.requires_grad) if isinstance(old, torch.nn.Parameter) else tensor
    layer.update_arg(1, add_constant(network, f"{node.target}_of_{layer.name}", own, layer))


def _is_shared(network: Network, node: fx.Node) -> bool:
    """Whether anything else reads the tensor that ``node`` reads."""
    return len(node.users) > 1 or [n.target for n in network.graph.nodes if n.op == "get_attr"].count(node.target) > 1


def set_bias(network: Network, layer: fx.Node, tensor: Tensor, position: int = 2) -> None:
    """Give a layer the bias ``tensor`` [outputs], whether it had one or not; ``position`` is the bias among its arguments."""
    node = argument(layer, position, "bias")
    shared = isinstance(node, fx.Node) and _is_shared(network, node)
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
        if node.target is not aten.pad.default or not is_zero_padding(node) or is_written(node.args[0]):
            continue
        amounts = list(node.args[1])
        dims = len(amounts) // 2
        symmetric = all(amounts[2 * i] == amounts[2 * i + 1] for i in range(dims))
        users = list(node.users)
        if symmetric and users and all(_padded_convolution(user, node, dims) for user in users):
            for user in users:
                args = [*user.args, *(None, [1] * dims, [0] * dims)[len(user.args) - 2 :]] if len(user.args) < 5 else list(user.args)
                before = list(args[4]) * dims if len(args[4]) == 1 else list(args[4])
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
    return spatial == dims and user.args[0] is pad and pad not in user.args[1:] and not set(user.kwargs) & {"bias", "stride", "padding"}

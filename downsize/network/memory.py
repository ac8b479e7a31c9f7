"""Which nodes of a graph may share memory, and which operators write into it: what an edit must know before it moves or drops a copy."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import fx

# Composite operators (their schemas do not say what they alias) whose result is always new memory.
_FRESH = """
    linear bilinear matmul conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d batch_norm layer_norm group_norm instance_norm
    rms_norm softmax log_softmax log_sigmoid relu6 selu celu adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d avg_pool1d max_pool1d
    max_pool2d max_pool3d upsample_nearest1d upsample_nearest2d upsample_nearest3d upsample_linear1d upsample_bilinear2d upsample_bicubic2d
    upsample_trilinear3d scaled_dot_product_attention lstm gru rnn_tanh rnn_relu lstm_cell gru_cell rnn_tanh_cell rnn_relu_cell embedding_bag one_hot
    concat concatenate hstack vstack column_stack pad tile multiply true_divide subtract square std var norm cosine_similarity outer where
    """
FRESH = frozenset(_FRESH.split())
COMPOSITE = torch._C.DispatchKey.CompositeImplicitAutograd  # type: ignore[attr-defined]


def may_alias(node: fx.Node) -> bool:
    """Whether the node's result may share memory with one of its arguments: views, in-place operators, and what is not known to be neither."""
    target = node.target
    if node.op != "call_function":
        return False
    if not isinstance(target, torch._ops.OpOverload):
        return target is operator.getitem
    if any(value.alias_info is not None for value in target._schema.returns):
        return True
    return target.has_kernel_for_dispatch_key(COMPOSITE) and target._schema.name.split("::")[1] not in FRESH


def writes(node: fx.Node) -> list[fx.Node]:
    """The arguments whose memory the node's operator changes; batch norm's running statistics are not among them."""
    schema = getattr(node.target, "_schema", None)
    if node.op != "call_function" or schema is None or not schema.is_mutable:
        return []
    found: list[fx.Node] = []
    for position, argument in enumerate(schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = node.args[position] if position < len(node.args) else node.kwargs.get(argument.name)
            fx.map_arg(value, _collect(found))
    return found


def _collect(found: list[fx.Node]) -> Callable[[fx.Node], Any]:
    def keep(node: fx.Node) -> fx.Node:
        found.append(node)
        return node

    return keep


def sharers(node: fx.Node) -> set[fx.Node]:
    """All nodes that may share memory with ``node``, itself among them."""
    found: set[fx.Node] = set()
    todo = [node]
    while todo:
        one = todo.pop()
        if one not in found:
            found.add(one)
            todo.extend(_neighbours(one))
    return found


def _neighbours(node: fx.Node) -> Iterator[fx.Node]:
    if may_alias(node):
        yield from node.all_input_nodes
    for user in node.users:
        if may_alias(user):
            yield user


def is_written(node: fx.Node) -> bool:
    """Whether any operator writes into memory that ``node`` may share: then a copy of it is not an identity."""
    family = sharers(node)
    return any(written in family for one in family for user in one.users for written in writes(user))


def drop_dead(graph: fx.Graph) -> None:
    """Remove what nothing reads. Unlike torch.fx's own way, switched-off dropout and random numbers go too; writes stay."""
    graph.eliminate_dead_code(is_impure_node=lambda node: node.op in ("placeholder", "output") or bool(writes(node)))

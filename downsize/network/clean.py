"""Make an exported graph plain: no contexts, no assertions, no needless in-place operators, and metadata that reports can show."""

# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false, reportOptionalMemberAccess=false
# pyright: reportAttributeAccessIssue=false
# (torch.fx types every argument as a union of everything)

from __future__ import annotations

import operator
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from ..errors import CaptureError
from .memory import may_alias, sharers, writes
from .parts import assign

aten = torch.ops.aten
NOT_THE_USERS = (str(Path(torch.__file__).parent), str(Path(__file__).parent.parent), "<eval_with_key", "<frozen", "torch/fx/")
# What export calls the path of shape arithmetic.
NO_MODULE = "_empty_nn_module_stack"
ASSERTIONS = ("aten._assert_tensor_metadata", "aten._assert_scalar", "aten._assert_async", "aten.sym_constrain_range", "aten._functional_assert")
SPELLED_PADDING = {aten.conv1d.padding: aten.conv1d.default, aten.conv2d.padding: aten.conv2d.default, aten.conv3d.padding: aten.conv3d.default}


def inline_contexts(module: fx.GraphModule) -> None:
    """Replace blocks run under no_grad (or under a disabled autocast) by their operators, in place."""
    for node in list(module.graph.nodes):
        name = getattr(node.target, "__name__", "") if node.op == "call_function" else ""
        if name == "wrap_with_set_grad_enabled":
            arguments = node.args[2:]
            trainable = any(isinstance(a, fx.Node) and getattr(a.meta.get("val"), "requires_grad", False) for a in arguments)
            _inline(module, node, node.args[1], arguments, detach=trainable and not node.args[0])
        elif name == "wrap_with_autocast":
            if node.args[2]:
                raise CaptureError(f"The model switches autocast on inside its forward.\n{at(node)}Remove it; downsize chooses the precision.")
            _inline(module, node, node.args[4], node.args[5:], detach=False)


def _inline(module: fx.GraphModule, node: fx.Node, block: Any, arguments: Sequence[Any], detach: bool) -> None:
    inner = getattr(module, block.target)
    inline_contexts(inner)
    mapping = dict(zip([n for n in inner.graph.nodes if n.op == "placeholder"], arguments, strict=True))
    for source in [n for n in inner.graph.nodes if n.op == "get_attr"]:
        path, _, leaf = source.target.rpartition(".")
        value = getattr(inner.get_submodule(path), leaf)
        if isinstance(value, Tensor):
            source.target = _free_name(module, source.target, value)
            assign(module, source.target, value)
    with module.graph.inserting_before(node):
        result = module.graph.graph_copy(inner.graph, mapping)
        if detach:
            # Without it, training the Network would train what the user kept from training.
            result = fx.map_arg(result, lambda value: _detached(module.graph, value))
    for user in list(node.users):
        if user.target is operator.getitem and isinstance(result, (tuple, list)):
            user.replace_all_uses_with(result[user.args[1]])
            module.graph.erase_node(user)
    if not isinstance(result, (tuple, list)):
        node.replace_all_uses_with(result)
    module.graph.erase_node(node)
    if not block.users:
        module.graph.erase_node(block)


def _free_name(module: torch.nn.Module, name: str, value: Tensor) -> str:
    """``name``, or with a number if another tensor has it: every block counts its own constants from zero."""
    made, number = name, 0
    while _held(module, made, value) is not value:
        number += 1
        made = f"{name}_{number}"
    return made


def _held(module: torch.nn.Module, name: str, default: Any) -> Any:
    path, _, leaf = name.rpartition(".")
    try:
        return getattr(module.get_submodule(path), leaf)
    except AttributeError:
        return default


def _detached(graph: fx.Graph, value: fx.Node) -> fx.Node:
    tensor = value.meta.get("val")
    if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
        return value
    made = graph.call_function(aten.detach.default, (value,))
    made.meta = dict(value.meta)
    return made


def drop_assertions(graph: fx.Graph) -> None:
    """Remove the checks that export writes into graphs, in place; the ports check what can be checked of them."""
    for node in reversed(list(graph.nodes)):
        guards = node.op == "call_module" and node.target == "_guards_fn"
        if guards or str(node.target).startswith(ASSERTIONS):
            graph.erase_node(node)


def spell_padding(graph: fx.Graph) -> None:
    """Write the padding of convolutions, given as "same" or "valid", in numbers: one form for everything that reads them."""
    for node in list(graph.nodes):
        if node.op != "call_function" or node.target not in SPELLED_PADDING:
            continue
        source, weight, bias, stride, padding, dilation, groups = (*node.args, *(None, 1, "valid", 1, 1)[len(node.args) - 2 :])
        kernel = weight.meta["val"].shape[2:]
        stride, dilation = (list(value) * len(kernel) if len(value) == 1 else list(value) for value in (_list(stride), _list(dilation)))
        total = [d * (k - 1) if padding == "same" else 0 for d, k in zip(dilation, kernel, strict=True)]
        # Where the sum is odd, the extra zero stands behind.
        uneven = [extra for amount in reversed(total) for extra in (0, amount % 2)]
        if any(uneven):
            with graph.inserting_before(node):
                source = graph.call_function(aten.pad.default, (source, uneven))
            source.meta = dict(node.meta)
        node.target = SPELLED_PADDING[node.target]
        node.args = (source, weight, bias, stride, [amount // 2 for amount in total], dilation, groups)


def _list(value: Any) -> Any:
    return value if isinstance(value, (list, tuple)) else [value]


def shorten_metadata(graph: fx.Graph, root: str) -> None:
    """Keep of export's metadata what reports show: the module path below ``root`` and the user's deepest source line."""
    for node in graph.nodes:
        stack = node.meta.get("nn_module_stack") or {}
        path = [path for path, _ in stack.values()][-1].split("@")[0] if stack and node.op != "placeholder" else ""
        path = "" if path.startswith(NO_MODULE) else path
        source = source_line(node.meta.get("stack_trace") or "") if node.op != "placeholder" else ""
        node.meta = {"module": path.removeprefix(root).removeprefix("."), "source": source}


def source_line(trace: str) -> str:
    """The deepest line of code outside torch in a stack trace, as ``file:line: code``; empty if there is none."""
    lines = trace.splitlines()
    for number in range(len(lines) - 1, -1, -1):
        line = lines[number].strip()
        if line.startswith('File "') and not line.removeprefix('File "').startswith(NOT_THE_USERS):
            file, _, rest = line.removeprefix('File "').partition('", line ')
            code = lines[number + 1].strip() if number + 1 < len(lines) else ""
            return f"{file}:{rest.split(',')[0]}: {code}"
    return ""


def at(node: fx.Node) -> str:
    """The user's source line of a node, as a line of an error message; empty if unknown."""
    line = node.meta.get("source") or source_line(node.meta.get("stack_trace") or "")
    return f"  at {line}\n" if line else ""


def functionalize(graph: fx.Graph) -> None:
    """Replace in-place operators by their pure forms where no view of the changed tensor exists; the rest stays, and runs as written.

    The caller's own tensors are never changed by it: an in-place operator on an input becomes a pure one too.
    """
    for node in list(graph.nodes):
        target = node.target
        if not writes(node):
            continue
        changed = node.args[0] if node.args else None
        name = target._schema.name.split("::")[1]
        pure = getattr(getattr(aten, name[:-1], None), target._overloadname, None) if name.endswith("_") else None
        if pure is None or writes(node) != [changed] or not _own_memory(changed) or not _same_dtype(node, pure):
            continue
        node.target = pure
        changed.replace_all_uses_with(node, delete_user_cb=lambda user, n=node: user is not n and user > n)


def _own_memory(node: fx.Node) -> bool:
    """Whether nothing but in-place operators shares the node's memory."""
    makes = node.op == "placeholder" or (node.op == "call_function" and not may_alias(node))
    return makes and not any(may_alias(user) and node not in writes(user) for user in node.users)


def _same_dtype(node: fx.Node, pure: Any) -> bool:
    """Whether the pure operator gives the dtype that the changed tensor has: ``half.add_(float)`` stays half, ``half + float`` is float."""
    value = node.meta.get("val")
    if not isinstance(value, Tensor):
        return False
    args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), lambda n: n.meta.get("val"))
    try:
        return pure(*args, **kwargs).dtype == value.dtype
    except Exception:  # any operator, any reason: then it stays in place
        return False


def drop_state(graph: fx.Graph) -> None:
    """Remove writes into the model's own tensors that no output reads (counters); refuse those that one does.

    Raises:
        CaptureError: what the model computes depends on what it computed before.
    """
    for node in reversed(list(graph.nodes)):
        kept = [source for changed in writes(node) for source in sharers(changed) if source.op == "get_attr"]
        if not kept:
            continue
        if node.users or len(kept[0].users) > 1:
            raise CaptureError(
                f"The model writes into its own tensor {kept[0].target} and reads it again.\n{at(node)}"
                "A Network has no state: make that tensor an input and an output, or remove the writing."
            )
        graph.erase_node(node)

"""Make an exported graph plain: no contexts, no assertions, no needless in-place operators, and metadata that reports can show."""

# pyright: reportArgumentType=false, reportCallIssue=false

from __future__ import annotations

import operator
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from ..errors import CaptureError
from .parts import assign

TORCH_FOLDER = str(Path(torch.__file__).parent)
ASSERTIONS = ("aten._assert_tensor_metadata", "aten._assert_scalar", "aten._assert_async", "aten.sym_constrain_range", "aten._functional_assert")


def inline_contexts(module: fx.GraphModule) -> None:
    """Replace blocks run under no_grad (or under a disabled autocast) by their operators, in place."""
    for node in list(module.graph.nodes):
        name = getattr(node.target, "__name__", "") if node.op == "call_function" else ""
        if name == "wrap_with_set_grad_enabled":
            _inline(module, node, node.args[1], node.args[2:])
        elif name == "wrap_with_autocast":
            if node.args[2]:
                raise CaptureError(f"The model switches autocast on inside its forward.\n{at(node)}Remove it; downsize chooses the precision.")
            _inline(module, node, node.args[4], node.args[5:])


def _inline(module: fx.GraphModule, node: fx.Node, block: Any, arguments: Sequence[Any]) -> None:
    inner = getattr(module, block.target)
    inline_contexts(inner)
    mapping = dict(zip([n for n in inner.graph.nodes if n.op == "placeholder"], arguments, strict=True))
    for source in [n for n in inner.graph.nodes if n.op == "get_attr"]:
        path, _, leaf = source.target.rpartition(".")
        value = getattr(inner.get_submodule(path), leaf)
        if isinstance(value, Tensor):
            assign(module, source.target, value)
    with module.graph.inserting_before(node):
        result = module.graph.graph_copy(inner.graph, mapping)
    for user in list(node.users):
        if user.target is operator.getitem and isinstance(result, (tuple, list)):
            user.replace_all_uses_with(result[user.args[1]])
            module.graph.erase_node(user)
    if not isinstance(result, (tuple, list)):
        node.replace_all_uses_with(result)
    module.graph.erase_node(node)
    if not block.users:
        module.graph.erase_node(block)


def drop_assertions(graph: fx.Graph) -> None:
    """Remove the checks that export writes into graphs, in place; the ports check what can be checked of them."""
    for node in reversed(list(graph.nodes)):
        guards = node.op == "call_module" and node.target == "_guards_fn"
        if guards or str(node.target).startswith(ASSERTIONS):
            graph.erase_node(node)


def shorten_metadata(graph: fx.Graph) -> None:
    """Keep of export's metadata what reports show: the module path and the user's deepest source line."""
    for node in graph.nodes:
        stack = node.meta.get("nn_module_stack") or {}
        paths = [path for path, _ in stack.values()]
        kept = {"module": paths[-1].split("@")[0] if paths else "", "source": _source(node.meta.get("stack_trace") or "")}
        node.meta = {**node.meta, **kept} if node.op == "placeholder" else kept


def _source(trace: str) -> str:
    lines = trace.splitlines()
    for number in range(len(lines) - 1, -1, -1):
        line = lines[number].strip()
        if line.startswith('File "') and not line.startswith(f'File "{TORCH_FOLDER}'):
            file, _, rest = line.removeprefix('File "').partition('", line ')
            code = lines[number + 1].strip() if number + 1 < len(lines) else ""
            return f"{file}:{rest.split(',')[0]}: {code}"
    return ""


def at(node: fx.Node) -> str:
    """The user's source line of a node, as a line of an error message; empty if unknown."""
    return f"  at {node.meta['source']}\n" if node.meta.get("source") else ""


def functionalize(graph: fx.Graph) -> None:
    """Replace in-place operators by their pure forms where no view of the changed tensor exists; the rest stays, and runs as written."""
    for node in list(graph.nodes):
        target = node.target
        if node.op != "call_function" or not isinstance(target, torch._ops.OpOverload) or not target._schema.is_mutable:
            continue
        changed = node.args[0] if node.args else None
        name = target._schema.name.split("::")[1]
        pure = getattr(getattr(torch.ops.aten, name[:-1], None), target._overloadname, None) if name.endswith("_") else None
        if pure is None or not isinstance(changed, fx.Node) or not _owns_its_memory(changed) or any(_views(user) for user in changed.users):
            continue
        node.target = pure
        changed.replace_all_uses_with(node, delete_user_cb=lambda user, n=node: user is not n and _after(user, n))


def _after(user: fx.Node, node: fx.Node) -> bool:
    return user > node


def _views(node: fx.Node) -> bool:
    """Whether the node's result may share memory with an argument."""
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return True
    aliases = any(ret.alias_info is not None and not ret.alias_info.is_write for ret in schema.returns)
    return aliases or schema.name in ("aten::reshape", "aten::contiguous", "aten::flatten", "aten::to")


def _owns_its_memory(node: fx.Node) -> bool:
    return node.op == "call_function" and not _views(node) and node.target is not operator.getitem

"""A traced program in the words of torch's ONNX exporter, so that the exporter has no reason to trace it once more.

The exporter takes apart what it cannot say, and casts numbers to the type of the tensors they meet, by running the whole program again; both
runs are left out where a few nodes, written another way, need neither.
"""

# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportReturnType=false, reportOptionalMemberAccess=false
# pyright: reportGeneralTypeIssues=false
# (torch.fx types every argument as a union of everything)

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, fx

from .dry import TRANSPOSED
from .rewrite import aten

TO = {aten.to.dtype, aten.to.dtype_layout, aten.to.device, aten.to.other}
SAME = {
    aten.min.other: aten.minimum.default,
    aten.max.other: aten.maximum.default,
    aten.__and__.Tensor: aten.bitwise_and.Tensor,
    aten.__or__.Tensor: aten.bitwise_or.Tensor,
    aten.__xor__.Tensor: aten.bitwise_xor.Tensor,
}
ASSERTIONS = {aten._assert_tensor_metadata.default, aten._assert_scalar.default, aten._assert_async.msg}


def respell(graph: fx.Graph) -> None:
    """Write operators that the exporter cannot say as ones that it can, in place, where one node does; every node has its ``meta["val"]``.

    Casts become copies or nothing, assertions go, ``unflatten`` is a reshape, ``chunk`` a split, a transposed convolution a convolution. A program
    that writes into tensors stays as it is: there, it counts which values share memory.
    """
    if any(isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable for node in graph.nodes):
        return
    for node in list(graph.nodes):
        if node.op != "call_function":
            continue
        if node.target in ASSERTIONS:
            graph.erase_node(node)
        elif node.target in TO:
            _cast(node)
        elif node.target in SAME:
            node.target = SAME[node.target]
        elif node.target is aten.adaptive_avg_pool1d.default and list(node.args[1]) == [1]:
            node.target, node.args = aten.mean.dim, (node.args[0], [-1], True)
        elif node.target is aten.mT.default:
            node.target, node.args = aten.transpose.int, (node.args[0], -2, -1)
        elif node.target is aten.unflatten.int:
            _reshape(node)
        elif node.target is aten.chunk.default:
            _split(node)
        elif node.target in TRANSPOSED:
            _convolve(node, TRANSPOSED[node.target])


def _cast(node: fx.Node) -> None:
    source, dtype = node.args[0], node.meta["val"].dtype
    if source.meta["val"].dtype == dtype and all(user.op != "output" for user in node.users):
        node.replace_all_uses_with(source)
        node.graph.erase_node(node)
    else:
        node.target, node.args, node.kwargs = aten._to_copy.default, (source,), {"dtype": dtype}


def _reshape(node: fx.Node) -> None:
    """With at most one open size, which the reshape finds by itself."""
    sizes = list(node.meta["val"].shape)
    unknown = [place for place, size in enumerate(sizes) if not isinstance(size, int)]
    if len(unknown) <= 1 and 0 not in sizes:
        shape = [-1 if place in unknown else size for place, size in enumerate(sizes)]
        node.target, node.args, node.kwargs = aten.reshape.default, (node.args[0], shape), {}


def _split(node: fx.Node) -> None:
    dim = node.args[2] if len(node.args) > 2 else node.kwargs.get("dim", 0)
    sizes = [part.shape[dim] for part in node.meta["val"]]
    if all(isinstance(size, int) for size in sizes):
        node.target, node.args, node.kwargs = aten.split_with_sizes.default, (node.args[0], sizes, dim), {}


def _convolve(node: fx.Node, dims: int) -> None:
    """``conv_transpose(x, w, bias, stride, padding, output_padding, groups, dilation)`` as ``convolution``, which has the last ones elsewhere."""
    names = ("input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation")
    default = {"bias": None, "stride": [1], "padding": [0], "output_padding": [0], "groups": 1, "dilation": [1]}
    given = {**default, **dict(zip(names, node.args, strict=False)), **node.kwargs}
    if len(node.args[0].meta["val"].shape) != dims + 2:
        return  # without a batch
    full = {name: list(given[name]) * (dims // len(given[name])) for name in ("stride", "padding", "output_padding", "dilation")}
    first = (given["input"], given["weight"], given["bias"], full["stride"], full["padding"], full["dilation"])
    node.target, node.args, node.kwargs = aten.convolution.default, (*first, True, full["output_padding"], given["groups"]), {}


def numbers_cast(graph: fx.Graph) -> bool:
    """Write whole numbers that meet tensors of floats as floats, in place; whether nothing else is left that has to be cast.

    ``add(x, 1)`` of a float tensor becomes ``add(x, 1.0)``. What has to be cast is asked of torch's own rules.
    """
    table, scalar_type = rules()
    for node in graph.nodes:
        rule = table.get_rule(node.target.overloadpacket) if isinstance(node.target, torch._ops.OpOverload) else None
        if rule is None:
            continue
        args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), lambda source: source.meta["val"])
        wanted = rule.preview_type_promotion(args, kwargs)
        made = [_number(arg, wanted.args_dtypes.get(place)) for place, arg in enumerate(node.args)]
        pairs = [(arg, wanted.args_dtypes.get(place)) for place, arg in enumerate(made)]
        pairs += [(arg, wanted.kwargs_dtypes.get(name)) for name, arg in node.kwargs.items()]
        if any(_must_be_cast(arg, dtype, scalar_type) for arg, dtype in pairs):
            return False
        node.args = tuple(made)
    return True


@functools.cache
def rules() -> tuple[Any, Any]:
    """Torch's rules for the types in which operators compute, and the type of a number of Python.

    Raises:
        ImportError: they are not where they are known to be.
    """
    from torch.onnx._internal.fx import type_utils
    from torch.onnx._internal.fx.passes.type_promotion import TypePromotionTable

    return TypePromotionTable(), type_utils.from_scalar_type_to_torch_dtype


def _number(arg: Any, dtype: torch.dtype | None) -> Any:
    return float(arg) if type(arg) is int and dtype == torch.float32 and abs(arg) < 2**24 else arg


def _must_be_cast(arg: Any, dtype: torch.dtype | None, scalar_type: Any) -> bool:
    """Whether an argument is not of the type wanted; of a list, whether any item is not."""
    value = arg.meta["val"] if isinstance(arg, fx.Node) else arg
    if dtype is None:
        return False
    if isinstance(value, (tuple, list)):
        return any(_must_be_cast(item, dtype, scalar_type) for item in value)
    return (value.dtype if isinstance(value, Tensor) else scalar_type(type(value))) != dtype

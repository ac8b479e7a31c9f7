"""What every operator does to the ids of its operands' positions: one table, operator name -> rule.

A rule is called with the lineage and the node, and gives the id vectors of the value. It raises :class:`NoRule` for a form that it does not
know; then, as for every operator that is not in the table, all that the node touches is frozen.
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportAttributeAccessIssue=false, reportOptionalSubscript=false
# pyright: reportIndexIssue=false, reportOptionalMemberAccess=false, reportOptionalIterable=false, reportGeneralTypeIssues=false
# pyright: reportOperatorIssue=false
# (torch.fx types every argument as a union of everything)

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import fx

from .lineage_sizes import SIZES
from .lineage_views import VIEWS, NoRule, same
from .positions import Dims, Positions, Read, getitem, never
from .rewrite import argument

Rule = Callable[[Positions, fx.Node], Any]


def apply_rule(lineage: Positions, node: fx.Node) -> Any:
    """The id vectors of a node's value, by its rule; a node without one, or of a form its rule does not know, freezes what it touches."""
    if getitem(node):
        return lineage.dims[node.args[0]][node.args[1]]
    name = operator_name(node)
    rule = pointwise if torch.Tag.pointwise in getattr(node.target, "tags", ()) and name not in NOT_POINTWISE else RULES.get(name)
    if rule is not None:
        # Whatever form of an operator a rule does not expect, freezing is right. What it unified before it failed only ties more.
        with contextlib.suppress(NoRule, TypeError, ValueError, IndexError, KeyError, AttributeError):
            dims = rule(lineage, node)
            if _fits(dims, lineage.shapes[node]):
                return dims
    lineage.frozen_by[name] = lineage.frozen_by.get(name, 0) + 1
    lineage.freeze(*[source for source in node.all_input_nodes if source in lineage.dims])
    return _never(lineage.shapes[node])


def operator_name(node: fx.Node) -> str:
    """An operator's name without namespace and overload; an in-place operator has that of its pure form."""
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return str(node.target)
    name = schema.name.split("::")[1]
    return name[:-1] if name.endswith("_") and not name.endswith("__") else name


def _fits(dims: Any, shape: Any) -> bool:
    if isinstance(shape, list):
        return len(dims) == len(shape) and all(one is None or _fits(part, one) for part, one in zip(dims, shape, strict=True))
    return tuple(len(vector) for vector in dims) == shape


def _never(shape: Any) -> Any:
    return [() if one is None else _never(one) for one in shape] if isinstance(shape, list) else tuple(map(never, shape))


# Pointwise --------------------------------------------------------------------------------------------------------------------------


def pointwise(lineage: Positions, node: fx.Node) -> Dims:
    """Operands are broadcast against each other; positions that meet live and die together."""
    return broadcast(lineage, [lineage.dims[source] for source in node.all_input_nodes if source in lineage.dims], lineage.shapes[node])


def broadcast(lineage: Positions, operands: Sequence[Dims], shape: Sequence[int]) -> Dims:
    """The vectors of a value of ``shape`` to which the operands are broadcast, aligned at the last dimension."""
    made = []
    for back in range(len(shape), 0, -1):
        found = [dims[-back] for dims in operands if len(dims) >= back]
        full = [vector for vector in found if len(vector) == shape[-back]]
        for short in found:
            if len(short) != shape[-back]:
                lineage.atoms.freeze(short)
        for other in full[1:]:
            lineage.atoms.unify(full[0], other)
        made.append(full[0] if full else never(shape[-back]))
    return tuple(made)


def _fake_quantize(lineage: Positions, node: fx.Node) -> Dims:
    dims = lineage.dims[node.args[0]]
    if node.args[3] is not None:
        for part in node.args[1:3]:
            lineage.atoms.unify(dims[node.args[3]], lineage.dims[part][0])
    return dims


def _fake_quantize_rows(lineage: Positions, node: fx.Node) -> Dims:
    """In groups, or to levels: a row has scales of its own, and its columns stay, as they share them."""
    dims, scale = lineage.dims[node.args[0]], lineage.dims[node.args[1]]
    lineage.atoms.unify(dims[0], scale[0])
    shared = [*dims[1:], scale[1]]
    if operator_name(node) == "fake_quantize_groups":
        lineage.atoms.unify(dims[0], lineage.dims[node.args[2]][0])
        shared.append(lineage.dims[node.args[2]][1])
    else:
        shared += lineage.dims[node.args[2]]
    for vector in shared:
        lineage.atoms.freeze(vector)
    return dims


def _prelu(lineage: Positions, node: fx.Node) -> Dims:
    dims, slope = same(lineage, node), lineage.dims[node.args[1]][0] if lineage.dims[node.args[1]] else never(1)
    if len(slope) > 1:
        lineage.atoms.unify(dims[1], slope)
    return dims


# Products ---------------------------------------------------------------------------------------------------------------------------


def _linear(lineage: Positions, node: fx.Node) -> Dims:
    x, weight, bias = node.args[0], node.args[1], argument(node, 2, "bias")
    rows, columns = _known(lineage.dims[weight], 2)
    lineage.atoms.unify(lineage.dims[x][-1], columns)
    lineage.read(node, x, -1)
    if bias is not None:
        lineage.atoms.unify(lineage.dims[bias][0], rows)
    return (*lineage.dims[x][:-1], rows)


def _known(dims: Dims, count: int) -> Dims:
    if len(dims) != count:
        raise NoRule
    return dims


def _convolution(lineage: Positions, node: fx.Node) -> Dims:
    x, weight, bias = node.args[0], node.args[1], argument(node, 2, "bias")
    rows, columns, *kernel = lineage.dims[weight]
    batch, channels, *spatial = _known(lineage.dims[x], 2 + len(kernel))
    groups, atoms = int(argument(node, 6, "groups", 1)), lineage.atoms
    for vector in (*spatial, *kernel):
        atoms.freeze(vector)
    if groups == 1:
        atoms.unify(channels, columns)
    else:
        group, member = atoms.factor(channels, groups, len(columns))
        atoms.unify(member, columns)
        atoms.unify(group, atoms.factor(rows, groups, len(rows) // groups)[0])
    if len(columns) > 1 or groups == 1:
        lineage.read(node, x, 1)
    if bias is not None:
        atoms.unify(lineage.dims[bias][0], rows)
    lineage.name_kind(rows, "channels")
    return (batch, rows, *map(never, lineage.shapes[node][2:]))


def _transposed(lineage: Positions, node: fx.Node) -> Dims:
    x, weight, bias = node.args[0], node.args[1], argument(node, 2, "bias")
    columns, rows, *kernel = lineage.dims[weight]
    batch, channels, *spatial = _known(lineage.dims[x], 2 + len(kernel))
    groups, atoms = int(argument(node, 6, "groups", 1)), lineage.atoms
    for vector in (*spatial, *kernel):
        atoms.freeze(vector)
    atoms.unify(channels, columns)
    if groups > 1:
        rows = atoms.product(atoms.factor(channels, groups, len(columns) // groups)[0], rows)
    lineage.read(node, x, 1)
    if bias is not None:
        atoms.unify(lineage.dims[bias][0], rows)
    lineage.name_kind(rows, "channels")
    return (batch, rows, *map(never, lineage.shapes[node][2:]))


def _matmul(lineage: Positions, node: fx.Node, first: int = 0) -> Dims:
    left, right = node.args[first : first + 2]
    one, two = lineage.dims[left], lineage.dims[right]
    contracted = two[-1] if len(two) == 1 else two[-2]
    lineage.atoms.unify(one[-1], contracted)
    lineage.read(node, left, -1)
    shape = lineage.shapes[node]
    ends = [*([one[-2]] if len(one) > 1 else []), *([two[-1]] if len(two) > 1 else [])]
    batch = broadcast(lineage, [one[:-2], two[:-2]], shape[: len(shape) - len(ends)])
    if not _constant(left) and not _constant(right):
        for vector in batch:
            lineage.name_kind(vector, "heads")
        lineage.name_kind(one[-1], "head_dims")
        lineage.name_kind(ends[-1], "head_dims")
    return (*batch, *ends)


def _constant(node: fx.Node) -> bool:
    return node.op == "get_attr" or (bool(node.all_input_nodes) and all(map(_constant, node.all_input_nodes)))


def _added_product(lineage: Positions, node: fx.Node) -> Dims:
    product = _matmul(lineage, node, first=1)
    return broadcast(lineage, [product, lineage.dims[node.args[0]]], lineage.shapes[node])


def _einsum(lineage: Positions, node: fx.Node) -> Dims:
    equation, operands = node.args[0].replace(" ", ""), node.args[1]
    if "." in equation or "->" not in equation:
        raise NoRule
    terms, result = equation.split("->")
    meaning: dict[str, tuple[fx.Node, int]] = {}
    for term, operand in zip(terms.split(","), operands, strict=True):
        if len(set(term)) < len(term):
            raise NoRule
        for dim, letter in enumerate(term):
            first, place = meaning.setdefault(letter, (operand, dim))
            if len(lineage.dims[first][place]) != len(lineage.dims[operand][dim]):
                raise NoRule
            lineage.atoms.unify(lineage.dims[first][place], lineage.dims[operand][dim])
    for letter, (operand, dim) in meaning.items():
        if letter not in result:
            lineage.read(node, operand, dim)
    return tuple(lineage.dims[meaning[letter][0]][meaning[letter][1]] for letter in result)


def _attention(lineage: Positions, node: fx.Node) -> Dims:
    query, key, value = (lineage.dims[part] for part in node.args[:3])
    mask, atoms = argument(node, 3, "attn_mask"), lineage.atoms
    batch = list(query[:-2])
    if argument(node, 7, "enable_gqa", False) and len(query[-3]) != len(key[-3]):
        shared = atoms.factor(query[-3], len(key[-3]), len(query[-3]) // len(key[-3]))[0]
        atoms.unify(shared, key[-3])
        atoms.unify(shared, value[-3])
        key, value = (*key[:-3], query[-3], *key[-2:]), (*value[:-3], query[-3], *value[-2:])
    for vector in (query[-2], key[-2], value[-2]):
        atoms.freeze(vector)
    shape = lineage.shapes[node]
    batch = broadcast(lineage, [query[:-2], key[:-2], value[:-2]], shape[:-2])
    if mask is not None:
        broadcast(lineage, [(*batch, query[-2], key[-2]), lineage.dims[mask]], (*shape[:-1], len(key[-2])))
    atoms.unify(query[-1], key[-1])
    lineage.read(node, node.args[0], -1)
    for vector, kind in ((batch[-1] if batch else never(1), "heads"), (query[-1], "head_dims"), (value[-1], "head_dims")):
        lineage.name_kind(vector, kind)
    return (*batch, query[-2], value[-1])


def _recurrent(gates: int) -> Rule:
    """Layers of one hidden width; ``gates`` rows of each matrix belong to a hidden unit (lstm 4, gru 3)."""

    def rule(lineage: Positions, node: fx.Node) -> Any:
        x, hidden, parameters, biased, layers, _, _, both = node.args[:8]
        states = hidden if isinstance(hidden, (list, tuple)) else [hidden]
        count, directions, atoms = (4 if biased else 2), (2 if both else 1), lineage.atoms
        if len(parameters) != count * layers * directions:
            raise NoRule  # projections
        width = lineage.dims[parameters[1]][1]
        incoming, batch = lineage.dims[x][-1], lineage.dims[x][:-1]
        for position in range(0, len(parameters), count):
            for offset, part in enumerate(parameters[position : position + count]):
                gate, unit = atoms.factor(lineage.dims[part][0], gates, len(width))
                atoms.freeze(gate)
                atoms.unify(unit, width)
                if offset < 2:
                    atoms.unify(lineage.dims[part][1], width if offset else incoming)
            lineage.reads += [_weight_read(node, parameters[position + 1])] + ([_weight_read(node, parameters[position])] if position else [])
            if (position // count + 1) % directions == 0:
                incoming = np.concatenate([width] * directions)
        lineage.read(node, x, -1)
        for state in states:
            first, middle, last = lineage.dims[state]
            atoms.unify(last, width)
            for vector in (first, middle, *batch):
                atoms.freeze(vector)
        shape = lineage.shapes[node]
        end = [(*map(never, one[:-1]), width) for one in shape[1:]]
        return [(*map(never, shape[0][:-1]), np.concatenate([width] * directions)), *end]

    return rule


def _weight_read(node: fx.Node, weight: fx.Node) -> Read:
    return Read(node, weight, 1, False)


# Normalisation and reduction ---------------------------------------------------------------------------------------------------------


def _batch_norm(lineage: Positions, node: fx.Node) -> Dims:
    dims = lineage.dims[node.args[0]]
    for part in node.args[1:5]:
        if part is not None:
            lineage.atoms.unify(dims[1], lineage.dims[part][0])
    return dims


def _layer_norm(lineage: Positions, node: fx.Node) -> Dims:
    dims, count = lineage.dims[node.args[0]], len(node.args[1])
    for dim in range(-count, 0):
        lineage.read(node, node.args[0], dim, statistic=True)
        for part in node.args[2:4]:
            if isinstance(part, fx.Node):
                lineage.atoms.unify(dims[dim], lineage.dims[part][dim])
    return dims


def _group_norm(lineage: Positions, node: fx.Node) -> Dims:
    dims, groups = lineage.dims[node.args[0]], int(node.args[1])
    _, member = lineage.atoms.factor(dims[1], groups, len(dims[1]) // groups)
    for part in (argument(node, 2, "weight"), argument(node, 3, "bias")):
        if part is not None:
            lineage.atoms.unify(dims[1], lineage.dims[part][0])
    if member.any():
        lineage.read(node, node.args[0], 1, statistic=True)
    for vector in dims[2:]:
        lineage.atoms.freeze(vector)
    return dims


def reduced(node: fx.Node, rank: int) -> tuple[list[int], bool]:
    """Which dimensions a reduction takes away, and whether they stay with size 1."""
    given = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
    which = list(range(rank)) if given is None or given == [] else [given] if isinstance(given, int) else list(given)
    return [dim % rank for dim in which], bool(argument(node, 2, "keepdim", False))


def _reduction(statistic: bool) -> Rule:
    def rule(lineage: Positions, node: fx.Node) -> Dims:
        dims = lineage.dims[node.args[0]]
        which, keep = reduced(node, len(dims))
        for dim in which:
            lineage.read(node, node.args[0], dim, statistic)
        return _left(dims, which, keep)

    return rule


def _vector_norm(lineage: Positions, node: fx.Node) -> Dims:
    """A 2-norm reads dead positions as zeros, as a sum does."""
    if argument(node, 1, "ord", 2) != 2:
        raise NoRule
    dims, given = lineage.dims[node.args[0]], argument(node, 2, "dim")
    which = [dim % len(dims) for dim in (range(len(dims)) if given is None else [given] if isinstance(given, int) else given)]
    for dim in which:
        lineage.read(node, node.args[0], dim)
    return _left(dims, which, bool(argument(node, 3, "keepdim", False)))


def _left(dims: Dims, which: list[int], keep: bool) -> Dims:
    return tuple(never(1) if dim in which else vector for dim, vector in enumerate(dims) if keep or dim not in which)


def _frozen_reduction(lineage: Positions, node: fx.Node) -> Any:
    """A maximum and its like: what a dead position would have given cannot be told."""
    dims = lineage.dims[node.args[0]]
    which, keep = reduced(node, len(dims))
    for dim in which:
        lineage.atoms.freeze(dims[dim])
    left, shape = _left(dims, which, keep), lineage.shapes[node]
    return [left] * len(shape) if isinstance(shape, list) else left


def _along(lineage: Positions, node: fx.Node) -> Any:
    """Operators that work along one dimension, which stays whole: softmax, cumulative sums, sorting."""
    dims = lineage.dims[node.args[0]]
    which = argument(node, 1, "dim", -1)
    for dim in which if isinstance(which, (list, tuple)) else [which]:
        lineage.atoms.freeze(dims[dim])
    shape = lineage.shapes[node]
    return [dims] * len(shape) if isinstance(shape, list) else dims


_FROZEN = ("amax", "amin", "max", "min", "argmax", "argmin", "any", "all", "prod", "logsumexp", "var", "std", "median")
_ALONG = ("softmax", "log_softmax", "_softmax", "_log_softmax", "softmin", "cumsum", "cumprod", "sort", "argsort", "logcumsumexp")
PRODUCTS: dict[str, Rule] = {
    "linear": _linear, "matmul": _matmul, "bmm": _matmul, "mm": _matmul, "mv": _matmul, "dot": _matmul, "linalg_matmul": _matmul,
    "addmm": _added_product, "addmv": _added_product, "baddbmm": _added_product, "einsum": _einsum,
    **dict.fromkeys(("conv1d", "conv2d", "conv3d"), _convolution),
    **dict.fromkeys(("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"), _transposed),
    "scaled_dot_product_attention": _attention,
    "lstm": _recurrent(4), "dynamic_lstm": _recurrent(4), "gru": _recurrent(3), "rnn_tanh": _recurrent(1), "rnn_relu": _recurrent(1),
}  # fmt: skip
STATISTICS: dict[str, Rule] = {
    "batch_norm": _batch_norm, "layer_norm": _layer_norm, "rms_norm": _layer_norm, "group_norm": _group_norm,
    "mean": _reduction(True), "sum": _reduction(False), "linalg_vector_norm": _vector_norm,
    **dict.fromkeys(_FROZEN, _frozen_reduction), **dict.fromkeys(_ALONG, _along),
}  # fmt: skip
NOT_POINTWISE = ("glu", "prelu")  # although tagged so
POINTWISE = dict.fromkeys(
    ["hardswish", "dropout", "feature_dropout", "alpha_dropout", "masked_fill", "where", "__and__", "__or__", "clamp", "fill", "copy", "elu"],
    pointwise,
)
RULES: dict[str, Rule] = {**VIEWS, **SIZES, **POINTWISE, **PRODUCTS, **STATISTICS, "fake_quantize": _fake_quantize, "prelu": _prelu}
RULES |= dict.fromkeys(("fake_quantize_groups", "fake_quantize_levels"), _fake_quantize_rows)

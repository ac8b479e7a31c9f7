"""The rules of operators that move, split, join or make positions without computing with them. See ``lineage_rules.py``."""

# pyright: reportArgumentType=false, reportCallIssue=false, reportAttributeAccessIssue=false, reportOptionalSubscript=false
# pyright: reportIndexIssue=false, reportOptionalMemberAccess=false, reportOptionalIterable=false, reportGeneralTypeIssues=false
# pyright: reportOperatorIssue=false
# (torch.fx types every argument as a union of everything)

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from torch import fx

from .atoms import Ids
from .positions import Dims, Positions, never
from .rewrite import argument

Rule = Callable[[Positions, fx.Node], Any]


class NoRule(Exception):
    """A form of an operator that its rule does not know."""


def same(lineage: Positions, node: fx.Node) -> Dims:
    """The positions of the first operand, as they are."""
    return lineage.dims[node.args[0]]


# Views ------------------------------------------------------------------------------------------------------------------------------


def _view(lineage: Positions, node: fx.Node) -> Dims:
    made = regroup(lineage, lineage.dims[node.args[0]], lineage.shapes[node])
    sizes = next((part for part in node.args[1:] if isinstance(part, (list, tuple))), ())
    first = node.args[1] % len(lineage.dims[node.args[0]]) if sizes and isinstance(node.args[1], int) else 0  # of an unflatten
    named = [dim for dim, size in enumerate(sizes, first) if isinstance(size, fx.Node) and made[dim].any()]
    left = first + list(sizes).index(-1) if -1 in sizes else None
    if len(named) > 1 or (named and left is not None and lineage.is_open(node, left)):
        # Two sizes that come from shapes cannot both be left to the runtime.
        for dim in named:
            lineage.atoms.freeze(made[dim])
    return made


def _view_like(lineage: Positions, node: fx.Node) -> Dims:
    made = regroup(lineage, lineage.dims[node.args[0]], lineage.shapes[node])
    for vector, other in zip(made, lineage.dims[node.args[1]], strict=True):
        lineage.atoms.unify(vector, other)
    return made


def regroup(lineage: Positions, dims: Dims, shape: Sequence[int]) -> Dims:
    """The vectors of a value that is viewed as another shape: the least groups of dimensions with equal products are merged and split."""
    made: list[Ids] = []
    old, new = list(dims), list(shape)
    while old or new:
        group, sizes = old[:1], new[:1]
        old, new = old[1:], new[1:]
        while math.prod(map(len, group)) != math.prod(sizes):
            if math.prod(map(len, group)) < math.prod(sizes):
                if not old:
                    raise NoRule
                group.append(old.pop(0))
            elif not new:
                raise NoRule
            else:
                sizes.append(new.pop(0))
        made += _regrouped(lineage, group, sizes)
    return tuple(made)


def _regrouped(lineage: Positions, group: Sequence[Ids], sizes: Sequence[int]) -> list[Ids]:
    """Split along the boundaries of old and new dimensions both, then merge; where those do not nest, merge all and split."""
    bounds = sorted({1, *itertools.accumulate(map(len, group), operator.mul), *itertools.accumulate(sizes, operator.mul)})
    if any(high % low for low, high in itertools.pairwise(bounds)):
        return _split(lineage, _merged(lineage, group), sizes)
    pieces = _pieces(bounds, [len(vector) for vector in group])
    parts = iter([part for vector, inner in zip(group, pieces, strict=True) for part in _split(lineage, vector, inner)])
    return [_merged(lineage, [next(parts) for _ in inner]) for inner in _pieces(bounds, sizes)]


def _pieces(bounds: Sequence[int], sizes: Sequence[int]) -> list[list[int]]:
    """Each dimension as the sizes that the bounds (cumulative products) split it into; a dimension of size 1 has none."""
    made, start = [], 1
    for size in sizes:
        inner = [bound for bound in bounds if start <= bound <= start * size]
        made.append([high // low for low, high in itertools.pairwise(inner)])
        start *= size
    return made


def _merged(lineage: Positions, group: Sequence[Ids]) -> Ids:
    flat = None
    for vector in group:
        if len(vector) != 1:
            flat = vector if flat is None else lineage.atoms.product(flat, vector)
    return never(1) if flat is None else flat


def _split(lineage: Positions, flat: Ids, sizes: Sequence[int]) -> list[Ids]:
    real = [size for size in sizes if size != 1]
    parts: list[Ids] = []
    while real:
        first = real.pop(0)
        if real:
            outer, flat = lineage.atoms.factor(flat, first, math.prod(real))
            parts.append(outer)
        else:
            parts.append(flat)
    found = iter(parts)
    return [never(1) if size == 1 else next(found) for size in sizes]


def _permuted(order: Callable[[fx.Node, int], Sequence[int]]) -> Rule:
    def rule(lineage: Positions, node: fx.Node) -> Dims:
        dims = lineage.dims[node.args[0]]
        return tuple(dims[dim] for dim in order(node, len(dims)))

    return rule


def _swapped(node: fx.Node, rank: int) -> list[int]:
    order, (one, two) = list(range(rank)), (dim % rank for dim in node.args[1:3])
    order[one], order[two] = order[two], order[one]
    return order


def _last_two(node: fx.Node, rank: int) -> list[int]:
    return [*range(rank - 2), rank - 1, rank - 2] if rank > 1 else list(range(rank))


def _moved(node: fx.Node, rank: int) -> list[int]:
    source, target = ([dim] if isinstance(dim, int) else list(dim) for dim in node.args[1:3])
    order = [dim for dim in range(rank) if dim not in {one % rank for one in source}]
    for to, one in sorted((t % rank, s % rank) for s, t in zip(source, target, strict=True)):
        order.insert(to, one)
    return order


# Splitting and joining --------------------------------------------------------------------------------------------------------------


def dimension(node: fx.Node, position: int, rank: int, default: int = 0) -> int:
    """The dimension argument of an operator, counted from the front."""
    return int(argument(node, position, "dim", default)) % rank


def _cat(lineage: Positions, node: fx.Node) -> Dims:
    parts = [lineage.dims[part] for part in node.args[0] if lineage.shapes[part] != (0,)]
    rank = len(parts[0])
    dim = dimension(node, 1, rank)
    for part in parts[1:]:
        for d in range(rank):
            if d != dim:
                lineage.atoms.unify(parts[0][d], part[d])
    joined = np.concatenate([part[dim] for part in parts])
    return (*parts[0][:dim], joined, *parts[0][dim + 1 :])


def _stack(lineage: Positions, node: fx.Node) -> Dims:
    parts = [lineage.dims[part] for part in node.args[0]]
    for part in parts[1:]:
        for one, other in zip(parts[0], part, strict=True):
            lineage.atoms.unify(one, other)
    dim = dimension(node, 1, len(parts[0]) + 1)
    return (*parts[0][:dim], never(len(parts)), *parts[0][dim:])


def _parts(lineage: Positions, node: fx.Node) -> list[Dims]:
    """split, chunk: consecutive stretches of one dimension, their lengths as they came out."""
    dims = lineage.dims[node.args[0]]
    dim = dimension(node, 2, len(dims))
    lineage.close(node.args[0], dim)
    made, start = [], 0
    for shape in lineage.shapes[node]:
        stretch = dims[dim][start : start + shape[dim]]
        made.append((*dims[:dim], stretch if len(stretch) > 1 else _held(lineage, stretch), *dims[dim + 1 :]))
        start += shape[dim]
    return made


def _held(lineage: Positions, vector: Ids) -> Ids:
    """A stretch of one position stays: a dimension cannot lose its last."""
    lineage.atoms.freeze(vector)
    return vector


def _unbind(lineage: Positions, node: fx.Node) -> list[Dims]:
    dims = lineage.dims[node.args[0]]
    dim = dimension(node, 1, len(dims))
    lineage.atoms.freeze(dims[dim])
    return [(*dims[:dim], *dims[dim + 1 :])] * len(lineage.shapes[node])


def _slice(lineage: Positions, node: fx.Node) -> Dims:
    dims = lineage.dims[node.args[0]]
    dim = dimension(node, 1, len(dims))
    start, end, step = (argument(node, i, name, default) for i, name, default in ((2, "start", 0), (3, "end", None), (4, "step", 1)))
    lineage.close(node.args[0], dim)
    if not all(one is None or isinstance(one, int) for one in (start, end)) or step != 1:
        lineage.atoms.freeze(dims[dim])
        return (*dims[:dim], never(lineage.shapes[node][dim]), *dims[dim + 1 :])
    vector = dims[dim][start:end]
    return (*dims[:dim], vector if len(vector) > 1 else _held(lineage, vector), *dims[dim + 1 :])


def _narrow(lineage: Positions, node: fx.Node) -> Dims:
    dims = lineage.dims[node.args[0]]
    dim, start, length = dimension(node, 1, len(dims)), node.args[2], node.args[3]
    lineage.atoms.freeze(dims[dim])
    if not isinstance(start, int) or not isinstance(length, int):
        return (*dims[:dim], never(lineage.shapes[node][dim]), *dims[dim + 1 :])
    return (*dims[:dim], dims[dim][start:][:length], *dims[dim + 1 :])


def _select(lineage: Positions, node: fx.Node) -> Dims:
    """The position that is picked stays; the others of its dimension may go."""
    dims = lineage.dims[node.args[0]]
    dim, index = dimension(node, 1, len(dims)), node.args[2]
    lineage.close(node.args[0], dim)
    lineage.atoms.freeze(dims[dim][[index]] if isinstance(index, int) else dims[dim])
    return (*dims[:dim], *dims[dim + 1 :])


def _looked_up(lineage: Positions, node: fx.Node) -> Dims:
    """x[..., indices, ...]: the dimensions that are indexed stay whole."""
    dims, indices = lineage.dims[node.args[0]], node.args[1]
    which = [dim for dim, index in enumerate(indices) if index is not None]
    for dim in which:
        lineage.atoms.freeze(dims[dim])
        lineage.freeze(indices[dim])
    rank = len(lineage.shapes[node]) - (len(dims) - len(which))
    rest = [vector for dim, vector in enumerate(dims) if dim not in which]
    place = which[0] if which == list(range(which[0], which[0] + len(which))) else 0
    shape = lineage.shapes[node]
    return (*rest[:place], *map(never, shape[place : place + rank]), *rest[place:])


def _index_select(lineage: Positions, node: fx.Node) -> Dims:
    dims = lineage.dims[node.args[0]]
    dim = dimension(node, 1, len(dims))
    lineage.atoms.freeze(dims[dim])
    lineage.freeze(node.args[2])
    return (*dims[:dim], never(lineage.shapes[node][dim]), *dims[dim + 1 :])


def _embedding(lineage: Positions, node: fx.Node) -> Dims:
    rows, columns = lineage.dims[node.args[0]]
    lineage.atoms.freeze(rows)
    return (*lineage.dims[node.args[1]], columns)


def _flip(lineage: Positions, node: fx.Node) -> Dims:
    dims = lineage.dims[node.args[0]]
    which = {dim % len(dims) for dim in node.args[1]}
    return tuple(vector[::-1] if dim in which else vector for dim, vector in enumerate(dims))


def _roll(lineage: Positions, node: fx.Node) -> Dims:
    dims = lineage.dims[node.args[0]]
    for dim in argument(node, 2, "dims", ()) or range(len(dims)):
        lineage.atoms.freeze(dims[dim])
    return dims


VIEWS: dict[str, Rule] = {
    **dict.fromkeys(["view", "reshape", "flatten", "unflatten", "_unsafe_view", "squeeze", "unsqueeze", "ravel"], _view),
    **dict.fromkeys(("view_as", "reshape_as"), _view_like),
    **dict.fromkeys(["clone", "contiguous", "_to_copy", "to", "detach", "alias", "lift_fresh_copy", "type_as"], same),
    **dict.fromkeys(["zeros_like", "ones_like", "full_like", "empty_like", "rand_like", "randn_like"], same),
    "permute": _permuted(lambda node, rank: [dim % rank for dim in node.args[1]]),
    **dict.fromkeys(("transpose", "swapaxes", "swapdims"), _permuted(_swapped)),
    **dict.fromkeys(("mT", "t", "adjoint"), _permuted(_last_two)),
    "numpy_T": _permuted(lambda node, rank: range(rank - 1, -1, -1)),
    **dict.fromkeys(("movedim", "moveaxis"), _permuted(_moved)),
    **dict.fromkeys(("cat", "concat", "concatenate"), _cat), "stack": _stack,
    **dict.fromkeys(["split", "split_with_sizes", "chunk", "unsafe_split", "unsafe_chunk"], _parts), "unbind": _unbind,
    "slice": _slice, "narrow": _narrow, "select": _select, "index": _looked_up, "index_select": _index_select, "embedding": _embedding,
    "flip": _flip, "roll": _roll,
}  # fmt: skip

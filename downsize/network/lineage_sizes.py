"""The rules of operators that repeat, make, pad and resize positions. See ``lineage_rules.py``."""

# pyright: reportArgumentType=false, reportCallIssue=false, reportAttributeAccessIssue=false, reportOptionalSubscript=false
# pyright: reportIndexIssue=false, reportOptionalMemberAccess=false, reportOptionalIterable=false, reportGeneralTypeIssues=false
# pyright: reportOperatorIssue=false
# (torch.fx types every argument as a union of everything)

from __future__ import annotations

from typing import Any

import numpy as np
from torch import fx

from .lineage_views import NoRule, Rule, dimension
from .positions import Dims, Positions, never
from .rewrite import argument

# Repeating and making ---------------------------------------------------------------------------------------------------------------


def _expand(lineage: Positions, node: fx.Node) -> Dims:
    dims, shape, sizes = lineage.dims[node.args[0]], lineage.shapes[node], node.args[1]
    missing = len(shape) - len(dims)
    made = []
    for dim, size in enumerate(shape):
        old = dims[dim - missing] if dim >= missing else None
        if old is not None and len(old) == size:
            if isinstance(sizes[dim], fx.Node):
                lineage.atoms.freeze(old)
            made.append(old)
        else:
            made.append(lineage.fresh(size, node) if isinstance(sizes[dim], int) else never(size))
    return tuple(made)


def _expand_like(lineage: Positions, node: fx.Node) -> Dims:
    dims, like = lineage.dims[node.args[0]], lineage.dims[node.args[1]]
    for back, vector in enumerate(reversed(dims), 1):
        if len(vector) == len(like[-back]):
            lineage.atoms.unify(vector, like[-back])
    return like


def _repeat(lineage: Positions, node: fx.Node) -> Dims:
    dims, counts = lineage.dims[node.args[0]], node.args[1]
    missing = len(counts) - len(dims)
    made = []
    for dim, count in enumerate(counts):
        old = dims[dim - missing] if dim >= missing else never(1)
        made.append(np.tile(old, count if isinstance(count, int) else lineage.shapes[node][dim] // len(old)))
    return tuple(made)


def _repeat_each(lineage: Positions, node: fx.Node) -> Dims:
    dims, count, dim = lineage.dims[node.args[0]], node.args[1], argument(node, 2, "dim")
    if dim is None or not isinstance(count, int):
        raise NoRule
    dim %= len(dims)
    return (*dims[:dim], np.repeat(dims[dim], count), *dims[dim + 1 :])


def _pad(lineage: Positions, node: fx.Node) -> Dims:
    """New positions are cut by another amount; only a constant can be put there without reading the others."""
    dims, amounts = list(lineage.dims[node.args[0]]), node.args[1]
    for back in range(len(amounts) // 2):
        dim, pair = len(dims) - 1 - back, amounts[2 * back : 2 * back + 2]
        if tuple(pair) == (0, 0):
            continue
        plain = argument(node, 2, "mode", "constant") == "constant" or not isinstance(argument(node, 2, "mode"), str)
        if plain and all(isinstance(amount, int) and amount >= 0 for amount in pair):
            before, behind = (lineage.fresh(amount, node) for amount in pair)
            dims[dim] = np.concatenate([before, dims[dim], behind])
        else:
            lineage.atoms.freeze(dims[dim])
            dims[dim] = never(lineage.shapes[node][dim])
    return tuple(dims)


def _made(lineage: Positions, node: fx.Node) -> Dims:
    """A tensor of one value: as many positions as are wanted."""
    sizes = next(part for part in node.args if isinstance(part, (list, tuple)))
    return tuple(lineage.fresh(size, node) if isinstance(size, int) else never(real) for size, real in zip(sizes, lineage.shapes[node], strict=True))


def _fixed(lineage: Positions, node: fx.Node) -> Any:
    """Values that depend on where they stand."""
    return tuple(map(never, lineage.shapes[node]))


# Space ------------------------------------------------------------------------------------------------------------------------------


def _spatial(count: int) -> Rule:
    """Pooling and resizing: the last ``count`` dimensions are mixed, the others pass."""

    def rule(lineage: Positions, node: fx.Node) -> Any:
        dims, shape = lineage.dims[node.args[0]], lineage.shapes[node]
        for vector in dims[-count:]:
            lineage.atoms.freeze(vector)
        shapes = shape if isinstance(shape, list) else [shape]
        made = [(*dims[:-count], *map(never, one[-count:])) for one in shapes]
        return made if isinstance(shape, list) else made[0]

    return rule


def _pixel_shuffle(lineage: Positions, node: fx.Node) -> Dims:
    *front, channels, height, width = lineage.dims[node.args[0]]
    outer, inner = lineage.atoms.factor(channels, len(channels) // node.args[1] ** 2, node.args[1] ** 2)
    for vector in (inner, height, width):
        lineage.atoms.freeze(vector)
    return (*front, outer, *map(never, lineage.shapes[node][-2:]))


def _pixel_unshuffle(lineage: Positions, node: fx.Node) -> Dims:
    *front, channels, height, width = lineage.dims[node.args[0]]
    for vector in (height, width):
        lineage.atoms.freeze(vector)
    return (*front, np.repeat(channels, node.args[1] ** 2), *map(never, lineage.shapes[node][-2:]))


def _channel_shuffle(lineage: Positions, node: fx.Node) -> Dims:
    batch, channels, *rest = lineage.dims[node.args[0]]
    outer, inner = lineage.atoms.factor(channels, node.args[1], len(channels) // node.args[1])
    return (batch, lineage.atoms.product(inner, outer), *rest)


def _glu(lineage: Positions, node: fx.Node) -> Dims:
    dims = lineage.dims[node.args[0]]
    dim = dimension(node, 1, len(dims), -1)
    half = len(dims[dim]) // 2
    lineage.atoms.unify(dims[dim][:half], dims[dim][half:])
    return (*dims[:dim], dims[dim][:half], *dims[dim + 1 :])


_POOLS = "max_pool avg_pool adaptive_avg_pool adaptive_max_pool"
_RESIZED = "upsample_nearest upsample_linear upsample_bilinear upsample_trilinear upsample_bicubic _upsample_nearest_exact"
SIZES: dict[str, Rule] = {
    **dict.fromkeys(("expand", "broadcast_to"), _expand), "expand_as": _expand_like, "repeat": _repeat, "repeat_interleave": _repeat_each,
    **dict.fromkeys(("pad", "constant_pad_nd"), _pad),
    **dict.fromkeys(["zeros", "ones", "full", "empty", "new_zeros", "new_ones", "new_full", "new_empty", "rand", "randn"], _made),
    **dict.fromkeys(["arange", "eye", "scalar_tensor", "linspace"], _fixed),
    **{f"{name}{count}d": _spatial(count) for name in (_POOLS + " " + _RESIZED).split() for count in (1, 2, 3)},
    "max_pool2d_with_indices": _spatial(2), "_adaptive_avg_pool2d": _spatial(2),
    "pixel_shuffle": _pixel_shuffle, "pixel_unshuffle": _pixel_unshuffle, "channel_shuffle": _channel_shuffle, "glu": _glu,
}  # fmt: skip

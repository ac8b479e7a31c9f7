"""Cutting: positions that die are taken out of every tensor that carries them, and out of every size that the graph spells."""

# pyright: reportArgumentType=false, reportCallIssue=false, reportAttributeAccessIssue=false, reportOptionalSubscript=false
# pyright: reportIndexIssue=false, reportOptionalMemberAccess=false, reportOptionalIterable=false, reportGeneralTypeIssues=false
# pyright: reportOperatorIssue=false
# (torch.fx types every argument as a union of everything)

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from ..errors import CutError
from .atoms import Ids
from .lineage import Lineage
from .lineage_rules import operator_name
from .network import Network
from .parts import assign
from .positions import output_shapes
from .rewrite import argument, aten, reshape_views


class Survivors:
    """Which positions of which dimensions live when some units die.

    Args:
        lineage: of the network.
        dead: axis name -> the numbers of its units that die.
        allow_empty: let dimensions lose all their positions.

    Raises:
        CutError: no such axis or unit, or a dimension would lose its last position.
    """

    def __init__(self, lineage: Lineage, dead: Mapping[str, Iterable[int]], allow_empty: bool = False) -> None:
        self.lineage = lineage
        atoms: list[int] = []
        for name, units in dead.items():
            try:
                axis = lineage.axis(name)
            except KeyError as error:
                raise CutError(error.args[0]) from None
            chosen = sorted({int(unit) for unit in units})
            if chosen and not 0 <= chosen[0] <= chosen[-1] < axis.units:
                raise CutError(f"axis {name!r} has the units 0 to {axis.units - 1}; unit {chosen[-1] if chosen[0] >= 0 else chosen[0]} was to go.")
            atoms += axis.atoms[chosen].tolist()
        self.dead = frozenset(atoms)
        self._living = lineage.atoms.living(self.dead)
        if not allow_empty:
            self._refuse_empty()

    def _refuse_empty(self) -> None:
        for name, dims in self.lineage.constants.values():
            for dim, vector in enumerate(dims):
                if len(vector) and not self.of(vector).any():
                    raise CutError(f"dimension {dim} of {name} would lose its last position; keep one unit, or take the block out whole.")
        for read in self.lineage.reads:
            if read.statistic and not self.dims(read.source)[read.dim].any():
                raise CutError(f"{read.node.name} would be a statistic of no position at all; keep one unit of what it reads.")

    def of(self, vector: Ids) -> np.ndarray:
        """Which positions of a dimension live, bool [positions]."""
        return self._living[vector]

    def dims(self, node: fx.Node) -> list[np.ndarray]:
        """Which positions of each dimension of a node's value live."""
        return [self.of(vector) for vector in self.lineage.dims[node]]

    def count(self, vector: Ids) -> int:
        """How many positions of a dimension live."""
        return int(self.of(vector).sum())

    def shape(self, dims: Any) -> Any:
        """The shape of a value after the cut; a list of shapes for several values."""
        return [self.shape(part) for part in dims] if isinstance(dims, list) else tuple(map(self.count, dims))


def cut(network: Network | Lineage, dead: Mapping[str, Iterable[int]], changed: Network | None = None) -> Network:
    """A network without those units.

    Args:
        network: it, or its lineage where several cuts are tried.
        dead: axis name (see ``lineage.axes``) -> the numbers of the units that go, counted from 0.
        changed: the network with other values in its tensors, to be cut instead of it.

    Returns: a new network, smaller in every tensor that carried the units; constants that do not are shared with the old one.

    Raises:
        CutError: no such axis or unit; a dimension would lose its last position; or the graph then gives other shapes than it should, which
            names the operator (and would be a fault of downsize).

    Example: ``cut(network, {"features.0": [1, 5]})`` takes two of the channels that the convolution ``features.0`` makes.
    """
    lineage = network if isinstance(network, Lineage) else Lineage(network)
    survivors = Survivors(lineage, dead)
    made = (changed or lineage.network).fork()
    by_name = {node.name: node for node in made.graph.nodes}
    twins = {node: by_name[node.name] for node in lineage.network.graph.nodes}
    slice_constants(made, survivors)
    for node, twin in twins.items():
        rewrite = REWRITES.get(operator_name(node)) if node.op == "call_function" and node in lineage.dims else None
        if rewrite is not None:
            rewrite(survivors, node, twin)
    reshape_views(made)
    made.recompile()
    _check_shapes(made, survivors, {twin: node for node, twin in twins.items()})
    return made


def slice_constants(made: Network, survivors: Survivors) -> None:
    """Take the dead positions out of the constants of ``made``; a tensor with two names stays one."""
    sliced: dict[int, Tensor] = {}
    known = {node.target: vectors for node, vectors in survivors.lineage.dims.items() if node.op == "get_attr"}
    for name, tensor in list(made.named_tensors()):
        alive = [survivors.of(vector) for vector in known.get(name, ())]
        if not all(one.all() for one in alive):
            if id(tensor) not in sliced:
                sliced[id(tensor)] = _sliced(tensor, alive)
            assign(made.graph_module, name, sliced[id(tensor)])


def _sliced(tensor: Tensor, alive: Sequence[np.ndarray]) -> Tensor:
    part = tensor.detach()
    for dim, one in enumerate(alive):
        if not one.all():
            part = part.index_select(dim, torch.from_numpy(np.flatnonzero(one)))
    part = part.contiguous()
    return torch.nn.Parameter(part, tensor.requires_grad) if isinstance(tensor, torch.nn.Parameter) else part


def _check_shapes(made: Network, survivors: Survivors, origin: Mapping[fx.Node, fx.Node]) -> None:
    """Every value has the shape that the lineage says."""
    try:
        shapes = output_shapes(made)
    except Exception as error:
        raise CutError(f"The network cannot run after the cut: {error}") from error
    for twin, shape in shapes.items():
        if twin in origin and origin[twin] in survivors.lineage.dims:
            node = origin[twin]
            expected = survivors.shape(survivors.lineage.dims[node])
            if not _same_shape(shape, expected):
                raise CutError(f"{node.target} ({node.meta.get('module') or node.name}) gives {shape} after the cut; the lineage says {expected}.")


def _same_shape(one: Any, other: Any) -> bool:
    if isinstance(one, list):
        return all(part is None or _same_shape(part, expected) for part, expected in zip(one, other, strict=True))
    return tuple(one) == tuple(other)


# Sizes that the graph spells ----------------------------------------------------------------------------------------------------------

Rewrite = Callable[[Survivors, fx.Node, fx.Node], None]


def _sizes(position: int) -> Rewrite:
    """Operators that spell the sizes of their result in one argument."""

    def rewrite(survivors: Survivors, node: fx.Node, twin: fx.Node) -> None:
        spelled, vectors = list(node.args[position]), survivors.lineage.dims[node]
        for dim, (size, vector) in enumerate(zip(spelled, vectors, strict=True)):
            if survivors.of(vector).all() or size == -1:
                continue
            # A size that was computed from shapes: the runtime finds it, and what it was left to find before is spelled.
            if isinstance(size, fx.Node):
                spelled = [survivors.count(v) if old == -1 else old for old, v in zip(spelled, vectors, strict=True)]
            spelled[dim] = -1 if isinstance(size, fx.Node) else survivors.count(vector)
        if spelled != list(node.args[position]):
            given = [dim if not isinstance(dim, fx.Node) else twin.args[position][i] for i, dim in enumerate(spelled)]
            twin.update_arg(position, given)

    return rewrite


def _unflatten(survivors: Survivors, node: fx.Node, twin: fx.Node) -> None:
    dims, first = survivors.lineage.dims[node], node.args[1] % len(survivors.lineage.dims[node.args[0]])
    sizes = list(twin.args[2])
    for i, size in enumerate(node.args[2]):
        if size != -1 and not survivors.of(dims[first + i]).all():
            sizes[i] = survivors.count(dims[first + i]) if isinstance(size, int) else -1
    twin.update_arg(2, sizes)


def _squeeze(survivors: Survivors, node: fx.Node, twin: fx.Node) -> None:
    """Only what had one position is squeezed out, not what is left with one."""
    if all(alive.all() for alive in survivors.dims(node.args[0])):
        return
    shape = survivors.lineage.shapes[node.args[0]]
    given = node.args[1] if len(node.args) > 1 else range(len(shape))
    which = [dim for dim in ([given] if isinstance(given, int) else given) if shape[dim] == 1]
    twin.target, twin.args = aten.squeeze.dims, (twin.args[0], which)


def _repeat_each(survivors: Survivors, node: fx.Node, twin: fx.Node) -> None:
    twin.kwargs = {name: value for name, value in twin.kwargs.items() if name != "output_size"}


def _split(survivors: Survivors, node: fx.Node, twin: fx.Node) -> None:
    dims = survivors.lineage.dims[node]
    dim = int(argument(node, 2, "dim", 0))
    if all(survivors.of(part[dim]).all() for part in dims):
        return
    twin.target = aten.split_with_sizes.default
    twin.args, twin.kwargs = (twin.args[0], [survivors.count(part[dim]) for part in dims], dim), {}


def _slice(survivors: Survivors, node: fx.Node, twin: fx.Node) -> None:
    source = survivors.lineage.dims[node.args[0]]
    dim = int(argument(node, 1, "dim", 0)) % len(source)
    alive = survivors.of(source[dim])
    if alive.all():
        return
    start, end, _ = slice(argument(node, 2, "start"), argument(node, 3, "end")).indices(len(alive))
    step = argument(node, 4, "step", 1)
    twin.args, twin.kwargs = (twin.args[0], dim, int(alive[:start].sum()), int(alive[: max(start, end)].sum()), step), {}


def _select(survivors: Survivors, node: fx.Node, twin: fx.Node) -> None:
    source = survivors.lineage.dims[node.args[0]]
    alive = survivors.of(source[int(node.args[1]) % len(source)])
    if not alive.all():
        twin.update_arg(2, int(alive[: node.args[2] % len(alive)].sum()))


def _convolution(survivors: Survivors, node: fx.Node, twin: fx.Node) -> None:
    groups = int(argument(node, 6, "groups", 1))
    if groups > 1:
        channels = survivors.lineage.dims[node.args[0]][1]
        twin.args = (*twin.args[:6], _living_groups(survivors, channels, groups), *twin.args[7:])


def _living_groups(survivors: Survivors, channels: Ids, groups: int) -> int:
    return int(survivors.of(channels).reshape(groups, -1).any(1).sum())


def _group_norm(survivors: Survivors, node: fx.Node, twin: fx.Node) -> None:
    twin.update_arg(1, _living_groups(survivors, survivors.lineage.dims[node.args[0]][1], int(node.args[1])))


def _channel_shuffle(survivors: Survivors, node: fx.Node, twin: fx.Node) -> None:
    twin.update_arg(1, _living_groups(survivors, survivors.lineage.dims[node.args[0]][1], int(node.args[1])))


def _layer_norm(survivors: Survivors, node: fx.Node, twin: fx.Node) -> None:
    count = len(node.args[1])
    twin.update_arg(1, [survivors.count(vector) for vector in survivors.lineage.dims[node][-count:]])


def _attention(survivors: Survivors, node: fx.Node, twin: fx.Node) -> None:
    """The scale stays what it was: 1 / sqrt of the width that q had."""
    if argument(node, 6, "scale") is None:
        twin.kwargs = {**twin.kwargs, "scale": 1 / math.sqrt(len(survivors.lineage.dims[node.args[0]][-1]))}


def _pad(survivors: Survivors, node: fx.Node, twin: fx.Node) -> None:
    dims, source, amounts = survivors.lineage.dims[node], survivors.lineage.dims[node.args[0]], list(node.args[1])
    for back in range(len(amounts) // 2):
        alive = survivors.of(dims[-1 - back])
        if not alive.all():
            before = amounts[2 * back]
            amounts[2 * back : 2 * back + 2] = [int(alive[:before].sum()), int(alive[before + len(source[-1 - back]) :].sum())]
    twin.update_arg(1, amounts)


_CONVOLUTIONS = [f"conv{kind}{dims}d" for kind in ("", "_transpose") for dims in (1, 2, 3)]
REWRITES: dict[str, Rewrite] = {
    **dict.fromkeys(["view", "reshape", "_unsafe_view", "expand", "broadcast_to"], _sizes(1)), "unflatten": _unflatten,
    "squeeze": _squeeze, "repeat_interleave": _repeat_each,
    **dict.fromkeys(["split", "split_with_sizes", "chunk", "unsafe_split", "unsafe_chunk"], _split),
    **dict.fromkeys(["zeros", "ones", "full", "empty", "rand", "randn"], _sizes(0)),
    **dict.fromkeys(["new_zeros", "new_ones", "new_full", "new_empty"], _sizes(1)),
    "slice": _slice, "select": _select, **dict.fromkeys(_CONVOLUTIONS, _convolution), "group_norm": _group_norm,
    "channel_shuffle": _channel_shuffle, **dict.fromkeys(("layer_norm", "rms_norm"), _layer_norm),
    "scaled_dot_product_attention": _attention, **dict.fromkeys(("pad", "constant_pad_nd"), _pad),
}  # fmt: skip

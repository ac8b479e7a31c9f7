"""Where a network can be pruned: an axis, the layers that read it, and what that costs for any width."""

# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportOptionalMemberAccess=false, reportCallIssue=false

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, fx

from ..network.columns import MATRIX_LAYERS, groups_of
from ..network.empty import can_empty
from ..network.lineage import Axis, Lineage
from ..network.network import Network
from ..network.rewrite import argument, constant

KINDS = ("channels", "heads", "neurons", "head_dims", "width")


@dataclass(frozen=True, eq=False)
class Reader:
    """A linear layer or convolution that reads an axis: its node's name, its groups, and the unit of each column of its weight matrix
    (int64 [columns], -1 for columns of no unit). ``own``: nothing else reads its weight and bias, so that they may be changed."""

    node: str
    groups: int
    unit: Tensor
    own: bool


@dataclass(frozen=True, eq=False)
class Site:
    """An axis with its readers. ``whole``: these are all there are, and their own, so that zero columns in them are what a cut computes.
    ``emptiable``: all its units may go."""

    axis: Axis
    readers: tuple[Reader, ...]
    whole: bool
    emptiable: bool


def sites(lineage: Lineage, what: Sequence[str] = ("channels", "heads", "neurons")) -> tuple[Site, ...]:
    """The axes of these kinds, with two units or more; inexact ones only where ``width`` is among the kinds.

    Example: of ``Sequential(Conv2d(3, 8, 3), ReLU(), Conv2d(8, 4, 3))`` one, whose reader has 72 columns, 9 for each of the 8 channels.
    """
    names = {id(lineage.network.tensor(name)): name for name, _ in lineage.constants.values()}
    layers = [node for node in lineage.network.graph.nodes if node.target in MATRIX_LAYERS and node.args[1].op == "get_attr"]
    # What crosses a statistic changes it: only on request.
    chosen = [axis for axis in lineage.axes if axis.kind in what and axis.units > 1 and (axis.exact or "width" in what)]
    readings = Counter(
        id(lineage.network.tensor(str(node.target))) for node in lineage.network.graph.nodes if node.op == "get_attr" for _ in node.users
    )
    return tuple(_site(lineage, axis, layers, names, readings) for axis in chosen)


def first_reader(network: Network, site: Site) -> fx.Node:
    """The first of a site's readers in the graph."""
    names = {reader.node for reader in site.readers}
    return next(node for node in network.graph.nodes if node.name in names)


def in_order(network: Network, found: Sequence[Site]) -> list[Site]:
    """The sites by where they are first read in the graph; those without readers come last."""
    rank = {node.name: number for number, node in enumerate(network.graph.nodes)}
    return sorted(found, key=lambda site: min((rank[reader.node] for reader in site.readers), default=len(rank)))


def _site(lineage: Lineage, axis: Axis, layers: Sequence[fx.Node], names: dict[int, str], readings: Counter[int]) -> Site:
    readers = []
    for node in layers:
        tensor = lineage.network.tensor(str(node.args[1].target))
        unit = axis.carriers.get((names[id(tensor)], 1))
        if unit is not None:
            each = tensor[0, 0].numel()
            readers.append(Reader(node.name, groups_of(node), torch.from_numpy(np.repeat(unit, each)), _is_own(lineage.network, node, readings)))
    known = {reader.node for reader in readers}
    atoms = set(axis.atoms.tolist())
    whole = axis.exact and all(read.node.name in known for read in lineage.reads if _reads(lineage, read.source, read.dim, atoms))
    whole = whole and bool(readers) and all(reader.own for reader in readers)
    return Site(axis, tuple(readers), whole, whole and can_empty(lineage, axis))


def _is_own(network: Network, node: fx.Node, readings: Counter[int]) -> bool:
    tensors = [constant(network, node.args[1]), constant(network, argument(node, 2, "bias"))]
    return all(tensor is None or readings[id(tensor)] == 1 for tensor in tensors)


def _reads(lineage: Lineage, source: fx.Node, dim: int, atoms: set[int]) -> bool:
    ids = np.unique(lineage.atoms.find(lineage.dims[source][dim])).tolist()
    return any(not atoms.isdisjoint(lineage.atoms.leaves(one)) for one in ids)

"""Which values inside a student stand for which inside its teacher."""

# pyright: reportArgumentType=false, reportAttributeAccessIssue=false

from __future__ import annotations

import math
import types
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from ..network.blocks import PASSED_ON, SUMS, blocks
from ..network.flow import Flow
from ..network.memory import is_written
from ..network.network import Network
from ..network.rewrite import aten
from ..network.statistics import Hook, walk
from ..numerics.distillation import kernel
from ..pruning.depth import CHANNELS_LAST, CHANNELS_SECOND
from ..pruning.structure import QUANTIZERS

# Positions of calibration data on which layers are compared, and of these so many for the comparison itself.
ROWS, COMPARED = 1024, 512
# What the same name counts beside a similarity of at most 1: no number of others outweighs it.
SAME_NAME = 100.0
# Through these the channels may change places with another dimension of the same size.
TURNS = {aten.transpose.int, aten.permute.default, aten.t.default, aten.mT.default, aten.movedim.int, aten.swapaxes.default}
# What only hands a value on, or a part of it, is no layer.
MOVES = PASSED_ON | TURNS | {
    aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.flatten.using_ints, aten.unflatten.int, aten.slice.Tensor,
    aten.select.int, aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims, aten.unsqueeze.default, aten.expand.default,
}  # fmt: skip


@dataclass(frozen=True)
class Layer:
    """A value that all data passes through: its node's name, its module's path, ``kind`` (``vector``, one position a sample; ``tokens``, of
    rank 3; ``map``, of higher rank), the dimension of its channels, and its sizes at the example: ``positions`` without those of the batch
    and the channels, and ``width``, how many channels."""

    name: str
    module: str
    kind: str
    channels: int
    positions: tuple[int, ...]
    width: int

    def rows(self, value: Tensor) -> Tensor:
        """The value as [samples, positions, channels]."""
        moved = value.movedim(self.channels, -1)
        return moved.reshape(moved.shape[0], -1, moved.shape[-1])


@dataclass(frozen=True)
class Pair:
    """A layer of the student, the one of the teacher that it is to give, and their linear CKA on calibration data."""

    student: Layer
    teacher: Layer
    similarity: float


# Layers -----------------------------------------------------------------------------------------------------------------------------


def layers(network: Network) -> tuple[Layer, ...]:
    """The values that all data passes through, in the graph's order: of those without products between them the last one of each kind.

    Outputs, and what is computed from inputs or up to outputs without any product, are not among them. Where a network rounds values, the
    layer is the value before.
    """
    network = unquantized(network)
    flow = Flow(network)
    output = network.graph.output_node()
    ports = [node for node in network.graph.nodes if node.op == "placeholder" and flow.reaches(node, output)]
    # Masks made from an input run past all layers; what residual branches run past does not, if no product lies beside it.
    entries = dict.fromkeys(block.entry for block in blocks(network) if block.exit.target in SUMS)
    sources = [*ports, *(node for node in entries if not _products_beside(flow, node, output))]
    passed = {node for source in sources for node in flow.waists(source, output)}
    found: list[tuple[fx.Node, Layer]] = []
    waists = sorted((node for node in passed if node.op == "call_function"), key=flow.place.__getitem__)
    groups = _groups(flow, ports, waists)
    ends = {group for node, group in groups.items() if node in output.all_input_nodes}
    for node in waists:
        layer = _layer(flow, node) if node.target not in MOVES and groups[node] > 0 and groups[node] not in ends else None
        if layer is not None:
            if found and groups[found[-1][0]] == groups[node] and found[-1][1].kind == layer.kind:
                found.pop()
            found.append((node, layer))
    return tuple(layer for _, layer in found)


def unquantized(network: Network) -> Network:
    """A fork in which what reads a rounded value reads the value itself: quantizers, and the Python functions that stand for them in training,
    are gone, the other nodes have the names they had."""
    made = network.fork()
    for node in list(made.graph.nodes):
        if node.op == "call_function" and (node.target in QUANTIZERS or isinstance(node.target, types.FunctionType)):
            node.replace_all_uses_with(node.args[0])
            made.graph.erase_node(node)
    made.recompile()
    return made


def _products_beside(flow: Flow, node: fx.Node, output: fx.Node) -> bool:
    """Whether the outputs depend on products that are neither computed from the node's value nor it from them."""
    return bool(flow.macs_of(flow.before(output) & ~(flow.before(node) | flow.bit(node) | flow.between(node, output))))


def _groups(flow: Flow, ports: Sequence[fx.Node], waists: Sequence[fx.Node]) -> dict[fx.Node, int]:
    """For each node how many steps with products lie before it."""
    number, groups = 0, dict[fx.Node, int]()
    before = flow.set_of(ports)
    for node in waists:
        above = flow.before(node) | flow.bit(node)
        number += bool(flow.macs_of(above & ~before))
        before |= above
        groups[node] = number
    return groups


def _layer(flow: Flow, node: fx.Node) -> Layer | None:
    """The node as a layer; None where its value is none: whole numbers, no batch first, or channels nobody knows."""
    form = flow.forms.get(node)
    sizes = [port.example[0] for port in flow.network.ports if port.dims[:1] == ("batch",)]
    if form is None or not form[0].is_floating_point or not sizes or form[1][:1] != (sizes[0],) or is_written(node):
        return None
    shape, rank = form[1], len(form[1])
    # A first dimension of the batch's size by chance does not grow with it.
    if rank < 2 or (form[2] is not None and form[2][0] == shape[0]):
        return None
    channels = rank - 1 if rank == 2 else _channels(flow, node)
    if channels is None:
        return None
    positions = tuple(size for dim, size in enumerate(shape) if dim not in (0, channels))
    kind = "tokens" if rank == 3 else "vector" if math.prod(positions) == 1 else "map"
    return Layer(node.name, node.meta.get("module", ""), kind, channels, positions, shape[channels])


def _channels(flow: Flow, node: fx.Node) -> int | None:
    """The dimension of the channels: by the nearest layer that makes or reads a value of this shape."""
    shape, todo, seen = flow.forms[node][1], [node], {node}
    while todo:
        one = todo.pop(0)
        for maker in [one, *one.users]:
            known = maker.target in CHANNELS_SECOND | CHANNELS_LAST and (maker is one or maker.args[0] is one)
            if known:
                return 1 if maker.target in CHANNELS_SECOND else len(shape) - 1
        beside = [] if one.target in TURNS else list(one.all_input_nodes)
        beside += [user for user in one.users if user.target not in TURNS]
        for other in beside:
            if other not in seen and other in flow.forms and flow.forms[other][1] == shape:
                seen.add(other)
                todo.append(other)
    return None


# Pairs ------------------------------------------------------------------------------------------------------------------------------


def pair(student: Network, teacher: Network, pieces: Sequence[list[Tensor]], derived: bool, port: int | None = None) -> tuple[list[Pair], Rows]:
    """Layers of a student with those of its teacher, in the order of both, and the values that they were compared on.

    Only layers of one kind and equal positions make a pair. In a student that derives from the teacher (pruned, quantized), layers of the
    same name belong together; others, and those of a student with other names, are aligned so that their summed similarity (linear CKA) is
    the largest without any pair crossing another.

    Args:
        pieces: flat inputs, see :func:`~downsize.network.statistics.chunks`; the same for both.
        port: the input that marks padding, which is not compared.
    """
    mine, theirs = layers(student), layers(teacher)
    rows = Rows(collect(student, mine, pieces, port), collect(teacher, theirs, pieces, port))
    kernels = [{layer: kernel(found[layer.name][:: max(1, -(-len(found[layer.name]) // COMPARED))]).float() for layer in own}
               for own, found in ((mine, rows.student), (theirs, rows.teacher))]  # fmt: skip
    alike = {
        (i, j): float((kernels[0][one] * kernels[1][two]).sum())
        for i, one in enumerate(mine)
        for j, two in enumerate(theirs)
        if one.kind == two.kind and one.positions == two.positions
    }
    known = {(i, j) for i, j in alike if derived and mine[i].name == theirs[j].name and mine[i].module == theirs[j].module}
    scores = {place: value + SAME_NAME * (place in known) for place, value in alike.items()}
    return [Pair(mine[i], theirs[j], alike[i, j]) for i, j in aligned(scores, len(mine), len(theirs))], rows


def aligned(scores: dict[tuple[int, int], float], first: int, second: int) -> list[tuple[int, int]]:
    """The pairs (i, j), both rising, with the largest sum of positive scores; places without a score make no pair.

    >>> aligned({(0, 0): 0.5, (0, 1): 0.9, (1, 0): 0.8, (1, 1): 0.6}, 2, 2)
    [(0, 0), (1, 1)]
    """
    best = [[0.0] * (second + 1) for _ in range(first + 1)]
    for i in range(first - 1, -1, -1):
        for j in range(second - 1, -1, -1):
            taken = scores.get((i, j), 0.0) + best[i + 1][j + 1]
            best[i][j] = max(taken, best[i + 1][j], best[i][j + 1])
    found, i, j = list[tuple[int, int]](), 0, 0
    while i < first and j < second:
        if best[i][j] == best[i + 1][j]:
            i += 1
        elif best[i][j] == best[i][j + 1]:
            j += 1
        else:
            found.append((i, j))
            i, j = i + 1, j + 1
    return found


@dataclass(frozen=True)
class Rows:
    """By layer name the values at some positions, [rows, channels]: the same positions for all layers of the same kind and positions."""

    student: dict[str, Tensor]
    teacher: dict[str, Tensor]


def collect(network: Network, found: Iterable[Layer], pieces: Sequence[list[Tensor]], port: int | None = None) -> dict[str, Tensor]:
    """By layer name about ``ROWS`` of its positions, evenly over the data, [rows, channels]; positions that are padding are left out."""
    nodes = {node.name: node for node in network.graph.nodes}
    kept: dict[str, list[Tensor]] = {layer.name: [] for layer in found}
    samples = sum(leaves[0].shape[0] for leaves in pieces)
    for leaves in pieces:
        mask = None if port is None else leaves[port].bool()
        walk(network, leaves, {nodes[layer.name]: _keeper(layer, kept[layer.name], mask, -(-ROWS // samples)) for layer in found})
    return {name: torch.cat(parts) for name, parts in kept.items()}


def _keeper(layer: Layer, kept: list[Tensor], mask: Tensor | None, each: int) -> Hook:
    def keep(args: tuple[Any, ...], value: Tensor) -> None:
        kept.extend(_picked(layer.rows(value), mask if layer.kind == "tokens" else None, each))

    return keep


def _picked(rows: Tensor, mask: Tensor | None, each: int) -> Iterator[Tensor]:
    """Of each sample ``each`` positions, spread evenly over the real ones."""
    for number, sample in enumerate(rows):
        if mask is not None and mask.shape == rows.shape[:2]:
            sample = sample[mask[number]]
        count = min(each, len(sample))
        yield sample[torch.linspace(0, len(sample) - 1, count).round().long()].clone()

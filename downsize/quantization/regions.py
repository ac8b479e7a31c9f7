"""Which parts of a quantized network can be fitted one after another, each from one value to one value."""

# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false, reportOptionalMemberAccess=false
# pyright: reportAssignmentType=false
# (torch.fx types every argument as a union of everything)

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate, pairwise
from math import prod

from torch import fx

from ..network.flow import Flow
from ..network.memory import writes
from ..network.network import Network
from .insertion import FAKE
from .placement import WEIGHT_LAYERS, end_of, is_transparent

# Parts with more layers than this are fitted layer by layer: their many weights would fit few samples too well.
MOST_LAYERS = 6
# So many layers in a row, none beside another, are one part at most.
MOST_IN_A_ROW = 3


@dataclass(frozen=True, eq=False)
class Region:
    """A part of a quantized network.

    ``entry``, ``exit``: the nodes whose values go in and come out. ``nodes``: what computes the exit from the entry and constants, in the
    graph's order, the exit among them, the entry not. ``layers``: those with a weight. ``batched``: both values have the batch as their
    first dimension, and samples do not depend on one another's number.
    """

    entry: fx.Node
    exit: fx.Node
    nodes: tuple[fx.Node, ...]
    layers: tuple[fx.Node, ...]
    batched: bool

    @property
    def name(self) -> str:
        """The module's path of its first layer, or that layer's node."""
        return self.layers[0].meta.get("module") or self.layers[0].name


def regions(network: Network) -> list[Region]:
    """All parts with a quantized weight, by their first nodes; none writes into memory, and no two share a node.

    A part is what lies between two values that everything passes through: a residual branch up to its sum and what follows without
    weights, else a layer or a few in a row with their activations. Where that is no self-contained part, or one of many layers, its layers
    are parts by themselves.
    """
    flow = Flow(network)
    constants = _constants(flow.nodes)
    found = [part for part in _stretches(flow, constants) if len(part.layers) <= MOST_LAYERS]
    covered = {layer for part in found for layer in part.layers}
    alone = [_alone(flow, constants, layer) for layer in flow.nodes if layer.target in WEIGHT_LAYERS and layer not in covered]
    found += [part for part in alone if part is not None]
    return sorted(found, key=lambda part: flow.place[part.nodes[0]])


def twin_name(node: fx.Node) -> str:
    """The name in the float network of what a node of the quantized one approximates."""
    while node.target is FAKE:
        node = node.args[0]
    return node.name


def _stretches(flow: Flow, constants: set[fx.Node]) -> Iterator[Region]:
    """From before a layer to before the next that all data passes, from the input to the output."""
    output = flow.network.graph.output_node()
    ports = [node for node in flow.nodes if node.op == "placeholder" and flow.reaches(node, output)]
    lines = [[node for node in flow.waists(port, output)[:-1] if node.target is not FAKE] for port in ports]
    line = max(lines, key=len, default=[])
    for one, two in pairwise(_narrow(flow, line)):
        part = _region(flow, constants, one, two, flow.nodes_of(flow.between(one, two)))
        if part is not None:
            yield part


def _narrow(flow: Flow, line: list[fx.Node]) -> list[fx.Node]:
    """Of values that all data passes those to cut at: before layers, and the last.

    Not where a smaller one comes within :data:`MOST_IN_A_ROW` layers of the part's begin: an inverted bottleneck, wide inside, is one part.
    """
    counts = {one: len(_layers(flow.nodes_of(flow.between(one, two)))) for one, two in pairwise(line)}
    ends = [*(node for node, count in counts.items() if count), *line[-1:]]
    cuts = ends[:1]
    room = MOST_IN_A_ROW
    for i, end in enumerate(ends[:-1]):
        if end is not cuts[-1]:
            ahead = accumulate(counts[one] for one in ends[i:-1])
            smaller = any(_elements(flow, two) < _elements(flow, end) for two, layers in zip(ends[i + 1 :], ahead, strict=True) if layers <= room)
            if not smaller:
                cuts.append(end)
                room = MOST_IN_A_ROW
        room -= counts[end]
    return [*cuts, *ends[-1:]] if ends else []


def _elements(flow: Flow, node: fx.Node) -> int:
    return prod(flow.forms[node][1]) if node in flow.forms else 0


def _alone(flow: Flow, constants: set[fx.Node], layer: fx.Node) -> Region | None:
    """A layer with the quantizer and padding that it alone reads, and the activation behind it."""
    nodes, source, leaving = [layer], layer.args[WEIGHT_LAYERS[layer.target][0]], end_of(layer)
    while isinstance(source, fx.Node) and (source.target is FAKE or is_transparent(source)) and len(source.users) == 1:
        nodes.insert(0, source)
        source = source.args[0]
    return _region(flow, constants, source, leaving, [*nodes, *([leaving] if leaving is not layer else [])]) if isinstance(source, fx.Node) else None


def _region(flow: Flow, constants: set[fx.Node], entry: fx.Node, leaving: fx.Node, nodes: list[fx.Node]) -> Region | None:
    """The region, or None: it has no layer, or needs other values than the entry's, or writes into memory."""
    inside, layers = {entry, *nodes}, _layers(nodes)
    sources = [source for node in nodes for source in node.all_input_nodes if source not in inside]
    whole = constants.issuperset(sources) and not any(writes(node) for node in nodes)
    if not layers or not whole or not all(node in flow.forms for node in (entry, leaving)):
        return None
    return Region(entry, leaving, tuple(nodes), tuple(layers), _batched(flow, entry) and _batched(flow, leaving))


def _layers(nodes: list[fx.Node]) -> list[fx.Node]:
    return [node for node in nodes if node.target in WEIGHT_LAYERS]


def _constants(nodes: list[fx.Node]) -> set[fx.Node]:
    """The nodes whose values depend on no input, nor on the shape of one."""
    found: set[fx.Node] = set()
    for node in nodes:
        if node.op == "get_attr" or (node.op == "call_function" and all(source in found for source in node.all_input_nodes)):
            found.add(node)
    return found


def _batched(flow: Flow, node: fx.Node) -> bool:
    """Whether the first dimension, and no other, grows by one when the batch does."""
    _, shape, other = flow.forms[node]
    rows = [port.example[0] for port in flow.network.ports if port.dims[:1] == ("batch",)]
    return bool(rows) and other is not None and bool(shape) and shape[0] == rows[0] and other[0] == rows[0] + 1

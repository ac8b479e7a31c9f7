"""What a layer looks like to a runtime, so that its latency can be measured once per shape: operator, tensor shapes, other arguments.

The latency of a network is about the sum over its layers plus an offset for what has no product (activations, normalisations, the call).
Who measures is not said here: a technique takes a :class:`Clock`.
"""

# pyright: reportArgumentType=false, reportAttributeAccessIssue=false
# (torch.fx types every argument as a union of everything)

from __future__ import annotations

import json
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, fx

from ..errors import ArtifactError
from ..network.cost import COUNTED
from ..network.network import Network
from ..network.operators import decode, encode, name_of, target_of
from ..network.parts import Port, assign
from ..network.statistics import Hook, walk
from ..structure import flatten

GROUPS = {f"aten.conv{dims}d.default": 6 for dims in (1, 2, 3)}  # the position of the argument
LINEAR = "aten.linear.default"
WIDENED = (*GROUPS, LINEAR)


@dataclass(frozen=True)
class Operand:
    """A tensor that a layer reads; ``constant``: it is in the file (a weight), else it is computed in every call."""

    shape: tuple[int, ...]
    dtype: str
    constant: bool


@dataclass(frozen=True)
class LayerShape:
    """One call of ``operator`` (``"aten.conv2d.default"``) on ``operands``.

    ``arguments`` is the JSON of [positions, keywords], where operand i stands as ``{"node": "operand<i>"}``.
    """

    operator: str
    operands: tuple[Operand, ...]
    arguments: str

    def __str__(self) -> str:
        tensors = [f"{operand.dtype}{list(operand.shape)}{'c' * operand.constant}" for operand in self.operands]
        return f"{self.operator} {' '.join(tensors)} {self.arguments}"

    @property
    def elements(self) -> int:
        """The elements of all operands."""
        return sum(prod(operand.shape) for operand in self.operands)

    def resized(self, sizes: Mapping[tuple[int, int], int]) -> LayerShape:
        """The same with other sizes: ``{(operand, dimension): size}``; the other arguments stay."""
        operands = list(self.operands)
        for (number, dim), size in sizes.items():
            shape = list(operands[number].shape)
            shape[dim] = size
            operands[number] = replace(operands[number], shape=tuple(shape))
        return replace(self, operands=tuple(operands))

    def widened(self, inputs: int | None = None, outputs: int | None = None) -> LayerShape:
        """A convolution or linear layer with other numbers of input and output channels (None: as it is).

        A depthwise convolution keeps one group per input channel, and its outputs follow its inputs; any other keeps its groups.

        Raises:
            ArtifactError: it is another operator, or the groups do not divide the channels.
        """
        if self.operator not in WIDENED or not self.operands[1].constant:
            raise ArtifactError(f"{self.operator} has no input and output channels of its own; expected one of {WIDENED}: use resized().")
        weight = self.operands[1].shape
        channel = -1 if self.operator == LINEAR else 1 - len(weight)  # a convolution's input may lack the batch
        before = self.operands[0].shape[channel]
        positions, keywords = json.loads(self.arguments)
        groups = 1 if self.operator == LINEAR else before // weight[1]
        inputs = before if inputs is None else inputs
        depthwise = 1 < groups == before
        after = inputs if depthwise else groups
        outputs = (weight[0] // groups * after if depthwise else weight[0]) if outputs is None else outputs
        if inputs % after or outputs % after:
            raise ArtifactError(f"{self.operator} has {after} groups, which do not divide {inputs} inputs and {outputs} outputs.")
        if after != groups:
            _put_groups(positions, keywords, GROUPS[self.operator], after)
        bias = {(2, 0): outputs} if len(self.operands) > 2 else {}
        sizes = {(0, channel): inputs, (1, 0): outputs, (1, 1): inputs // after, **bias}
        return replace(self.resized(sizes), arguments=json.dumps([positions, keywords]))


def _put_groups(positions: dict[str, list[Any]], keywords: dict[str, Any], place: int, groups: int) -> None:
    if "groups" in keywords:
        keywords["groups"] = groups
    else:
        positions["tuple"][place] = groups


class Clock(Protocol):
    """Whatever knows latencies of layers: a table measured on this machine, or one that came from another."""

    def milliseconds(self, shapes: Sequence[LayerShape]) -> list[float]:
        """The time of each layer in milliseconds."""
        ...


# The layers of a network ------------------------------------------------------------------------------------------------------------


def layer_shapes(network: Network, inputs: Any, operators: Container[Any] = COUNTED) -> dict[str, LayerShape]:
    """The shape of every call of the ``operators`` (those with products) in one run on ``inputs``, by name of node.

    Raises:
        ArtifactError: the inputs do not fit the network.
    """
    values: dict[fx.Node, Any] = {}

    def recorder(node: fx.Node) -> Hook:
        def record(args: tuple[Any, ...], value: Any) -> None:
            values[node] = (tuple(value.shape), str(value.dtype).removeprefix("torch.")) if isinstance(value, Tensor) else value

        return record

    walk(network, network.flat(inputs), {node: recorder(node) for node in network.graph.nodes if node.op != "output"})
    constant = _constants(network)
    calls = [node for node in network.graph.nodes if node.op == "call_function" and node.target in operators]
    return {node.name: _shape_of(node, values, constant) for node in calls}


def predicted(clock: Clock, network: Network, inputs: Any) -> float:
    """Milliseconds of all layers with products in one run on ``inputs``: the latency, less an offset for everything else."""
    return sum(clock.milliseconds(list(layer_shapes(network, inputs).values())))


def _constants(network: Network) -> set[fx.Node]:
    """The nodes whose values do not depend on the inputs: a runtime computes them once."""
    found: set[fx.Node] = set()
    for node in network.graph.nodes:
        sources = node.all_input_nodes
        if node.op == "get_attr" or (node.op == "call_function" and sources and found.issuperset(sources)):
            found.add(node)
    return found


def _shape_of(node: fx.Node, values: Mapping[fx.Node, Any], constant: Container[fx.Node]) -> LayerShape:
    operands: list[Operand] = []
    stand_ins = fx.Graph()

    def stand_in(source: fx.Node) -> Any:
        value = values[source]
        if not (isinstance(value, tuple) and len(value) == 2 and isinstance(value[0], tuple)):
            return value  # a size
        operands.append(Operand(*value, constant=source in constant))
        return stand_ins.placeholder(f"operand{len(operands) - 1}")

    positions, keywords = fx.map_arg((node.args, dict(node.kwargs)), stand_in)
    return LayerShape(name_of(node.target), tuple(operands), spelled(node.target, positions, keywords))


def spelled(target: Any, positions: Sequence[Any], keywords: Mapping[str, Any]) -> str:
    """The JSON of a call's arguments in their order, without those behind the last that the defaults do not say: a layer has one name.

    ``conv2d(x, w, None, [1, 1], [0, 0])`` is spelled as ``conv2d(x, w)``, ``conv2d(x, w, stride=[2])`` as ``conv2d(x, w, None, [2, 2])``.
    """
    given = {argument.name: value for argument, value in zip(target._schema.arguments, positions, strict=False)} | dict(keywords)
    values: list[Any] = []
    last, alone = 0, {}
    for place, argument in enumerate(target._schema.arguments):
        default = argument.default_value if argument.has_default_value() else ...
        value = given.get(argument.name, default)
        if isinstance(default, list) and isinstance(value, (list, tuple)) and len(value) == 1:
            value = [*value] * len(default)
        if argument.kwarg_only:
            alone |= {argument.name: encode(value)} if value != default else {}
            continue
        values.append(value)
        last = place + 1 if value != default else last
    return json.dumps([encode(tuple(values[:last])), alone])


def side_by_side(shapes: Sequence[LayerShape]) -> Network:
    """A network of these layers, each with inputs and random weights of its own; layer n has the module path ``layers.<n>``.

    Its inputs are all operands that are not constant, in order, and its outputs one tensor a layer.
    """
    root, graph, ports = torch.nn.Module(), fx.Graph(), []
    generator = torch.Generator().manual_seed(0)
    results = []
    tensors: dict[tuple[int, int], fx.Node] = {}
    for n, shape in enumerate(shapes):
        for i, operand in enumerate(shape.operands):
            if not operand.constant:
                dtype = getattr(torch, operand.dtype)
                ports.append(Port(f"x{n}_{i}", dtype, operand.shape, operand.shape))
                tensors[n, i] = graph.placeholder(f"x{n}_{i}")
    for n, shape in enumerate(shapes):
        for i, operand in enumerate(shape.operands):
            if operand.constant:
                assign(root, f"layers.{n}.t{i}", values_for(operand, generator))
                tensors[n, i] = graph.get_attr(f"layers.{n}.t{i}")
        results.append(_call(graph, n, shape, {f"operand{i}": tensors[n, i] for i in range(len(shape.operands))}))
    graph.output(tuple(results))
    inputs = flatten([tuple(torch.empty(0) for _ in ports), {}])[1]
    outputs = flatten(tuple(torch.empty(0) for _ in shapes))[1]
    return Network(fx.GraphModule(root, graph), inputs, outputs, tuple(ports))


def _call(graph: fx.Graph, number: int, shape: LayerShape, operands: dict[str, fx.Node]) -> fx.Node:
    positions, keywords = json.loads(shape.arguments)
    target = target_of(shape.operator)
    made = graph.call_function(target, decode(positions, operands), {key: decode(value, operands) for key, value in keywords.items()})
    several = len(target._schema.returns) > 1
    result = graph.call_function(target_of("operator.getitem"), (made, 0)) if several else made
    for node in (made, result):
        node.meta["module"] = f"layers.{number}"
    return result


def values_for(operand: Operand, generator: torch.Generator) -> Tensor:
    """Values that any layer takes: small normal floats, ones for masks and whole numbers."""
    dtype = getattr(torch, operand.dtype)
    return torch.randn(operand.shape, generator=generator).to(dtype) / 8 if dtype.is_floating_point else torch.ones(operand.shape, dtype=dtype)


# Tables for an allocation -----------------------------------------------------------------------------------------------------------


def latency_table(clock: Clock, shape: LayerShape, inputs: Sequence[int], outputs: Sequence[int], anchors: int = 4) -> np.ndarray:
    """Milliseconds of a layer at all pairs of widths, [inputs, outputs]; it never falls with a width.

    At most ``anchors`` widths a side are measured, evenly spread with the ends among them, and those between are interpolated linearly
    (the work is bilinear in the widths). That is right for multiples of what the kernels work in (8 or 16); between multiples latency is
    a staircase, which interpolation does not show.
    """
    rows, columns = _spread(inputs, anchors), _spread(outputs, anchors)
    found = clock.milliseconds([shape.widened(i, j) for i in rows for j in columns])
    table = np.maximum(np.array(found).reshape(len(rows), len(columns)), 0.0)
    # More channels are never faster: what looks so is noise, or padding that the kernel could have done itself.
    table = np.maximum.accumulate(np.maximum.accumulate(table, axis=0), axis=1)
    across = np.stack([np.interp(outputs, columns, row) for row in table])
    return np.stack([np.interp(inputs, rows, column) for column in across.T], axis=1)


def _spread(widths: Sequence[int], most: int) -> list[int]:
    known = sorted(set(widths))
    picked = np.unique(np.linspace(0, len(known) - 1, min(most, len(known))).round().astype(int))
    return [known[i] for i in picked]

"""Where quantizers belong, so that runtimes really compute in integers.

Integer kernels exist for a convolution only when its input, weight and OUTPUT are quantized, and residual additions and pooling stay in
integers only when everything around them is; a transformer's matrix products take integers in and give floats out, and lose accuracy
when more than their inputs is quantized. So: tensors that come from convolutions *flow* in integers (every reader sees the codes), while
other inputs of weight layers are quantized for those layers alone.
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportOptionalIterable=false, reportGeneralTypeIssues=false
# pyright: reportAttributeAccessIssue=false, reportOptionalMemberAccess=false, reportIndexIssue=false, reportReturnType=false
# (torch.fx and onnxscript type every argument as a union of everything)

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import fx

from ..errors import TaskError
from ..network.dry import shapes
from ..network.memory import sharers, writes
from ..network.network import Network
from ..network.rewrite import CONVOLUTIONS, TRANSPOSED, aten, constant, is_zero_padding, only_user

# Layers with a weight: operator -> positions of input, weight, bias, and the weight's output axis.
WEIGHT_LAYERS: dict[object, tuple[int, int, int | None, int]] = {
    **{target: (0, 1, 2, 0) for target in CONVOLUTIONS},
    aten.linear.default: (0, 1, 2, 0),
    aten.addmm.default: (1, 2, 0, 1),
    aten.mm.default: (0, 1, None, 1),
    aten.matmul.default: (0, 1, None, 1),
}
# Activations that a requantization behind them absorbs: the code range does the clipping.
ABSORBED = {aten.relu.default, aten.relu6.default, aten.hardtanh.default, aten.clamp.default, aten.clamp_min.default}
# Operators that only move values, or pick among them: the output has the input's codes.
MOVES = {
    aten.max_pool1d.default, aten.max_pool2d.default, aten.max_pool3d.default, aten.adaptive_max_pool2d.default,
    aten.view.default, aten.reshape.default, aten.flatten.using_ints, aten.permute.default, aten.transpose.int,
    aten.squeeze.dim, aten.squeeze.dims, aten.unsqueeze.default, aten.contiguous.default, aten.pixel_shuffle.default,
    aten.upsample_nearest2d.vec,
}  # fmt: skip
# Operators with integer kernels of their own when all their inputs are quantized tensors.
COMBINES = {
    aten.add.Tensor, aten.mul.Tensor, aten.cat.default, aten.avg_pool2d.default, aten.adaptive_avg_pool2d.default, aten.leaky_relu.default,
}  # fmt: skip
# Their weights are quantized alone: matrices of every layer and direction, in the list of parameters.
RECURRENT = {aten.lstm.input, aten.gru.input, aten.rnn_tanh.input, aten.rnn_relu.input}
TRANSPOSES = {aten.t.default, aten.numpy_T.default, aten.transpose.int, aten.permute.default}


@dataclass(frozen=True, eq=False)
class Point:
    """An activation to quantize: behind ``node``, for ``readers`` (None: for all), on the grid of ``like`` where it has the same codes."""

    node: fx.Node
    readers: tuple[fx.Node, ...] | None = None
    like: fx.Node | None = None


@dataclass(frozen=True, eq=False)
class WeightPoint:
    """A weight to quantize: the ``get_attr`` node and the axis that gets one scale each."""

    node: fx.Node
    axis: int | None


@dataclass
class Placement:
    """Everything to quantize, and the layers left in float with the reason."""

    activations: list[Point] = field(default_factory=list)
    weights: list[WeightPoint] = field(default_factory=list)
    layers: list[fx.Node] = field(default_factory=list)
    left: dict[str, str] = field(default_factory=dict)

    @property
    def recurrent(self) -> list[fx.Node]:
        """The recurrent layers with weights to quantize."""
        return list(dict.fromkeys(user for point in self.weights for user in point.node.users if user.target in RECURRENT))

    def on(self, fork: Network) -> Placement:
        """The same decisions for a fork of the network they were made on."""
        twin = {node.name: node for node in fork.graph.nodes}
        points = [
            Point(twin[p.node.name], None if p.readers is None else tuple(twin[r.name] for r in p.readers), p.like and twin[p.like.name])
            for p in self.activations
        ]
        weights = [WeightPoint(twin[p.node.name], p.axis) for p in self.weights]
        return Placement(points, weights, [twin[layer.name] for layer in self.layers], dict(self.left))


def place(network: Network) -> Placement:
    """Decide what to quantize in a network whose batch norms are folded. See the module's docstring for the rules.

    Raises:
        TaskError: the weights are of another type than float32.
    """
    sizes = shapes(network)
    placement = Placement()
    changed = {one for node in network.graph.nodes for written in writes(node) for one in sharers(written)}
    _layers(network, placement, sizes, changed)
    _weights(network, placement)
    flowing = _flow(network, set(placement.layers), changed)
    placement.activations = [Point(node, None, like) for node, like in flowing.items()]
    placement.activations += _inputs_only(placement.layers, set(flowing))
    return placement


def _layers(network: Network, placement: Placement, sizes: dict[fx.Node, tuple[int, ...]], changed: set[fx.Node]) -> None:
    dtypes: dict[torch.dtype, str] = {}
    for node in network.graph.nodes:
        if node.target not in WEIGHT_LAYERS or node not in sizes:
            continue
        at_source, at_weight, _, _ = WEIGHT_LAYERS[node.target]
        weight = constant(network, node.args[at_weight])
        if weight is None or weight.dim() not in ((3, 4, 5) if node.target in CONVOLUTIONS else (2,)):
            continue
        dtypes.setdefault(weight.dtype, str(node.args[at_weight].target))
        if weight.dtype is not torch.float32:
            placement.left[node.name] = f"its weight is {weight.dtype}: only float32 is quantized"
        elif constant(network, node.args[at_source]) is not None:
            placement.left[node.name] = "its input is a constant"
        elif node.args[at_source] in changed:
            placement.left[node.name] = "its input is changed in place: the codes would be those of before or after"
        else:
            placement.layers.append(node)
    if dtypes and torch.float32 not in dtypes:
        dtype, name = next(iter(dtypes.items()))
        raise TaskError(f"The weight {name} is {str(dtype).removeprefix('torch.')}; int8 is made from float32 models: call model.float() before.")


def _weights(network: Network, placement: Placement) -> None:
    axes: dict[fx.Node, set[int]] = {}
    for layer in placement.layers:
        _, position, _, axis = WEIGHT_LAYERS[layer.target]
        axes.setdefault(layer.args[position], set()).add(axis)
    for node in network.graph.nodes:
        if node.target is aten.embedding.default and _is_float(network, node.args[0]):
            axes.setdefault(node.args[0], set()).add(0)
        elif node.target in TRANSPOSED and _is_float(network, node.args[1]):
            # ONNX Runtime would round this weight by itself, with one scale for all.
            axes.setdefault(node.args[1], set()).add(1)
            placement.left[node.name] = "transposed convolution: no integer kernel in the runtimes, only its weight is quantized"
        elif node.target in RECURRENT:
            for matrix in [one for one in node.args[2] if _is_float(network, one) and network.tensor(str(one.target)).dim() == 2]:
                axes.setdefault(matrix, set()).add(0)
            placement.left[node.name] = "recurrent layer: only its weights are quantized, but with dynamic activations in ONNX Runtime"
    for node, found in axes.items():
        found |= {axis for user in node.users for axis in _other_axes(user, node)}
    # A weight read along two axes takes one scale.
    placement.weights = [WeightPoint(node, axis.copy().pop() if len(axis) == 1 else None) for node, axis in axes.items()]


def _is_float(network: Network, node: object) -> bool:
    tensor = constant(network, node)
    return tensor is not None and tensor.dtype is torch.float32


def _other_axes(user: fx.Node, weight: fx.Node) -> set[int]:
    """The output axes along which a reader that is no layer of its own reads a weight; all of them if it is not known."""
    if user.target in RECURRENT:
        return {0}
    known = user.target in TRANSPOSED or user.target is aten.embedding.default or user.target in WEIGHT_LAYERS
    position = 0 if user.target is aten.embedding.default else WEIGHT_LAYERS.get(user.target, (0, 1))[1]
    if known and [one is weight for one in user.args].count(True) == 1 and user.args[position] is weight:
        return set()
    products = [reader.target in (aten.matmul.default, aten.mm.default) and reader.args[1] is user for reader in user.users]
    # A product with the transposed weight: its outputs lie along the first axis.
    return {0} if user.target in TRANSPOSES and all(products) else {0, 1}


def end_of(layer: fx.Node) -> fx.Node:
    """Where a layer's output is quantized: behind the activation that the requantization absorbs, if that is its only reader."""
    user = only_user(layer)
    return user if user is not None and user.target in ABSORBED and user.args[0] is layer else layer


def _flow(network: Network, layers: set[fx.Node], changed: set[fx.Node]) -> dict[fx.Node, fx.Node | None]:
    """The nodes whose value every reader sees as codes, each with the node whose grid it shares (None: its own)."""
    flowing: dict[fx.Node, fx.Node | None] = {}
    optional: list[fx.Node] = []
    absorbed: set[fx.Node] = set()
    for node in network.graph.nodes:
        if node in absorbed or node.op != "call_function":
            continue
        end = end_of(node)
        if end in changed or node in changed:
            continue
        if node in layers and node.target in CONVOLUTIONS:
            flowing[end] = None
        elif node.target in MOVES and _codes(node.args[0], flowing):
            flowing[node] = _origin(node.args[0], flowing)
            optional.append(node)
            continue
        elif node.target in COMBINES and node.kwargs.get("alpha", 1) == 1 and all(_codes(source, flowing) for source in _operands(node)):
            flowing[end] = None
            optional.append(end)
        absorbed.add(end)
    return _wanted(flowing, optional, layers)


def _operands(node: fx.Node) -> list[object]:
    """What an operator combines: two numbers or tensors, a list of tensors, or one tensor."""
    if node.target in (aten.add.Tensor, aten.mul.Tensor):
        return list(node.args[:2])
    return list(node.args[0]) if isinstance(node.args[0], (list, tuple)) else [node.args[0]]


def _codes(node: object, flowing: dict[fx.Node, fx.Node | None]) -> bool:
    return isinstance(node, fx.Node) and (node in flowing or (is_transparent(node) and _codes(node.args[0], flowing)))


def is_transparent(node: fx.Node) -> bool:
    """Zero padding: zero is on every grid, and exporters merge the pad into the convolution behind it."""
    return node.target is aten.pad.default and is_zero_padding(node)


def _origin(node: object, flowing: dict[fx.Node, fx.Node | None]) -> fx.Node:
    assert isinstance(node, fx.Node)
    if node not in flowing:
        return _origin(node.args[0], flowing)
    like = flowing[node]
    return node if like is None else like


def _wanted(flowing: dict[fx.Node, fx.Node | None], optional: list[fx.Node], layers: set[fx.Node]) -> dict[fx.Node, fx.Node | None]:
    """Without the quantizers behind moves and sums that no integer operator reads: they would cost accuracy for nothing."""
    kept = dict(flowing)
    for node in reversed(optional):
        if not any(_reads_codes(user, kept, layers) for user in node.users):
            del kept[node]
    return {node: like for node, like in kept.items() if like is None or like in kept}


def _reads_codes(user: fx.Node, kept: dict[fx.Node, fx.Node | None], layers: set[fx.Node]) -> bool:
    if is_transparent(user):
        return any(_reads_codes(reader, kept, layers) for reader in user.users)
    return user in layers or (user in kept and user.target in MOVES) or (user.target in COMBINES and end_of(user) in kept)


def _inputs_only(layers: list[fx.Node], flowing: set[fx.Node]) -> list[Point]:
    """Quantizers for inputs of weight layers that do not flow: seen by those layers alone."""
    readers: dict[fx.Node, list[fx.Node]] = {}
    for layer in layers:
        source = layer.args[WEIGHT_LAYERS[layer.target][0]]
        assert isinstance(source, fx.Node)
        reader = layer
        while is_transparent(source):
            reader, source = source, source.args[0]
        if source not in flowing and reader not in readers.setdefault(source, []):
            readers[source].append(reader)
    return [Point(node, tuple(users)) for node, users in readers.items()]

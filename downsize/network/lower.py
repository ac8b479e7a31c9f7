"""From a trainable quantized graph to an integer one: fake-quantized weights become integer constants, ready for a model file.

Vocabulary after lowering (our own operators, each one ONNX operator or two): ``quantize`` (QuantizeLinear), ``dequantize``
(DequantizeLinear), ``quantized_embedding`` (Gather of codes and scales), ``dynamic_linear`` (DynamicQuantizeLinear + MatMulInteger).
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportOptionalIterable=false, reportGeneralTypeIssues=false
# pyright: reportAttributeAccessIssue=false, reportOptionalMemberAccess=false, reportIndexIssue=false, reportReturnType=false
# (torch.fx and onnxscript type every argument as a union of everything)

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode

from ..numerics import grids
from .network import Network
from .rewrite import CONVOLUTIONS, add_constant, argument, constant, only_user
from .statistics import shapes

aten = torch.ops.aten
ours = torch.ops.downsize
# A bias code beyond this would not leave room for the accumulator.
LARGEST_BIAS_CODE = 2.0**30
# Matrix products with a weight: operator -> positions of input, weight, bias, and the weight's output axis.
PRODUCTS: dict[object, tuple[int, int, int | None, int]] = {
    aten.linear.default: (0, 1, 2, 0),
    aten.addmm.default: (1, 2, 0, 1),
    aten.mm.default: (0, 1, None, 1),
    aten.matmul.default: (0, 1, None, 1),
}


@torch.library.custom_op("downsize::quantize", mutates_args=())
def quantize(x: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """Codes of ``x`` on a per-tensor grid, in the integer type of ``zero_point``."""
    return grids.codes(x, scale, zero_point.to(torch.int32), None, grids.UINT8 if zero_point.dtype is torch.uint8 else grids.INT8)


@quantize.register_fake
def _(x: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    return torch.empty_like(x, dtype=zero_point.dtype)


@torch.library.custom_op("downsize::dequantize", mutates_args=())
def dequantize(q: Tensor, scale: Tensor, zero_point: Tensor, axis: int | None) -> Tensor:
    """Real values of codes; ``axis`` is the one that ``scale`` runs along, None for one scale."""
    return grids.values(q, scale, zero_point, axis)


@dequantize.register_fake
def _(q: Tensor, scale: Tensor, zero_point: Tensor, axis: int | None) -> Tensor:
    return torch.empty_like(q, dtype=torch.float32)


@torch.library.custom_op("downsize::quantized_embedding", mutates_args=())
def quantized_embedding(q: Tensor, scale: Tensor, index: Tensor, axis: int) -> Tensor:
    """Rows ``index`` of a table with one scale a row [rows, 1]: float [*index, width].

    ``q``: the codes, [rows, width] when ``axis`` is 0, [width, rows] when it is 1.
    """
    return (q[index] if axis == 0 else q.t()[index]).float() * scale[index]


@quantized_embedding.register_fake
def _(q: Tensor, scale: Tensor, index: Tensor, axis: int) -> Tensor:
    return scale.new_empty([*index.shape, q.shape[1 - axis]])


@torch.library.custom_op("downsize::dynamic_linear", mutates_args=())
def dynamic_linear(x: Tensor, q: Tensor, scale: Tensor) -> Tensor:
    """``x @ w`` with ``x`` [..., in] quantized by its own range and ``w`` given as codes [in, out] with one scale an output [out]."""
    return ours.fake_quantize_dynamic(x) @ (q.float() * scale)


@dynamic_linear.register_fake
def _(x: Tensor, q: Tensor, scale: Tensor) -> Tensor:
    return x.new_empty([*x.shape[:-1], q.shape[1]])


def lower(network: Network) -> None:
    """Replace the fake quantizers of ``network`` by integer constants and quantize/dequantize pairs, in place."""
    fakes = [node for node in network.graph.nodes if node.target is ours.fake_quantize.default]
    with FakeTensorMode(allow_non_fake_inputs=True):
        ranks = {node: len(size) for node, size in shapes(network).items()} if fakes else {}
    weights = [fake for fake in fakes if constant(network, fake.args[0]) is not None]
    for fake in weights:
        _lower_weight(network, fake, ranks)
    for fake in fakes:
        if fake not in weights:
            _lower_activation(network, fake)
    for node in list(network.graph.nodes):
        if node.target is aten.add.Tensor:
            _join_bias(network, node, ranks)
    for node in list(network.graph.nodes):
        if node.target in CONVOLUTIONS or node.target in (aten.linear.default, aten.addmm.default):
            _lower_bias(network, node)
    network.recompile()


def _grid(fake: fx.Node) -> grids.Grid:
    return grids.Grid(int(fake.args[4]), int(fake.args[5]))


def finer(grid: grids.Grid) -> int:
    """The power of two that codes of a signed grid are multiplied by in a file; 1 for those of int8."""
    room = grids.INT8.high // max(-grid.low, grid.high)
    return 1 if grid.low >= 0 or room < 2 else 1 << (room.bit_length() - 1)


@dataclass
class _Weight:
    """A fake-quantized weight: its codes, and the constants made of them so far, by whether they are transposed.

    Codes of few bits are multiplied by a power of two that int8 has room for, ``factor``, and the scale is divided by it: the values are the
    same, and integer biases, whose step is this scale times the input's, become so much finer.
    """

    network: Network
    fake: fx.Node
    q: Tensor
    factor: int
    made: dict[bool, fx.Node] = field(default_factory=dict)

    @staticmethod
    def of(network: Network, fake: fx.Node) -> _Weight:
        weight, scale, zero_point = (constant(network, node) for node in fake.args[:3])
        assert weight is not None and scale is not None and zero_point is not None
        grid = _grid(fake)
        factor = 1 if bool(zero_point.any()) else finer(grid)
        with torch.no_grad():
            return _Weight(network, fake, grids.codes(weight, scale, zero_point, fake.args[3], grid) * factor, factor)

    def constant(self, what: str, tensor: Tensor) -> fx.Node:
        return add_constant(self.network, f"{self.fake.args[0].target}_{what}", tensor.detach(), self.fake)

    def scale(self) -> Tensor:
        scale = constant(self.network, self.fake.args[1])
        assert scale is not None
        return scale / self.factor

    def codes(self, transposed: bool) -> fx.Node:
        if transposed not in self.made:
            self.made[transposed] = self.constant("codes", self.q.t().contiguous() if transposed else self.q)
        return self.made[transposed]

    def values(self, transposed: bool, before: fx.Node) -> fx.Node:
        axis: Any = self.fake.args[3]
        zero = self.constant("zero", constant(self.network, self.fake.args[2]).to(self.q.dtype))
        parts = self.codes(transposed), self.constant("scale", self.scale()), zero
        return insert_call(self.network, before, ours.dequantize.default, (*parts, axis if axis is None or not transposed else 1 - axis))


def _lower_weight(network: Network, fake: fx.Node, ranks: dict[fx.Node, int]) -> None:
    weight = _Weight.of(network, fake)
    tables = [user for user in fake.users if user.target is aten.embedding.default and user.args[0] is fake]
    for user in list(fake.users):
        if user.target in PRODUCTS and user.args[PRODUCTS[user.target][1]] is fake and fake.args[3] in (None, PRODUCTS[user.target][3]):
            _lower_product(weight, user, ranks)
    if set(fake.users) - set(tables):
        made = weight.values(False, fake)
        fake.replace_all_uses_with(made, delete_user_cb=lambda user: user not in tables)
    for user in tables:
        # A table that layers read too is stored once, the way round that they take.
        _lower_embedding(weight, user, transposed=True in weight.made and False not in weight.made)
    network.graph.erase_node(fake)


def dequantized(network: Network, name: str, q: Tensor, scale: Tensor, zero_point: Tensor, axis: object, before: fx.Node) -> fx.Node:
    """The values of constant codes, as a node before ``before``."""
    parts = [
        add_constant(network, f"{name}_codes", q, before),
        add_constant(network, f"{name}_scale", scale.detach(), before),
        add_constant(network, f"{name}_zero", zero_point.to(q.dtype), before),
    ]
    return insert_call(network, before, ours.dequantize.default, (*parts, axis))


def insert_call(network: Network, before: fx.Node, target: object, args: tuple[object, ...]) -> fx.Node:
    """A call of ``target`` before ``before``, which stands for the same part of the user's model."""
    with network.graph.inserting_before(before):
        made = network.graph.call_function(target, args)
    made.meta = dict(before.meta)
    return made


def _lower_embedding(weight: _Weight, user: fx.Node, transposed: bool) -> None:
    scale = weight.scale().reshape(-1, 1).expand(weight.q.shape[0], 1).contiguous()
    args = weight.codes(transposed), weight.constant("scale", scale), user.args[1], int(transposed)
    user.replace_all_uses_with(insert_call(weight.network, user, ours.quantized_embedding.default, args))
    weight.network.graph.erase_node(user)


def _lower_product(weight: _Weight, user: fx.Node, ranks: dict[fx.Node, int]) -> None:
    """A layer of N-D input becomes a product with codes [in, out], the way round that integer kernels for it take, and a sum.

    One of 2-D input stays as it is: it is exported as Gemm, whose kernel adds an integer bias.
    """
    network, (at_source, _, at_bias, output_axis) = weight.network, PRODUCTS[user.target]
    source, bias = user.args[at_source], None if at_bias is None else argument(user, at_bias, "bias")
    dynamic = isinstance(source, fx.Node) and source.target is ours.fake_quantize_dynamic.default
    if user.kwargs.keys() & {"alpha", "beta"} or (not dynamic and (user.target is not aten.linear.default or ranks.get(user) == 2)):
        return
    transposed = output_axis == 0
    if dynamic:
        scales = weight.constant("scale", weight.scale().expand(weight.q.shape[output_axis]).contiguous())
        product = insert_call(network, user, ours.dynamic_linear.default, (source.args[0], weight.codes(transposed), scales))
    else:
        product = insert_call(network, user, aten.matmul.default, (source, weight.values(transposed, user)))
    if bias is not None:
        product = insert_call(network, user, aten.add.Tensor, (product, bias))
    user.replace_all_uses_with(product)
    network.graph.erase_node(user)


def _lower_activation(network: Network, fake: fx.Node) -> None:
    scale, zero_point = constant(network, fake.args[1]), constant(network, fake.args[2])
    assert scale is not None and zero_point is not None
    name = f"{fake.args[0].name}"
    made_scale = add_constant(network, f"{name}_scale", scale.detach().reshape(()), fake)
    made_zero = add_constant(network, f"{name}_zero", zero_point.reshape(()).to(_grid(fake).dtype), fake)
    source = _before_clipping(network, fake, float(scale), int(zero_point))
    q = insert_call(network, fake, ours.quantize.default, (source, made_scale, made_zero))
    grid = _grid(fake)
    if grid not in (grids.UINT8, grids.INT8):
        # The operator saturates at the ends of its type alone.
        q = insert_call(network, fake, aten.clamp.default, (q, grid.low, grid.high))
    fake.replace_all_uses_with(insert_call(network, fake, ours.dequantize.default, (q, made_scale, made_zero, None)))
    network.graph.erase_node(fake)


def _before_clipping(network: Network, fake: fx.Node, scale: float, zero_point: int) -> fx.Node:
    """The tensor to quantize: the codes' own range does what a ReLU or clip right before them does, so that node need not be in the file.

    It does when both bounds have the outermost codes: then what lies beyond them gets these codes in any case.
    """
    source = fake.args[0]
    assert isinstance(source, fx.Node)
    bounds = _clipping_bounds(source)
    if bounds is None or only_user(source) is not fake or not isinstance(source.args[0], fx.Node):
        return source
    grid = _grid(fake)
    low, high = (torch.round(torch.tensor(bound, dtype=torch.float32) / scale) + zero_point for bound in bounds)
    return source.args[0] if float(low) <= grid.low and float(high) >= grid.high else source


def _clipping_bounds(node: fx.Node) -> tuple[float, float] | None:
    if node.target is aten.relu.default:
        return 0.0, float("inf")
    if node.target is aten.relu6.default:
        return 0.0, 6.0
    if node.target is aten.hardtanh.default:
        return float(argument(node, 1, "min_val", -1.0)), float(argument(node, 2, "max_val", 1.0))
    if node.target in (aten.clamp.default, aten.clamp_min.default):
        low, high = argument(node, 1, "min"), argument(node, 2, "max")
        if not all(bound is None or isinstance(bound, (int, float)) for bound in (low, high)):
            return None
        return float("-inf") if low is None else float(low), float("inf") if high is None else float(high)
    return None


def _lower_bias(network: Network, layer: fx.Node) -> None:
    """An int32 bias with scale ``input scale * weight scale``, which integer kernels add to their accumulator as it is."""
    at_source, at_weight, at_bias, _ = PRODUCTS.get(layer.target, (0, 1, 2, 0))
    assert at_bias is not None
    source, weight, bias = layer.args[at_source], layer.args[at_weight], constant(network, argument(layer, at_bias, "bias"))
    source = source.args[0] if isinstance(source, fx.Node) and source.target is aten.pad.default else source
    if bias is None or not all(isinstance(n, fx.Node) and n.target is ours.dequantize.default for n in (source, weight)):
        return
    scale_x, scale_w = constant(network, source.args[1]), constant(network, weight.args[1])
    assert scale_x is not None and scale_w is not None
    if bias.dim() != 1 or scale_x.dim() or scale_w.dim() > 1 or scale_w.numel() not in (1, bias.numel()) or layer.kwargs.keys() & {"alpha", "beta"}:
        return
    bias = bias.detach()
    scale = (scale_x.double() * scale_w.double()).expand(bias.shape)
    codes = (bias.double() / scale).round()
    if not float(codes.abs().max()) <= LARGEST_BIAS_CODE:
        return
    name = str(argument(layer, at_bias, "bias").target)
    made = dequantized(network, name, codes.to(torch.int32), scale.float(), torch.zeros(bias.shape, dtype=torch.int32), 0, layer)
    layer.update_arg(at_bias, made)


def _join_bias(network: Network, total: fx.Node, ranks: dict[fx.Node, int]) -> None:
    """A 2-D integer product and the sum behind it become one operator: ONNX Runtime joins them in any case, and leaves them in float."""
    product, bias = total.args[:2]
    if not isinstance(product, fx.Node) or product.target not in (aten.mm.default, aten.matmul.default) or ranks.get(product) != 2:
        return
    integers = all(isinstance(n, fx.Node) and n.target is ours.dequantize.default for n in product.args)
    values = constant(network, bias)
    if integers and values is not None and values.dim() == 1 and only_user(product) is total and not total.kwargs:
        total.target, total.args = aten.addmm.default, (bias, *product.args)

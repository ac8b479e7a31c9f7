"""From a trainable quantized graph to an integer one: fake-quantized weights become integer constants, ready for a model file.

Vocabulary after lowering (our own operators, each one ONNX operator or two): ``quantize`` (QuantizeLinear), ``dequantize``
(DequantizeLinear), ``quantized_embedding`` (Gather of codes and scales), ``dynamic_linear`` (DynamicQuantizeLinear + MatMulInteger).
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportOptionalIterable=false, reportGeneralTypeIssues=false
# pyright: reportAttributeAccessIssue=false, reportOptionalMemberAccess=false, reportIndexIssue=false, reportReturnType=false
# (torch.fx and onnxscript type every argument as a union of everything)

from __future__ import annotations

import torch
from torch import Tensor, fx

from ..numerics import grids
from .dry import shapes
from .lower_groups import Decoding, GroupedWeight, insert_call
from .lower_recurrent import lower_recurrent
from .lower_weights import PRODUCTS, lower_weight
from .lower_weights import finer as finer
from .network import Network
from .rewrite import CONVOLUTIONS, add_constant, argument, constant, only_user

aten = torch.ops.aten
ours = torch.ops.downsize
# A bias code beyond this would not leave room for the accumulator.
LARGEST_BIAS_CODE = 2.0**30
GROUPED = (ours.fake_quantize_groups.default, ours.fake_quantize_levels.default)


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


def lower(network: Network, runtime: str = "") -> list[Decoding]:
    """Replace the fake quantizers of ``network`` by integer constants and quantize/dequantize pairs, in place.

    Args: ``runtime``: whose own operators may be used; empty for standard operators alone.

    Returns: of each weight that is decoded somewhere, where.
    """
    made = lower_recurrent(network, runtime)
    for fake in [node for node in network.graph.nodes if node.target in GROUPED and constant(network, node.args[0]) is not None]:
        made += GroupedWeight.of(network, fake).lower(runtime)
    fakes = [node for node in network.graph.nodes if node.target is ours.fake_quantize.default]
    ranks = {node: len(size) for node, size in shapes(network).items()} if fakes else {}
    weights = [fake for fake in fakes if constant(network, fake.args[0]) is not None]
    # TensorRT takes signed activations, and weights behind its dequantize operators alone: nothing may be packed.
    explicit = any(_grid(fake).low < 0 for fake in fakes if fake not in weights)
    for fake in weights:
        made += lower_weight(network, fake, ranks, runtime, explicit)
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
    return made


def _grid(fake: fx.Node) -> grids.Grid:
    return grids.Grid(int(fake.args[4]), int(fake.args[5]))


def dequantized(network: Network, name: str, q: Tensor, scale: Tensor, zero_point: Tensor, axis: object, before: fx.Node) -> fx.Node:
    """The values of constant codes, as a node before ``before``."""
    parts = [
        add_constant(network, f"{name}_codes", q, before),
        add_constant(network, f"{name}_scale", scale.detach(), before),
        add_constant(network, f"{name}_zero", zero_point.to(q.dtype), before),
    ]
    return insert_call(network, before, ours.dequantize.default, (*parts, axis))


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
    """An int32 bias with scale ``input scale * weight scale``, which integer kernels add to their accumulator as it is.

    Where the input is signed it stays in float, as TensorRT wants it.
    """
    at_source, at_weight, at_bias, _ = PRODUCTS.get(layer.target, (0, 1, 2, 0))
    assert at_bias is not None
    source, weight, bias = layer.args[at_source], layer.args[at_weight], constant(network, argument(layer, at_bias, "bias"))
    source = source.args[0] if isinstance(source, fx.Node) and source.target is aten.pad.default else source
    if bias is None or not all(isinstance(n, fx.Node) and n.target is ours.dequantize.default for n in (source, weight)):
        return
    scale_x, scale_w = constant(network, source.args[1]), constant(network, weight.args[1])
    assert scale_x is not None and scale_w is not None
    if constant(network, source.args[2]).dtype is torch.int8:
        return
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

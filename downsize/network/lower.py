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
from .network import Network
from .rewrite import add_constant, argument, constant, only_user
from .statistics import shapes

aten = torch.ops.aten
ours = torch.ops.downsize
# A bias code beyond this would not leave room for the accumulator.
LARGEST_BIAS_CODE = 2.0**30


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
def quantized_embedding(q: Tensor, scale: Tensor, index: Tensor) -> Tensor:
    """Rows ``index`` of a table of codes [rows, width] with one scale a row [rows, 1]: float [*index, width]."""
    return q[index].float() * scale[index]


@quantized_embedding.register_fake
def _(q: Tensor, scale: Tensor, index: Tensor) -> Tensor:
    return scale.new_empty([*index.shape, q.shape[1]])


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
    for node, sizes in shapes(network).items() if fakes else ():
        # A 2-D product is exported as Gemm, whose integer kernel wants the weight as it is.
        node.meta["matrix"] = len(sizes) == 2
    weights = [fake for fake in fakes if constant(network, fake.args[0]) is not None]
    for fake in weights:
        _lower_weight(network, fake)
    for fake in fakes:
        if fake not in weights:
            _lower_activation(network, fake)
    for node in list(network.graph.nodes):
        if node.target in (aten.conv1d.default, aten.conv2d.default, aten.conv3d.default, aten.linear.default):
            _lower_bias(network, node)
    network.recompile()


def _grid(fake: fx.Node) -> grids.Grid:
    return grids.Grid(int(fake.args[4]), int(fake.args[5]))


def _lower_weight(network: Network, fake: fx.Node) -> None:
    weight, scale, zero_point = (constant(network, node) for node in fake.args[:3])
    assert weight is not None and scale is not None and zero_point is not None
    axis, grid = fake.args[3], _grid(fake)
    with torch.no_grad():
        q = grids.codes(weight, scale, zero_point, axis, grid)
    name = str(fake.args[0].target)
    for user in list(fake.users):
        if user.target is aten.embedding.default and user.args[0] is fake:
            _lower_embedding(network, user, name, q, scale, axis)
        elif user.target is aten.linear.default and user.args[1] is fake and axis == 0:
            _lower_linear(network, user, name, q, scale, zero_point)
    if fake.users:
        made = _dequantized(network, name, q, scale, zero_point, axis, fake)
        fake.replace_all_uses_with(made)
    network.graph.erase_node(fake)


def _dequantized(network: Network, name: str, q: Tensor, scale: Tensor, zero_point: Tensor, axis: object, before: fx.Node) -> fx.Node:
    parts = [
        add_constant(network, f"{name}_codes", q, before),
        add_constant(network, f"{name}_scale", scale.detach(), before),
        add_constant(network, f"{name}_zero", zero_point.to(q.dtype), before),
    ]
    return _call(network, before, ours.dequantize.default, (*parts, axis))


def _call(network: Network, before: fx.Node, target: object, args: tuple[object, ...]) -> fx.Node:
    with network.graph.inserting_before(before):
        made = network.graph.call_function(target, args)
    made.meta = dict(before.meta)
    return made


def _lower_embedding(network: Network, user: fx.Node, name: str, q: Tensor, scale: Tensor, axis: object) -> None:
    rows = scale.detach().reshape(-1, 1) if axis == 0 else scale.detach().reshape(1, 1).expand(q.shape[0], 1).contiguous()
    table = add_constant(network, f"{name}_codes", q, user)
    scales = add_constant(network, f"{name}_scale", rows, user)
    user.replace_all_uses_with(_call(network, user, ours.quantized_embedding.default, (table, scales, user.args[1])))
    network.graph.erase_node(user)


def _lower_linear(network: Network, user: fx.Node, name: str, q: Tensor, scale: Tensor, zero_point: Tensor) -> None:
    """A linear layer becomes a product with codes [in, out]: runtimes take the weight of an integer product that way round."""
    source = user.args[0]
    dynamic = isinstance(source, fx.Node) and source.target is ours.fake_quantize_dynamic.default
    if not dynamic and user.meta.get("matrix"):
        return  # A 2-D input: exported as Gemm, which takes [out, in].
    transposed = q.t().contiguous()
    if dynamic:
        codes = add_constant(network, f"{name}_codes", transposed, user)
        scales = add_constant(network, f"{name}_scale", scale.detach(), user)
        product = _call(network, user, ours.dynamic_linear.default, (source.args[0], codes, scales))
    else:
        weight = _dequantized(network, name, transposed, scale, zero_point, 1, user)
        product = _call(network, user, aten.matmul.default, (source, weight))
    bias = argument(user, 2, "bias")
    if bias is not None:
        product = _call(network, user, aten.add.Tensor, (product, bias))
    user.replace_all_uses_with(product)
    network.graph.erase_node(user)


def _lower_activation(network: Network, fake: fx.Node) -> None:
    scale, zero_point = constant(network, fake.args[1]), constant(network, fake.args[2])
    assert scale is not None and zero_point is not None
    name = f"{fake.args[0].name}"
    made_scale = add_constant(network, f"{name}_scale", scale.detach().reshape(()), fake)
    made_zero = add_constant(network, f"{name}_zero", zero_point.reshape(()).to(_grid(fake).dtype), fake)
    source = _before_clipping(network, fake, float(scale), int(zero_point))
    q = _call(network, fake, ours.quantize.default, (source, made_scale, made_zero))
    fake.replace_all_uses_with(_call(network, fake, ours.dequantize.default, (q, made_scale, made_zero, None)))
    network.graph.erase_node(fake)


def _before_clipping(network: Network, fake: fx.Node, scale: float, zero_point: int) -> fx.Node:
    """The tensor to quantize: the codes' own range does what a ReLU or clip right before them does, so that node need not be in the file."""
    source = fake.args[0]
    assert isinstance(source, fx.Node)
    bounds = _clipping_bounds(source)
    if bounds is None or only_user(source) is not fake or not isinstance(source.args[0], fx.Node):
        return source
    grid = _grid(fake)
    slack = scale / 2
    inside = scale * (grid.low - zero_point) >= bounds[0] - slack * 1e-3 and scale * (grid.high - zero_point) <= bounds[1] + slack
    return source.args[0] if inside else source


def _clipping_bounds(node: fx.Node) -> tuple[float, float] | None:
    if node.target is aten.relu.default:
        return 0.0, float("inf")
    if node.target is aten.relu6.default:
        return 0.0, 6.0
    if node.target is aten.hardtanh.default:
        return float(argument(node, 1, "min_val", -1.0)), float(argument(node, 2, "max_val", 1.0))
    return None


def _lower_bias(network: Network, layer: fx.Node) -> None:
    """An int32 bias with scale ``input scale * weight scale``, which integer kernels add to their accumulator as it is."""
    source, weight, bias = layer.args[0], layer.args[1], constant(network, argument(layer, 2, "bias"))
    bias = None if bias is None else bias.detach()
    source = source.args[0] if isinstance(source, fx.Node) and source.target is aten.pad.default else source
    if bias is None or not all(isinstance(n, fx.Node) and n.target is ours.dequantize.default for n in (source, weight)):
        return
    scale_x, scale_w = constant(network, source.args[1]), constant(network, weight.args[1])
    assert scale_x is not None and scale_w is not None
    scale = (scale_x.double() * scale_w.double()).expand(bias.shape)
    codes = (bias.double() / scale).round()
    if float(codes.abs().max()) > LARGEST_BIAS_CODE:
        return
    name = str(argument(layer, 2, "bias").target)
    made = _dequantized(network, name, codes.to(torch.int32), scale.float(), torch.zeros(bias.shape, dtype=torch.int32), 0, layer)
    layer.update_arg(2, made)

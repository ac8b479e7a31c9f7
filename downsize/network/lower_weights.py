"""Fake-quantized weights of one scale a channel become constants: codes for integer kernels, or values for layers that compute in float."""

# pyright: reportArgumentType=false, reportCallIssue=false, reportOptionalIterable=false, reportGeneralTypeIssues=false
# pyright: reportAttributeAccessIssue=false, reportOptionalMemberAccess=false, reportIndexIssue=false, reportReturnType=false
# (torch.fx types every argument as a union of everything)

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from ..numerics import grids
from .lower_groups import AT_LOAD, Decoding, GroupedWeight, insert_call
from .network import Network
from .packed import Packed
from .rewrite import CONVOLUTIONS, TRANSPOSED, add_constant, argument, constant

aten = torch.ops.aten
ours = torch.ops.downsize
# Matrix products with a weight: operator -> positions of input, weight, bias, and the weight's output axis.
PRODUCTS: dict[object, tuple[int, int, int | None, int]] = {
    aten.linear.default: (0, 1, 2, 0),
    aten.addmm.default: (1, 2, 0, 1),
    aten.mm.default: (0, 1, None, 1),
    aten.matmul.default: (0, 1, None, 1),
}
# What may stand between a quantizer and the layer that computes with its codes: the codes only move.
MOVING = """
    pad constant_pad_nd view reshape flatten unflatten permute transpose t numpy_T squeeze unsqueeze contiguous clone alias slice select expand
    max_pool1d max_pool2d max_pool3d relu dropout chunk split getitem
"""
MOVES = frozenset(MOVING.split())
QUANTIZED = (ours.fake_quantize.default, ours.fake_quantize_dynamic.default)
LARGEST = 64  # that codes become: two products of it with an unsigned byte can be added in 16 bits


def lower_weight(network: Network, fake: fx.Node, ranks: dict[fx.Node, int], runtime: str, explicit: bool = False) -> list[Decoding]:
    """Replace the fake quantizer of a weight, in place, and say where packed bits are decoded.

    ``explicit``: every weight is an int8 constant behind a dequantize operator, whoever reads it.
    """
    tables = [user for user in fake.users if user.target is aten.embedding.default and user.args[0] is fake and fake.args[3] in (None, 0)]
    integers = explicit or any(_reads_codes(network, fake, user) for user in fake.users if user not in tables)
    if not integers and fake.args[3] in (None, 0) and network.tensor(str(fake.args[0].target)).dim() > 1:
        return GroupedWeight.of(network, fake).lower(runtime)
    weight = ChannelWeight.of(network, fake)
    weight.packs = not explicit
    for user in list(fake.users) if integers else []:
        if user.target in PRODUCTS and user.args[PRODUCTS[user.target][1]] is fake and fake.args[3] in (None, PRODUCTS[user.target][3]):
            _lower_product(weight, user, ranks)
    if set(fake.users) - set(tables):
        made = weight.values(False, fake, integers)
        fake.replace_all_uses_with(made, delete_user_cb=lambda user: user not in tables)
    for user in tables:
        # A table that layers read too is stored once, the way round that they take.
        _lower_embedding(weight, user, transposed=True in weight.made and False not in weight.made)
    bits = (int(fake.args[5]) - int(fake.args[4])).bit_length()
    record = Decoding(str(fake.args[0].target), bits, weight.stored, AT_LOAD)
    network.graph.erase_node(fake)
    return [record] if weight.packed or not integers else []


def _reads_codes(network: Network, weight: fx.Node, user: fx.Node) -> bool:
    """Whether a reader of a weight computes with codes: its other input is quantized, too."""
    if _moves(user):
        return any(_reads_codes(network, user, reader) for reader in user.users)
    others = [source for source in user.all_input_nodes if source is not weight and constant(network, source) is None]
    return any(_is_quantized(network, source) for source in others) and (
        user.target in PRODUCTS or user.target in CONVOLUTIONS | TRANSPOSED or user.target is aten.bmm.default
    )


def _is_quantized(network: Network, node: Any) -> bool:
    while _moves(node):
        node = node.args[0]
    return node.target in QUANTIZED and constant(network, node.args[0]) is None


def _moves(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    name = schema.name.split("::")[1] if schema is not None else getattr(node.target, "__name__", "")
    return node.op == "call_function" and name in MOVES and isinstance(node.args[0], fx.Node)


def finer(grid: grids.Grid) -> int:
    """The power of two that codes of a signed grid are multiplied by in a file, up to ``LARGEST``; 1 for those of 7 bits and int8."""
    room = LARGEST // max(-grid.low, grid.high)
    return 1 if grid.low >= 0 or room < 2 else 1 << (room.bit_length() - 1)


@dataclass
class ChannelWeight:
    """A fake-quantized weight: its codes, and the constants made of them so far, by whether they are transposed.

    Codes of few bits are multiplied by a power of two, ``factor``, and the scale is divided by it: the values are the
    same, and integer biases, whose step is this scale times the input's, become so much finer. In the file they are packed, if it ``packs``.
    """

    network: Network
    fake: fx.Node
    q: Tensor
    factor: int
    made: dict[bool, fx.Node] = field(default_factory=dict)
    stored: int = 0
    packed: bool = False
    packs: bool = True

    @staticmethod
    def of(network: Network, fake: fx.Node) -> ChannelWeight:
        weight, scale, zero_point = (constant(network, node) for node in fake.args[:3])
        assert weight is not None and scale is not None and zero_point is not None
        grid = grids.Grid(int(fake.args[4]), int(fake.args[5]))
        factor = 1 if bool(zero_point.any()) else finer(grid)
        with torch.no_grad():
            return ChannelWeight(network, fake, grids.codes(weight, scale, zero_point, fake.args[3], grid) * factor, factor)

    def constant(self, what: str, tensor: Tensor) -> fx.Node:
        self.stored += tensor.numel() * tensor.element_size()
        return add_constant(self.network, f"{self.fake.args[0].target}_{what}", tensor.detach(), self.fake)

    def scale(self) -> Tensor:
        scale = constant(self.network, self.fake.args[1])
        assert scale is not None
        return scale / self.factor

    def codes(self, transposed: bool) -> fx.Node:
        if transposed not in self.made:
            q = self.q.t().contiguous() if transposed else self.q
            packed = Packed.of(q.reshape(1, -1))
            self.packed = self.packs and packed.saves > 0
            self.made[transposed] = self._unpacked(packed, q.shape) if self.packed else self.constant("codes", q)
        return self.made[transposed]

    def _unpacked(self, packed: Packed, shape: torch.Size) -> fx.Node:
        bits, table = self.constant("packed", packed.bits), self.constant("table", packed.table)
        codes = insert_call(self.network, self.fake, ours.unpack.default, (bits, table, packed.width, packed.columns))
        return insert_call(self.network, self.fake, aten.reshape.default, (codes, list(shape)))

    def values(self, transposed: bool, before: fx.Node, integers: bool = True) -> fx.Node:
        """The real values: for integer kernels decoded by the runtime's own operator, else once, when the file is loaded."""
        axis: Any = self.fake.args[3]
        offset: Any = constant(self.network, self.fake.args[2])
        # Constants that are decoded when the file is loaded need none where it changes nothing.
        zero = self.constant("zero", offset.to(self.q.dtype if integers else torch.int32)) if integers or bool(offset.any()) else None
        parts = self.codes(transposed), self.constant("scale", self.scale()), zero
        target = ours.dequantize.default if integers else ours.decode.default
        return insert_call(self.network, before, target, (*parts, axis if axis is None or not transposed else 1 - axis))


def _lower_embedding(weight: ChannelWeight, user: fx.Node, transposed: bool) -> None:
    scale = weight.scale().reshape(-1, 1).expand(weight.q.shape[0], 1).contiguous()
    args = weight.codes(transposed), weight.constant("scale", scale), user.args[1], int(transposed)
    user.replace_all_uses_with(insert_call(weight.network, user, ours.quantized_embedding.default, args))
    weight.network.graph.erase_node(user)


def _lower_product(weight: ChannelWeight, user: fx.Node, ranks: dict[fx.Node, int]) -> None:
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

"""Recurrent layers on their way into a file: an LSTM with dynamic activations becomes one operator a layer, where the runtime has it.

ONNX Runtime's DynamicQuantizeLSTM multiplies int8 codes; with one input of 64 steps it took a third of the time of the float operator. For other
runtimes the layer computes in float, with weights that are decoded when the file is loaded, as all recurrent layers do that are not dynamic.
Where ONNX Runtime computes small layers on several threads, it measures the ranges of a batch's states in parts.
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportOptionalIterable=false, reportGeneralTypeIssues=false
# pyright: reportAttributeAccessIssue=false, reportOptionalMemberAccess=false, reportIndexIssue=false, reportReturnType=false
# pyright: reportOptionalSubscript=false, reportOperatorIssue=false
# (torch.fx and onnxscript type every argument as a union of everything)

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from onnx.defs import OpSchema
from onnxscript import opset20 as op
from onnxscript import values
from torch import Tensor, fx

from ..errors import ExportError
from ..numerics import grids
from ..numerics.recurrent import dynamic_lstm
from .clean import at
from .lower_groups import AT_LOAD, Decoding, insert_call
from .network import Network
from .packed import Packed
from .rewrite import add_constant, aten, constant

ours = torch.ops.downsize
DYNAMIC = ours.dynamic_lstm.default
# Which runtimes have the operator.
RUNTIMES = ("onnxruntime",)
RECURRENT = (aten.lstm.input, aten.gru.input, aten.rnn_tanh.input, aten.rnn_relu.input, DYNAMIC)
ROWS = (0, 3, 1, 2)  # the gates of ONNX (input, output, forget, cell) in torch's order (input, forget, cell, output)


@torch.library.custom_op("downsize::integer_lstm", mutates_args=())
def integer_lstm(
    x: Tensor, state: Tensor, cell: Tensor, w: Tensor, w_scale: Tensor, r: Tensor, r_scale: Tensor, zero: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """One layer of :func:`~downsize.numerics.recurrent.dynamic_lstm` from codes, laid out as ONNX has them.

    ``x``: [time, batch, features]. ``w``, ``r``: int8 [directions, columns, 4 * width], gates in the order input, output, forget, cell;
    ``w_scale``, ``r_scale``, ``zero`` (all 0, int8): [directions, 4 * width]; ``bias``: [directions, 8 * width].
    """
    order = torch.tensor(ROWS).argsort()
    parameters: list[Tensor] = []
    for direction in range(len(w)):
        for q, scale in ((w, w_scale), (r, r_scale)):
            parameters.append(_gates((q[direction].float() * scale[direction]).mT, order))
        if bias is not None:
            parameters += [_gates(part, order) for part in bias[direction].chunk(2)]
    return dynamic_lstm(x, [state, cell], parameters, bias is not None, 1, 0.0, False, len(w) == 2, False)


@integer_lstm.register_fake
def _(x, state, cell, w, w_scale, r, r_scale, zero, bias):
    return x.new_empty([*x.shape[:2], state.shape[2] * w.shape[0]]), torch.empty_like(state), torch.empty_like(cell)


def _gates(rows: Tensor, order: Tensor | Sequence[int]) -> Tensor:
    """Rows of four gates, the gates in another order."""
    return rows.unflatten(0, (4, -1))[torch.as_tensor(order)].flatten(0, 1)


def lower_recurrent(network: Network, runtime: str) -> list[Decoding]:
    """Replace the dynamic LSTM layers of ``network``, in place, and say where those of their weights are decoded that are packed.

    Raises:
        ExportError: an LSTM has projections, which ONNX does not know.
    """
    made: list[Decoding] = []
    for node in [node for node in network.graph.nodes if node.target in RECURRENT]:
        count = (4 if node.args[3] else 2) * node.args[4] * (2 if node.args[7] else 1)
        if len(node.args[2]) != count:
            raise ExportError(f"An lstm has projections of its state, which ONNX cannot say.\n{at(node)}Leave proj_size at 0.")
        if node.target is not DYNAMIC:
            continue
        if runtime in RUNTIMES and all(_is_codes(network, matrix) for matrix in _matrices(node)):
            made += _Layers(network, node).lower()
        else:
            node.target = aten.lstm.input
    return made


def _matrices(node: fx.Node) -> list[fx.Node]:
    """The weights of a recurrent layer: for input and state, of every layer and direction."""
    step = 4 if node.args[3] else 2
    return [one for start in range(0, len(node.args[2]), step) for one in node.args[2][start : start + 2]]


def _is_codes(network: Network, fake: fx.Node) -> bool:
    """Whether a weight has codes that fit int8, one scale a row and no zero points."""
    if fake.target is not ours.fake_quantize.default or fake.args[3] != 0 or constant(network, fake.args[0]) is None:
        return False
    return fake.args[4] >= grids.INT8.low and fake.args[5] <= grids.INT8.high and not bool(constant(network, fake.args[2]).any())


class _Layers:
    """A dynamic LSTM of several layers while it becomes one operator a layer."""

    def __init__(self, network: Network, node: fx.Node) -> None:
        self.network, self.node = network, node
        self.made: list[Decoding] = []

    def call(self, target: object, *args: object) -> fx.Node:
        return insert_call(self.network, self.node, target, args)

    def lower(self) -> list[Decoding]:
        x, hidden, _, biased, layers, _, _, both, first = self.node.args
        directions, value, states = 2 if both else 1, self.call(aten.transpose.int, x, 0, 1) if first else x, []
        for layer in range(layers):
            parts = [self.call(aten.slice.Tensor, one, 0, layer * directions, (layer + 1) * directions) for one in hidden]
            outputs = self.call(ours.integer_lstm.default, value, *parts, *self._constants(layer, directions, biased))
            value, *last = (self.call(operator.getitem, outputs, i) for i in range(3))
            states.append(last)
        ends = [self.call(aten.cat.default, list(each), 0) if layers > 1 else each[0] for each in zip(*states, strict=True)]
        results = [self.call(aten.transpose.int, value, 0, 1) if first else value, *ends]
        fakes = _matrices(self.node)
        for user in list(self.node.users):
            user.replace_all_uses_with(results[user.args[1]])
            self.network.graph.erase_node(user)
        self.network.graph.erase_node(self.node)
        for fake in dict.fromkeys(fakes):
            if not fake.users:
                self.network.graph.erase_node(fake)
        return self.made

    def _constants(self, layer: int, directions: int, biased: bool) -> list[fx.Node | None]:
        """Codes, scales, zero points and biases of a layer."""
        count = 4 if biased else 2
        own = self.node.args[2][layer * directions * count : (layer + 1) * directions * count]
        by_direction = [own[i : i + count] for i in range(0, len(own), count)]
        parts: list[fx.Node | None] = []
        for place in (0, 1):
            parts += self._weight([each[place] for each in by_direction])
        name = str(by_direction[0][0].args[0].target)
        scale = constant(self.network, parts[1])
        parts.append(self.constant(f"{name}_zero", torch.zeros(scale.shape, dtype=torch.int8)))
        if not biased:
            return [*parts, None]
        biases = [[_gates(constant(self.network, one).detach(), ROWS) for one in each[2:]] for each in by_direction]
        return [*parts, self.constant(f"{name}_biases", torch.stack([torch.cat(each) for each in biases]))]

    def constant(self, name: str, tensor: Tensor) -> fx.Node:
        return add_constant(self.network, name, tensor, self.node)

    def _weight(self, fakes: list[fx.Node]) -> tuple[fx.Node, fx.Node]:
        """The codes, as int8 or, where that takes less, packed, and the scales of one weight of a layer, of all directions."""
        codes, scales = [], []
        for fake in fakes:
            weight, scale, zero = (constant(self.network, part).detach() for part in fake.args[:3])
            q = grids.codes(weight, scale, zero, 0, grids.Grid(*fake.args[4:6]))
            codes.append(_gates(q, ROWS).mT)
            scales.append(_gates(scale, ROWS))
        name, q = str(fakes[0].args[0].target), torch.stack(codes).contiguous()
        packed = Packed.of(q.reshape(1, -1))
        made_scale = self.constant(f"{name}_scale", torch.stack(scales))
        if packed.saves <= 0:
            return self.constant(f"{name}_codes", q), made_scale
        bits, table = self.constant(f"{name}_packed", packed.bits), self.constant(f"{name}_table", packed.table)
        width = (int(fakes[0].args[5]) - int(fakes[0].args[4])).bit_length()
        each = (packed.bits.numel() + 4 * sum(scale.numel() for scale in scales)) // len(fakes)
        self.made += [Decoding(str(fake.args[0].target), width, each, AT_LOAD) for fake in fakes]
        flat = self.call(ours.unpack.default, bits, table, packed.width, packed.columns)
        return self.call(aten.reshape.default, flat, list(q.shape)), made_scale


# In ONNX --------------------------------------------------------------------------------------------------------------------------

_KINDS = sorted(f"tensor({kind})" for kind in ("float", "int8", "uint8", "int32"))
_INPUTS = ("X", "W", "R", "B", "sequence_lens", "initial_h", "initial_c", "P", "W_scale", "W_zero_point", "R_scale", "R_zero_point")
_SCHEMA = OpSchema(
    "DynamicQuantizeLSTM",
    "com.microsoft",
    1,
    inputs=[OpSchema.FormalParameter(name, f"T_{name}", param_option=OpSchema.FormalParameterOption.Optional) for name in _INPUTS],
    outputs=[OpSchema.FormalParameter(name, "T") for name in ("Y", "Y_h", "Y_c")],
    type_constraints=[(kind, _KINDS, "") for kind in ("T", *(f"T_{name}" for name in _INPUTS))],
    attributes=[OpSchema.Attribute("direction", OpSchema.AttrType.STRING, ""), OpSchema.Attribute("hidden_size", OpSchema.AttrType.INT, "")],
)
_OPERATOR: Any = values.Op(values.Opset("com.microsoft", 1), "DynamicQuantizeLSTM", _SCHEMA)


def _integer_lstm(x, state, cell, w, w_scale, r, r_scale, zero, bias=None):
    ways: dict[str, Any] = {"direction": "bidirectional" if w.shape[0] == 2 else "forward", "hidden_size": r.shape[1]}
    y, last_state, last_cell = _OPERATOR(x, w, r, bias, None, state, cell, None, w_scale, zero, r_scale, zero, **ways)
    # [time, directions, batch, width]
    return op.Reshape(op.Transpose(y, perm=[0, 2, 1, 3]), op.Constant(value_ints=[0, 0, -1])), last_state, last_cell


TRANSLATIONS: dict[Any, Any] = {ours.integer_lstm.default: _integer_lstm}

"""The ONNX form of constants of few bits (see ``packed.py``).

The exporter computes what it can of constants, and would write the decoded weights into the file. So it is handed operators that it does not
know, of the domain ``downsize``; when it has done, :func:`spell_packed` puts standard operators in their place.

Bits are taken apart by looking bytes up in a table, or, where codes lie across bytes, by division and remainder: these OpenVINO computes when
it loads a file, while it neither does so with shifts nor shifts bytes to the left rightly.
"""

# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportOptionalMemberAccess=false, reportCallIssue=false

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from onnx import TensorProto
from onnx.defs import OpSchema
from onnxscript import ir, values

from ..numerics.groups import LARGEST_CODE, SMALLEST_EXTREME, group_count
from . import lower_halves as lower_halves
from .packed import WHOLE

DOMAIN = "downsize"
MICROSOFT = "com.microsoft"
ours = torch.ops.downsize
ANYTHING = sorted(f"tensor({kind})" for kind in ("float", "float16", "bfloat16", "uint8", "int8", "int32", "int64"))


def _unknown_operator(name: str, inputs: int, *attributes: str) -> values.Op:
    """An operator of so many inputs (the last may be left out) and whole-number attributes."""
    optional = [OpSchema.FormalParameterOption.Single] * (inputs - 1) + [OpSchema.FormalParameterOption.Optional]
    schema = OpSchema(
        name,
        DOMAIN,
        1,
        inputs=[OpSchema.FormalParameter(f"x{i}", f"T{i}", param_option=option) for i, option in enumerate(optional)],
        outputs=[OpSchema.FormalParameter("y", "T")],
        type_constraints=[(kind, ANYTHING, "") for kind in ("T", *(f"T{i}" for i in range(inputs)))],
        attributes=[OpSchema.Attribute(attribute, OpSchema.AttrType.INT, "") for attribute in attributes],
    )
    return values.Op(values.Opset(DOMAIN, 1), name, schema)


_UNPACK = _unknown_operator("Unpack", 2, "width", "stored", "columns", "rank")
_PACKED_ROWS = _unknown_operator("PackedRows", 2, "rank", "index_rank")
_DECODE = _unknown_operator("Decode", 3, "behind")
_DECODE_GROUPS = _unknown_operator("DecodeGroups", 3, "group", "groups", "columns", "rank")
_GROUP_LINEAR = _unknown_operator("GroupLinear", 4, "width", "group", "rows", "blocks", "columns")
_BLOCK_LINEAR = _unknown_operator("BlockLinear", 4, "width", "group", "rows", "blocks", "columns")
_ROUND_BLOCKS = _unknown_operator("RoundBlocks", 1, "group", "columns", "rank")
_GROUP_ROWS = _unknown_operator("GroupRows", 4, "width", "group")
_WIDEN = _unknown_operator("Widen", 1)


def _unpack(bits, table, width, columns):
    return _UNPACK(bits, table, width=width, stored=bits.shape[-1] * 8 // width, columns=columns, rank=len(bits.shape))


def _packed_rows(table, index):
    return _PACKED_ROWS(table, index, rank=len(table.shape), index_rank=len(index.shape))


def _decode(q, scale, zero_point=None, axis=None):
    return _DECODE(q, scale, zero_point, behind=0 if axis is None else len(q.shape) - 1 - axis)


def _decode_groups(q, scale, zero_point, group):
    return _DECODE_GROUPS(q, scale, zero_point, group=group, groups=scale.shape[-1], columns=q.shape[-1], rank=len(q.shape))


def _group_linear(x, bits, scale, zero_point, width, group):
    return _GROUP_LINEAR(x, bits, scale, zero_point, **_sizes(x, bits, width, group))


def _block_linear(x, bits, scale, zero_point, width, group):
    return _BLOCK_LINEAR(x, bits, scale, zero_point, **_sizes(x, bits, width, group))


def _sizes(x, bits, width, group):
    return {"width": width, "group": group, "rows": bits.shape[0], "blocks": bits.shape[1], "columns": x.shape[-1]}


def _round_blocks(x, group):
    return _ROUND_BLOCKS(x, group=max(1, min(group, x.shape[-1])), columns=x.shape[-1], rank=len(x.shape))


def _group_rows(bits, scale, zero_point, index, width, group):
    return _GROUP_ROWS(bits, index, scale, zero_point, width=width, group=group)


def _widen(x):
    return _WIDEN(x)


TRANSLATIONS: dict[Any, Callable[..., Any]] = {
    ours.widen.default: _widen,
    ours.unpack.default: _unpack,
    ours.packed_rows.default: _packed_rows,
    ours.decode.default: _decode,
    ours.decode_groups.default: _decode_groups,
    ours.group_linear.default: _group_linear,
    ours.block_linear.default: _block_linear,
    ours.fake_quantize_blocks.default: _round_blocks,
    ours.group_rows.default: _group_rows,
}


def spell_packed(model: ir.Model) -> None:
    """Replace, in place, the operators of the domain ``downsize`` by those that runtimes have."""
    writer = _Writer(model.graph)
    for node in list(model.graph):
        if node.domain == DOMAIN:
            writer.nodes = []
            writer.metadata = dict(node.metadata_props)
            sizes = {name: attribute.as_int() for name, attribute in node.attributes.items()}
            made = SPELLINGS[node.op_type](writer, *node.inputs, **sizes)
            made.name, node.outputs[0].name = node.outputs[0].name, None
            ir.convenience.replace_nodes_and_values(model.graph, node, [node], writer.nodes, node.outputs, [made])
    model.opset_imports.pop(DOMAIN, None)
    if any(node.domain == MICROSOFT for node in model.graph):
        model.opset_imports[MICROSOFT] = 1


class _Writer:
    """Makes nodes, and constants, each once for a file."""

    def __init__(self, graph: ir.Graph) -> None:
        self.graph = graph
        self.nodes: list[ir.Node] = []
        self.metadata: dict[str, str] = {}
        self.constants: dict[tuple[Any, ...], ir.Value] = {}
        self.tables: dict[tuple[Any, ...], ir.Value] = {}
        self.spoiled: dict[ir.Value, ir.Value] = {}

    def __call__(self, operator: str, *inputs: ir.Value | None, domain: str = "", **attributes: Any) -> ir.Value:
        node = ir.node(operator, inputs, attributes, domain=domain, metadata_props=dict(self.metadata))
        self.nodes.append(node)
        return node.outputs[0]

    def constant(self, array: Any) -> ir.Value:
        """An initializer with these numbers."""
        array = np.asarray(array)
        key = (array.dtype.str, array.shape, array.tobytes())
        if key not in self.constants:
            name = f"constant_{len(self.constants)}"
            while name in self.graph.initializers:
                name += "_"
            self.constants[key] = ir.Value(name=name, const_value=ir.tensor(array, name=name))
            self.graph.register_initializer(self.constants[key])
        return self.constants[key]

    def of_bytes(self, entries: np.ndarray, width: int) -> ir.Value:
        """The entries that each byte stands for, [256, codes a byte], made when the file is loaded, and once."""
        key = (entries.dtype.str, entries.tobytes(), width)
        if key not in self.tables:
            numbers = (np.arange(256)[:, None] >> np.arange(0, 8, width)).astype(np.uint8) & np.uint8(2**width - 1)
            index = self("Cast", self.constant(numbers), to=TensorProto.INT32)
            self.tables[key] = self("Gather", self.constant(entries), index, axis=0)
        return self.tables[key]

    def reshape(self, value: ir.Value, shape: Sequence[int]) -> ir.Value:
        """Where ``shape`` has 0 the dimension stays."""
        return self("Reshape", value, self.constant(np.array(shape, np.int64)))

    def first(self, value: ir.Value, columns: int) -> ir.Value:
        """The first columns of the last dimension."""
        ends = (self.constant(np.array([number], np.int64)) for number in (0, columns, -1))
        return self("Slice", value, *ends)

    def floats(self, value: ir.Value) -> ir.Value:
        return self("Cast", value, to=TensorProto.FLOAT)


def _spell_unpack(write: _Writer, bits: ir.Value, table: ir.Value, width: int, stored: int, columns: int, rank: int) -> ir.Value:
    entries, leading = table.const_value.numpy(), [0] * (rank - 1)
    numbers = write("Cast", bits, to=TensorProto.INT32)
    if width in WHOLE:
        codes = write("Gather", write.of_bytes(entries, width), numbers, axis=0)
    else:
        start = np.arange(8, dtype=np.int32) * width
        runs = write.reshape(numbers, [*leading, -1, width])
        low = write("Gather", runs, write.constant(start // 8), axis=-1)
        high = write("Gather", runs, write.constant(np.minimum(start // 8 + 1, width - 1)), axis=-1)
        both = write("Add", low, write("Mul", high, write.constant(np.int32(256))))
        shifted = write("Div", both, write.constant(np.int32(1) << start % 8))
        codes = write("Gather", write.constant(entries), write("Mod", shifted, write.constant(np.int32(2**width))), axis=0)
    flat = write.reshape(codes, [*leading, -1])
    return flat if stored == columns else write.first(flat, columns)


def _spell_packed_rows(write: _Writer, table: ir.Value, index: ir.Value, rank: int, index_rank: int) -> ir.Value:
    rows = write("Gather", table, index, axis=0)
    return rows if rank == 2 else write.reshape(rows, [*[0] * index_rank, -1])


def _spell_decode(write: _Writer, q: ir.Value, scale: ir.Value, zero_point: ir.Value | None = None, behind: int = 0) -> ir.Value:
    def along(value: ir.Value) -> ir.Value:
        return write.reshape(value, [-1, *[1] * behind]) if behind else value

    return _scaled(write, q, along(scale), None if zero_point is None else along(zero_point))


def _scaled(write: _Writer, q: ir.Value, scale: ir.Value, zero_point: ir.Value | None) -> ir.Value:
    numbers = write.floats(q)
    shifted = numbers if zero_point is None else write("Sub", numbers, write.floats(zero_point))
    return write("Mul", shifted, write.floats(scale))


def _spell_decode_groups(
    write: _Writer, q: ir.Value, scale: ir.Value, zero_point: ir.Value | None = None, *, group: int, groups: int, columns: int, rank: int
) -> ir.Value:
    leading = [0] * (rank - 1)

    def part(value: ir.Value | None) -> ir.Value | None:
        """One value a group as [..., groups, 1], or, where the last group is shorter, as one a column."""
        if groups == 1 or value is None:
            return value
        parts = write("Unsqueeze", value, write.constant(np.array([-1])))
        if groups * group == columns:
            return parts
        return write.first(write.reshape(write("Expand", parts, write.constant(np.array([group]))), [*leading, -1]), columns)

    if groups == 1 or groups * group != columns:
        return _scaled(write, q, part(scale), part(zero_point))
    return write.reshape(_scaled(write, write.reshape(q, [*leading, groups, group]), part(scale), part(zero_point)), [*leading, columns])


def _spell_group_linear(write: _Writer, x: ir.Value, bits: ir.Value, scale: ir.Value, zero_point: ir.Value | None = None, **sizes: int) -> ir.Value:
    # Level 1 computes in float32.
    return _matmul_nbits(write, x, bits, scale, zero_point, level=1, **sizes)


def _spell_block_linear(write: _Writer, x: ir.Value, bits: ir.Value, scale: ir.Value, zero_point: ir.Value | None = None, **sizes: int) -> ir.Value:
    # Level 4 rounds x to int8 in blocks, where NaN becomes a number: a product with zeros brings it back.
    product = _matmul_nbits(write, x, bits, scale, zero_point, level=4, **sizes)
    if x not in write.spoiled:
        write.spoiled[x] = write("MatMul", x, write.constant(np.zeros((sizes["columns"], 1), np.float32)))
    return write("Add", product, write.spoiled[x])


def _matmul_nbits(
    write: _Writer, x: ir.Value, bits: ir.Value, scale: ir.Value, zero_point: ir.Value | None, *, level: int, width: int, group: int, **sizes: int
) -> ir.Value:
    full = write("Expand", write.floats(scale), write.constant(np.array([sizes["rows"], sizes["blocks"]])))
    inputs = [x, bits, full] + ([] if zero_point is None else [zero_point])
    attributes = {"K": sizes["columns"], "N": sizes["rows"], "bits": width, "block_size": group, "accuracy_level": level}
    return write("MatMulNBits", *inputs, domain=MICROSOFT, **attributes)


def _spell_round_blocks(write: _Writer, x: ir.Value, *, group: int, columns: int, rank: int) -> ir.Value:
    """See :func:`~downsize.numerics.groups.fake_quantize_blocks`; a runtime may take NaN for no largest value, and it stays where it is."""
    leading, count = [0] * (rank - 1), group_count(columns, group)
    ends = np.array([0] * (2 * rank - 1) + [count * group - columns], np.int64)
    filled = write("Pad", x, write.constant(ends)) if ends.any() else x
    blocks = write.reshape(filled, [*leading, count, group])
    extreme = write("ReduceMax", write("Abs", blocks), write.constant(np.array([-1])), keepdims=1)
    extreme = write("Max", extreme, write.constant(np.float32(SMALLEST_EXTREME)))
    most = write.constant(np.float32(LARGEST_CODE))
    codes = write("Round", write("Mul", blocks, write("Div", most, extreme)))
    flat = write.reshape(write("Mul", codes, write("Div", extreme, most)), [*leading, count * group])
    return write.first(flat, columns) if ends.any() else flat


def _spell_group_rows(
    write: _Writer, bits: ir.Value, index: ir.Value, scale: ir.Value, zero_point: ir.Value | None = None, *, width: int, group: int
) -> ir.Value:
    inputs = [bits, index, write.floats(scale)] + ([] if zero_point is None else [zero_point])
    sizes = {"gather_axis": 0, "quantize_axis": 1, "bits": width, "block_size": group}
    return write("GatherBlockQuantized", *inputs, domain=MICROSOFT, **sizes)


def _spell_widen(write: _Writer, x: ir.Value) -> ir.Value:
    return write.floats(x)


SPELLINGS: dict[str, Callable[..., ir.Value]] = {
    "Widen": _spell_widen,
    "Unpack": _spell_unpack,
    "PackedRows": _spell_packed_rows,
    "Decode": _spell_decode,
    "DecodeGroups": _spell_decode_groups,
    "GroupLinear": _spell_group_linear,
    "BlockLinear": _spell_block_linear,
    "RoundBlocks": _spell_round_blocks,
    "GroupRows": _spell_group_rows,
}

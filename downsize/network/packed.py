"""Constants of few bits in a lowered graph: how integers are packed, and the operators that read them.

Vocabulary, beside that of ``lower.py``; each has its meaning here and its ONNX form in ``packed_onnx.py``: ``unpack`` (packed bits to codes),
``packed_rows`` (rows of a packed table), ``decode`` (codes to floats, one scale along an axis), ``decode_groups`` (the same in groups of
columns), ``group_linear`` and ``group_rows`` (a product, and rows of a table, that a runtime's own operator computes from packed bits),
``block_linear`` (such a product in integers, its input rounded in blocks).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..numerics import grids
from ..numerics.groups import fake_quantize_blocks, spread
from ..numerics.packing import byte_count, pack, unpack

# What the operators that decode a weight take in a file, in bytes.
OPERATORS_TAKE = 600
# Bytes hold a whole number of these; eight codes of any other width take as many bytes as a code has bits.
WHOLE = (1, 2, 4, 8)


@dataclass(frozen=True)
class Packed:
    """Integers of few bits: ``bits`` uint8 [rows, bytes] hold numbers of entries of ``table`` [2^width], ``columns`` of them a row."""

    bits: Tensor
    table: Tensor
    width: int
    columns: int

    @property
    def saves(self) -> int:
        """Bytes that a file is smaller for it."""
        return self.bits.shape[0] * (self.columns - self.bits.shape[1]) - OPERATORS_TAKE

    @staticmethod
    def of(q: Tensor) -> Packed:
        """Pack integers [rows, columns] into as few bits as their differing values need: their least value and common step go into the table."""
        wide = q.long()
        low = int(wide.min())
        step = math.gcd(*(wide - low).unique().tolist()) or 1
        numbers = (wide - low) // step
        least = max(int(numbers.max()).bit_length(), 1)
        # Short rows are filled up less by codes that bytes hold a whole number of.
        width = min(
            least, min(each for each in WHOLE if each >= least), key=lambda each: byte_count(numbers.shape[1] + filling(numbers.shape[1], each), each)
        )
        table = (low + step * torch.arange(2**width)).clamp(max=int(wide.max()))
        return Packed.numbered(numbers, table.to(q.dtype), width)

    @staticmethod
    def numbered(numbers: Tensor, table: Tensor, width: int) -> Packed:
        """Pack numbers [rows, columns] of entries of ``table``; a row is filled up to whole bytes, or to eight codes of a width that needs it."""
        filled = torch.nn.functional.pad(numbers, (0, -numbers.shape[1] % (8 // width if width in WHOLE else 8)))
        # Two codes of one bit are one of two.
        bits = pack(filled[:, ::2] + 2 * filled[:, 1::2], 2) if width == 1 else pack(filled, width)
        return Packed(bits, table, width, numbers.shape[1])


def filling(columns: int, width: int) -> int:
    """How many codes fill a row of so many up to what can be taken apart."""
    return -columns % (8 // width if width in WHOLE else 8)


def numbers_of(bits: Tensor, width: int, columns: int) -> Tensor:
    """The numbers that :class:`Packed` holds: uint8 [..., columns] from uint8 [..., bytes]."""
    if width == 1:
        pairs = unpack(bits, 2, bits.shape[-1] * 4)
        return torch.stack((pairs & 1, pairs >> 1), -1).flatten(-2)[..., :columns]
    return unpack(bits, width, bits.shape[-1] * 8 // width)[..., :columns]


@torch.library.custom_op("downsize::unpack", mutates_args=())
def unpack_codes(bits: Tensor, table: Tensor, width: int, columns: int) -> Tensor:
    """Entries of ``table`` from packed numbers: uint8 [..., bytes] to [..., columns]."""
    return table[numbers_of(bits, width, columns).long()]


@unpack_codes.register_fake
def _(bits: Tensor, table: Tensor, width: int, columns: int) -> Tensor:
    return table.new_empty([*bits.shape[:-1], columns])


@torch.library.custom_op("downsize::packed_rows", mutates_args=())
def packed_rows(table: Tensor, index: Tensor) -> Tensor:
    """Rows ``index`` of a table [rows, ...], each flat: [*index, columns]."""
    return table[index].reshape(*index.shape, table[:1].numel())


@packed_rows.register_fake
def _(table: Tensor, index: Tensor) -> Tensor:
    return table.new_empty([*index.shape, math.prod(table.shape[1:])])


@torch.library.custom_op("downsize::decode", mutates_args=())
def decode(q: Tensor, scale: Tensor, zero_point: Tensor | None, axis: int | None) -> Tensor:
    """Real values of constant codes, as ``dequantize``; but a runtime computes them once, when it loads the file."""
    return grids.values(q, scale.float(), torch.zeros((), dtype=torch.int32) if zero_point is None else zero_point, axis)


@decode.register_fake
def _(q: Tensor, scale: Tensor, zero_point: Tensor | None, axis: int | None) -> Tensor:
    return torch.empty_like(q, dtype=torch.float32)


@torch.library.custom_op("downsize::decode_groups", mutates_args=())
def decode_groups(q: Tensor, scale: Tensor, zero_point: Tensor | None, group: int) -> Tensor:
    """``(q - zero_point) * scale`` in float32: ``q`` [..., columns], ``scale`` and ``zero_point`` [..., groups]."""
    columns = q.shape[-1]
    values = q.float() if zero_point is None else q.float() - _spread(zero_point.float(), columns, group)
    return values * _spread(scale.float(), columns, group)


def _spread(values: Tensor, columns: int, group: int) -> Tensor:
    return spread(values.flatten(0, -2), columns, group).reshape(*values.shape[:-1], columns)


@decode_groups.register_fake
def _(q: Tensor, scale: Tensor, zero_point: Tensor | None, group: int) -> Tensor:
    return torch.empty_like(q, dtype=torch.float32)


@torch.library.custom_op("downsize::group_linear", mutates_args=())
def group_linear(x: Tensor, bits: Tensor, scale: Tensor, zero_point: Tensor | None, width: int, group: int) -> Tensor:
    """``x @ w.T`` from packed bits, in float32.

    ``x``: [..., columns]. ``bits``: uint8 [rows, blocks, group * width / 8]. ``scale``: [rows, blocks], or [rows, 1] for one a row.
    ``zero_point``: packed as the bits are, uint8 [rows, bytes]; None stands for half of all codes, 2^(width-1).
    """
    rows, blocks, columns = bits.shape[0], bits.shape[1], x.shape[-1]
    q = numbers_of(bits.flatten(1), width, columns).float()
    zero = torch.full((rows, blocks), 2 ** (width - 1)) if zero_point is None else numbers_of(zero_point, width, blocks)
    return torch.nn.functional.linear(x, (q - spread(zero.float(), columns, group)) * spread(scale.float().expand(rows, blocks), columns, group))


@group_linear.register_fake
def _(x: Tensor, bits: Tensor, scale: Tensor, zero_point: Tensor | None, width: int, group: int) -> Tensor:
    return x.new_empty([*x.shape[:-1], bits.shape[0]])


@torch.library.custom_op("downsize::block_linear", mutates_args=())
def block_linear(x: Tensor, bits: Tensor, scale: Tensor, zero_point: Tensor | None, width: int, group: int) -> Tensor:
    """:func:`group_linear` of ``x`` rounded to int8 by the range of every ``group`` columns of a row."""
    return group_linear(fake_quantize_blocks(x, group), bits, scale, zero_point, width, group)


@block_linear.register_fake
def _(x: Tensor, bits: Tensor, scale: Tensor, zero_point: Tensor | None, width: int, group: int) -> Tensor:
    return x.new_empty([*x.shape[:-1], bits.shape[0]])


@torch.library.custom_op("downsize::group_rows", mutates_args=())
def group_rows(bits: Tensor, scale: Tensor, zero_point: Tensor | None, index: Tensor, width: int, group: int) -> Tensor:
    """Rows ``index`` of a table, decoded by the operator that reads them: float32 [*index, columns].

    ``bits``: uint8 [rows, columns * width / 8]. ``scale``: [rows, groups]. ``zero_point``: as for :func:`group_linear`.
    """
    rows, groups = scale.shape
    zero = torch.full((rows, groups), 2 ** (width - 1)) if zero_point is None else numbers_of(zero_point, width, groups)
    return decode_groups(numbers_of(bits[index], width, bits.shape[1] * 8 // width), scale[index], zero[index], group)


@group_rows.register_fake
def _(bits: Tensor, scale: Tensor, zero_point: Tensor | None, index: Tensor, width: int, group: int) -> Tensor:
    return scale.new_empty([*index.shape, bits.shape[1] * 8 // width], dtype=torch.float32)


def stored_scale(scale: Tensor) -> Tensor:
    """A scale as a file holds it: in 16 bits where that changes nothing."""
    half = scale.detach().half()
    return half if torch.equal(half.float(), scale.detach()) else scale.detach().float()

"""Codes of 2 to 8 bits as bytes: a plain bit stream, and the layouts that operators of ONNX Runtime read."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from .grids import BITS
from .groups import group_count


def pack(codes: Tensor, bits: int) -> Tensor:
    """Every row as a stream of bits: code ``i`` takes the bits from ``i * bits`` on, and bit ``n`` is bit ``n % 8`` of byte ``n // 8``.

    Args: ``codes``: integers [..., columns], 0 to ``2**bits - 1``. Returns: uint8 [..., ceil(columns * bits / 8)], the last bits zero.

    Raises:
        ValueError: the width is not 2 to 8 bits, or a code does not fit it.
    """
    _check(bits)
    if codes.numel() and not 0 <= int(codes.min()) <= int(codes.max()) < 2**bits:
        raise ValueError(f"codes from {int(codes.min())} to {int(codes.max())} were given; expected 0 to {2**bits - 1} for {bits} bits.")
    columns = codes.shape[-1]
    # Eight codes fill whole bytes, ``bits`` of them, and fit one 64-bit word.
    runs = pad(codes.to(torch.uint8), (0, -columns % 8)).unflatten(-1, (-1, 8))
    words = torch.zeros(runs.shape[:-1], dtype=torch.int64, device=codes.device)
    for i in range(8):
        words |= runs[..., i].long() << (i * bits)
    packed = torch.stack([(words >> (8 * i)) & 255 for i in range(bits)], dim=-1).to(torch.uint8)
    return packed.flatten(-2)[..., : byte_count(columns, bits)].contiguous()


def unpack(packed: Tensor, bits: int, columns: int) -> Tensor:
    """The codes of :func:`pack`: uint8 [..., columns] from uint8 [..., ceil(columns * bits / 8)].

    Raises:
        ValueError: the width is not 2 to 8 bits, or the rows have another number of bytes.
    """
    _check(bits)
    if packed.shape[-1] != byte_count(columns, bits):
        raise ValueError(f"rows of {packed.shape[-1]} bytes were given; {columns} codes of {bits} bits take {byte_count(columns, bits)}.")
    runs = pad(packed, (0, -packed.shape[-1] % bits)).unflatten(-1, (-1, bits))
    words = torch.zeros(runs.shape[:-1], dtype=torch.int64, device=packed.device)
    for i in range(bits):
        words |= runs[..., i].long() << (8 * i)
    codes = torch.stack([(words >> (i * bits)) & (2**bits - 1) for i in range(8)], dim=-1).to(torch.uint8)
    return codes.flatten(-2)[..., :columns].contiguous()


def byte_count(columns: int, bits: int) -> int:
    """Bytes of a row of so many codes."""
    return -(-columns * bits // 8)


def _check(bits: int) -> None:
    if bits not in BITS:
        raise ValueError(f"{bits} bits were given; expected {BITS[0]} to {BITS[-1]}.")


def matmul_nbits(codes: Tensor, zero_point: Tensor, group: int, bits: int) -> tuple[Tensor, Tensor]:
    """Weight and zero points as ``com.microsoft::MatMulNBits`` reads them: inputs ``B`` and ``zero_points``.

    Args: ``codes``: unsigned [rows, columns]; ``zero_point``: unsigned integers [rows, groups]; ``bits``: 2, 4 or 8; ``group``: its
    ``block_size``, a power of two from 16 to 256, which may be more than the columns.

    Returns: uint8 [rows, groups, group * bits / 8], the last group filled up with zeros; uint8 [rows, ceil(groups * bits / 8)].

    Raises:
        ValueError: the operator takes no such width or group, or a code does not fit.
    """
    if bits not in (2, 4, 8) or group not in (16, 32, 64, 128, 256):
        raise ValueError(f"{bits} bits in groups of {group} were given; MatMulNBits takes 2, 4 or 8 bits and groups of 16, 32, 64, 128 or 256.")
    columns = codes.shape[1]
    filled = pad(codes, (0, group_count(columns, group) * group - columns))
    return pack(filled.unflatten(1, (-1, group)), bits), pack(zero_point, bits)


def gather_block_quantized(codes: Tensor, zero_point: Tensor, group: int, bits: int) -> tuple[Tensor, Tensor]:
    """A table and its zero points as ``com.microsoft::GatherBlockQuantized`` reads them: inputs ``data`` and ``zero_points``, of uint8.

    Args: as :func:`matmul_nbits`, but that groups may be any power of two from 16 on.

    Returns: uint8 [rows, columns * bits / 8]; uint8 [rows, ceil(groups * bits / 8)].

    Raises:
        ValueError: the operator takes no such width or group, a code does not fit, or a row does not fill whole bytes: the operator
            takes the number of columns from the number of bytes.
    """
    if bits not in (2, 4, 8) or group < 16 or group & (group - 1):
        raise ValueError(f"{bits} bits in groups of {group} were given; GatherBlockQuantized takes 2, 4 or 8 bits and powers of two from 16 on.")
    if codes.shape[1] * bits % 8:
        raise ValueError(f"rows of {codes.shape[1]} codes of {bits} bits do not fill whole bytes, as GatherBlockQuantized needs.")
    return pack(codes, bits), pack(zero_point, bits)


def matmul_bnb4(codes: Tensor, group: int) -> Tensor:
    """Numbers of 16 levels as ``com.microsoft::MatMulBnb4`` reads them: its input ``B``.

    Args: ``codes``: [rows, columns], 0 to 15; ``group``: its ``block_size``, a power of two from 16 to 256 that divides the columns,
    as its blocks run on from one row to the next.

    Returns: uint8 [ceil(rows * columns / 2)], the first of two codes in the high half of the byte.

    Raises:
        ValueError: the operator takes no such group, or a code does not fit.
    """
    if group not in (16, 32, 64, 128, 256) or codes.shape[1] % group:
        raise ValueError(f"groups of {group} in {codes.shape[1]} columns were given; MatMulBnb4 takes 16, 32, 64, 128 or 256 that divide them.")
    packed = pack(codes.flatten(), 4)
    return (packed & 15) << 4 | packed >> 4

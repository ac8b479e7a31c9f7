"""Packed codes: bit streams against a decoder that goes bit by bit, layouts against what ONNX Runtime computes from them."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor

from downsize.numerics.groups import group_count, group_values, level_values
from downsize.numerics.levels import normal_float
from downsize.numerics.packing import byte_count, gather_block_quantized, matmul_bnb4, matmul_nbits, pack, unpack


def decode(row: bytes, bits: int, columns: int) -> list[int]:
    """One bit after the other, from one large number."""
    stream = int.from_bytes(row, "little")
    return [stream >> (i * bits) & ((1 << bits) - 1) for i in range(columns)]


def draw_codes(seed: int, bits: int, *shape: int) -> Tensor:
    return torch.randint(0, 2**bits, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


@settings(max_examples=150, deadline=None)
@given(bits=st.integers(2, 8), rows=st.integers(1, 4), columns=st.integers(1, 70), seed=st.integers(0, 2**31))
def test_a_packed_row_is_what_a_bit_by_bit_decoder_reads(bits, rows, columns, seed):
    codes = draw_codes(seed, bits, rows, columns)
    packed = pack(codes, bits)
    assert packed.shape == (rows, byte_count(columns, bits)) and packed.dtype == torch.uint8
    assert [decode(bytes(row), bits, columns) for row in packed.tolist()] == codes.tolist()
    unused = 8 * packed.shape[1] - bits * columns
    assert unused < 8 and all(row[-1] >> (8 - unused) == 0 for row in packed.tolist())
    assert torch.equal(unpack(packed, bits, columns), codes)


@pytest.mark.parametrize("bits", range(2, 9))
def test_the_outermost_codes_survive(bits):
    codes = torch.tensor([[2**bits - 1] * 11, [0] * 11, [0, 2**bits - 1] * 5 + [0]])
    assert torch.equal(unpack(pack(codes, bits), bits, 11).long(), codes)
    assert pack(codes, bits).shape == (3, -(-11 * bits // 8))


def test_codes_that_do_not_fit_are_refused():
    for codes, bits in ((torch.tensor([[4]]), 2), (torch.tensor([[-1]]), 4), (torch.tensor([[300]]), 8), (torch.tensor([[1]]), 9)):
        with pytest.raises(ValueError, match="expected"):
            pack(codes, bits)
    with pytest.raises(ValueError, match="7 codes of 3 bits take 3"):
        unpack(torch.zeros(2, 4, dtype=torch.uint8), 3, 7)


# What ONNX Runtime computes ---------------------------------------------------------------------------------------------------------


def run(operator: str, order: str, feeds: dict[str, np.ndarray], constants: dict[str, Tensor], **attributes: Any) -> np.ndarray:
    node = helper.make_node(operator, order.split(), ["y"], domain="com.microsoft", **attributes)
    graph = helper.make_graph(
        [node],
        "one",
        [helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(x.dtype), x.shape) for name, x in feeds.items()],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(x.numpy(), name) for name, x in constants.items()],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, feeds)[0])


def scales(rows: int, groups: int) -> Tensor:
    return torch.rand(rows, groups, generator=torch.Generator().manual_seed(1)) * 0.1 + 0.05


def difference(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


@pytest.mark.parametrize(("group", "columns"), [(16, 50), (32, 64), (32, 33), (128, 96), (256, 300)])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_onnx_runtime_multiplies_by_the_values_of_the_codes(bits, group, columns):
    groups = group_count(columns, group)
    codes, zero, scale = draw_codes(2, bits, 24, columns), draw_codes(3, bits, 24, groups), scales(24, groups)
    weight, zeros = matmul_nbits(codes, zero, group, bits)
    assert weight.shape == (24, groups, group * bits // 8)
    x = torch.randn(5, columns, generator=torch.Generator().manual_seed(4))
    constants = {"b": weight, "scale": scale, "zeros": zeros}
    found = run("MatMulNBits", "x b scale zeros", {"x": x.numpy()}, constants, K=columns, N=24, bits=bits, block_size=group, accuracy_level=0)
    expected = x.double() @ group_values(codes, scale, zero.int(), group).double().T
    assert difference(found, expected.numpy()) < 2e-6


@pytest.mark.parametrize(("group", "columns"), [(16, 64), (32, 48), (128, 96)])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_onnx_runtime_gathers_the_values_of_the_codes(bits, group, columns):
    groups = group_count(columns, group)
    codes, zero, scale = draw_codes(5, bits, 40, columns), draw_codes(6, bits, 40, groups), scales(40, groups)
    table, zeros = gather_block_quantized(codes, zero, group, bits)
    which = np.array([[0, 39, 7], [7, 1, 20]])
    constants = {"table": table, "scale": scale, "zeros": zeros}
    node = {"bits": bits, "block_size": group, "gather_axis": 0, "quantize_axis": 1}
    found = run("GatherBlockQuantized", "table which scale zeros", {"which": which}, constants, **node)
    assert np.array_equal(found, group_values(codes, scale, zero.int(), group).numpy()[which])


@pytest.mark.parametrize(("group", "columns"), [(16, 48), (64, 64), (64, 128)])
def test_onnx_runtime_multiplies_by_the_normal_levels(group, columns):
    codes, scale, levels = draw_codes(7, 4, 24, columns), scales(24, columns // group), normal_float(4)
    x = torch.randn(5, columns, generator=torch.Generator().manual_seed(8))
    constants = {"b": matmul_bnb4(codes, group), "scale": scale.flatten()}
    found = run("MatMulBnb4", "x b scale", {"x": x.numpy()}, constants, K=columns, N=24, block_size=group, quant_type=1)
    expected = x.double() @ level_values(codes, scale, levels, group).double().T
    assert difference(found, expected.numpy()) < 2e-6


def test_layouts_refuse_what_the_operators_do_not_take():
    codes, zero = torch.zeros(3, 9, dtype=torch.uint8), torch.zeros(3, 1, dtype=torch.uint8)
    with pytest.raises(ValueError, match="MatMulNBits takes"):
        matmul_nbits(codes, zero, 32, 3)
    with pytest.raises(ValueError, match="MatMulNBits takes"):
        matmul_nbits(codes, zero, 48, 4)
    with pytest.raises(ValueError, match="whole bytes"):
        gather_block_quantized(codes, zero, 32, 4)
    with pytest.raises(ValueError, match="GatherBlockQuantized takes"):
        gather_block_quantized(codes, zero, 48, 8)
    with pytest.raises(ValueError, match="that divide"):
        matmul_bnb4(codes, 16)

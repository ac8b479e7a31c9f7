"""Grids: codes, values and the fake-quantization operators against numpy, ONNX's reference implementation, and closed forms of the gradient."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from downsize.numerics import grids
from downsize.numerics.grids import INT8, SYMMETRIC_INT8, UINT8, Grid

fake_quantize = torch.ops.downsize.fake_quantize
fake_quantize_dynamic = torch.ops.downsize.fake_quantize_dynamic
TYPES = {UINT8: TensorProto.UINT8, INT8: TensorProto.INT8}


def draw(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def whole(*numbers: int) -> torch.Tensor:
    made = torch.tensor(numbers, dtype=torch.int32)
    return made[0] if len(numbers) == 1 else made


def by_numpy(x: np.ndarray, scale: np.ndarray, zero_point: np.ndarray, axis: int | None, grid: Grid) -> tuple[np.ndarray, np.ndarray]:
    """Codes and values, by the definition of QuantizeLinear; numpy rounds half to even."""
    shape = [1] * x.ndim
    if axis is not None:
        shape[axis] = -1
    s, z = (part.reshape(shape) if axis is not None else part for part in (scale.astype("float32"), zero_point.astype("float32")))
    codes = np.clip(np.round(x / s) + z, grid.low, grid.high)
    return codes, (codes - z) * s


def by_onnx(x: np.ndarray, scale: np.ndarray, zero_point: np.ndarray, axis: int | None, grid: Grid) -> tuple[np.ndarray, np.ndarray]:
    """Codes and values of QuantizeLinear and DequantizeLinear in onnx's own reference implementation."""
    attributes: dict[str, Any] = {} if axis is None else {"axis": axis}
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"], **attributes),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["y"], **attributes),
    ]
    values = [
        numpy_helper.from_array(scale.astype("float32"), "s"),
        numpy_helper.from_array(zero_point.astype(helper.tensor_dtype_to_np_dtype(TYPES[grid])), "z"),
    ]
    outputs = [helper.make_tensor_value_info("q", TYPES[grid], None), helper.make_tensor_value_info("y", TensorProto.FLOAT, None)]
    graph = helper.make_graph(nodes, "g", [helper.make_tensor_value_info("x", TensorProto.FLOAT, None)], outputs, values)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)])
    return tuple(ReferenceEvaluator(model).run(None, {"x": x}))  # type: ignore[return-value]


CASES = [
    pytest.param(draw(1, 3, 50), torch.tensor(0.013), whole(7), None, UINT8, id="uint8, one scale"),
    pytest.param(draw(2, 3, 50), torch.tensor(0.02), whole(-5), None, INT8, id="int8, one scale"),
    pytest.param(draw(3, 4, 5, 6), torch.tensor([0.01, 0.02, 0.005, 0.1]), whole(0, 0, 0, 0), 0, INT8, id="int8, axis 0"),
    pytest.param(draw(4, 4, 3, 6), torch.tensor([0.01, 0.02, 0.005]), whole(3, 200, 128), 1, UINT8, id="uint8, axis 1"),
    pytest.param(draw(5, 7), torch.linspace(0.01, 0.07, 7), whole(*range(7)), 0, UINT8, id="a vector"),
    pytest.param(torch.zeros(2, 3), torch.tensor(1e-12), whole(0), None, UINT8, id="zeros"),
]


@pytest.mark.parametrize(("x", "scale", "zero_point", "axis", "grid"), CASES)
def test_codes_values_and_the_operator_agree_with_numpy_and_onnx(x, scale, zero_point, axis, grid):
    codes = grids.codes(x, scale, zero_point, axis, grid)
    values = grids.values(codes, scale, zero_point, axis)
    for oracle in (by_numpy, by_onnx):
        expected_codes, expected_values = oracle(x.numpy(), scale.numpy(), zero_point.numpy(), axis, grid)
        assert np.array_equal(codes.numpy().astype("int64"), expected_codes.astype("int64"))
        assert np.array_equal(values.numpy(), expected_values.astype("float32"))
    assert codes.dtype is (torch.uint8 if grid is UINT8 else torch.int8) and values.dtype is torch.float32
    assert torch.equal(fake_quantize(x, scale, zero_point, axis, grid.low, grid.high), values)


@given(st.floats(2**-20, 2**13, width=32), st.integers(0, 255), st.lists(st.integers(-600, 600), min_size=1, max_size=30))
def test_half_a_step_is_rounded_as_onnx_does(scale, zero_point, halves):
    x = (np.array(halves, "float32") / 2 * np.float32(scale)).astype("float32")
    arguments = torch.tensor(scale), whole(zero_point)
    codes = grids.codes(torch.from_numpy(x), *arguments, None, UINT8)
    expected, values = by_numpy(x, arguments[0].numpy(), arguments[1].numpy(), None, UINT8)
    assert np.array_equal(codes.numpy(), expected)
    assert np.array_equal(fake_quantize(torch.from_numpy(x), *arguments, None, 0, 255).numpy(), values)


def test_half_is_rounded_to_even():
    x = torch.tensor([0.25, 0.75, 1.25, 1.75, -0.25, -0.75])
    assert grids.codes(x, torch.tensor(0.5), whole(10), None, UINT8).tolist() == [10, 12, 12, 14, 10, 8]


ends = st.floats(0, 1e6, width=32, allow_subnormal=False)


@given(ends, ends)
def test_affine_covers_the_range_and_holds_zero_exactly(below, above):
    low, high = torch.tensor(-below), torch.tensor(above)
    scale, zero_point = grids.affine(low, high, UINT8)
    assert scale.dtype is torch.float32 and zero_point.dtype is torch.int32 and float(scale) > 0 and 0 <= int(zero_point) <= 255
    ends_and_zero = torch.stack([low, high, torch.tensor(0.0)])
    near = fake_quantize(ends_and_zero, scale, zero_point, None, 0, 255)
    assert float(near[2]) == 0.0
    assert float((near - ends_and_zero).abs().max()) <= float(scale) * 0.501
    if below + above > 1e-9:
        assert float(scale) == pytest.approx((below + above) / 255, rel=2e-6)
        assert grids.codes(ends_and_zero, scale, zero_point, None, UINT8)[:2].tolist() == [0, 255]


def test_affine_of_a_range_on_one_side_starts_at_zero():
    assert [int(z) for _, z in (grids.affine(torch.tensor(a), torch.tensor(b), UINT8) for a, b in ((2.0, 5.0), (-5.0, -2.0)))] == [0, 255]
    assert float(grids.affine(torch.tensor(2.0), torch.tensor(5.0), UINT8)[0]) == pytest.approx(5 / 255, rel=2e-6)


def test_symmetric_grids_never_use_the_lowest_code():
    x = torch.tensor([[-1.0, 0.3], [-2.0, 2.0], [5.0, -5.0]])
    scale, zero_point = grids.symmetric(x.abs().amax(1), SYMMETRIC_INT8)
    codes = grids.codes(x * 1.5, scale, zero_point, 0, SYMMETRIC_INT8)
    assert codes.min() == -127 and codes.max() == 127 and not zero_point.any()
    assert torch.allclose(scale, x.abs().amax(1) / 127)


def test_rows_of_zeros_take_a_scale_that_harms_nothing():
    scale, _ = grids.symmetric(torch.tensor([0.0, 2.54, 1e-30]), SYMMETRIC_INT8)
    assert torch.allclose(scale, torch.full((3,), 0.02))
    assert not grids.codes(torch.zeros(3, 4), scale, whole(0, 0, 0), 0, SYMMETRIC_INT8).any()
    assert float(grids.symmetric(torch.zeros(2), SYMMETRIC_INT8)[0].min()) == 1.0


def test_beyond_the_range_is_clipped_and_nan_stays():
    x = torch.tensor([1e30, -1e30, float("inf"), float("-inf"), float("nan")])
    got = fake_quantize(x, torch.tensor(0.01), whole(100), None, 0, 255)
    assert torch.allclose(got[:4], torch.tensor([1.55, -1.0, 1.55, -1.0])) and got[4].isnan()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("axis", [None, 0])
def test_other_float_types_are_kept_and_rounded_as_float32(dtype, axis):
    x = draw(6, 3, 40).to(dtype)
    scale, zero_point = (torch.tensor(0.013), whole(100)) if axis is None else (torch.tensor([0.01, 0.02, 0.03]), whole(0, 0, 0))
    low, high = (0, 255) if axis is None else (-127, 127)
    got = fake_quantize(x, scale, zero_point, axis, low, high)
    assert got.dtype is dtype
    assert torch.equal(got, fake_quantize(x.float(), scale, zero_point, axis, low, high).to(dtype)) or dtype is torch.float64
    assert torch.allclose(got.double(), fake_quantize(x.float(), scale, zero_point, axis, low, high).double(), rtol=1e-2)


# Gradients ------------------------------------------------------------------------------------------------------------------------

GRADIENT_CASES = [
    pytest.param(draw(7, 40), torch.tensor(0.011), whole(90), None, 0, 255, id="one scale"),
    pytest.param(draw(8, 4, 30), torch.tensor([0.005, 0.01, 0.02, 0.03]), whole(0, 0, 0, 0), 0, -127, 127, id="axis 0"),
    pytest.param(draw(9, 5, 3, 7), torch.tensor([0.005, 0.01, 0.02]), whole(0, 10, -20), 1, -127, 127, id="axis 1"),
    pytest.param(draw(10, 6), torch.linspace(0.002, 0.02, 6), whole(*[0] * 6), 0, -127, 127, id="a vector"),
]


def gradients(x, scale, zero_point, axis, low, high, upstream):
    x, scale = x.clone().requires_grad_(), scale.clone().requires_grad_()
    (fake_quantize(x, scale, zero_point, axis, low, high) * upstream).sum().backward()
    return x.grad, scale.grad


@pytest.mark.parametrize(("x", "scale", "zero_point", "axis", "low", "high"), GRADIENT_CASES)
def test_gradient_is_straight_through_and_the_learned_step(x, scale, zero_point, axis, low, high):
    upstream = draw(11, *x.shape)
    to_x, to_scale = gradients(x, scale, zero_point, axis, low, high, upstream)
    s, z = (torch.movedim(part.expand(x.movedim(axis or 0, -1).shape), -1, axis or 0) for part in (scale, zero_point))
    steps = x / s
    inside = (steps.round() + z >= low) & (steps.round() + z <= high)
    assert bool(inside.any()) and not bool(inside.all())
    expected = torch.where(inside, steps.round() - steps, torch.where(steps < 0, low - z, high - z).float())
    per_row = (
        (upstream * expected).sum()
        if axis is None
        else (upstream * expected).movedim(axis, 0).flatten(1).sum(1)
        if x.dim() > 1
        else upstream * expected
    )
    assert torch.allclose(to_x, upstream * inside)
    assert to_scale.shape == scale.shape and torch.allclose(to_scale, per_row, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("x", "scale", "zero_point", "axis", "low", "high"), GRADIENT_CASES)
def test_gradient_along_a_direction_is_that_of_the_function_with_rounding_errors_held(x, scale, zero_point, axis, low, high):
    """The straight-through function is s * clamp(x / s + r, low - z, high - z) with the rounding residue r held; differences in float64."""
    x, scale = x.double(), scale.double()
    shape = [1] * x.dim()
    if axis is not None:
        shape[axis] = -1
    rounded = (x / scale.reshape(shape)).round() + zero_point.reshape(shape)
    x = torch.where((rounded == low) | (rounded == high), 0.0, x)  # the function has a kink there
    upstream, along_x, along_s = draw(12, *x.shape).double(), draw(13, *x.shape).double(), draw(14, *scale.shape).double() * 1e-3
    z = zero_point.reshape(shape)
    residue = (x / scale.reshape(shape)).round() - x / scale.reshape(shape)

    def function(amount: float) -> float:
        s = (scale + amount * along_s).reshape(shape)
        return float((upstream * s * ((x + amount * along_x) / s + residue).clamp(low - z, high - z)).sum())

    to_x, to_scale = gradients(x, scale, zero_point, axis, low, high, upstream)
    slope = (function(1e-7) - function(-1e-7)) / 2e-7
    assert float((to_x * along_x).sum() + (to_scale * along_s).sum()) == pytest.approx(slope, rel=1e-4)


# The dynamic operator, and both as operators of torch -----------------------------------------------------------------------------


@pytest.mark.parametrize("x", [draw(15, 5, 20), draw(16, 4).abs() + 1, -draw(17, 4).abs() - 1, torch.zeros(3), torch.tensor([-1.0, 1.0])])
def test_dynamic_is_onnx_dynamic_quantize_linear(x):
    node = helper.make_node("DynamicQuantizeLinear", ["x"], ["q", "s", "z"])
    kinds = (TensorProto.UINT8, TensorProto.FLOAT, TensorProto.UINT8)
    outputs = [helper.make_tensor_value_info(name, kind, None) for name, kind in zip("qsz", kinds, strict=True)]
    graph = helper.make_graph([node], "g", [helper.make_tensor_value_info("x", TensorProto.FLOAT, None)], outputs)
    q, s, z = ReferenceEvaluator(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)])).run(None, {"x": x.numpy()})
    expected = (np.asarray(q, "float32") - np.asarray(z, "float32")) * np.asarray(s, "float32")
    assert np.allclose(fake_quantize_dynamic(x).numpy(), np.nan_to_num(expected), rtol=1e-6, atol=1e-9)


def test_dynamic_gradient_is_straight_through():
    x = draw(18, 3, 4).requires_grad_()
    upstream = draw(19, 3, 4)
    (fake_quantize_dynamic(x) * upstream).sum().backward()
    assert x.grad is not None and torch.equal(x.grad, upstream)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_operators_are_sound_for_torch(dtype):
    x = draw(20, 4, 6).to(dtype).requires_grad_()
    per_row = (torch.rand(6) * 0.05 + 0.01).requires_grad_()
    torch.library.opcheck(grids.fake_quantize, (x, per_row, torch.zeros(6, dtype=torch.int32), 1, -127, 127))
    torch.library.opcheck(grids.fake_quantize, (x, torch.tensor(0.02, requires_grad=True), whole(3), None, 0, 255))
    torch.library.opcheck(grids.fake_quantize_dynamic, (x,))

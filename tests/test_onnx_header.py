"""The reader of ONNX headers, against the onnx package that wrote the files, and on damaged ones."""

from __future__ import annotations

import numpy as np
import onnx
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper
from onnx_files import structured

from downsize.errors import ArtifactError
from downsize.runtimes.onnx_header import Slot, read_header

DIMENSIONS = st.one_of(st.integers(1, 2**40), st.sampled_from(["batch", "l\u00e4nge", "2*s0"]), st.none())
DTYPE_NAMES = ["float32", "uint8", "int8", "uint16", "int16", "int32", "int64", "bool", "float16", "float64", "uint32", "uint64", "complex64"]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    values=st.lists(st.tuples(st.sampled_from(DTYPE_NAMES), st.one_of(st.none(), st.lists(DIMENSIONS, max_size=5))), max_size=6),
    weights=st.lists(st.integers(0, 5), unique=True, max_size=3),
    metadata=st.dictionaries(st.text(min_size=1, max_size=9), st.text(max_size=300), max_size=3),
)
def test_header_equals_what_onnx_reads(tmp_path, values, weights, metadata):
    """Every name, type, shape and metadata text that the onnx package wrote; weights listed among the inputs are none."""
    infos = [
        helper.make_tensor_value_info(f"in{i}", helper.np_dtype_to_tensor_dtype(np.dtype(dtype)), shape) for i, (dtype, shape) in enumerate(values)
    ]
    tensors = [helper.make_tensor(f"in{i}", TensorProto.FLOAT, [2], [1.0, 2.0]) for i in weights]
    output = helper.make_tensor_value_info("out", TensorProto.INT64, ["batch", 3])
    model = helper.make_model(helper.make_graph([helper.make_node("X", ["in0"], ["out"])], "g", infos, [output], tensors))
    helper.set_model_props(model, metadata)
    onnx.save(model, tmp_path / "a.onnx")
    header = read_header(tmp_path / "a.onnx")
    expected = [
        Slot(f"in{i}", dtype, None if shape is None else tuple("?" if dim is None else dim for dim in shape))
        for i, (dtype, shape) in enumerate(values)
        if i not in weights
    ]
    assert list(header.inputs) == expected
    assert (header.outputs, header.metadata, header.side_files) == ((Slot("out", "int64", ("batch", 3)),), metadata, ())


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changes=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=6))
def test_header_of_a_mutated_file_is_a_header_or_an_error(tmp_path, changes):
    data = bytearray(structured(tmp_path / "whole.onnx").read_bytes())
    for place, value in changes:
        data[int(place * len(data))] = value
    (tmp_path / "a.onnx").write_bytes(data)
    try:
        header = read_header(tmp_path / "a.onnx")
    except ArtifactError:
        return
    assert header.outputs

"""Inputs and files that are refused: each with a message that says what came and what was expected, before a runtime sees them."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from onnx_files import EMPTY, TENSOR, mlp, save, structured, structured_io

from downsize.errors import ArtifactError, SpecError, TargetError
from downsize.runtimes import RUNTIMES, open_artifact

RUNTIME_NAMES = [pytest.param(name, marks=pytest.mark.skipif(RUNTIMES[name].missing() is not None, reason=f"no {name}")) for name in RUNTIMES]
every_runtime = pytest.mark.parametrize("runtime", RUNTIME_NAMES)


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(1).standard_normal(shape).astype("float32")


# Inputs that are refused ----------------------------------------------------------------------------------------------------------


@every_runtime
@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        (noise(2, 32).astype("float64"), "'x' has dtype float64; expected float32"),
        (np.zeros((2, 32), "int64"), "'x' has dtype int64; expected float32"),
        (noise(2, 31), r"'x' has shape \(2, 31\); expected 32 in dimension 1"),
        (noise(32), "expected 2 dimensions"),
        (noise(0, 32), "it is empty"),
        ({"z": noise(2, 32)}, r"The inputs are \['z'\]; expected 1 tensor"),
        ((noise(2, 32), noise(2, 32)), "expected 1 tensor"),
        ([[1.0] * 32], r"The inputs are \['list'\]"),
        (np.array([["a"] * 32]), "dtype <U1 cannot be given to a model"),
    ],
    ids=["float64", "int64", "size", "rank", "empty", "name", "too many", "no array", "text"],
)
def test_wrong_inputs(tmp_path, runtime, inputs, words):
    session = open_artifact(mlp(tmp_path / "a.onnx"), runtime)
    with pytest.raises(ArtifactError, match=words) as caught:
        session(inputs)
    assert "a.onnx takes (x: float32[batch, 32])" in str(caught.value)


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        ({"ids": np.ones((2, 3), int), "mask": np.ones((2, 4), int)}, "'ids' has length = 3 in dimension 1, but 'mask' has length = 4"),
        ({"ids": np.ones((2, 3), int)}, r"has \['ids'\]; expected the keys \['fast', 'ids', 'mask'\]"),
        ({"ids": np.ones((2, 3), int), "mask": np.ones((2, 3), int), "fast": False}, "is False; the model was captured with the constant True"),
        ((np.ones((2, 3), int), np.ones((2, 3), int)), "inputs has 2 values; expected 0"),
    ],
    ids=["symbol", "missing", "constant", "positions"],
)
def test_wrong_structure(tmp_path, inputs, words):
    with pytest.raises(ArtifactError, match=words):
        open_artifact(structured(tmp_path / "a.onnx"))(inputs)


def test_a_failure_inside_the_runtime_is_an_artifact_error(tmp_path):
    """The file declares nothing about the number of columns, so only the runtime can find out."""
    nodes = [helper.make_node("MatMul", ["x", "w"], ["y"])]
    value = ("x", TensorProto.FLOAT, ["batch", "columns"]), ("y", TensorProto.FLOAT, ["batch", 2])
    session = open_artifact(save(tmp_path / "a.onnx", nodes, [value[0]], [value[1]], {"w": np.ones((3, 2), "float32")}))
    assert session(np.ones((1, 3), "float32")).tolist() == [[3.0, 3.0]]
    with pytest.raises(ArtifactError, match="onnxruntime failed while running"):
        session(np.ones((1, 4), "float32"))


# Files that are refused -----------------------------------------------------------------------------------------------------------


@every_runtime
@pytest.mark.parametrize(
    ("content", "words"),
    [(b"", "damaged"), (b"hello world" * 9, "damaged"), (b"\x08\x0a", "no graph"), (None, "There is no file")],
    ids=["empty", "text", "no graph", "missing"],
)
def test_not_a_model(tmp_path, runtime, content, words):
    path = tmp_path / "a.onnx"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ArtifactError, match=words):
        open_artifact(path, runtime)


@every_runtime
def test_an_unknown_operator(tmp_path, runtime):
    value = ("x", TensorProto.FLOAT, [1]), ("y", TensorProto.FLOAT, [1])
    path = save(tmp_path / "a.onnx", [helper.make_node("Wobble", ["x"], ["y"])], [value[0]], [value[1]], {})
    with pytest.raises(ArtifactError, match=rf"{runtime} cannot open .*Wobble"):
        open_artifact(path, runtime)


def test_a_truncated_file_is_refused_wherever_it_ends(tmp_path):
    """A protobuf message may end after any whole field, so a cut can leave a file that still reads; never anything but our error."""
    data = mlp(tmp_path / "a.onnx", 4, 1).read_bytes()
    cut = tmp_path / "cut.onnx"
    refused = 0
    for end in range(len(data)):
        cut.write_bytes(data[:end])
        try:
            open_artifact(cut)
        except ArtifactError:
            refused += 1
    assert refused >= len(data) - 10


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("{", "JSONDecodeError"),
        ("[" * 100_000, "damaged metadata"),
        ({"version": 2}, "version 2, expected 1"),
        ({"input_names": ["mask"]}, r"inputs \['mask'\]"),
        ({"input_names": None}, "TypeError"),
        ({"output_names": ["sum", "other"]}, "outputs"),
        ({"outputs": TENSOR}, "structures with"),
        ({"inputs": {"kind": "list", "items": [EMPTY, EMPTY]}}, "structures with"),
        ({"inputs": TENSOR}, "structures with"),
        ({"outputs": {"kind": "exec", "items": []}}, "unknown structure 'exec'"),
        ({"outputs": {"kind": "constant", "value": [1]}}, "unknown structure"),
        ({"outputs": {"kind": "dict", "keys": ["a", "a"], "items": [TENSOR, TENSOR]}}, "unknown structure"),
    ],
)
def test_forged_metadata(tmp_path, change, words):
    io = change if isinstance(change, str) else structured_io() | change
    with pytest.raises(ArtifactError, match=words):
        open_artifact(structured(tmp_path / "a.onnx", io))


def test_inputs_that_no_array_can_hold(tmp_path):
    value = ("x", TensorProto.BFLOAT16, [1]), ("y", TensorProto.BFLOAT16, [1])
    with pytest.raises(ArtifactError, match=r"no array for: \['x: onnx type 16\[1\]'\]"):
        open_artifact(save(tmp_path / "a.onnx", [helper.make_node("Identity", ["x"], ["y"])], [value[0]], [value[1]], {}))
    sequence = helper.make_tensor_sequence_value_info("x", TensorProto.FLOAT, [1])
    graph = helper.make_graph([helper.make_node("SequenceLength", ["x"], ["y"])], "g", [sequence], [helper.make_tensor_value_info("y", 7, [])], [])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), tmp_path / "b.onnx")
    with pytest.raises(ArtifactError, match="'x' is not a plain tensor"):
        open_artifact(tmp_path / "b.onnx")


def test_weights_beside_the_file_must_be_there(tmp_path):
    whole = onnx.load(mlp(tmp_path / "a.onnx", 64))
    onnx.save(whole, tmp_path / "b.onnx", save_as_external_data=True, location="b.weights", size_threshold=0)
    x = noise(2, 64)
    np.testing.assert_array_equal(open_artifact(tmp_path / "b.onnx")(x), open_artifact(tmp_path / "a.onnx")(x))
    (tmp_path / "b.weights").unlink()
    with pytest.raises(ArtifactError, match=r"b\.weights.*not there"):
        open_artifact(tmp_path / "b.onnx")


@pytest.mark.parametrize("threads", [0, -1, 1.5, True, "2"])
def test_threads_must_be_a_positive_number(tmp_path, threads):
    for name in RUNTIMES:
        with pytest.raises(TargetError, match="whole number of at least 1"):
            RUNTIMES[name].open(mlp(tmp_path / "a.onnx"), threads)


def test_names_and_suffixes(tmp_path):
    path = mlp(tmp_path / "a.onnx")
    with pytest.raises(SpecError, match="did you mean 'onnxruntime'"):
        open_artifact(path, "onnxruntme")
    with pytest.raises(ArtifactError, match=r"ends in '\.pt'; .* read.* \.onnx"):
        open_artifact(tmp_path / "a.pt")
    assert open_artifact(path).runtime == "onnxruntime"

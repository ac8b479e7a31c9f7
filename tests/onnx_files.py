"""Small ONNX files for tests, with weights drawn from a fixed seed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

TENSOR, EMPTY = {"kind": "tensor"}, {"kind": "dict", "keys": [], "items": []}


def save(path: Path, nodes: list[Any], inputs: list[Any], outputs: list[Any], weights: dict[str, np.ndarray], io: Any = None) -> Path:
    """Write an ONNX file; inputs and outputs are (name, onnx type, shape); ``io`` becomes the metadata."""
    graph_inputs, graph_outputs = ([helper.make_tensor_value_info(*value) for value in side] for side in (inputs, outputs))
    graph = helper.make_graph(nodes, "graph", graph_inputs, graph_outputs, [numpy_helper.from_array(value, name) for name, value in weights.items()])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    if io is not None:
        helper.set_model_props(model, {"downsize.io": io if isinstance(io, str) else json.dumps(io)})
    onnx.save(model, path)
    return path


def mlp_weights(width: int, layers: int) -> list[np.ndarray]:
    draw = np.random.default_rng(7)
    return [(draw.standard_normal((width, width)) / width**0.5).astype("float32") for _ in range(layers)]


def mlp(path: Path, width: int = 32, layers: int = 3) -> Path:
    """x [batch, width] -> MatMul and Relu, ``layers`` times."""
    names = ["x", *(f"relu{i}" for i in range(layers))]
    nodes = []
    for i in range(layers):
        nodes.append(helper.make_node("MatMul", [names[i], f"weight{i}"], [f"product{i}"], name=f"linear{i}"))
        nodes.append(helper.make_node("Relu", [f"product{i}"], [names[i + 1]], name=f"activation{i}"))
    shape = ["batch", width]
    weights = {f"weight{i}": weight for i, weight in enumerate(mlp_weights(width, layers))}
    return save(path, nodes, [("x", TensorProto.FLOAT, shape)], [(names[-1], TensorProto.FLOAT, shape)], weights)


def run_mlp(x: np.ndarray, layers: int = 3) -> np.ndarray:
    """The same in numpy, float64."""
    values = x.astype("float64")
    for weight in mlp_weights(x.shape[1], layers):
        values = np.maximum(values @ weight.astype("float64"), 0)
    return values


def conv(path: Path) -> Path:
    """image [batch, 3, height, width] -> Conv 3x3, Relu, mean over the image: [batch, 8]."""
    draw = np.random.default_rng(8)
    weights = {"kernel": draw.standard_normal((8, 3, 3, 3)).astype("float32"), "bias": draw.standard_normal(8).astype("float32")}
    nodes = [
        helper.make_node("Conv", ["image", "kernel", "bias"], ["maps"], name="conv", pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["maps"], ["relu"], name="relu"),
        helper.make_node("GlobalAveragePool", ["relu"], ["mean"], name="pool"),
        helper.make_node("Flatten", ["mean"], ["features"], name="flatten"),
    ]
    inputs = [("image", TensorProto.FLOAT, ["batch", 3, "height", "width"])]
    return save(path, nodes, inputs, [("features", TensorProto.FLOAT, ["batch", 8])], weights)


def quantized(path: Path) -> Path:
    """x [batch, 16] -> QuantizeLinear, DequantizeLinear, MatMul with an int8 weight: [batch, 8]."""
    draw = np.random.default_rng(9)
    weights = {
        "scale": np.array(0.04, "float32"),
        "zero": np.array(128, "uint8"),
        # Two products with an unsigned byte can be added in 16 bits, as processors without VNNI do.
        "codes": draw.integers(-64, 64, (16, 8)).astype("int8"),
        "scales": (draw.uniform(0.5, 1.5, 8) / 127).astype("float32"),
        "zeros": np.zeros(8, "int8"),
    }
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["q"], name="quantize"),
        helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["d"], name="dequantize"),
        helper.make_node("DequantizeLinear", ["codes", "scales", "zeros"], ["w"], name="weight", axis=1),
        helper.make_node("MatMul", ["d", "w"], ["y"], name="linear"),
    ]
    return save(path, nodes, [("x", TensorProto.FLOAT, ["batch", 16])], [("y", TensorProto.FLOAT, ["batch", 8])], weights)


def structured(path: Path, io: Any = None) -> Path:
    """Keywords ids and mask [batch, length] (int64) and a constant -> {"sum": ids + mask, "parts": (ids - mask,)}."""
    nodes = [
        helper.make_node("Add", ["ids", "mask"], ["sum"], name="add"),
        helper.make_node("Sub", ["ids", "mask"], ["difference"], name="subtract"),
    ]
    shape = ["batch", "length"]
    values = [[(name, TensorProto.INT64, shape) for name in names] for names in (["ids", "mask"], ["sum", "difference"])]
    return save(path, nodes, values[0], values[1], {}, structured_io() if io is None else io)


def structured_io() -> dict[str, Any]:
    """The metadata of :func:`structured`; its inputs are named in the order mask, ids, unlike the graph's."""
    keywords = {"kind": "dict", "keys": ["mask", "ids", "fast"], "items": [TENSOR, TENSOR, {"kind": "constant", "value": True}]}
    parts = {"kind": "tuple", "items": [TENSOR]}
    return {
        "version": 1,
        "inputs": {"kind": "list", "items": [{"kind": "tuple", "items": []}, keywords]},
        "outputs": {"kind": "dict", "keys": ["sum", "parts"], "items": [TENSOR, parts]},
        "input_names": ["mask", "ids"],
        "output_names": ["sum", "difference"],
        "input_shapes": [["batch", "length"], ["batch", "length"]],
        "input_dtypes": ["int64", "int64"],
    }

"""Recurrent layers: their matrices are quantized weights, packed in files, and decoded once when a file is loaded."""

from __future__ import annotations

import operator
from functools import cache
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from small_nets import VOCABULARY, Made, Net, in_onnxruntime, int8, like, needs_openvino, plain, task_of
from torch import nn

import downsize as ds
from downsize.errors import ExportError
from downsize.network.cost import count
from downsize.network.onnx_file import decodings, write
from downsize.quantization.diagnosis import diagnose
from downsize.quantization.placement import place
from downsize.quantization.weight_only import Data
from downsize.techniques.quantize import Quantize
from downsize.testing import loaded_equals_live

IN, WIDTH, GATES = 40, 48, {nn.LSTM: 4, nn.GRU: 3, nn.RNN: 1}
TOKENS = torch.randint(0, VOCABULARY, (2, 7), generator=torch.Generator().manual_seed(0))
CELLS: dict[str, tuple[Any, dict[str, Any]]] = {
    "lstm": (nn.LSTM, {"num_layers": 2}),
    "two ways": (nn.LSTM, {"bidirectional": True, "bias": False}),
    "gru": (nn.GRU, {"bidirectional": True}),
    "rnn": (nn.RNN, {"num_layers": 2, "nonlinearity": "relu"}),
}
FAST: dict[str, Any] = {"samples": 8, "equalize": False, "smooth": False, "correct": False}
WAYS: dict[str, dict[str, Any]] = {
    "int8": {"activations": "none"},
    "static": FAST,
    "4 bits": {"activations": "none", "bits": 4, "group": 32, "symmetric": False, "rounding": "nearest"},
}


def text_model(cell: str) -> Any:
    torch.manual_seed(0)
    build, options = CELLS[cell]
    directions = 2 if options.get("bidirectional") else 1
    layers = {"table": nn.Embedding(VOCABULARY, IN), "rnn": build(IN, WIDTH, batch_first=True, **options), "head": nn.Linear(WIDTH * directions, 5)}
    return Net(lambda net, x: net.head(net.rnn(net.table(x))[0]), **layers).eval()


@cache
def made(cell: str, way: str) -> Made:
    return int8(text_model(cell), TOKENS, **WAYS[way])


def matrices(model: Any) -> dict[str, torch.Tensor]:
    return {f"rnn.{name}": tensor for name, tensor in model.rnn.named_parameters() if tensor.dim() == 2}


@pytest.mark.parametrize("runtime", ["onnxruntime", pytest.param("openvino", marks=needs_openvino)])
@pytest.mark.parametrize(("cell", "way"), [(cell, way) for cell in CELLS for way in WAYS if way != "static" or cell == "lstm"])
def test_files_compute_what_was_simulated(cell, way, runtime):
    one = made(cell, way)
    onnx.checker.check_model(onnx.load(one.path))
    simulated, original = one.quantized.predict(one.inputs), one.network.predict(one.inputs)
    assert not torch.allclose(simulated, original, rtol=1e-4)
    got = torch.as_tensor(np.asarray(ds.open(one.path, runtime=runtime)(one.inputs)))
    # In static mode a code of the head's input may be another one.
    assert (got - simulated).abs().max() <= (1e-5 if way != "static" else 1e-2) * simulated.abs().max()


@pytest.mark.parametrize("cell", CELLS)
def test_files_hold_codes_alone_and_runtimes_compute_as_in_float(cell):
    for way, bits in (("int8", 8), ("4 bits", 4)):
        one = made(cell, way)
        held = {tensor.name: numpy_helper.to_array(tensor) for tensor in onnx.load(one.path).graph.initializer}
        for name, matrix in matrices(one.model).items():
            assert held[f"{name}_{'codes' if bits == 8 else 'packed'}"].nbytes == matrix.numel() * bits // 8, name
        floats = [array.size for array in held.values() if array.dtype == np.float32]
        assert max(floats) < min(matrix.numel() for matrix in matrices(one.model).values())
        found, float_file = in_onnxruntime(one.path), one.path.with_suffix(".float.onnx")
        write(one.network, float_file)
        plain_file = in_onnxruntime(float_file)
        kinds = [kind for kind in ("LSTM", "GRU", "RNN") if plain_file[kind]]
        assert all(found[kind] == plain_file[kind] for kind in kinds)
        # What turns gates round and decodes is done when the file is loaded.
        assert not found["Concat"] > plain_file["Concat"] and found["Slice"] <= plain_file["Slice"]


def test_the_decoded_codes_are_those_of_the_grid():
    one = made("lstm", "int8")
    held = {tensor.name: numpy_helper.to_array(tensor) for tensor in onnx.load(one.path).graph.initializer}
    for name, matrix in matrices(one.model).items():
        values = matrix.detach().numpy()
        step = np.abs(values).max(1, keepdims=True).astype(np.float64) / 127
        gap = held[f"{name}_codes"] - np.rint(values / step)
        assert np.abs(gap).max() <= 1 and (gap != 0).mean() < 1e-3, name  # steps are float32 there
        assert np.allclose(held[f"{name}_scale"], step, rtol=1e-6)
    records = {record.weight: record for record in decodings(one.quantized)}
    assert all(records[name].bits == 8 and records[name].when == "at load" for name in matrices(one.model))


@pytest.mark.parametrize("cell", CELLS)
def test_every_matrix_of_every_layer_and_direction_is_placed(cell):
    network = plain(text_model(cell), TOKENS)
    placement = place(network)
    found = {str(point.node.target): point.axis for point in placement.weights}
    build, options = CELLS[cell]
    assert {name: 0 for name in matrices(text_model(cell))} | {"table.weight": 0, "head.weight": 0} == found
    assert len(found) == 2 + 2 * options.get("num_layers", 1) * (2 if options.get("bidirectional") else 1)
    assert all(network.tensor(name).shape[0] == GATES[build] * WIDTH for name in matrices(text_model(cell)))


def test_bytes_are_counted_in_closed_form():
    one = made("lstm", "4 bits")
    rows = {row.node: row for row in count(one.quantized, TOKENS).rows}
    for name, matrix in matrices(one.model).items():
        node = next(n for n in one.quantized.graph.nodes if n.op == "get_attr" and n.target == name)
        fake = next(iter(node.users))
        groups = matrix.shape[0] * -(-matrix.shape[1] // 32)
        constants = groups * (4 + 4)  # a float scale and an int32 zero point each
        assert rows[fake.name].bytes == matrix.numel() // 2 + constants
    recurrent = next(row for row in rows.values() if row.operator == "lstm")
    assert recurrent.macs == TOKENS.numel() * sum(matrix.numel() for matrix in matrices(one.model).values())


def test_saved_and_loaded_they_are_the_same(tmp_path):
    loaded_equals_live(made("gru", "4 bits").quantized, TOKENS, tmp_path)


@pytest.mark.parametrize("way", WAYS)
def test_zeros_stay_zeros(way):
    model = text_model("lstm")
    network = plain(model, TOKENS)
    generator, zero = torch.Generator().manual_seed(1), {}
    for name, matrix in matrices(model).items():
        zero[name] = torch.rand(matrix.shape, generator=generator) < 0.6
        node = next(n for n in network.graph.nodes if n.op == "get_attr" and n.target == name)
        with torch.no_grad():
            operator.attrgetter(str(node.target))(network.graph_module).masked_fill_(zero[name], 0.0)
    quantized = Quantize(**WAYS[way])(network, task_of(model, TOKENS))
    values = {}
    for node in quantized.graph.nodes:
        if node.op == "call_function" and str(node.target).startswith("downsize.fake_quantize") and str(node.args[0].target) in zero:
            parts = [quantized.tensor(str(part.target)) for part in node.args[:3]]
            values[str(node.args[0].target)] = node.target(*parts, *node.args[3:])
    assert values.keys() == zero.keys()
    for name, mask in zero.items():
        assert not bool(values[name][mask].any()) and bool(values[name][~mask].any()), name


def test_a_network_of_a_recurrent_layer_alone():
    torch.manual_seed(0)
    model, data = nn.LSTM(IN, WIDTH, batch_first=True).eval(), torch.randn(2, 5, IN)
    for activations in ("none", "static"):
        one = int8(model, data, **{**FAST, "activations": activations})
        got = ds.open(one.path, runtime="onnxruntime")(one.inputs)
        expected = one.quantized.predict(one.inputs)
        assert torch.allclose(torch.as_tensor(np.asarray(got[0])), expected[0], atol=1e-6)
        assert not torch.allclose(one.network.predict(one.inputs)[0], expected[0], atol=1e-6)


def test_weights_that_are_kept_stay_in_float():
    model = text_model("lstm")
    quantized = Quantize(activations="none", keep=("rnn.weight_hh_l*",))(plain(model, TOKENS), task_of(model, TOKENS))
    fakes = {str(n.args[0].target) for n in quantized.graph.nodes if n.op == "call_function" and "fake_quantize" in str(n.target)}
    assert {name for name in matrices(model) if "_ih_" in name} == {name for name in fakes if name.startswith("rnn.")}


def test_sensitivity_measures_a_recurrent_layer_by_all_it_gives():
    model = text_model("two ways")
    network = plain(model, TOKENS)
    data = [[like(TOKENS, 2, seed)] for seed in range(3)]
    found = {one.weight: one for one in diagnose(network, Data(data[:2], data[2:]), (8, 3))}
    name = "rnn.weight_hh_l0_reverse"
    assert found[name].operator == "lstm" and not found[name].inputs
    with torch.no_grad():
        x = model.table(data[2][0])
        before = [each.clone() for each in (lambda y, s: (y, *s))(*model.rnn(x))]
        weight = model.rnn.weight_hh_l0_reverse
        weight.copy_((weight / (step := weight.abs().amax(1, keepdim=True) / 127)).round() * step)
        after = (lambda y, s: (y, *s))(*model.rnn(x))
    error = sum(float((one - other).square().sum()) for one, other in zip(before, after, strict=True))
    assert found[name].output[8] == pytest.approx(error / sum(float(one.square().sum()) for one in before), rel=0.05)
    assert found[name].output[3] > 100 * found[name].output[8] and found[name].loss[3] > found[name].loss[8] > 0


@pytest.mark.filterwarnings("ignore:LSTM with projections")
def test_projections_are_refused_in_files(tmp_path):
    network = plain(nn.LSTM(IN, WIDTH, proj_size=8, batch_first=True), torch.randn(2, 5, IN))
    with pytest.raises(ExportError, match=r"lstm.*projection"):
        write(network, tmp_path / "model.onnx")

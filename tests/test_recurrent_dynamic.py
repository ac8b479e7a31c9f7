"""LSTM layers with dynamic activations: the simulation against a plain numpy one, and ONNX Runtime against the simulation."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from small_nets import VOCABULARY, Net, in_onnxruntime, like, needs_openvino, plain, task_of
from torch import nn

import downsize as ds
from downsize.errors import TaskError
from downsize.network.cost import count
from downsize.network.lineage import Lineage
from downsize.network.lower import lower
from downsize.network.network import Network
from downsize.network.onnx_file import decodings, write
from downsize.numerics.recurrent import dynamic_lstm
from downsize.techniques.quantize import Quantize
from downsize.testing import loaded_equals_live, simulation_equals_artifact

IN, WIDTH = 24, 40
TOKENS = torch.randint(0, VOCABULARY, (2, 7), generator=torch.Generator().manual_seed(0))
WAYS: dict[str, dict[str, Any]] = {
    "layers": {"num_layers": 2, "batch_first": True},
    "directions": {"bidirectional": True, "batch_first": True, "num_layers": 2},
    "without biases": {"bias": False},
}


def rounded(x: np.ndarray) -> np.ndarray:
    """As ONNX defines DynamicQuantizeLinear, and back."""
    low, high = min(np.float32(0), x.min()), max(np.float32(0), x.max())
    scale = np.float32(high - low) / np.float32(255) if high > low else np.float32(1)
    zero = np.rint(np.clip(-low / scale, 0, 255))
    return ((np.clip(np.rint(x / scale) + zero, 0, 255) - zero) * scale).astype(np.float32)


def by_hand(x: np.ndarray, hidden: list[np.ndarray], parameters: list[np.ndarray], biased: bool, layers: int, both: bool) -> list[np.ndarray]:
    """The LSTM's equations, every product's left side rounded; ``x`` [time, batch, features]."""
    count, directions, states, cells = (4 if biased else 2), (2 if both else 1), [], []
    for layer in range(layers):
        inputs, outputs = rounded(x), np.zeros((*x.shape[:2], directions * hidden[0].shape[2]), np.float32)
        for direction in range(directions):
            number = layer * directions + direction
            w, r, *biases = parameters[number * count : (number + 1) * count]
            h, c = hidden[0][number], hidden[1][number]
            for t in range(len(x))[:: -1 if direction else 1]:
                i, f, g, o = np.split(inputs[t] @ w.T + rounded(h) @ r.T + sum(biases), 4, axis=1)
                c = c / (1 + np.exp(-f)) + np.tanh(g) / (1 + np.exp(-i))
                h = np.tanh(c) / (1 + np.exp(-o))
                outputs[t, :, direction * h.shape[1] : (direction + 1) * h.shape[1]] = h
            states.append(h)
            cells.append(c)
        x = outputs
    return [x, np.stack(states), np.stack(cells)]


@pytest.mark.parametrize("way", WAYS)
def test_the_simulation_is_the_one_by_hand(way):
    torch.manual_seed(0)
    lstm = nn.LSTM(IN, WIDTH, **WAYS[way])
    biased, layers, both, first = lstm.bias, lstm.num_layers, lstm.bidirectional, lstm.batch_first
    parameters = [p.detach() for p in lstm.parameters()]
    x, hidden = torch.randn(5, 3, IN), [torch.randn(layers * (2 if both else 1), 3, WIDTH) / 3 for _ in range(2)]
    got = dynamic_lstm(x.transpose(0, 1) if first else x, hidden, parameters, biased, layers, 0.0, False, both, first)
    expected = by_hand(x.numpy(), [each.numpy() for each in hidden], [each.numpy() for each in parameters], biased, layers, both)
    for one, other in zip((got[0].transpose(0, 1) if first else got[0], *got[1:]), expected, strict=True):
        # Where sums differ in their last digits a code may be the next one: a 255th of the range, times a weight.
        gap = np.abs(one.numpy() - other)
        assert np.median(gap) < 1e-6 and gap.max() < 5e-3
    with torch.no_grad():
        exact = lstm(x.transpose(0, 1) if first else x, tuple(hidden))[0]
    assert 1e-5 < float((got[0] - exact).abs().max()) < 0.05


def test_it_is_an_operator_of_torch():
    lstm = nn.LSTM(4, 3, num_layers=2, bidirectional=True)
    args = torch.randn(5, 2, 4), [torch.zeros(4, 2, 3)] * 2, [p.detach() for p in lstm.parameters()], True, 2, 0.0, False, True, False
    torch.library.opcheck(dynamic_lstm, args, test_utils=("test_schema", "test_faketensor"))


def text_model(way: str) -> Any:
    torch.manual_seed(0)
    lstm = nn.LSTM(IN, WIDTH, **WAYS[way])
    width = WIDTH * (2 if lstm.bidirectional else 1)
    return Net(lambda net, x: net.head(net.rnn(net.table(x))[0]), table=nn.Embedding(VOCABULARY, IN), rnn=lstm, head=nn.Linear(width, 5)).eval()


@cache
def quantized(way: str, bits: Any = 8, profile: Any = "auto") -> Network:
    model = text_model(way)
    return Quantize(activations="dynamic", bits=bits, profile=profile)(plain(model, TOKENS), task_of(model, TOKENS))


@pytest.mark.parametrize(("way", "bits"), [("layers", 8), ("layers", 4), ("directions", 8), ("without biases", 8)])
def test_onnxruntime_computes_what_is_simulated(way, bits, tmp_path):
    made, path = quantized(way, bits), tmp_path / "model.onnx"
    write(made, path, "onnxruntime")
    found = in_onnxruntime(path)
    assert found["DynamicQuantizeLSTM"] == WAYS[way].get("num_layers", 1) and not found["LSTM"]
    for batch in (1, 3) if "batch_first" in WAYS[way] else (2,):
        inputs = like(TOKENS, batch, 5)
        simulation_equals_artifact(made, path, inputs)
        got, expected = np.asarray(ds.open(path, runtime="onnxruntime")(inputs)), made.predict(inputs).numpy()
        assert np.abs(got - expected).max() <= 0.01 * np.abs(expected).max()


def test_the_lowered_graph_computes_the_same():
    for way in WAYS:
        made = quantized(way).fork()
        expected = made.predict(TOKENS)
        lower(made, "onnxruntime")
        assert any(node.target is torch.ops.downsize.integer_lstm.default for node in made.graph.nodes)
        assert torch.allclose(made.predict(TOKENS), expected, atol=1e-5)


def test_files_hold_codes_of_a_byte_or_half_one(tmp_path):
    sizes = [4 * WIDTH * columns for columns in (IN, WIDTH, WIDTH, WIDTH)]
    for bits in (8, 4):
        write(quantized("layers", bits, "x86"), tmp_path / "model.onnx", "onnxruntime")
        held = [numpy_helper.to_array(tensor) for tensor in onnx.load(tmp_path / "model.onnx").graph.initializer]
        codes = [array.nbytes for array in held if array.dtype in (np.int8, np.uint8) and array.nbytes >= sizes[0] * bits // 8]
        assert sorted(codes) == sorted(size * bits // 8 for size in sizes)
        assert max(array.nbytes for array in held if array.dtype == np.float32) == 4 * 8 * WIDTH  # the biases of a layer
    told = {one.weight: one for one in decodings(quantized("layers", 4), "onnxruntime")}
    assert told["rnn.weight_hh_l1"].bits == 4 and told["rnn.weight_hh_l1"].stored == sizes[1] // 2 + 4 * 4 * WIDTH
    assert "rnn.weight_hh_l1" not in {one.weight for one in decodings(quantized("layers", 8, "x86"), "onnxruntime")}


@needs_openvino
def test_other_runtimes_compute_the_layer_in_float(tmp_path):
    made = quantized("layers")
    path = tmp_path / "model.onnx"
    write(made, path, "openvino")
    alone = made.fork()
    for node in alone.graph.nodes:
        if node.target is torch.ops.downsize.dynamic_lstm.default:
            node.target = torch.ops.aten.lstm.input
    alone.recompile()
    got, expected = np.asarray(ds.open(path, runtime="openvino")(TOKENS)), alone.predict(TOKENS).numpy()
    assert np.abs(got - expected).max() <= 0.02 * np.abs(expected).max()
    assert in_onnxruntime(path)["LSTM"] == 2


def test_what_stays_in_float_is_told_and_refused():
    torch.manual_seed(0)
    model = Net(lambda net, x: net.head(net.rnn(net.table(x))[0]), table=nn.Embedding(50, 8), rnn=nn.GRU(8, 12), head=nn.Linear(12, 3)).eval()
    made = Quantize(activations="dynamic")(plain(model, TOKENS), task_of(model, TOKENS))
    assert made.origin["weights_alone"] == ["rnn"] and "weights_alone" not in quantized("layers").origin
    kept = text_model("layers")
    partly = Quantize(activations="dynamic", keep=("rnn.weight_hh_l1",))(plain(kept, TOKENS), task_of(kept, TOKENS))
    assert partly.origin["weights_alone"] == ["rnn"]
    with pytest.raises(TaskError, match="no linear layer or LSTM"):
        images = nn.Sequential(nn.Conv2d(3, 4, 3)).eval()
        Quantize(activations="dynamic")(plain(images, torch.randn(2, 3, 8, 8)), task_of(images, torch.randn(2, 3, 8, 8)))


def test_the_rest_of_the_toolkit_knows_the_operator(tmp_path):
    made = quantized("directions")
    loaded_equals_live(made, TOKENS, tmp_path)
    row = next(row for row in count(made, TOKENS).rows if row.operator == "dynamic_lstm")
    assert row.macs == TOKENS.numel() * sum(p.numel() for p in text_model("directions").rnn.parameters() if p.dim() == 2)
    network = plain(text_model("directions"), TOKENS)
    twin = network.fork()
    for node in twin.graph.nodes:
        node.target = torch.ops.downsize.dynamic_lstm.default if node.target is torch.ops.aten.lstm.input else node.target
    assert [axis.units for axis in Lineage(twin).axes] == [axis.units for axis in Lineage(network).axes] == [IN, WIDTH]

"""What runtimes get wrong in integer graphs: each case once as it came (shown to be wrong still) and as it is written now."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from small_nets import Made, Net, conv, in_onnxruntime, int8, needs_openvino, operators, plain, weight
from torch import nn

from downsize.errors import ExportError
from downsize.network import onnx_file
from downsize.runtimes import open_artifact
from downsize.testing import artifact_is_as_near, simulation_equals_artifact

IMAGE, TEXT = torch.randn(2, 3, 12, 12), torch.randn(2, 7, 16)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def pooled(pool: Any) -> nn.Module:
    return Net(lambda net, x: net.b(pool(net.a(x))), a=conv(3, 8), b=conv(8, 4))


def gained(reduce: Any) -> nn.Module:
    net = Net(lambda net, x: net.b(reduce(x) * net.gain), b=nn.Linear(16, 8), gain=weight(16))
    with torch.no_grad():
        net.gain.abs_().add_(0.1)  # type: ignore[operator]
    return net


OPENVINO = {
    "pool that counts its padding": (lambda: pooled(lambda x: F.avg_pool2d(x, 3, 2, 1)), IMAGE),
    "pool behind padding": (lambda: pooled(lambda x: F.avg_pool2d(F.pad(x, (1, 1, 1, 1)), 3, 2)), IMAGE),
    "mean, then a factor a channel": (lambda: gained(lambda x: x.mean(1)), TEXT),
    "sum, then a factor a channel": (lambda: gained(lambda x: x.sum(1)), TEXT),
    "maximum, then a factor a channel": (lambda: gained(lambda x: x.amax(1)), TEXT),
    "padding with a number": (lambda: Net(lambda net, x: F.pad(net.a(x), (0, 0, 0, 0, 1, 0), value=1.5), a=conv(3, 8)), IMAGE),
}


@needs_openvino
@pytest.mark.parametrize("name", OPENVINO)
def test_openvino_is_right_as_it_is_written_now(name, monkeypatch):
    build, example = OPENVINO[name]
    made = int8(build(), example)
    artifact_is_as_near(made.network, made.quantized, made.path, made.inputs, "openvino")
    simulation_equals_artifact(made.quantized, made.path, made.inputs)
    monkeypatch.setattr(onnx_file, "avoid", lambda network: None)
    onnx_file.write(made.quantized, made.path)
    with pytest.raises(AssertionError, match="openvino: the file is off"):  # else the rewriting can go
        artifact_is_as_near(made.network, made.quantized, made.path, made.inputs, "openvino")


def test_onnxruntime_is_right_on_pools_that_round_their_size_up(monkeypatch):
    made = int8(pooled(lambda x: F.avg_pool2d(x, 5, 3, ceil_mode=True)), IMAGE)
    simulation_equals_artifact(made.quantized, made.path, made.inputs)
    monkeypatch.setattr(onnx_file, "avoid", lambda network: None)
    onnx_file.write(made.quantized, made.path)
    with pytest.raises(AssertionError, match="simulation == artifact"):
        simulation_equals_artifact(made.quantized, made.path, made.inputs)


@pytest.mark.parametrize(
    ("pool", "operator"),
    [
        (lambda x: F.avg_pool2d(x, 3, 2, 1), "QLinearConv"),
        (lambda x: F.avg_pool2d(F.relu(x), 3, 2, 1), "QLinearAveragePool"),  # zero is the lowest code: right as it is
        (lambda x: F.avg_pool2d(x, 3, 2, 1, count_include_pad=False), "QLinearAveragePool"),
        (lambda x: F.avg_pool2d(x, (2, 3), (1, 2)), "QLinearAveragePool"),
    ],
)
def test_pools_stay_integer_operators(pool, operator):
    made = int8(pooled(pool), IMAGE)
    simulation_equals_artifact(made.quantized, made.path, made.inputs)
    found = in_onnxruntime(made.path)
    assert found["QLinearConv"] + found["QLinearAveragePool"] == 3 and not found["AveragePool"] and found[operator] >= 1


@pytest.mark.parametrize(
    ("build", "example"),
    [
        (lambda: Net(lambda net, x: net.b(F.avg_pool1d(net.a(x), 3, 2, 1)), a=nn.Conv1d(3, 8, 3), b=nn.Conv1d(8, 4, 3)), torch.randn(2, 3, 20)),
        (lambda: Net(lambda net, x: net.b(F.avg_pool3d(net.a(x), 3, 2, 1)), a=nn.Conv3d(3, 8, 3), b=nn.Conv3d(8, 4, 2)), torch.randn(2, 3, 6, 6, 6)),
    ],
    ids=["1-D", "3-D"],
)
def test_pools_of_other_dimensions(build, example):
    made = int8(build(), example)
    simulation_equals_artifact(made.quantized, made.path, made.inputs)
    for runtime in ("onnxruntime", "openvino"):
        artifact_is_as_near(made.network, made.quantized, made.path, made.inputs, runtime)


def test_a_pool_that_no_runtime_gets_right_is_refused_with_the_line():
    with pytest.raises(ExportError, match=r"counts its padding and rounds its size up[\s\S]*small_nets.py"):
        int8(pooled(lambda x: F.avg_pool2d(x, 3, 2, 1, ceil_mode=True)), IMAGE)


def test_float_networks_are_left_as_they_are():
    network = plain(pooled(lambda x: F.avg_pool2d(x, 3, 2, 1)), IMAGE)
    before = operators(network)
    onnx_file.avoid(network)
    assert operators(network) == before


def spread(function: Any, **parts: Any) -> Made:
    return int8(Net(function, a=conv(3, 8), **parts), IMAGE)


SPREAD = {
    "concatenated": (lambda net, x: torch.cat([net.t.expand(x.shape[0], -1, -1, -1), net.a(x)], 1), {"t": weight(1, 2, 12, 12)}),
    "apart": (lambda net, x: (net.t.expand(x.shape[0], -1, -1, -1)[:, :, :4] * 1.0, net.a(x)), {"t": weight(1, 8, 12, 12)}),
    "positions": (lambda net, x: net.a(x) + net.e(torch.arange(x.shape[0]))[:, :, None, None], {"e": nn.Embedding(50, 8)}),
    "zeros": (lambda net, x: torch.cat([net.a(x), x.new_full((x.shape[0], 1, 12, 12), 0.3)], 1), {}),
    "state": (lambda net, x: net.r(net.a(x).flatten(2))[0], {"r": nn.LSTM(144, 4, batch_first=True)}),
}


@needs_openvino
@pytest.mark.xfail(strict=True, raises=AssertionError, reason="the runtime compiles files from their path")
@pytest.mark.parametrize("name", SPREAD)
def test_tensors_made_to_the_size_of_a_batch(name):
    """OpenVINO takes the first channel's scale for all channels when such a file is compiled from its path, not after convert_model."""
    function, parts = SPREAD[name]
    made = spread(function, **parts)
    simulation_equals_artifact(made.quantized, made.path, made.inputs)
    artifact_is_as_near(made.network, made.quantized, made.path, made.inputs, "openvino")


@needs_openvino
@pytest.mark.parametrize("batch", [1, 3, 4, 8])
def test_a_weight_read_both_ways_has_one_scale_for_openvino(batch):
    """With a scale a column, products along these columns were wrong at batches below 8."""
    made = int8(Net(lambda net, x: (x @ net.w.t()) @ net.w, w=weight(16, 24)), torch.randn(2, 24))
    inputs = made.inputs[:batch]
    artifact_is_as_near(made.network, made.quantized, made.path, inputs, "openvino")
    assert np.isfinite(open_artifact(made.path, "openvino")(inputs.numpy())).all()

"""Weights of few bits in files: packed, decoded where it is said, and the runtimes compute what was simulated."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from onnx import numpy_helper
from packed_nets import Way, quantized
from small_nets import Made, Net, conv, in_onnxruntime, in_openvino, int8, like, needs_openvino
from torch import nn

import downsize as ds
from downsize.network import lower_groups
from downsize.network.network import Network
from downsize.network.onnx_file import decodings, write
from downsize.runtimes import RUNTIMES
from downsize.testing import loaded_equals_live, simulation_equals_artifact

TEXT, ROWS, IMAGE = torch.randn(2, 5, 96), torch.randn(2, 50), torch.randn(2, 16, 9, 9)
TOKENS = torch.randint(0, 50, (2, 7))
LAYERS: dict[str, tuple[Any, Any]] = {
    "linear": (lambda: nn.Linear(96, 80), TEXT),
    "odd columns": (lambda: nn.Linear(50, 70, bias=False), ROWS),
    "convolution": (lambda: nn.Conv2d(16, 33, 3), IMAGE),
    "groups": (lambda: nn.Conv2d(16, 128, 5, padding=2, groups=4), IMAGE),
    "1-d": (lambda: nn.Conv1d(5, 96, 7), torch.randn(2, 5, 20)),
    "transposed": (lambda: nn.ConvTranspose2d(16, 24, 3, 2), IMAGE),
    "table": (lambda: nn.Embedding(50, 96), TOKENS),
    "odd table": (lambda: nn.Embedding(50, 75), TOKENS),
    "tied": (lambda: Net(lambda net, x: F.linear(net.t(x), net.t.weight), t=nn.Embedding(50, 96)), TOKENS),
    "product": (lambda: Net(lambda net, x: x @ net.weight, weight=nn.Parameter(torch.randn(96, 60))), TEXT),
}
WAYS = [
    *(Way(bits, 32) for bits in range(2, 9)),
    *(Way(bits, 16, asymmetric=True) for bits in (2, 3, 4, 8)),
    *(Way(bits, channels=True) for bits in (2, 3, 4, 8)),
    *(Way(bits, 128) for bits in (2, 4)),
    *(Way(bits, 24, asymmetric=True) for bits in (4, 6)),
    *(Way(bits, 32, levels=True) for bits in (1, 3, 4)),
]
ALL = pytest.mark.slow
FILES = [
    *((name, "", [ALL] if name not in ("odd columns", "odd table") else []) for name in LAYERS),
    *((name, "onnxruntime", [ALL]) for name in ("linear", "tied", "table", "odd table")),
    *((name, "openvino", [needs_openvino, ALL]) for name in ("linear", "odd columns", "tied")),
]


@pytest.fixture(autouse=True)
def small_kernels(monkeypatch):
    """Kernels also for weights as small as those of tests."""
    monkeypatch.setitem(lower_groups.KERNELS, "onnxruntime", {2: 0, 4: 0, 8: 0})


def side_by_side(name: str) -> tuple[Network, Any]:
    """A layer of that kind for every way, all of the same input, each with an output of its own."""
    build, example = LAYERS[name]
    inner = ".t.weight" if name == "tied" else ".weight"
    ways = {f"layers.{number}{inner}": way for number, way in enumerate(WAYS)}

    def build_all() -> nn.Module:
        return Net(lambda net, x: tuple(layer(x) for layer in net.layers), layers=nn.ModuleList(build() for _ in WAYS))

    network = quantized(build_all, example, ways)
    floats, outputs = quantized(build_all, example, {}).predict(example), network.predict(example)
    assert not any(torch.equal(one, two) for one, two in zip(floats, outputs, strict=True))
    return network, example


@pytest.mark.parametrize(("name", "runtime"), [pytest.param(name, runtime, marks=marks) for name, runtime, marks in FILES])
def test_files_compute_what_was_simulated(name, runtime, tmp_path):
    network, example = side_by_side(name)
    write(network, tmp_path / "model.onnx", runtime)
    onnx.checker.check_model(onnx.load(tmp_path / "model.onnx"))
    inputs = like(example, 5, 3)
    expected = network.predict(inputs)
    for program in RUNTIMES:
        if RUNTIMES[program].missing() is None and (runtime or program) == program:
            got = ds.open(tmp_path / "model.onnx", runtime=program)(inputs)
            gaps = [float((one - two).abs().max() / one.abs().max()) for one, two in zip(expected, got, strict=True)]
            wrong = {str(way): gap for way, gap in zip(WAYS, gaps, strict=True) if not gap <= 1e-5}
            assert not wrong, program


# Where it is decoded --------------------------------------------------------------------------------------------------------------


def optimized(path: Path) -> dict[str, np.ndarray]:
    """The constants that ONNX Runtime computes with, after it has loaded the file."""
    in_onnxruntime(path)
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in onnx.load(path.with_suffix(".optimized.onnx")).graph.initializer}


@pytest.mark.parametrize("way", [Way(3, 32, asymmetric=True), Way(4, channels=True), Way(8, channels=True), Way(4, 32, levels=True)], ids=str)
def test_onnxruntime_decodes_once_and_holds_the_simulated_weights_with_their_zeros(way, tmp_path):
    def sparse() -> nn.Module:
        layer = nn.Linear(96, 64)
        with torch.no_grad():
            layer.weight.mul_(torch.rand(64, 96, generator=torch.Generator().manual_seed(1)) > 0.6)
        return nn.Sequential(layer)

    network = quantized(sparse, TEXT, {"0.weight": way})
    write(network, tmp_path / "model.onnx")
    assert set(in_onnxruntime(tmp_path / "model.onnx")) <= {"MatMul", "Add"}
    fake = next(node for node in network.graph.nodes if "fake_quantize" in str(node.target))
    simulated = fake.target(*(network.tensor(str(node.target)) for node in fake.args[:3]), *fake.args[3:]).detach()
    held = [value for value in optimized(tmp_path / "model.onnx").values() if value.shape == (96, 64)]
    assert len(held) == 1 and np.array_equal(held[0].T, simulated.numpy())
    zeros = network.tensor("0.weight") == 0
    assert int(zeros.sum()) > 3000 and (way.levels or bool((simulated[zeros] == 0).all()))


def test_convolutions_run_in_float_without_decoding(tmp_path):
    network = quantized(lambda: nn.Sequential(conv(16, 32), nn.ReLU()), IMAGE, {"0.weight": Way(4, 48, asymmetric=True)})
    write(network, tmp_path / "model.onnx")
    assert set(in_onnxruntime(tmp_path / "model.onnx")) <= {"Conv", "FusedConv", "Relu", "ReorderInput", "ReorderOutput"}
    names = [node.name for node in onnx.load(tmp_path / "model.onnx").graph.node if node.op_type in ("Cast", "Gather", "Mul")]
    assert names and all(name.startswith("0:") for name in names)  # of the module that the weight is in


def test_each_weight_is_decoded_where_it_is_said(tmp_path, monkeypatch):
    def build() -> nn.Module:
        return nn.Sequential(nn.Embedding(50, 96), nn.Linear(96, 64), nn.GELU(), nn.Linear(64, 96))

    network = quantized(build, TOKENS, {"0.weight": Way(4, 32, asymmetric=True), "1.weight": Way(4, 32), "3.weight": Way(3, 32)})
    packed = {"0.weight": (4, 50 * (48 + 6 + 2)), "1.weight": (4, 64 * 96 // 2 + 64 * 3 * 2), "3.weight": (3, 96 * 64 * 3 // 8 + 96 * 2 * 2)}
    for runtime, second in (("", "at load"), ("onnxruntime", "in the kernel"), ("openvino", "in the kernel")):
        found = decodings(network, runtime)
        assert {one.weight: (one.bits, one.stored) for one in found} == packed
        assert [one.when for one in sorted(found)] == ["at run", second, "at load"]
        write(network, tmp_path / "model.onnx", runtime)
        nodes = [node.op_type for node in onnx.load(tmp_path / "model.onnx").graph.node]
        assert nodes.count("MatMulNBits") == (1 if second == "in the kernel" else 0)
        assert nodes.count("GatherBlockQuantized") == (1 if runtime == "onnxruntime" else 0)
    monkeypatch.undo()
    assert {one.when for one in decodings(network, "onnxruntime")} == {"at run", "at load"}  # too small to gain by its kernel


@needs_openvino
@pytest.mark.parametrize("way", [Way(2, 32), Way(4, 16, asymmetric=True), Way(4, channels=True), Way(8, channels=True)], ids=str)
def test_openvino_keeps_packed_weights_and_computes_in_float32(way, tmp_path):
    network = quantized(lambda: nn.Sequential(nn.Linear(96, 64)), TEXT, {"0.weight": way})
    write(network, tmp_path / "model.onnx", "openvino")
    made = Made(nn.Identity(), network, network, tmp_path / "model.onnx", TEXT)
    assert in_openvino(made)["FullyConnectedCompressed"] == {"f32"}


@needs_openvino
def test_integer_kernels_compute_with_codes_of_few_bits():
    model = nn.Sequential(conv(8, 32), nn.ReLU(), conv(32, 32), nn.ReLU(), nn.Flatten(), nn.Linear(32 * 64, 16))
    made = int8(model, torch.randn(2, 8, 8, 8), bits=4, ends=4, samples=8)
    simulation_equals_artifact(made.quantized, made.path, made.inputs)
    executed = in_onnxruntime(made.path)
    assert executed["QLinearConv"] == 2 and executed["QGemm"] == 1 and not {"Conv", "Gemm", "Gather"} & set(executed)
    assert in_openvino(made)["Convolution"] <= {"I8", "i8"}
    weights = 9 * 8 * 32 + 9 * 32 * 32 + 16 * 32 * 64
    eight = int8(model, torch.randn(2, 8, 8, 8), samples=8, profile="x86").path.stat().st_size
    assert eight - weights / 2 < made.path.stat().st_size < eight - weights / 2 + 3000


# Bytes ----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("way", "expected"),
    [
        (Way(2, 64), 512 * 512 // 4 + 512 * 8 * 2),
        (Way(3, 64, asymmetric=True), 512 * 512 * 3 // 8 + 512 * 8 * 2 + 512 * 8 * 3 // 8),
        (Way(5, 32), 512 * 512 * 5 // 8 + 512 * 16 * 2),
        (Way(4, channels=True), 512 * 512 // 2 + 512 * 2),
        (Way(1, 128, levels=True), 512 * 512 // 8 + 512 * 4 * 4),
    ],
    ids=str,
)
def test_a_file_has_the_bytes_of_its_codes_scales_and_zero_points(way, expected, tmp_path):
    network = quantized(lambda: nn.Sequential(nn.Linear(512, 512, bias=False)), torch.randn(2, 512), {"0.weight": way})
    loaded_equals_live(network, torch.randn(2, 512))
    for runtime in ("", "openvino"):
        write(network, tmp_path / "model.onnx", runtime)
        assert expected <= (tmp_path / "model.onnx").stat().st_size <= expected + 5000

"""Kernels' rules: signed symmetric files for TensorRT, and weights of 7 bits for processors that add products in 16 bits."""

# pyright: reportCallIssue=false
# (modules type every attribute as a tensor or a module)

from __future__ import annotations

import platform
from contextlib import nullcontext
from dataclasses import replace
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, numpy_helper
from small_nets import FLOAT_LAYERS, Net, conv, in_onnxruntime, like, task_of
from torch import nn

import downsize as ds
from downsize.bench import Bench
from downsize.errors import SpecError
from downsize.network.capture import capture
from downsize.network.network import Network
from downsize.numerics import grids
from downsize.processor import Processor, adds_in_16_bits, processor
from downsize.progress import Progress
from downsize.quantization import profiles
from downsize.runtimes import RUNTIMES
from downsize.testing import simulation_equals_artifact

IMAGE = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
TOKENS = torch.randint(0, 50, (2, 6), generator=torch.Generator().manual_seed(1))
NARROW = adds_in_16_bits(processor().features)
INTEGER_TYPES = (TensorProto.INT8, TensorProto.UINT8, TensorProto.INT32, TensorProto.INT4, TensorProto.UINT4)
# Operators that compute shapes and positions, not values of the model.
SHAPES = {"Shape", "Gather", "Concat", "Reshape", "Slice", "Unsqueeze", "Squeeze", "Constant", "Expand", "Cast", "Range", "ReduceMean"}


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def residual() -> nn.Module:
    def forward(net: Any, x: torch.Tensor) -> torch.Tensor:
        x = net.stem(x)
        return net.end(net.pool(net.relu(net.two(net.relu(net.one(x))) + x)).flatten(1))

    return Net(
        forward,
        stem=conv(3, 8),
        one=conv(8, 8),
        two=conv(8, 8),
        relu=nn.ReLU(),
        pool=nn.AdaptiveAvgPool2d(1),
        end=nn.Linear(8, 5),
    ).eval()


def upsampling() -> nn.Module:
    return nn.Sequential(conv(3, 8), nn.ReLU6(), nn.ConvTranspose2d(8, 8, 2, stride=2), nn.ReLU(), conv(8, 2)).eval()


def tied() -> nn.Module:
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0)
    return Net(lambda net, x: net.layer(net.table(x)) @ net.table.weight.t(), table=nn.Embedding(50, 16), layer=layer).eval()


CASES: dict[str, tuple[Any, torch.Tensor]] = {"residual": (residual, IMAGE), "upsampling": (upsampling, IMAGE), "tied": (tied, TOKENS)}


def made_for(profile: Any, build: Any, example: torch.Tensor, folder: Path, **options: Any) -> tuple[Network, Path]:
    model = build()
    network = capture(model, (example,))
    made = ds.quantize(profile=profile, smooth=False, equalize=False, **options)(network, task_of(model, (example,)))
    path = folder / "model.onnx"
    RUNTIMES["onnxruntime"].export(made, path)
    return made, path


def tensorrt_faults(model: onnx.ModelProto) -> list[str]:
    """What in a file is against TensorRT's rules for explicit quantization."""
    constants = {item.name: numpy_helper.to_array(item) for item in model.graph.initializer}
    makers = {name: node for node in model.graph.node for name in node.output}
    faults = []
    for node in model.graph.node:
        read = [constants[name] for name in node.input if name in constants]
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            scale, zero = constants.get(node.input[1]), constants.get(node.input[2]) if len(node.input) > 2 else None
            if scale is None or zero is None or zero.dtype != np.int8 or zero.any() or not (scale > 0).all():
                faults.append(f"{node.name}: scale {scale}, zero point {zero}; expected positive constants and 0 in int8")
            source = makers.get(node.input[0])
            if node.op_type == "DequantizeLinear" and node.input[0] not in constants and (source is None or source.op_type != "QuantizeLinear"):
                faults.append(f"{node.name} reads neither a constant nor QuantizeLinear")
            if node.op_type == "DequantizeLinear" and scale is not None and scale.ndim:
                faults += _axis_faults(model, node, constants[node.input[0]].shape, scale.size)
        elif "Integer" in node.op_type or node.op_type.startswith(("QLinear", "DynamicQuantize")) or node.domain:
            faults.append(f"{node.name}: an integer operator")
        elif any(array.dtype in (np.int8, np.uint8, np.int32) for array in read):
            faults.append(f"{node.name} reads integers")
    return faults


def _axis_faults(model: onnx.ModelProto, dequantize: onnx.NodeProto, shape: tuple[int, ...], scales: int) -> list[str]:
    """Scales of a weight run along the outputs of the layer that reads it."""
    axis = next((attribute.i for attribute in dequantize.attribute if attribute.name == "axis"), 1)
    faults = [] if shape[axis] == scales else [f"{dequantize.name}: {scales} scales along {shape[axis]}"]
    for reader in [node for node in model.graph.node if dequantize.output[0] in node.input]:
        transposed = any(attribute.name == "transB" and attribute.i for attribute in reader.attribute)
        wanted = {"Conv": 0, "ConvTranspose": 1, "MatMul": 1, "Gemm": 0 if transposed else 1}.get(reader.op_type)
        if axis != wanted:
            faults.append(f"{dequantize.name}: scales along {axis}, {reader.op_type} wants {wanted}")
    return faults


@pytest.mark.parametrize("name", CASES)
def test_a_file_for_tensorrt_keeps_its_rules_and_computes_what_was_simulated(name: str, tmp_path: Path) -> None:
    build, example = CASES[name]
    made, path = made_for("tensorrt", build, example, tmp_path)
    model = onnx.load(str(path))
    onnx.checker.check_model(model, full_check=True)
    assert tensorrt_faults(model) == []
    layers = [node for node in model.graph.node if node.op_type in ("Conv", "ConvTranspose", "Gemm")]
    makers = {output: node.op_type for node in model.graph.node for output in node.output}
    assert all([makers.get(source) for source in node.input[:2]] == ["DequantizeLinear"] * 2 for node in layers)
    floats = {item.name for item in model.graph.initializer if item.data_type == TensorProto.FLOAT}
    assert all(name in floats for node in layers for name in node.input[2:])  # biases
    simulation_equals_artifact(made, path, like((example,), 4, 7))


def test_both_inputs_of_a_residual_sum_are_dequantized(tmp_path: Path) -> None:
    _, path = made_for("tensorrt", residual, IMAGE, tmp_path)
    nodes = onnx.load(str(path)).graph.node
    makers = {output: node.op_type for node in nodes for output in node.output}
    sums = [node for node in nodes if node.op_type == "Add"]
    assert [[makers[source] for source in node.input] for node in sums] == [["DequantizeLinear"] * 2]


def test_the_rules_see_a_file_that_breaks_them(tmp_path: Path) -> None:
    _, path = made_for("x86", residual, IMAGE, tmp_path)
    faults = tensorrt_faults(onnx.load(str(path)))
    assert any("expected positive constants and 0 in int8" in fault for fault in faults)


def test_a_pruned_weight_of_few_codes_is_not_packed_for_tensorrt(tmp_path: Path) -> None:
    """For other targets it would be."""
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8)).eval()
    model[0].weight.data = model[0].weight.data.sign()
    example = torch.randn(4, 64)
    _, path = made_for("tensorrt", lambda: model, example, tmp_path, rounding="nearest")
    assert tensorrt_faults(onnx.load(str(path))) == []
    _, path = made_for("x86", lambda: model, example, tmp_path, rounding="nearest")
    assert any("pack" in item.name for item in onnx.load(str(path)).graph.initializer)


def test_a_signed_grid_is_symmetric_and_covers_the_range() -> None:
    for low, high in ((-1.0, 3.0), (-3.0, 1.0), (0.0, 2.0), (-2.0, 0.0), (0.0, 0.0)):
        scale, zero = grids.covering(torch.tensor(low), torch.tensor(high), grids.INT8)
        assert int(zero) == 0 and float(scale) > 0
        assert float(scale) == pytest.approx(max(-low, high) / 127, rel=1e-6, abs=1e-10)
    assert torch.equal(torch.stack(grids.covering(torch.tensor(-1.0), torch.tensor(3.0), grids.UINT8)),
                       torch.stack(grids.affine(torch.tensor(-1.0), torch.tensor(3.0), grids.UINT8)))  # fmt: skip


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"profile": "avx2", "activations": "none"}, "which no integer kernel multiplies"),
        ({"profile": "tensorrt", "activations": "dynamic"}, "static activations of 8 bits"),
        ({"profile": "tensorrt", "activation_bits": 4}, "static activations of 8 bits"),
        ({"profile": "tensorrt", "train": True}, "static activations of 8 bits"),
    ],
)
def test_fields_that_a_profile_cannot_have_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        ds.quantize(**fields)


# Sums in 16 bits ------------------------------------------------------------------------------------------------------------------


def added_by_twos(x: np.ndarray, w: np.ndarray) -> np.ndarray:
    """[rows, columns] of unsigned times signed bytes as AVX2 does it (VPMADDUBSW): pairs of products are added with saturation in 16 bits."""
    pairs = x.astype(np.int64).reshape(len(x), 1, -1, 2) * w.astype(np.int64).reshape(1, len(w), -1, 2)
    return pairs.sum(-1).clip(-(2**15), 2**15 - 1).sum(-1)


def test_no_sum_of_two_products_leaves_16_bits_with_7_bits_and_some_do_with_8() -> None:
    """All extremes of both types, and so all sums that are largest."""
    for bits, exact in ((7, True), (8, False)):
        grid = grids.weight_grid(bits)
        x = np.array([[a, b] for a in (0, 255) for b in (0, 255)], np.uint8)
        w = np.array([[a, b] for a in (grid.low, grid.high) for b in (grid.low, grid.high)], np.int8)
        assert np.array_equal(added_by_twos(x, w), x.astype(np.int64) @ w.T.astype(np.int64)) == exact


def test_weights_have_7_bits_and_the_layer_is_exact_where_products_are_added_in_16(tmp_path: Path) -> None:
    """The codes of a trained-like layer with large weights and inputs, multiplied as such processors do."""
    model = nn.Sequential(nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 4)).eval()
    model[0].weight.data = torch.randn(16, 32).sign() * (1 - 0.05 * torch.rand(16, 32))
    example = torch.rand(16, 32) + 1
    codes = {}
    for profile in ("avx2", "x86"):
        made, path = made_for(profile, lambda: model, example, tmp_path, rounding="nearest")
        fake = next(node for node in made.graph.nodes if "fake_quantize" in str(node.target) and str(node.args[0].target) == "0.weight")
        weight, scale, zero = (made.tensor(str(node.target)) for node in fake.args[:3])
        codes[profile] = grids.codes(weight, scale, zero, 0, grids.Grid(*fake.args[4:6])).numpy()
        # On a processor that adds so the file of 8 bits is wrong, and the check sees it.
        with pytest.raises(AssertionError, match="simulation == artifact") if profile == "x86" and NARROW else nullcontext():
            simulation_equals_artifact(made, path, like((example,), 4, 7))
        assert not set(in_onnxruntime(path)) & FLOAT_LAYERS
    assert codes["avx2"].min() >= -64 and codes["avx2"].max() <= 63 < codes["x86"].max()
    x = np.full((1, 32), 255, np.uint8)
    for profile, exact in (("avx2", True), ("x86", False)):
        assert np.array_equal(added_by_twos(x, codes[profile]), x.astype(np.int64) @ codes[profile].T.astype(np.int64)) == exact


@pytest.mark.parametrize("features", [("avx2", "fma"), ("avx2", "avx512_vnni"), ("asimd",)])
def test_auto_takes_what_the_processor_here_needs_and_says_so(features: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profiles, "processor", lambda: Processor("a processor", features))
    narrow, told, model = adds_in_16_bits(features), StringIO(), residual()
    task = replace(task_of(model, (IMAGE,)), progress=Progress(stream=told))
    made = ds.quantize(smooth=False, equalize=False)(capture(model, (IMAGE,)), task)
    grid = {True: (-64, 63), False: (-127, 127)}[narrow]
    fakes = [node for node in made.graph.nodes if node.target is torch.ops.downsize.fake_quantize.default]
    assert {tuple(node.args[4:6]) for node in fakes if node.args[0].op == "get_attr"} == {grid}
    # Activations keep all of their bits, at the ends of the network, too.
    assert {tuple(node.args[4:6]) for node in fakes if node.args[0].op != "get_attr"} == {(0, 255)}
    assert ("profile='x86'" in told.getvalue()) == narrow
    assert ds.quantize().kernels == ("avx2" if narrow else "x86")
    assert ds.quantize(activations="none").kernels == ds.quantize(profile="x86").kernels == "x86"


@pytest.mark.parametrize("features", [("avx2",), ("avx2", "avx512_vnni")])
def test_lstms_beside_blocks_have_7_bits_where_the_processor_asks_for_it_and_blocks_have_all(
    features: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(profiles, "processor", lambda: Processor("a processor", features))
    model = Net(
        lambda net, x: net.end(net.rnn(net.table(x))[0]), table=nn.Embedding(50, 64), rnn=nn.LSTM(64, 256, batch_first=True), end=nn.Linear(256, 512)
    )
    technique = ds.quantize(activations="dynamic", group=128, rounding="nearest")
    assert technique.kernels == ("avx2" if len(features) == 1 else "x86")  # a part of the step's key in a run
    made = technique(capture(model.eval(), (TOKENS,)), task_of(model, (TOKENS,)))
    highest = {
        str(node.args[0].target): int(
            (made.tensor(str(node.args[0].target)) / made.tensor(str(node.args[1].target)).unsqueeze(-1)).abs().max().round()
        )
        for node in made.graph.nodes
        if node.op == "call_function" and "fake_quantize.default" in str(node.target) and "rnn" in str(getattr(node.args[0], "target", ""))
    }
    assert set(highest) == {"rnn.weight_ih_l0", "rnn.weight_hh_l0"}
    assert {value > 64 for value in highest.values()} == {len(features) == 2}


def test_an_x86_of_which_nothing_is_known_counts_as_one_that_overflows(monkeypatch: pytest.MonkeyPatch) -> None:
    for machine, narrow in (("x86_64", True), ("AMD64", True), ("arm64", False)):
        monkeypatch.setattr(platform, "machine", lambda machine=machine: machine)
        assert adds_in_16_bits(()) == narrow
        assert not adds_in_16_bits(("avx2", "avx_vnni"))


def test_levels_that_are_learned_do_not_overflow_and_stay_three_through_reconstruction(tmp_path: Path) -> None:
    """Weights of one sign and large inputs, so that sums of two products are as large as they get."""
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8)).eval()
    for name, tensor in model.named_parameters():
        if name.endswith("weight"):
            tensor.data = torch.rand_like(tensor) + 0.2
    example = torch.rand(16, 64) + 1
    made, path = made_for("auto", lambda: model, example, tmp_path, levels="ttq", activation_bits=8, reconstruct=20, samples=32)
    assert all(len(row.unique()) <= 3 for row in made.tensor("2.weight").detach())
    simulation_equals_artifact(made, path, like((example,), 4, 7))


def test_reconstruction_leaves_learned_levels_three(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8)).eval()
    example = torch.randn(16, 64)
    made, _ = made_for("auto", lambda: model, example, tmp_path, levels="ttq", activation_bits=8, reconstruct=60, correct=False, samples=32)
    assert all(len(row.unique()) <= 3 for row in made.tensor("2.weight").detach())


def test_a_step_made_for_other_kernels_is_another_step(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = []
    for features in (("avx2",), ("avx2", "avx512_vnni")):
        monkeypatch.setattr(profiles, "processor", lambda features=features: Processor("a processor", features))
        run = SimpleNamespace(place=list, clear=list, network=lambda parts, make, needs: keys.append(list(parts)))
        stage = SimpleNamespace(key="before", network=capture(nn.Linear(4, 4).eval(), (torch.randn(2, 4),)))
        bench: Any = SimpleNamespace(data_key="data", task=task_of(residual(), (IMAGE,)), progress=Progress(quiet=True), run=run)
        Bench._apply(bench, ds.quantize(), "quantize()", stage)  # type: ignore[arg-type]
    assert keys[0] != keys[1]


def test_the_bits_at_the_ends_are_few_where_they_are_asked_for(tmp_path: Path) -> None:
    made, _ = made_for("avx2", residual, IMAGE, tmp_path, bits=4, activation_bits=4)
    weights = {
        str(node.args[0].target): tuple(node.args[4:6]) for node in made.graph.nodes if "fake" in str(node.target) and node.args[0].op == "get_attr"
    }
    assert {name: grid for name, grid in weights.items() if grid != (-8, 7)} == {"stem.weight": (-64, 63), "end.weight": (-64, 63)}


def test_dynamic_layers_have_7_bits_too(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 4)).eval()
    example = torch.randn(4, 32)
    made, path = made_for("avx2", lambda: model, example, tmp_path, activations="dynamic")
    assert {tuple(node.args[4:6]) for node in made.graph.nodes if node.target is torch.ops.downsize.fake_quantize.default} == {(-64, 63)}
    simulation_equals_artifact(made, path, like((example,), 4, 7))
    assert not set(in_onnxruntime(path)) & {"MatMul", *FLOAT_LAYERS}

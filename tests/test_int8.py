"""int8 end to end: the fake quantizer against closed forms, the written file against its simulation, and the integer kernels that run it."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from small_nets import Net, conv, int8
from torch import nn
from zoo import Depthwise, Residual, block, head, images, shake

import downsize as ds
from downsize.errors import TaskError
from downsize.network.onnx_file import write
from downsize.network.rewrite import fold_batch_norm
from downsize.network.statistics import Distribution
from downsize.numerics import grids
from downsize.numerics.hessian import gptq
from downsize.quantization import ranges
from downsize.quantization.correction import channel_means, correct_biases
from downsize.quantization.equalization import equalize
from downsize.quantization.insertion import FAKE, extremes
from downsize.techniques import Quantize
from downsize.testing import simulation_equals_artifact


def perceptron() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(192, 64), nn.ReLU(), nn.Linear(64, 10)).eval()


class Attention(nn.Module):
    """One post-norm transformer layer on image rows."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(24, 4, 48, batch_first=True, activation="gelu")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x.flatten(1).reshape(x.shape[0], 8, 24)) * 1.0


def task_of(model: nn.Module, size: int = 8, batches: int = 4) -> ds.Task:
    generator = torch.Generator().manual_seed(1)
    data = [(torch.randn(4, 3, size, size, generator=generator), None) for _ in range(batches)]
    return ds.Task(model, data[0][0], {"calibrate": lambda: list(data)})


def optimized(path: Path, folder: Path) -> Counter[str]:
    """How often each operator occurs in the graph that ONNX Runtime really runs."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(folder / "optimized.onnx")
    options.log_severity_level = 4
    onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return Counter(node.op_type for node in onnx.load(folder / "optimized.onnx").graph.node)


def quantized(model: nn.Module, folder: Path, size: int = 8, **options: object) -> tuple[ds.Network, ds.Network, Path, torch.Tensor]:
    """The float network, the quantized one, its file, and inputs that calibration has not seen."""
    task = task_of(model, size)
    network = ds.capture(model, task.example)
    made = Quantize(**options)(network, task)  # type: ignore[arg-type]
    write(made, folder / "int8.onnx")
    return network, made, folder / "int8.onnx", torch.randn(5, 3, size, size, generator=torch.Generator().manual_seed(9))


def test_fake_quantization_is_the_closed_form_and_rounds_half_to_even():
    x = torch.tensor([-1.0, -0.25, 0.25, 0.5, 0.75, 1.25, 200.0])
    got = torch.ops.downsize.fake_quantize(x, torch.tensor(0.5), torch.tensor(2, dtype=torch.int32), None, 0, 255)
    expected = (np.clip(np.rint(x.numpy() / 0.5) + 2, 0, 255) - 2) * 0.5  # numpy rounds half to even, as ONNX does
    np.testing.assert_array_equal(got.numpy(), expected)
    rows = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    scale, zero = grids.symmetric(extremes(rows, 0), grids.SYMMETRIC_INT8)
    codes = grids.codes(rows, scale, zero, 0, grids.SYMMETRIC_INT8)
    assert codes.dtype is torch.int8 and int(codes.abs().amax()) == 127
    fake = torch.ops.downsize.fake_quantize(rows, scale, zero, 0, -127, 127)
    assert torch.equal(fake, grids.values(codes, scale, zero, 0))
    assert bool(((fake - rows).abs() <= scale[:, None] / 2 + 1e-7).all())


def test_the_gradients_are_straight_through_and_the_learned_step():
    x = torch.tensor([-9.0, -0.6, 0.2, 0.9, 9.0], dtype=torch.float64, requires_grad=True)
    scale = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    torch.ops.downsize.fake_quantize(x, scale, torch.tensor(0, dtype=torch.int32), None, -4, 3).sum().backward()
    assert x.grad is not None and scale.grad is not None
    assert x.grad.tolist() == [0.0, 1.0, 1.0, 1.0, 0.0]
    # Esser et al. 2020, equation 3: low and high outside, round(v) - v inside
    inside = sum(float(np.rint(v / 0.5) - v / 0.5) for v in (-0.6, 0.2, 0.9))
    assert float(scale.grad) == pytest.approx(-4 + 3 + inside)


def test_zero_is_on_every_affine_grid_and_rows_of_zeros_are_harmless():
    low, high = torch.tensor([-3.0, 0.5, -2.0, 0.0]), torch.tensor([1.0, 4.0, -1.0, 0.0])
    scale, zero = grids.affine(low, high, grids.UINT8)
    assert torch.equal(grids.values(zero.to(torch.uint8), scale, zero, 0), torch.zeros(4))
    scale, _ = grids.symmetric(torch.tensor([0.0, 2.0]), grids.SYMMETRIC_INT8)
    assert scale[0] == scale[1]


def test_a_range_estimator_finds_what_brute_force_finds():
    values = torch.cat([torch.randn(20000, generator=torch.Generator().manual_seed(0)), torch.tensor([40.0, -35.0])])
    distribution = Distribution()
    for part in values.split(3000):
        distribution.add(part)
    assert (distribution.low, distribution.high) == (float(values.min()), float(values.max()))

    def error(bounds: ranges.Range) -> float:
        return float((ranges.fake(values, bounds, grids.UINT8) - values).square().mean())

    found = error(ranges.mean_squared_error(distribution, grids.UINT8))
    full = (distribution.low, distribution.high)
    brute = min(error((full[0] * a, full[1] * b)) for a in np.linspace(0.05, 1, 39) for b in np.linspace(0.05, 1, 39))
    assert found <= 1.001 * error(full) and found < 1.1 * brute
    low, high = ranges.percentile(distribution, 1e-3)
    assert np.quantile(values, 1e-3) == pytest.approx(low, abs=0.05) and np.quantile(values, 1 - 1e-3) == pytest.approx(high, abs=0.05)


def test_gptq_beats_rounding_on_the_inputs_it_saw_and_equals_it_on_white_ones():
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(24, 24, generator=generator)
    x = torch.randn(4000, 24, generator=generator) @ mixing
    weight = torch.randn(1, 8, 24, generator=generator)
    scale = extremes(weight[0], 0)[None] / 7
    grid = grids.Grid(-7, 7)
    nearest = (weight / scale[..., None]).round().clamp(-7, 7) * scale[..., None]
    rounded = gptq(weight, (x.T @ x)[None], scale, grid)
    assert torch.allclose((rounded / scale[..., None]).round() * scale[..., None], rounded, atol=1e-5)

    def error(q: torch.Tensor) -> float:
        return float(((q - weight)[0] @ x.T).square().sum())

    assert error(rounded) < 0.6 * error(nearest)
    assert torch.allclose(gptq(weight, torch.eye(24)[None], scale, grid), nearest, atol=1e-5)


def test_equalization_keeps_the_function_and_evens_the_ranges():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8), nn.ReLU(), nn.Conv2d(8, 4, 1)).eval()
    with torch.no_grad():
        model[0].weight *= torch.logspace(-2, 2, 8)[:, None, None, None]  # type: ignore[operator]
    x = torch.randn(2, 3, 8, 8)
    network = ds.capture(model, x)
    before = network.predict(x)
    balanced = network.fork()
    assert equalize(balanced) == 2
    torch.testing.assert_close(balanced.predict(x), before, rtol=1e-4, atol=1e-4 * float(before.abs().max()))
    assert torch.equal(network.predict(x), before)
    one, two = balanced.tensor("0.weight").detach(), balanced.tensor("2.weight").detach()
    ratio = extremes(one, 0) / two.flatten(1).abs().amax(1)
    assert float(ratio.max() / ratio.min()) < 1.1


def test_bias_correction_restores_every_mean():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 6, 3)).eval()
    x = torch.randn(8, 3, 8, 8)
    network = ds.capture(model, x)
    worse = network.fork()
    torch.manual_seed(1)
    for name in ("0.weight", "2.weight"):
        node = next(n for n in worse.graph.nodes if n.op == "get_attr" and n.target == name)
        from downsize.network.rewrite import set_constant

        set_constant(worse, node, worse.tensor(name).detach() + 0.05 * torch.rand_like(worse.tensor(name)))
    layer = next(n for n in network.graph.nodes if n.name == "conv2d_1")

    def gap(other: ds.Network) -> float:
        return float((channel_means(layer, other.predict(x)) - channel_means(layer, network.predict(x))).abs().max())

    before = gap(worse)
    correct_biases(network, worse, [[x]])
    assert before > 0.05 and gap(worse) < 1e-5


CASES = {
    "plain": (lambda: nn.Sequential(block(3, 8), block(8, 8), head(8)), {"QLinearConv": 2}),
    "residual": (Residual, {}),
    "depthwise": (Depthwise, {}),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_convolutional_networks_run_in_integers_and_as_simulated(name: str, runtime: str, tmp_path: Path):
    if runtime == "openvino":
        pytest.importorskip("openvino")
    torch.manual_seed(0)
    model = CASES[name][0]().eval()
    shake(model)
    network, made, path, x = quantized(model.eval(), tmp_path, 16)
    convolutions = sum("conv2d" in str(node.target) for node in network.graph.nodes)
    operators = optimized(path, tmp_path)
    assert operators["QLinearConv"] == convolutions
    assert operators["Conv"] == operators["FusedConv"] == operators["Gemm"] == operators["MatMul"] == 0
    assert simulation_equals_artifact(made, path, x).requantizations >= convolutions
    session = ds.open(path, runtime=runtime)
    reference = network.predict(x).numpy()
    for batch in (1, 5):
        got = np.asarray(session(x[:batch].numpy()))
        assert np.linalg.norm(got - reference[:batch]) < 0.08 * np.linalg.norm(reference[:batch])


def test_weights_are_stored_as_integers_and_clipping_is_left_to_the_codes(tmp_path: Path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 64, 3), nn.ReLU6(), nn.Conv2d(64, 64, 3), nn.ReLU()).eval()
    _, _, path, _ = quantized(model, tmp_path, 16, profile="x86")
    graph = onnx.load(path).graph
    types = Counter(tensor.data_type for tensor in graph.initializer for _ in range(int(np.prod(tensor.dims))))
    weights = 64 * 27 + 64 * 64 * 9
    assert types[onnx.TensorProto.INT8] >= weights and types[onnx.TensorProto.FLOAT] < 0.02 * weights
    assert not {"Clip", "Relu"} & {node.op_type for node in graph.node}
    assert path.stat().st_size < 1.2 * weights


def test_a_perceptron_and_a_transformer_layer_multiply_in_integers(tmp_path: Path):
    _, made, path, x = quantized(perceptron(), tmp_path)
    operators = optimized(path, tmp_path)
    assert operators["QGemm"] == 2 and operators["Gemm"] == operators["MatMul"] == 0
    simulation_equals_artifact(made, path, x)
    torch.manual_seed(0)
    network, made, path, x = quantized(Attention().eval(), tmp_path)
    linear = sum(str(node.target) == "aten.linear.default" for node in network.graph.nodes)
    operators = optimized(path, tmp_path)
    assert operators["MatMulIntegerToFloat"] + operators["QGemm"] == linear == 4
    assert operators["MatMul"] + operators["FusedMatMul"] == 2  # attention's own products stay in float
    simulation_equals_artifact(made, path, x)


def pyramid(net: Any, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    large = net.stem(x).relu()
    return net.head(F.max_pool2d(large, 2)), net.head(large)


def gated(net: Any, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    large = net.stem(x).relu()
    return net.head(large * net.inner(large).sigmoid()), net.head(large)


@pytest.mark.parametrize("forward", [pyramid, gated])
def test_a_layer_used_at_several_places_is_quantized_once_whatever_the_order_of_its_inputs(forward):
    """The last of these inputs in the graph is quantized first: its layer is then the last among the readers of the weight."""
    torch.manual_seed(0)
    made = int8(Net(forward, stem=conv(3, 8), inner=conv(8, 8), head=conv(8, 4)), torch.randn(2, 3, 8, 8))
    fakes = [node for node in made.quantized.graph.nodes if node.target is FAKE and str(getattr(node.args[0], "target", "")) == "head.weight"]
    assert [len(fake.users) for fake in fakes] == [2]
    simulation_equals_artifact(made.quantized, made.path, made.inputs)


def computed(net: Any, x: torch.Tensor) -> torch.Tensor:
    """A weight and a bias that are computed, the bias too large to be stored in the place of what it is made from."""
    return net.end(F.linear(net.start(x).relu(), net.weight.tanh(), net.bias.repeat(2)).relu())


def crossed(net: Any, x: torch.Tensor) -> torch.Tensor:
    queries, x = net.queries.expand(x.shape[0], -1, -1), net.start(x).unflatten(1, (2, 8))
    return net.end(net.attention(queries, x, x, need_weights=False)[0].flatten(1))


@pytest.mark.parametrize(("forward", "layers"), [(computed, 3), (crossed, 5)])
def test_weights_that_are_computed_or_read_in_parts_are_quantized_and_computed_biases_stay(forward, layers):
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(8, 2, batch_first=True)
    nn.init.normal_(attention.in_proj_bias)
    net = Net(forward, start=nn.Linear(8, 16), attention=attention, end=nn.Linear(16, 4))
    net.weight, net.bias, net.queries = nn.Parameter(torch.randn(16, 16) / 4), nn.Parameter(3 * torch.randn(8)), nn.Parameter(torch.randn(1, 2, 8))
    made = int8(net, torch.randn(4, 8))
    fakes = [node for node in made.quantized.graph.nodes if node.target is FAKE and getattr(node.args[0], "op", "") == "get_attr"]
    assert len(fakes) == layers
    simulation_equals_artifact(made.quantized, made.path, made.inputs)
    expected, got = made.network.predict(made.inputs), made.quantized.predict(made.inputs)
    assert float((got - expected).norm() / expected.norm()) < 0.1


def test_dynamic_quantization_multiplies_in_integers(tmp_path: Path):
    torch.manual_seed(0)
    _, made, path, x = quantized(Attention().eval(), tmp_path, activations="dynamic")
    operators = optimized(path, tmp_path)
    assert operators["DynamicQuantizeMatMul"] + operators["MatMulIntegerToFloat"] == 4
    got, expected = np.asarray(ds.open(path)(x.numpy())), made.predict(x).numpy()
    assert np.abs(got - expected).max() < 0.02 * np.abs(expected).max()
    convolutional = nn.Sequential(nn.Conv2d(3, 4, 3)).eval()
    with pytest.raises(TaskError, match="no linear layer"):
        quantized(convolutional, tmp_path, activations="dynamic")


def test_a_quantized_network_is_saved_loaded_and_written_alike(tmp_path: Path):
    torch.manual_seed(0)
    model = Residual().eval()
    shake(model)
    network, made, path, x = quantized(model.eval(), tmp_path, 16)
    before = network.fingerprint()
    made.save(tmp_path / "network.safetensors")
    loaded = ds.Network.load(tmp_path / "network.safetensors")
    assert loaded.fingerprint() == made.fingerprint() and torch.equal(loaded.predict(x), made.predict(x))
    write(loaded, tmp_path / "again.onnx")
    assert (tmp_path / "again.onnx").read_bytes() == path.read_bytes()
    assert network.fingerprint() == before


def test_folded_and_equal_calibration_gives_equal_bytes(tmp_path: Path):
    torch.manual_seed(0)
    model = nn.Sequential(block(3, 8), head(8)).eval()
    files = []
    for number in range(2):
        (tmp_path / str(number)).mkdir()
        files.append(quantized(model, tmp_path / str(number), 16)[2].read_bytes())
    assert files[0] == files[1]
    network = ds.capture(model, images()(2))
    assert fold_batch_norm(network.fork()) == 1


def test_data_and_networks_that_cannot_be_quantized_are_refused():
    model = perceptron()
    x = torch.randn(4, 3, 8, 8)
    network = ds.capture(model, x)
    with pytest.raises(TaskError):
        Quantize()(network, ds.Task(model, x, {"calibrate": lambda: []}))
    with pytest.raises(TaskError, match="NaN"):
        Quantize()(network, ds.Task(model, x, {"calibrate": lambda: [(x * float("nan"), None)]}))
    shapeless = nn.Sequential(nn.ReLU(), nn.Flatten()).eval()
    with pytest.raises(TaskError, match="nothing to quantize"):
        Quantize()(ds.capture(shapeless, x), ds.Task(shapeless, x, {"calibrate": lambda: [(x, None)] * 4}))

"""Fewer than 8 bits after training: who gets how many, what the file's integers are, and that runtimes compute what was simulated."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from small_nets import Net, conv, in_onnxruntime, int8, like, needs_openvino, plain, task_of, weight
from torch import Tensor, nn
from zoo import block, shake

import downsize as ds
from downsize.errors import SpecError
from downsize.network.lower import finer, lower
from downsize.network.network import Network
from downsize.network.rewrite import add_constant, constant, insert_after
from downsize.numerics import grids
from downsize.numerics.grids import SYMMETRIC_INT8, UINT8, Grid
from downsize.quantization.bits import Bits
from downsize.quantization.insertion import FAKE, grid_of
from downsize.quantization.placement import place
from downsize.techniques.quantize import Quantize
from downsize.testing import loaded_equals_live, neutral_equals_identity, simulation_equals_artifact

ours, aten = torch.ops.downsize, torch.ops.aten
IMAGE = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
WAYS: dict[str, dict[str, Any]] = {
    "4/4": {"bits": 4, "activation_bits": 4},
    "2/2": {"bits": 2, "activation_bits": 2},
    "2/2 throughout": {"bits": 2, "activation_bits": 2, "ends": 2},
    "3/8": {"bits": 3, "activation_bits": 8},
    "4/4, ends in float": {"bits": 4, "activation_bits": 4, "ends": 32},
    "ternary": {"levels": "twn"},
    "ternary/4": {"levels": "ttq", "activation_bits": 4},
    "ternary/8": {"levels": "ttq", "activation_bits": 8},
    "binary": {"levels": "xnor"},
    "binary/2": {"levels": "binary_connect", "activation_bits": 2},
    "5/none": {"bits": 5, "activations": "none"},
}


FEW = ("4/4", "binary/2")


def ways(*left: str) -> list[Any]:
    """The ways but those, most of them marked as slow."""
    return [pytest.param(way, marks=() if way in FEW else pytest.mark.slow) for way in WAYS if way not in left]


def small() -> nn.Module:
    torch.manual_seed(0)
    classifier = [nn.Flatten(), nn.Linear(12 * 16, 24), nn.ReLU(), nn.Linear(24, 10)]
    model = nn.Sequential(block(3, 8), block(8, 8), nn.MaxPool2d(2), block(8, 12), nn.MaxPool2d(2), *classifier)
    shake(model)
    return model.eval()


def fakes(network: Network) -> dict[str, Grid]:
    """The grid of each quantizer, by what it quantizes."""
    return {str(node.args[0].target if node.args[0].op == "get_attr" else node.args[0].name): grid_of(node) for node in quantizers(network)}


def quantizers(network: Network) -> list[Any]:
    return [node for node in network.graph.nodes if node.target is FAKE]


# Who gets how many ----------------------------------------------------------------------------------------------------------------


def test_the_ends_and_what_no_layer_reads_have_more_bits():
    model = small()
    made = Quantize(bits=2, activation_bits=3, samples=8, profile="x86")(ds.capture(model, IMAGE), task_of(model, IMAGE, 2))
    two, three, found = Grid(-2, 1), Grid(0, 7), fakes(made)
    weights = {name: grid for name, grid in found.items() if name.endswith("weight")}
    assert weights == {"0.0.weight": SYMMETRIC_INT8, "1.0.weight": two, "3.0.weight": two, "6.weight": two, "8.weight": SYMMETRIC_INT8}
    activations = [grid for name, grid in found.items() if not name.endswith("weight")]
    # The image, the outputs of three convolutions and of two pools, the flat ones, and the input of the last layer.
    assert activations == [UINT8, *[three] * (len(activations) - 2), UINT8]


def test_what_only_sums_read_keeps_eight_bits_and_a_table_is_the_first_layer():
    torch.manual_seed(0)
    residual = Net(lambda net, x: (lambda y: net.c(torch.relu(net.b(y) + y)))(net.a(x)), a=conv(3, 8), b=conv(8, 8), c=conv(8, 4))
    network = plain(residual, IMAGE)
    by_grid = {grid: {point.node.name for point in part.activations} for grid, part in Bits(4, 4, 8).groups(network, place(network))}
    assert by_grid == {UINT8: {"x_0", "conv2d_1", "relu", "conv2d_2"}, Grid(0, 15): {"conv2d"}}
    text = nn.Sequential(nn.Embedding(50, 16), nn.Linear(16, 16), nn.GELU(), nn.Linear(16, 16), nn.GELU(), nn.Linear(16, 4))
    network = plain(text, torch.randint(0, 50, (2, 5)))
    at_ends, inner = Bits(4, 4, 8).parts(network, place(network), lambda point: True)
    assert {str(point.node.target) for point in at_ends} == {"0.weight", "5.weight"}
    assert {str(point.node.target) for point in inner} == {"1.weight", "3.weight"}


# Settings -------------------------------------------------------------------------------------------------------------------------


def test_thirty_two_bits_change_nothing():
    model = small()
    network, task = ds.capture(model, IMAGE), task_of(model, IMAGE, 2)
    made = Quantize(bits=32, activation_bits=32)(network, task)
    assert neutral_equals_identity(network, made, IMAGE) == 0.0 and made is not network
    weights_alone = Quantize(activation_bits=32)(network, task)
    assert weights_alone.fingerprint() == Quantize(activations="none")(network, task).fingerprint()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"bits": 32}, "round weights to 8 bits by themselves"),
        ({"bits": 4, "levels": "twn"}, "how many values"),
        ({"activations": "dynamic", "activation_bits": 4}, "dynamic activations have 8 bits"),
        ({"activations": "none", "activation_bits": 4}, "leave one out"),
        ({"activations": "dynamic", "train": True}, "not trained"),
        ({"bits": 1}, "bits=1"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(fields, message):
    with pytest.raises(SpecError, match=message):
        Quantize(**fields)


# Values and files -----------------------------------------------------------------------------------------------------------------


def test_fewer_bits_lose_more_and_least_squares_steps_lose_less_than_full_ranges():
    model = small()
    network, task = ds.capture(model, IMAGE), task_of(model, IMAGE, 4)
    x = like(IMAGE, 16, 77)
    expected = network.predict(x)

    def loss(**fields: Any) -> float:
        return float((Quantize(samples=16, **fields)(network, task).predict(x) - expected).norm() / expected.norm())

    losses = [loss(bits=bits, activation_bits=bits) for bits in (8, 6, 4, 2)]
    assert losses == sorted(losses) and losses[0] < 0.02 < losses[-1]
    tensor = network.tensor("6.weight").detach()
    full, _ = grids.symmetric(tensor.abs().amax(1), Grid(-2, 1))
    made = Quantize(bits=2, samples=16, rounding="nearest", correct=False)(network, task)
    fake = next(node for node in quantizers(made) if node.args[0].target == "6.weight")
    step = constant(made, fake.args[1])
    assert step is not None
    nearest = [(ours.fake_quantize(tensor, one, torch.zeros(24, dtype=torch.int32), 0, -2, 1) - tensor).norm() for one in (step, full)]
    assert nearest[0] < 0.7 * nearest[1]


def test_ternary_and_binary_weights_have_their_values():
    model = small()
    network, task = ds.capture(model, IMAGE), task_of(model, IMAGE, 2)
    counts: list[tuple[Any, int]] = [("twn", 3), ("xnor", 2), ("binary_connect", 2), ("ttq", 3)]
    for levels, count in counts:
        made = Quantize(levels=levels, samples=8)(network, task)
        for name in ("1.0.weight", "3.0.weight", "6.weight"):
            assert all(len(row.unique()) == count for row in made.tensor(name).detach()), levels
        signs = made.tensor("6.weight").detach().sign() * network.tensor("6.weight").detach().sign()
        assert set(signs.unique().tolist()) == ({0.0, 1.0} if count == 3 else {1.0})
        assert len(made.tensor("8.weight").unique()) > 50


FACTORS = {Grid(-2, 1): 32, Grid(-8, 7): 8, Grid(-1, 1): 64, Grid(-64, 63): 1, Grid(-63, 63): 1, Grid(-127, 127): 1, Grid(-128, 127): 1}


@pytest.mark.parametrize("grid", FACTORS)
def test_codes_in_a_file_are_so_much_larger_that_the_values_are_the_same(grid):
    assert finer(grid) == FACTORS[grid]
    network = plain(Net(lambda net, x: x @ net.w, w=weight(16, 24)), torch.randn(2, 16))
    node = next(node for node in network.graph.nodes if node.op == "get_attr")
    parts = [add_constant(network, name, tensor, node) for name, tensor in (("s", torch.rand(24)), ("z", torch.zeros(24, dtype=torch.int32)))]
    insert_after(network, node, ours.fake_quantize.default, (*parts, 1, grid.low, grid.high))
    source = next(node for node in network.graph.nodes if node.op == "placeholder")
    insert_after(network, source, ours.fake_quantize_dynamic.default, ())  # layers of float inputs read values, not codes
    network.recompile()
    simulated = ours.fake_quantize(weight(16, 24), constant(network, parts[0]), constant(network, parts[1]), 1, grid.low, grid.high)  # type: ignore[arg-type]
    lower(network)
    (product,) = [n for n in network.graph.nodes if n.target is ours.dynamic_linear.default]
    q, scale = (constant(network, argument) for argument in product.args[1:])
    assert q is not None and scale is not None and torch.equal(q * scale, simulated)


def test_codes_are_clipped_in_the_graph_where_the_type_does_not():
    network = plain(Net(lambda net, x: x * 1.0), torch.randn(2, 8))
    node = list(network.graph.nodes)[-2]
    parts = [add_constant(network, name, tensor, node) for name, tensor in (("s", torch.tensor(0.1)), ("z", torch.tensor(3, dtype=torch.int32)))]
    insert_after(network, node, ours.fake_quantize.default, (*parts, None, 0, 15))
    network.recompile()
    x = torch.linspace(-3, 3, 800).reshape(-1, 8)
    expected = network.predict(x)
    lower(network)
    assert torch.equal(network.predict(x), expected)
    assert float(expected.max()) == pytest.approx(1.2) and float(expected.min()) == pytest.approx(-0.3)
    assert [n.target for n in network.graph.nodes].count(aten.clamp.default) == 1


@pytest.mark.parametrize("way", ways())
def test_the_files_integers_are_the_simulated_ones(way):
    made = int8(small(), IMAGE, samples=16, smooth=False, **WAYS[way])
    simulation_equals_artifact(made.quantized, made.path, made.inputs)
    loaded_equals_live(made.quantized, made.inputs)
    executed = in_onnxruntime(made.path)
    if "none" in way or way in ("ternary", "binary"):
        assert executed["QuantizeLinear"] == 0
    elif "float" not in way:
        assert executed["QLinearConv"] == 3 and executed["QGemm"] == 2 and executed["Conv"] == executed["FusedConv"] == executed["Gemm"] == 0
    types = {tensor.data_type for tensor in onnx.load(made.path).graph.initializer if len(tensor.dims) > 1 and tensor.dims[-1] > 1}
    # Codes of 8 bits, and packed ones with the table of what a byte holds; two magnitudes of each row are no even steps.
    packed = {onnx.TensorProto.UINT8} if "ternary/" not in way else set()
    assert types == {onnx.TensorProto.INT8} | packed | ({onnx.TensorProto.FLOAT} if "float" in way else set())


@needs_openvino
@pytest.mark.parametrize("way", ways("ternary", "binary", "5/none"))
def test_openvino_computes_the_simulated_outputs(way):
    made = int8(small(), IMAGE, samples=16, **WAYS[way])
    expected, got = made.quantized.predict(made.inputs), ds.open(made.path, runtime="openvino")(made.inputs)
    assert float((got - expected).norm() / expected.norm()) < (0.02 if way == "3/8" else 3e-3)  # with 8 bits both round to other codes now and then


def test_a_law_sees_codes_beyond_the_grid(tmp_path):
    made = int8(small(), IMAGE, samples=16, bits=4, activation_bits=4)
    model = onnx.load(made.path)
    clips = [node for node in model.graph.node if node.op_type == "Clip"]
    upper = {node.input[2] for node in clips}
    assert clips and upper
    for tensor in model.graph.initializer:
        if tensor.name in upper:
            tensor.CopyFrom(numpy_helper.from_array(np.array(255, np.uint8), tensor.name))
    onnx.save(model, tmp_path / "unclipped.onnx")
    with pytest.raises(AssertionError, match="simulation == artifact"):
        simulation_equals_artifact(made.quantized, tmp_path / "unclipped.onnx", like(IMAGE, 32, 1))


def test_zeros_that_must_stay_stay_in_every_way():
    model = small()
    task = task_of(model, IMAGE, 2)
    network = ds.capture(model, IMAGE)
    for name in ("1.0.weight", "6.weight"):
        tensor: Tensor = network.tensor(name)
        with torch.no_grad():
            tensor.mul_(tensor.abs() > tensor.abs().median())
    network.keep_zeros("1.0.weight", "6.weight")
    for way in ("2/2", "ternary", "ternary/4", "binary", "binary/2"):
        made = Quantize(samples=8, **WAYS[way])(network, task)
        made.check()
        for name in ("1.0.weight", "6.weight"):
            assert bool((made.tensor(name)[network.tensor(name) == 0] == 0).all()), way

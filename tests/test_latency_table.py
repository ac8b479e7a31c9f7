"""Layers' shapes against networks built at those widths; measured latencies: kept, read again, and adding up to what a file takes."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
import torch
from small_nets import conv, needs_openvino
from torch import Tensor, nn

from downsize.errors import ArtifactError, SpecError, TargetError
from downsize.measure import latency
from downsize.measure.shapes import LatencyTable, layer_times
from downsize.network.capture import capture
from downsize.network.cost import count
from downsize.network.network import Network
from downsize.network.onnx_file import write
from downsize.pruning.latency import LayerShape, Operand, latency_table, layer_shapes, predicted, side_by_side, spelled
from downsize.runtimes import OperatorTime

IMAGE = torch.zeros(2, 3, 16, 16)


class Convolutions(nn.Module):
    """A plain, a grouped, a depthwise convolution and a linear layer, of any width."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.first = conv(3, width, stride=2)
        self.grouped = conv(width, 2 * width, groups=4, bias=False)
        self.depthwise = conv(2 * width, 4 * width, groups=2 * width)
        self.head = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.depthwise(self.grouped(torch.relu(self.first(x)))).mean((2, 3)))


class FakeClock:
    """Milliseconds by a formula of the input and output channels; remembers what it was asked."""

    def __init__(self, formula) -> None:
        self.formula, self.asked = formula, []

    def milliseconds(self, shapes):
        self.asked += shapes
        return [float(self.formula(shape.operands[1].shape[1], shape.operands[1].shape[0])) for shape in shapes]


def shapes_of(model: nn.Module, *inputs: Tensor) -> list[LayerShape]:
    return list(layer_shapes(capture(model.eval(), inputs), inputs).values())


# Shapes -----------------------------------------------------------------------------------------------------------------------------


def test_the_shapes_of_a_network():
    network = capture(Convolutions().eval(), IMAGE)
    found = layer_shapes(network, IMAGE[:1])
    assert list(found) == [row.node for row in count(network, IMAGE).rows if row.macs]
    first, grouped, _, head = found.values()
    assert first.operands == (
        Operand((1, 3, 16, 16), "float32", False),
        Operand((16, 3, 3, 3), "float32", True),
        Operand((16,), "float32", True),
    )
    assert [operand.shape for operand in grouped.operands] == [(1, 16, 8, 8), (32, 4, 3, 3)]
    assert (head.operator, head.operands[0].shape) == ("aten.linear.default", (1, 64))


def test_a_layer_has_one_spelling():
    conv2d = torch.ops.aten.conv2d.default
    short = spelled(conv2d, ["x", "y"], {})
    assert short == spelled(conv2d, ["x", "y", None, [1, 1], [0, 0], [1, 1], 1], {}) == spelled(conv2d, ["x", "y"], {"groups": 1, "padding": [0, 0]})
    assert (
        spelled(conv2d, ["x", "y", None, [2, 2]], {})
        == spelled(conv2d, ["x", "y"], {"stride": [2]})
        == spelled(conv2d, ["x"], {"weight": "y", "stride": [2, 2]})
    )
    others = [(["x", "y", None, [1, 1], [1, 0]], {}), (["x", "y"], {"groups": 2}), (["x", "y", None, [2, 2], [0, 0], [1, 1]], {})]
    assert len({short, *(spelled(conv2d, positions, keywords) for positions, keywords in others)}) == 4


@pytest.mark.parametrize("width", [8, 24, 64])
def test_widened_is_the_shape_of_the_network_built_at_that_width(width):
    first, grouped, depthwise, head = shapes_of(Convolutions(16), IMAGE)
    expected = shapes_of(Convolutions(width), IMAGE)
    widened = [first.widened(outputs=width), grouped.widened(width, 2 * width), depthwise.widened(2 * width), head.widened(4 * width, width)]
    assert widened == expected
    assert first.widened() == first


def test_what_cannot_be_widened_is_refused():
    _, grouped, _, _ = shapes_of(Convolutions(), IMAGE)
    with pytest.raises(ArtifactError, match=r"4 groups.* 18 inputs"):
        grouped.widened(18, 32)
    product = shapes_of(Product(), torch.zeros(2, 3, 5), torch.zeros(2, 5, 4))[0]
    with pytest.raises(ArtifactError, match=r"aten\.matmul.*resized"):
        product.widened(3, 3)
    assert [operand.shape for operand in product.resized({(0, 2): 7, (1, 1): 7}).operands] == [(2, 3, 7), (2, 7, 4)]


class Product(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return x @ y


class Mixed(nn.Module):
    """Attention with a mask, a recurrent layer, and a weight that is computed from constants."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(8, 8, batch_first=True)
        self.scaled = nn.utils.parametrizations.weight_norm(nn.Linear(8, 8))

    def forward(self, x: Tensor) -> Tensor:
        x = self.scaled(self.rnn(x)[0])
        mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()
        return nn.functional.scaled_dot_product_attention(x, x, x, attn_mask=mask, scale=0.5)


def test_layers_side_by_side_compute_what_they_do_in_the_network():
    """One output a layer; attention, which has no weights, gives what torch gives on the same inputs."""
    x = torch.randn(2, 5, 8)
    model = Mixed().eval()
    network = capture(model, x)
    shapes = layer_shapes(network, x)
    made = side_by_side(list(shapes.values()))
    computed = next(shape for shape in shapes.values() if shape.operator == "aten.linear.default")
    assert [operand.constant for operand in computed.operands] == [False, True, True]  # the weight is made of constants
    inputs = tuple(torch.randn(port.example) if port.dtype.is_floating_point else torch.ones(port.example, dtype=port.dtype) for port in made.ports)
    attention = next(i for i, shape in enumerate(shapes.values()) if "attention" in shape.operator)
    q, k, v, mask = inputs[-4:]
    expected = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=0.5)
    assert attention == len(shapes) - 1
    torch.testing.assert_close(made(*inputs)[attention], expected)
    assert len(made(*inputs)) == len(shapes)


def test_a_sum_over_layers():
    network = capture(Convolutions().eval(), IMAGE)
    clock = FakeClock(lambda inputs, outputs: inputs * 1000 + outputs)
    assert predicted(clock, network, IMAGE) == 3016 + 4032 + 1064 + 64016


# Tables -----------------------------------------------------------------------------------------------------------------------------


def test_a_table_is_exact_where_time_is_bilinear_and_measures_few():
    shape = shapes_of(conv(16, 16), torch.zeros(1, 16, 8, 8))[0]
    clock = FakeClock(lambda inputs, outputs: 1 + 2 * inputs + 3 * outputs + 0.1 * inputs * outputs)
    inputs, outputs = range(160, 0, -16), range(80, 0, -8)
    table = latency_table(clock, shape, inputs, outputs)
    np.testing.assert_allclose(table, [[clock.formula(i, j) for j in outputs] for i in inputs], rtol=1e-12)
    assert len(clock.asked) == 16


def test_a_table_never_falls_with_a_width():
    shape = shapes_of(conv(16, 16), torch.zeros(1, 16, 8, 8))[0]
    random = np.random.default_rng(0)
    widths = range(8, 128, 8)
    table = latency_table(FakeClock(lambda inputs, outputs: inputs * outputs * random.lognormal(0, 0.5)), shape, widths, widths, anchors=15)
    assert (np.diff(table, axis=0) >= 0).all() and (np.diff(table, axis=1) >= 0).all()


# Measured ---------------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """A folder with a table of a small and a large convolution, and the two."""
    folder = tmp_path_factory.mktemp("cache")
    small = shapes_of(conv(16, 16), torch.zeros(1, 16, 32, 32))[0]
    large = small.widened(128, 128)
    return folder, small, large, LatencyTable(folder=folder).milliseconds([small, large, small])


def test_more_work_takes_longer(measured):
    _, _, _, (small, large, again) = measured
    assert small == again > 0
    assert large > 4 * small  # 64 times the MACs


def test_what_was_measured_is_read_again(measured, monkeypatch):
    folder, small, large, times = measured
    monkeypatch.setattr(LatencyTable, "_measure", lambda self, shapes: pytest.fail(f"measured {shapes} again"))
    assert LatencyTable(folder=folder).milliseconds([large, small]) == [times[1], times[0]]


def test_other_threads_and_runtimes_are_kept_apart(tmp_path):
    paths = {LatencyTable(runtime, threads, tmp_path).path for runtime, threads in (("onnxruntime", 1), ("onnxruntime", 2))}
    assert len(paths) == 2


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"milliseconds": [1]}', '{"milliseconds": {"a": "x"}}', '{"milliseconds": 3}', "\udcff"])
def test_a_damaged_file_is_no_file(tmp_path, text, monkeypatch):
    path = LatencyTable(folder=tmp_path).path
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    table = LatencyTable(folder=tmp_path)
    assert table.known == {}
    monkeypatch.setattr(table, "_measure", lambda shapes: [2.5] * len(shapes))
    shape = shapes_of(conv(2, 2), torch.zeros(1, 2, 4, 4))[0]
    assert table.milliseconds([shape]) == [2.5]
    assert json.loads(path.read_text())["milliseconds"] == {str(shape): 2.5}


def test_impossible_times_are_not_believed(tmp_path):
    LatencyTable(folder=tmp_path).path.write_text('{"milliseconds": {"a": NaN, "b": -1.0, "c": 2.0}}')
    assert LatencyTable(folder=tmp_path).known == {"c": 2.0}


def test_two_processes_keep_what_both_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(LatencyTable, "_measure", lambda self, shapes: [1.0] * len(shapes))
    shape = shapes_of(conv(2, 2), torch.zeros(1, 2, 4, 4))[0]
    one, two = LatencyTable(folder=tmp_path), LatencyTable(folder=tmp_path)
    one.milliseconds([shape])
    two.milliseconds([shape.widened(4, 4)])
    assert set(LatencyTable(folder=tmp_path).known) == {str(shape), str(shape.widened(4, 4))}


def test_a_folder_that_cannot_be_written_is_no_error(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    table = LatencyTable(folder=tmp_path / "file" / "below")
    monkeypatch.setattr(table, "_measure", lambda shapes: [1.0] * len(shapes))
    assert table.milliseconds(shapes_of(conv(2, 2), torch.zeros(1, 2, 4, 4))) == [1.0]


def test_the_cache_lies_where_the_system_says(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert LatencyTable().path.parent == tmp_path / "downsize"


def test_bad_arguments_are_refused():
    with pytest.raises(SpecError, match="onnxruntime"):
        LatencyTable("onnxruntim")
    with pytest.raises(TargetError, match="threads"):
        LatencyTable(threads=0)


def test_the_runtimes_names_tell_the_layers():
    ran = [
        OperatorTime("ReorderInput_token_6", "ReorderInput", 1.0, ""),
        OperatorTime("output1_nchwc", "Conv", 2.0, ""),
        OperatorTime("layers.10:MatMul_3/MatMulScaleFusion/", "FusedMatMul", 4.0, ""),
        OperatorTime("layers.1:Add_1", "Add", 8.0, ""),
    ]
    assert layer_times(ran, 11) == [0.0, 10.0, *[0.0] * 8, 4.0]
    nameless = [*ran[:1], OperatorTime("Convert_3", "Convert", 16.0, "")]
    assert layer_times(nameless, 11) is None
    assert layer_times(nameless, 1) == [16.0]


# Against files ----------------------------------------------------------------------------------------------------------------------


class Residual(nn.Module):
    """A ResNet of four stages of two blocks, each of two 3x3 convolutions, with strided 1x1 shortcuts (He et al., 2016)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.stem = conv(3, width, 7, stride=2)
        widths = [width, *(width << stage // 2 for stage in range(8))]
        pairs = list(itertools.pairwise(widths))
        self.first = nn.ModuleList(conv(a, b, stride=1 + (a != b)) for a, b in pairs)
        self.second = nn.ModuleList(conv(b, b) for _, b in pairs)
        self.shortcuts = nn.ModuleList(conv(a, b, 1, stride=2) if a != b else nn.Identity() for a, b in pairs)
        self.head = nn.Linear(widths[-1], 100)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.max_pool2d(torch.relu(self.stem(x)), 2)
        for first, second, shortcut in zip(self.first, self.second, self.shortcuts, strict=True):
            x = torch.relu(second(torch.relu(first(x))) + shortcut(x))
        return self.head(x.mean((2, 3)))


def perceptron(width: int) -> nn.Module:
    return nn.Sequential(nn.Linear(784, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10))


@pytest.mark.slow
@pytest.mark.parametrize("runtime", ["onnxruntime", pytest.param("openvino", marks=needs_openvino)])
@pytest.mark.parametrize(("build", "inputs"), [(Residual, (1, 3, 128, 128)), (perceptron, (8, 784))], ids=["resnet", "mlp"])
def test_layers_add_up_to_the_ratio_of_two_widths(build, inputs, runtime, tmp_path):
    x = torch.randn(inputs, generator=torch.Generator().manual_seed(0))
    wide, narrow = 64 if build is Residual else 2048, 32 if build is Residual else 1024
    networks: list[Network] = [capture(build(width).eval(), x) for width in (wide, narrow)]
    for number, network in enumerate(networks):
        write(network, tmp_path / f"{number}.onnx")
    table = LatencyTable(runtime, folder=tmp_path)
    ratio = predicted(table, networks[0], x) / predicted(table, networks[1], x)
    measured = latency(tmp_path / "0.onnx", x, runtime, baseline=tmp_path / "1.onnx")["cpu_latency_ratio"].value
    assert measured > 1.5
    assert ratio == pytest.approx(measured, rel=0.4)

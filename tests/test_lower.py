"""Lowering: fake quantizers become integer constants, and the graph still computes what it simulated."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from small_nets import Net, conv, like, operators, plain, task_of, weight
from torch import nn

from downsize.network.lower import lower
from downsize.network.network import Network
from downsize.network.rewrite import add_constant, constant, insert_after
from downsize.numerics import grids
from downsize.numerics.grids import UINT8
from downsize.techniques.quantize import Quantize

aten, ours = torch.ops.aten, torch.ops.downsize
FAST = {"samples": 24, "equalize": False, "smooth": False, "rounding": "nearest", "correct": False}


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def lowered(model: nn.Module, example: Any, **options: Any) -> tuple[Network, Network]:
    """The quantized network and its lowered fork."""
    quantized = Quantize(**{**FAST, **options})(plain(model, example), task_of(model, example))
    made = quantized.fork()
    lower(made)
    return quantized, made


def nodes(network: Network, target: object) -> list[torch.fx.Node]:
    return [node for node in network.graph.nodes if node.target is target]


def value(network: Network, node: object) -> torch.Tensor:
    found = constant(network, node)
    assert found is not None
    return found.detach()


IMAGE, ROWS, TEXT = torch.randn(2, 3, 8, 8), torch.randn(2, 16), torch.randn(2, 5, 16)
SAME = {
    "convolutions": (lambda: nn.Sequential(conv(3, 8), nn.ReLU(), nn.MaxPool2d(2), conv(8, 8, groups=8), nn.Hardtanh(), conv(8, 4)), IMAGE),
    "rows": (lambda: nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 4, bias=False)), ROWS),
    "sequences": (lambda: nn.Sequential(nn.Linear(16, 24), nn.GELU(), nn.Linear(24, 4)), TEXT),
    "addmm": (lambda: Net(lambda net, x: torch.addmm(net.c, x, net.w), w=weight(16, 24), c=weight(24)), ROWS),
    "products": (lambda: Net(lambda net, x: torch.tanh(x @ net.w + net.c) @ net.v, w=weight(16, 24), v=weight(24, 3), c=weight(24)), ROWS),
    "transposed": (lambda: nn.Sequential(conv(3, 8), nn.ConvTranspose2d(8, 6, 2, 2), conv(6, 4)), IMAGE),
    "embedding": (lambda: nn.Sequential(nn.Embedding(50, 16), nn.Linear(16, 4)), torch.randint(0, 50, (2, 5))),
}


@pytest.mark.parametrize("activations", ["static", "dynamic", "none"])
@pytest.mark.parametrize("name", SAME)
def test_the_lowered_graph_computes_what_was_simulated(name, activations):
    build, example = SAME[name]
    if activations == "dynamic" and name in ("convolutions", "transposed", "addmm", "products"):
        pytest.skip("no linear layer")
    quantized, made = lowered(build().eval(), example, activations=activations)
    inputs = like(example, 16, 5)
    simulated, integers = quantized.predict(inputs), made.predict(inputs)
    # The bias alone is rounded in addition, to a step far below the output's: a few entries move by one code.
    step = max([float(value(quantized, node.args[1])) for node in nodes(quantized, ours.fake_quantize.default) if node.args[3] is None], default=0.0)
    assert float((simulated - integers).abs().max()) <= step * 4 + 1e-5
    assert float((simulated - integers).norm() / simulated.norm()) < 3e-3
    assert not nodes(made, ours.fake_quantize.default)


@pytest.mark.parametrize("name", SAME)
def test_weights_are_integers_alone(name):
    build, example = SAME[name]
    _, made = lowered(build().eval(), example)
    floats = {n: t.numel() for n, t in made.named_tensors() if t.is_floating_point()}
    assert all(numel <= 50 for numel in floats.values()), floats
    assert any(t.dtype is torch.int8 and t.dim() > 1 for _, t in made.named_tensors())


# Clipping -------------------------------------------------------------------------------------------------------------------------


def quantized_behind(activation: Any, low: float, high: float) -> Network:
    """x * 1 -> activation -> quantizer over [low, high], lowered."""
    network = plain(Net(lambda net, x: activation(x * 1.0)), torch.randn(2, 8))
    node = list(network.graph.nodes)[-2]
    scale, zero_point = grids.affine(torch.tensor(low), torch.tensor(high), UINT8)
    parts = [add_constant(network, name, tensor, node) for name, tensor in (("step", scale), ("offset", zero_point))]
    insert_after(network, node, ours.fake_quantize.default, (*parts, None, 0, 255))
    network.recompile()
    lower(network)
    return network


@pytest.mark.parametrize(
    ("activation", "low", "high", "dropped"),
    [
        (F.relu, 0.0, 3.0, True),
        (F.relu, -0.5, 3.0, False),
        (F.relu6, 0.0, 6.0, True),
        (F.relu6, 0.0, 5.0, True),
        (F.relu6, 0.0, 8.0, False),
        (F.hardtanh, -1.0, 1.0, True),
        (F.hardtanh, -1.2, 1.0, False),
        (lambda x: F.hardtanh(x, -0.3, 0.7), -0.3, 0.7, True),
        (lambda x: x.clamp(min=-0.5), -0.5, 2.0, True),
        (lambda x: x.clamp(min=-0.5), -0.9, 2.0, False),
        (lambda x: x.clamp(max=0.5), -2.0, 0.5, True),
        (lambda x: x.clamp(max=0.5), -2.0, 0.9, False),
        (lambda x: x.clamp(-0.5, 0.5), -0.5, 0.5, True),
        (torch.sigmoid, 0.0, 1.0, False),
        (F.leaky_relu, 0.0, 1.0, False),
    ],
)
def test_what_the_codes_do_is_dropped_and_nothing_else(activation, low, high, dropped):
    assert set(operators(quantized_behind(activation, low, high))) >= {"mul", "quantize", "dequantize"}
    assert (len(operators(quantized_behind(activation, low, high))) == 3) is dropped


@given(st.floats(-4, 0, width=32), st.floats(0.125, 4, width=32), st.floats(-4, 0, width=32), st.floats(0, 4, width=32))
def test_dropping_changes_no_code(low, high, least, most):
    network = quantized_behind(lambda x: x.clamp(least, most), low, high)
    x = torch.cat([torch.linspace(-6, 6, 2001), torch.tensor([least, most, low, high])]).reshape(-1, 1).expand(-1, 8)
    node = nodes(network, ours.quantize.default)[0]
    scale, zero_point = value(network, node.args[1]), value(network, node.args[2])
    expected = grids.codes((x * 1.0).clamp(least, most), scale, zero_point.int(), None, UINT8)
    got = grids.codes(network.predict(x), scale, zero_point.int(), None, UINT8)
    assert torch.equal(got, expected)


def test_an_activation_with_another_reader_stays():
    _, made = lowered(Net(lambda net, x: (lambda y: net.b(y).mean() + y.mean((1, 2, 3)))(F.relu(net.a(x))), a=conv(3, 8), b=conv(8, 4)), IMAGE)
    quantized, both = lowered(Net(lambda net, x: (lambda y: net.b(F.relu(y)) + torch.sigmoid(y))(net.a(x)), a=conv(3, 8), b=conv(8, 8)), IMAGE)
    assert "relu" not in operators(made)  # all readers see the codes
    inputs = like(IMAGE, 4, 3)
    assert float((quantized.predict(inputs) - both.predict(inputs)).abs().max()) < 0.05


# Biases ---------------------------------------------------------------------------------------------------------------------------


def biases(network: Network) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Of each layer the codes and scale of its bias, and the product of its input's and weight's scales."""
    found = []
    for node in network.graph.nodes:
        positions = {aten.conv2d.default: (0, 1, 2), aten.linear.default: (0, 1, 2), aten.addmm.default: (1, 2, 0)}.get(node.target)
        if positions is not None:
            source, weights, bias = (node.args[i] for i in positions)
            source = source.args[0] if source.target is aten.pad.default else source
            assert bias.target is ours.dequantize.default
            product = value(network, source.args[1]).double() * value(network, weights.args[1]).double()
            found.append((value(network, bias.args[0]), value(network, bias.args[1]), product))
    return found


@pytest.mark.parametrize(
    ("build", "example", "layers"),
    [
        (lambda: nn.Sequential(conv(3, 8), nn.ReLU(), conv(8, 4)), IMAGE, 2),
        (lambda: nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 4)), ROWS, 2),
        (lambda: Net(lambda net, x: torch.addmm(net.c, x, net.w), w=weight(16, 24), c=weight(24)), ROWS, 1),
        (lambda: Net(lambda net, x: x @ net.w + net.c, w=weight(16, 24), c=weight(24)), ROWS, 1),
        (lambda: Net(lambda net, x: net.b(F.pad(net.a(x), (0, 1, 0, 1))), a=conv(3, 8), b=conv(8, 4, padding=0)), IMAGE, 2),
    ],
    ids=["convolutions", "linear", "addmm", "product and sum", "behind padding"],
)
def test_biases_are_int32_in_steps_of_input_times_weight(build, example, layers):
    model = build().eval()
    quantized, made = lowered(model, example)
    found = biases(made)
    assert len(found) == layers
    for codes, scale, product in found:
        assert codes.dtype is torch.int32
        assert torch.allclose(scale.double(), product.expand(scale.shape), rtol=1e-6)
    originals = [t.detach() for n, t in quantized.named_tensors() if n.endswith("bias") or n == "c"]
    for codes, scale, _ in found:
        assert any(b.shape == codes.shape and bool(((codes * scale - b).abs() <= scale * 0.5001 + 1e-7).all()) for b in originals)


def test_a_weight_and_bias_shared_by_layers_with_other_inputs_have_a_bias_each():
    shared = conv(8, 8)
    _, made = lowered(Net(lambda net, x: net.c(F.relu(net.c(F.relu(net.a(x))) * 3)), a=conv(3, 8), c=shared), IMAGE)
    (_, first, second) = biases(made)
    assert not torch.equal(first[1], second[1])
    for codes, scale, _ in (first, second):
        assert torch.allclose(codes * scale, shared.bias.detach(), atol=float(scale.max()))  # type: ignore[union-attr]


def test_a_bias_too_large_for_the_accumulator_stays_in_float():
    net = nn.Sequential(conv(3, 4), nn.ReLU(), conv(4, 2))
    with torch.no_grad():
        net[0].weight.mul_(1e-10)  # type: ignore[operator]
        net[0].bias.fill_(100.0)  # type: ignore[operator]
    quantized, made = lowered(net, IMAGE)
    first = nodes(made, aten.conv2d.default)[0]
    assert constant(made, first.args[2]) is not None
    assert torch.allclose(made.predict(IMAGE), quantized.predict(IMAGE), rtol=0.02, atol=0.02)


# Products -------------------------------------------------------------------------------------------------------------------------


def test_layers_of_rows_keep_their_form_and_layers_of_sequences_become_products():
    _, rows = lowered(nn.Sequential(nn.Linear(16, 24)), ROWS, profile="x86")
    assert set(operators(rows)) == {"quantize", "dequantize", "linear"}
    _, text = lowered(nn.Sequential(nn.Linear(16, 24)), TEXT, profile="x86")
    assert set(operators(text)) == {"quantize", "dequantize", "matmul", "add"}
    codes = value(text, nodes(text, aten.matmul.default)[0].args[1].args[0])  # type: ignore[union-attr]
    assert codes.shape == (16, 24) and codes.dtype is torch.int8


def test_loaded_networks_are_lowered_as_live_ones(tmp_path):
    quantized, made = lowered(nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 4)), ROWS)
    quantized.save(tmp_path / "n.safetensors")
    again = Network.load(tmp_path / "n.safetensors")
    lower(again)
    assert operators(again) == operators(made)


def test_dynamic_layers_become_one_operator_each_whatever_the_scales():
    tied = Net(lambda net, ids: F.linear(torch.tanh(F.linear(F.embedding(ids, net.w), net.w)), net.v) @ net.w, w=weight(50, 16), v=weight(50, 50))
    quantized, made = lowered(tied, torch.randint(0, 50, (2, 5)), activations="dynamic")
    assert operators(made)["dynamic_linear"] == 2 and not nodes(made, ours.fake_quantize_dynamic.default)
    inputs = torch.randint(0, 50, (3, 5))
    assert torch.allclose(made.predict(inputs), quantized.predict(inputs), rtol=1e-4, atol=1e-4)

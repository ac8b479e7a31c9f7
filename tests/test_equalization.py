"""Cross-layer equalization and bias correction: closed forms, and what must be left alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from small_nets import Net, conv, like, plain, task_of, weight
from torch import Tensor, nn

from downsize.network.network import Network
from downsize.network.rewrite import constant, set_constant
from downsize.network.statistics import chunks, walk
from downsize.quantization.correction import channel_means, correct_biases
from downsize.quantization.equalization import equalize
from downsize.quantization.insertion import extremes
from downsize.techniques.quantize import Quantize

IMAGE, ROWS, TEXT = torch.randn(2, 3, 8, 8), torch.randn(2, 8), torch.randn(2, 5, 8)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def uneven(model: nn.Module) -> nn.Module:
    """Rows of weights that differ a hundredfold."""
    with torch.no_grad():
        for tensor in model.parameters():
            if tensor.dim() > 1:
                tensor.mul_((torch.rand(tensor.shape[0]) * 4.6 - 2.3).exp().reshape(-1, *[1] * (tensor.dim() - 1)))
    return model


def own(network: Network, name: str) -> Tensor:
    return network.tensor(name).detach()


PAIRS: dict[str, tuple[Any, Any, int]] = {
    "convolutions": (lambda: nn.Sequential(conv(3, 8), nn.ReLU(), conv(8, 4)), IMAGE, 1),
    "no bias": (lambda: nn.Sequential(conv(3, 8, bias=False), nn.ReLU(), conv(8, 4, bias=False)), IMAGE, 1),
    "pooled": (lambda: nn.Sequential(conv(3, 8), nn.LeakyReLU(0.2), nn.MaxPool2d(2), conv(8, 4)), IMAGE, 1),
    "depthwise": (lambda: nn.Sequential(conv(3, 8, 1), nn.ReLU(), conv(8, 8, groups=8), nn.ReLU(), conv(8, 4, 1)), IMAGE, 2),
    "grouped": (lambda: nn.Sequential(conv(3, 8), nn.ReLU(), conv(8, 12, groups=4), nn.ReLU(), conv(12, 4)), IMAGE, 2),
    "nothing between": (lambda: nn.Sequential(conv(3, 8), conv(8, 4)), IMAGE, 1),
    "rows": (lambda: nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)), ROWS, 1),
    "sequences": (lambda: nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)), TEXT, 1),
}


@pytest.mark.parametrize("name", PAIRS)
def test_equalization_keeps_the_function(name):
    build, example, pairs = PAIRS[name]
    network = plain(uneven(build()), example)
    balanced = network.fork()
    assert equalize(balanced) == pairs
    inputs = like(example, 7, 1)
    expected, got = network.predict(inputs), balanced.predict(inputs)
    assert float((expected - got).abs().max()) <= 1e-5 * float(expected.abs().max())


def test_both_sides_of_a_pair_get_the_geometric_mean_of_their_ranges():
    network = plain(uneven(nn.Sequential(conv(3, 8), nn.ReLU(), conv(8, 4))), IMAGE)
    before = extremes(own(network, "0.weight"), 0), own(network, "2.weight").abs().amax((0, 2, 3))
    equalize(network)
    after = extremes(own(network, "0.weight"), 0), own(network, "2.weight").abs().amax((0, 2, 3))
    expected = (before[0] * before[1]).sqrt()
    assert float((before[0] / before[1]).log().abs().max()) > 1
    assert torch.allclose(after[0], expected, rtol=1e-5) and torch.allclose(after[1], expected, rtol=1e-5)


def test_a_chain_settles_with_every_channel_even():
    network = plain(uneven(nn.Sequential(conv(3, 8, 1), nn.ReLU(), conv(8, 8, groups=8), nn.ReLU(), conv(8, 4, 1))), IMAGE)
    equalize(network)
    rows = [extremes(own(network, f"{i}.weight"), 0) for i in (0, 2)]
    columns = [own(network, "2.weight").abs().amax((1, 2, 3)), own(network, "4.weight").abs().amax((0, 2, 3))]
    for one, two in zip(rows, columns, strict=True):
        assert float((one / two).log().abs().max()) < 0.05


def test_channels_of_zeros_are_left():
    model = nn.Sequential(conv(3, 8), nn.ReLU(), conv(8, 4))
    with torch.no_grad():
        model[0].weight[2] = 0.0  # type: ignore[index]
        model[2].weight[:, 5] = 0.0  # type: ignore[index]
    network = plain(model, IMAGE)
    balanced = network.fork()
    equalize(balanced)
    assert torch.isfinite(own(balanced, "0.weight")).all() and torch.isfinite(own(balanced, "2.weight")).all()
    assert torch.equal(own(balanced, "0.weight")[5], own(network, "0.weight")[5])
    assert torch.allclose(balanced.predict(IMAGE), network.predict(IMAGE), atol=1e-5)


SHARED = conv(4, 4)
ALONE = {
    "relu6": (lambda: nn.Sequential(conv(3, 8), nn.ReLU6(), conv(8, 4)), IMAGE),
    "gelu": (lambda: nn.Sequential(conv(3, 8), nn.GELU(), conv(8, 4)), IMAGE),
    "another reader": (lambda: Net(lambda net, x: (lambda y: net.b(F.relu(y)) + y.mean())(net.a(x)), a=conv(3, 8), b=conv(8, 4)), IMAGE),
    "a shared weight": (lambda: Net(lambda net, x: net.a(F.relu(net.a(x))), a=SHARED), torch.randn(2, 4, 8, 8)),
    "features mixed by a pool": (lambda: nn.Sequential(nn.Linear(8, 8), nn.MaxPool2d(2), nn.Linear(4, 4)), IMAGE),
    "read as a bias": (
        lambda: Net(lambda net, x: F.conv1d(net.c, net.w, net.a(x).mean(0)), a=nn.Linear(8, 4), w=weight(4, 2, 3), c=weight(1, 2, 9)),
        ROWS,
    ),
    "a computed bias": (
        lambda: Net(lambda net, x: net.b(F.relu(F.conv2d(x, net.w, x.mean((0, 2, 3))[:1].expand(8)))), w=weight(8, 3, 3, 3), b=conv(8, 4)),
        IMAGE,
    ),
    "two kinds of layer": (lambda: nn.Sequential(conv(3, 8), nn.ReLU(), nn.Linear(8, 4)), IMAGE),
}


@pytest.mark.parametrize("name", ALONE)
def test_what_a_factor_cannot_pass_through_is_left(name):
    build, example = ALONE[name]
    network = plain(build(), example)
    before = network.fingerprint()
    assert equalize(network) == 0 and network.fingerprint() == before


# Bias correction ------------------------------------------------------------------------------------------------------------------

PLAIN = {"samples": 24, "ranges": ("minmax",), "equalize": False, "smooth": False, "rounding": "nearest", "correct": False}


def coarse(model: nn.Module, example: Any) -> tuple[Network, Network, list[list[Tensor]]]:
    """A network, the same with weights on 15 levels, and calibration pieces."""
    network, task = plain(model, example), task_of(model, example)
    quantized = Quantize(**PLAIN)(network, task)
    for node in quantized.graph.nodes:
        if node.target is torch.ops.downsize.fake_quantize.default and constant(quantized, node.args[0]) is not None:
            set_constant(quantized, node.args[1], own(quantized, str(node.args[1].target)) * 17)
    return network, quantized, list(chunks(network, task.batches("calibrate")))


def mean_gaps(network: Network, quantized: Network, pieces: list[list[Tensor]]) -> dict[str, Tensor]:
    """For every layer the difference of its mean output, per channel, over all pieces."""
    sums: list[dict[str, Tensor]] = [{}, {}]

    def recorder(node: torch.fx.Node, found: dict[str, Tensor]) -> Any:
        return lambda args, value: found.__setitem__(node.name, found.get(node.name, 0) + channel_means(node, value) / len(pieces))

    for one, found in zip((network, quantized), sums, strict=True):
        hooks = {node: recorder(node, found) for node in one.graph.nodes if str(node.target).split(".")[1:2] in (["conv2d"], ["linear"])}
        for leaves in pieces:
            walk(one, leaves, hooks)
    return {name: sums[0][name] - sums[1][name] for name in sums[0]}


def test_the_correction_of_one_layer_is_its_mean_error():
    network, quantized, pieces = coarse(nn.Sequential(nn.Linear(8, 4)), ROWS)
    before, old = mean_gaps(network, quantized, pieces)["linear"], own(quantized, "0.bias")
    correct_biases(network, quantized, pieces)
    assert float(before.abs().max()) > 1e-3
    assert torch.allclose(own(quantized, "0.bias"), old + before, atol=1e-6)


@pytest.mark.parametrize(
    ("build", "example"),
    [
        (lambda: nn.Sequential(conv(3, 8), nn.ReLU(), conv(8, 8), nn.ReLU(), conv(8, 4)), IMAGE),
        (lambda: nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 4)), TEXT),
        (lambda: Net(lambda net, x: net.b(F.relu(net.a(x))) + net.c(x), a=conv(3, 4), b=conv(4, 4, bias=False), c=conv(3, 4, bias=False)), IMAGE),
    ],
    ids=["convolutions", "sequences", "without biases"],
)
def test_every_layers_mean_output_is_that_of_the_original(build, example):
    network, quantized, pieces = coarse(build(), example)
    before = mean_gaps(network, quantized, pieces)
    correct_biases(network, quantized, pieces)
    after = mean_gaps(network, quantized, pieces)
    for name in before:
        assert float(after[name].norm()) <= 0.25 * float(before[name].norm()), name

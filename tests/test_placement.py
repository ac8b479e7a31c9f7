"""Placement: where quantizers go, on networks written out by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from small_nets import Net, conv, plain, weight
from torch import nn

from downsize.errors import TaskError
from downsize.network.rewrite import fold_batch_norm
from downsize.quantization.placement import Placement, place


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def placed(model: nn.Module, example: Any) -> Placement:
    return place(plain(model, example))


def activations(placement: Placement) -> set[str]:
    """Each quantizer: ``node`` for all its readers, ``node > reader`` for these alone, ``node = other`` on the grid of the other."""
    found = set()
    for point in placement.activations:
        text = point.node.name
        text += "".join(f" > {reader.name}" for reader in point.readers or ())
        found.add(text + (f" = {point.like.name}" if point.like is not None else ""))
    return found


def weights(placement: Placement) -> dict[str, int | None]:
    return {str(point.node.target): point.axis for point in placement.weights}


def image(channels: int = 3, size: int = 8) -> torch.Tensor:
    return torch.randn(2, channels, size, size)


# Convolutional networks -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("activation", "name"),
    [
        (nn.ReLU(), "relu"),
        (F.relu6, "relu6"),
        (nn.ReLU6(), "hardtanh"),
        (nn.Hardtanh(), "hardtanh"),
        (lambda x: x.clamp(min=0.1), "clamp"),
        (lambda x: x.clamp(max=2.0), "clamp"),
    ],
)
def test_one_quantizer_behind_what_clips(activation, name):
    placement = placed(Net(lambda net, x: net.b(activation(net.a(x))), a=conv(3, 8), b=conv(8, 4)), image())
    assert activations(placement) == {"x_0 > conv2d", name, "conv2d_1"}
    assert weights(placement) == {"a.weight": 0, "b.weight": 0}


def test_an_activation_that_is_not_clipping_comes_after_the_quantizer():
    placement = placed(Net(lambda net, x: net.b(F.gelu(net.a(x))), a=conv(3, 8), b=conv(8, 4)), image())
    assert activations(placement) == {"x_0 > conv2d", "conv2d", "gelu > conv2d_1", "conv2d_1"}


def test_a_convolution_with_two_readers_is_quantized_before_its_activation():
    net = Net(lambda net, x: (lambda y: net.b(F.relu(y)) + torch.sigmoid(y))(net.a(x)), a=conv(3, 8), b=conv(8, 8))
    assert activations(placed(net, image())) == {"x_0 > conv2d", "conv2d", "relu > conv2d_1", "conv2d_1"}


def test_batch_norm_folds_away():
    net = nn.Sequential(conv(3, 8, bias=False), nn.BatchNorm2d(8), nn.ReLU(), conv(8, 4))
    assert activations(placed(net, image())) == {"input_1 > conv2d", "relu", "conv2d_1"}


def test_a_residual_sum_has_quantizers_on_both_inputs_and_its_output():
    net = Net(lambda net, x: (lambda y: net.c(F.relu(y + net.b(y))))(F.relu(net.a(x))), a=conv(3, 8), b=conv(8, 8), c=conv(8, 4))
    assert activations(placed(net, image())) == {"x_0 > conv2d", "relu", "conv2d_1", "relu_1", "conv2d_2"}


def test_a_sum_that_no_integer_operator_reads_stays_in_float():
    net = Net(lambda net, x: (lambda y: y + net.b(y))(F.relu(net.a(x))), a=conv(3, 8), b=conv(8, 8))
    assert activations(placed(net, image())) == {"x_0 > conv2d", "relu", "conv2d_1"}


def test_sums_of_a_tensor_with_itself_flow_and_those_with_numbers_or_factors_do_not():
    build = dict(a=conv(3, 8), b=conv(8, 4))
    assert "add" in activations(placed(Net(lambda net, x: (lambda y: net.b(y + y))(net.a(x)), **build), image()))
    assert "add > conv2d_1" in activations(placed(Net(lambda net, x: net.b(net.a(x) + 1), **build), image()))
    assert "mul > conv2d_1" in activations(placed(Net(lambda net, x: net.b(net.a(x) * 0.5), **build), image()))
    scaled = Net(lambda net, x: net.b(torch.add(net.a(x), net.c(x), alpha=0.5)), **build, c=conv(3, 8))
    assert "add > conv2d_2" in activations(placed(scaled, image()))


def test_concatenation_flows_with_a_grid_of_its_own():
    net = Net(lambda net, x: (lambda y: net.c(torch.cat([y, y, F.relu(net.b(x))], 1)))(net.a(x)), a=conv(3, 4), b=conv(3, 4), c=conv(12, 4))
    assert activations(placed(net, image())) == {"x_0 > conv2d > conv2d_1", "conv2d", "relu", "cat", "conv2d_2"}


def test_pools_and_reshapes_share_the_grid_of_what_they_move():
    net = nn.Sequential(conv(3, 8), nn.ReLU(), nn.MaxPool2d(2), conv(8, 8), nn.PixelShuffle(2), conv(2, 4))
    expected = {"input_1 > conv2d", "relu", "max_pool2d = relu", "conv2d_1", "pixel_shuffle = conv2d_1", "conv2d_2"}
    assert activations(placed(net, image())) == expected


def test_a_chain_of_moves_ends_where_nothing_reads_its_codes():
    net = Net(lambda net, x: F.max_pool2d(F.max_pool2d(net.a(x), 2), 2), a=conv(3, 8))
    assert activations(placed(net, image())) == {"x_0 > conv2d", "conv2d"}


def test_global_average_pooling_flows_into_the_classifier():
    net = nn.Sequential(conv(3, 8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))
    expected = {"input_1 > conv2d", "relu", "adaptive_avg_pool2d", "flatten = adaptive_avg_pool2d"}
    assert activations(placed(net, image())) == expected


def test_zero_padding_is_transparent():
    net = Net(
        lambda net, x: net.b(F.pad(F.relu(net.a(F.pad(x, (0, 1, 0, 1)))), (0, 1, 0, 1))), a=conv(3, 8, stride=2, padding=0), b=conv(8, 4, padding=0)
    )
    assert activations(placed(net, image())) == {"x_0 > pad", "relu", "conv2d_1"}
    mirrored = Net(lambda net, x: net.b(F.pad(F.relu(net.a(x)), (1, 1, 1, 1), mode="reflect")), a=conv(3, 8), b=conv(8, 4, padding=0))
    assert "pad > conv2d_1" in activations(placed(mirrored, image()))


def test_squeeze_and_excite_multiplies_in_float():
    net = Net(
        lambda net, x: (lambda y: net.d(y * torch.sigmoid(net.c(F.silu(net.b(y.mean((2, 3), keepdim=True)))))))(F.relu(net.a(x))),
        **dict(a=conv(3, 8), b=conv(8, 4, 1), c=conv(4, 8, 1), d=conv(8, 4)),
    )
    expected = {"x_0 > conv2d", "relu", "mean > conv2d_1", "conv2d_1", "silu > conv2d_2", "conv2d_2", "mul > conv2d_3", "conv2d_3"}
    assert activations(placed(net, image())) == expected


def test_a_gate_of_integers_multiplies_in_integers():
    net = Net(lambda net, x: (lambda y: net.c(y * F.relu6(net.b(y))))(F.relu(net.a(x))), a=conv(3, 8), b=conv(8, 8, 1), c=conv(8, 4))
    assert activations(placed(net, image())) == {"x_0 > conv2d", "relu", "relu6", "mul", "conv2d_2"}


def test_an_input_read_by_two_layers_has_one_quantizer():
    net = Net(lambda net, x: torch.tanh(net.a(x)) + torch.tanh(net.b(x)), a=conv(3, 8), b=conv(3, 8, 1))
    assert activations(placed(net, image())) == {"x_0 > conv2d > conv2d_1", "conv2d", "conv2d_1"}


def test_parts_of_a_split_are_quantized_for_their_readers():
    net = Net(lambda net, x: (lambda y: net.b(y[0]) + net.c(y[1]))(net.a(x).chunk(2, 1)), a=conv(3, 8), b=conv(4, 4), c=conv(4, 4))
    found = activations(placed(net, image()))
    assert {text for text in found if ">" in text} == {"x_0 > conv2d", "getitem > conv2d_1", "getitem_1 > conv2d_2"}


def test_transposed_convolutions_have_quantized_weights_alone():
    net = Net(lambda net, x: net.b(net.t(net.a(x))), a=conv(3, 8), t=nn.ConvTranspose2d(8, 6, 2, 2), b=conv(6, 4))
    placement = placed(net, image())
    assert weights(placement) == {"a.weight": 0, "t.weight": 1, "b.weight": 0}
    assert "conv_transpose2d" in placement.left and "conv_transpose2d" not in activations(placement)


# Transformers and other products --------------------------------------------------------------------------------------------------


class Block(nn.Module):
    """A transformer block over token embeddings, spelled out."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.norm, self.norm2 = nn.Embedding(50, 16), nn.LayerNorm(16), nn.LayerNorm(16)
        self.q, self.k, self.v, self.o, self.up, self.down = (nn.Linear(i, o) for i, o in ((16, 16),) * 4 + ((16, 32), (32, 16)))

    def forward(self, ids):
        x = self.table(ids)
        y = self.norm(x)
        scores = (self.q(y) @ self.k(y).transpose(1, 2)).softmax(-1)
        x = x + self.o(scores @ self.v(y))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


def test_transformers_quantize_only_the_inputs_of_products_with_weights():
    placement = placed(Block(), torch.randint(0, 50, (2, 7)))
    found = activations(placement)
    assert found == {
        "layer_norm > linear > linear_1 > linear_2", "matmul_1 > linear_3", "layer_norm_1 > linear_4", "gelu > linear_5",
    }  # fmt: skip
    assert weights(placement)["table.weight"] == 0 and len(placement.weights) == 7


def test_convnext_block():
    net = Net(
        lambda net, x: x * 1.0 + net.down(F.gelu(net.up(net.norm(net.a(x).permute(0, 2, 3, 1))))).mul(net.gamma).permute(0, 3, 1, 2),
        **dict(a=nn.Conv2d(8, 8, 7, padding=3, groups=8), norm=nn.LayerNorm(8), up=nn.Linear(8, 32), down=nn.Linear(32, 8), gamma=weight(8)),
    )
    assert activations(placed(net, image(8))) == {"x_0 > conv2d", "conv2d", "layer_norm > linear", "gelu > linear_1"}


def test_gpt2_style_layers_are_layers_with_outputs_on_the_last_axis():
    net = Net(lambda net, x: torch.addmm(net.c, x.view(-1, 16), net.w).view(2, -1, 24), w=weight(16, 24), c=weight(24))
    placement = placed(net, torch.randn(2, 5, 16))
    assert activations(placement) == {"view > addmm"} and weights(placement) == {"w": 1}


def test_products_with_a_constant_on_the_right_are_layers_and_on_the_left_are_not():
    placement = placed(Net(lambda net, x: torch.tanh(x @ net.w), w=weight(16, 24)), torch.randn(2, 5, 16))
    assert activations(placement) == {"x_0 > matmul"} and weights(placement) == {"w": 1}
    placement = placed(Net(lambda net, x: net.a(net.w @ x), w=weight(5, 5), a=nn.Linear(16, 4)), torch.randn(2, 5, 16))
    assert activations(placement) == {"matmul > linear"} and weights(placement) == {"a.weight": 0}


def test_a_perceptron_has_quantizers_on_inputs_alone():
    net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    assert activations(placed(net, torch.randn(2, 8))) == {"input_1 > linear", "relu > linear_1"}


def test_a_layer_of_a_constant_input_is_left():
    net = Net(lambda net, x: net.a(x) + net.b(net.queries), queries=weight(5, 16), a=nn.Linear(16, 8), b=nn.Linear(16, 8))
    placement = placed(net, torch.randn(2, 5, 16))
    assert activations(placement) == {"x_0 > linear"} and weights(placement) == {"a.weight": 0}
    assert "constant" in placement.left["linear_1"]


# Weights --------------------------------------------------------------------------------------------------------------------------


class Tied(nn.Module):
    def __init__(self, read) -> None:
        super().__init__()
        self.table, self.read = nn.Embedding(50, 16), read

    def forward(self, ids):
        return self.read(torch.tanh(self.table(ids)), self.table.weight)


@pytest.mark.parametrize(
    ("read", "axis"),
    [
        (lambda x, w: F.linear(x, w), 0),
        (lambda x, w: x @ w.t(), 0),
        (lambda x, w: x @ w.transpose(0, 1), 0),
        (lambda x, w: F.linear(x, w) @ w, None),
        (lambda x, w: F.linear(x, w) + w.sum(), None),
    ],
    ids=["linear", "t", "transpose", "both ways", "another reader"],
)
def test_a_tied_embedding_keeps_its_rows_scales_only_if_all_readers_read_rows(read, axis):
    assert weights(placed(Tied(read), torch.randint(0, 50, (2, 7)))) == {"table.weight": axis}


def test_tables_of_integers_are_left():
    net = Net(lambda net, ids: net.a(F.embedding(ids, net.table).float()), a=nn.Linear(4, 8))
    net.register_buffer("table", torch.randint(0, 9, (50, 4)))
    assert weights(placed(net, torch.randint(0, 50, (2, 7)))) == {"a.weight": 0}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_float_types_are_refused_with_the_mend(dtype):
    net = nn.Sequential(nn.Linear(8, 8)).to(dtype)
    with pytest.raises(TaskError, match=rf"0.weight is {str(dtype)[6:]}.*model.float\(\)"):
        placed(net, torch.randn(2, 8).to(dtype))


def test_a_layer_of_another_type_among_others_is_left():
    net = Net(lambda net, x: net.b(net.a(x).double()), a=nn.Linear(8, 8), b=nn.Linear(8, 4).double())
    placement = placed(net, torch.randn(2, 8))
    assert weights(placement) == {"a.weight": 0} and "float64" in placement.left["linear_1"]


def test_tensors_changed_in_place_are_not_quantized():
    def change(net, x):
        y = net.a(x)
        y[:, :2] += 1
        return net.b(y) + net.b(x)

    placement = placed(Net(change, a=conv(3, 3), b=conv(3, 4)), image())
    assert "conv2d" not in activations(placement) and "in place" in placement.left["conv2d_1"]
    assert weights(placement)["a.weight"] == 0


def test_the_same_decisions_on_a_fork():
    network = plain(nn.Sequential(conv(3, 8), nn.ReLU(), nn.MaxPool2d(2), conv(8, 4)), image())
    placement = place(network)
    fork = network.fork()
    moved = placement.on(fork)
    assert activations(moved) == activations(placement) and weights(moved) == weights(placement)
    assert all(point.node in set(fork.graph.nodes) for point in moved.activations)
    assert fold_batch_norm(fork) == 0

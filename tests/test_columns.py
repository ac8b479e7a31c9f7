"""Layers as matrices: what is unfolded, times the weight matrix, is what the layer computes, at the same positions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_nets import Net
from torch import Tensor, fx, nn

from downsize.network.capture import capture
from downsize.network.columns import MATRIX_LAYERS, WINDOW, channel_axis, groups_of, input_rows, output_rows, weight_from_matrix, weight_matrix
from downsize.network.network import Network
from downsize.network.statistics import walk


def layer_of(network: Network) -> fx.Node:
    return next(node for node in network.graph.nodes if node.target in MATRIX_LAYERS)


def unfolded(layer: nn.Module, x: Tensor, visit: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """The weight matrix times the unfolded inputs plus bias, the unfolded outputs, and the whole output."""
    network = capture(Net(lambda net, x: net.layer(x) * 1, layer=layer).eval(), x)
    node = layer_of(network)
    found: list[tuple[Tensor, Tensor, Tensor]] = []

    def take(args: tuple[Any, ...], value: Tensor) -> None:
        groups = groups_of(node)
        bias = 0.0 if layer.bias is None else layer.bias.detach().reshape(groups, -1, 1)  # type: ignore[operator]
        product = weight_matrix(args[1], groups) @ input_rows(node, args, groups, visit) + bias
        found.append((product, output_rows(node, value, groups, visit), value))

    walk(network, network.flat(x), {node: take})
    return found[0]


@settings(max_examples=50)
@given(
    st.sampled_from([1, 2]),
    st.sampled_from([1, 2, 4]),
    st.integers(1, 3),
    st.integers(1, 3),
    st.integers(0, 2),
    st.integers(1, 2),
    st.booleans(),
    st.integers(0, 5),
)
def test_a_convolution_is_its_matrix_times_its_columns(dims, groups, kernel, stride, padding, dilation, bias, visit):
    torch.manual_seed(0)
    kind = {1: nn.Conv1d, 2: nn.Conv2d}[dims]
    layer = kind(4, 8, (kernel, 2)[:dims], stride, padding, (1, dilation)[-dims:], groups, bias)
    product, rows, value = unfolded(layer, torch.randn(2, 4, *(13, 9)[:dims]), visit)
    assert rows.shape == (groups, 8 // groups, value.numel() // 8)
    assert torch.allclose(product, rows, atol=1e-5)


@pytest.mark.parametrize("shape", [(5,), (3, 5), (2, 3, 5), (2, 3, 4, 5)])
def test_a_linear_layer_is_its_matrix_times_its_columns(shape):
    torch.manual_seed(0)
    product, rows, value = unfolded(nn.Linear(5, 7), torch.randn(shape))
    assert torch.equal(rows[0].T.reshape(value.shape), value) and torch.allclose(product, rows, atol=1e-6)


@pytest.mark.parametrize(("layer", "shape"), [(nn.Conv2d(4, 6, 3), (4, 7, 8)), (nn.Conv1d(4, 6, 3), (4, 9))])
def test_a_convolution_without_a_batch(layer, shape):
    product, rows, value = unfolded(layer, torch.randn(shape))
    assert value.shape[0] == 6 and torch.equal(rows[0].reshape(value.shape), value) and torch.allclose(product, rows, atol=1e-6)


@pytest.mark.parametrize("stride", [1, 2])
def test_large_images_give_one_window_that_wanders_the_same_for_inputs_and_outputs(stride):
    torch.manual_seed(0)
    layer = nn.Conv2d(2, 3, 3, stride, 1)
    x = torch.randn(1, 2, 2 * stride * WINDOW, stride * (WINDOW + 5))
    firsts = []
    for visit in range(3):
        product, rows, value = unfolded(layer, x, visit)
        assert rows.shape == (1, 3, WINDOW**2) and torch.allclose(product, rows, atol=1e-5)
        window = rows.reshape(3, WINDOW, WINDOW)
        places = [
            (i, j)
            for i in range(value.shape[2] - WINDOW + 1)
            for j in range(value.shape[3] - WINDOW + 1)
            if torch.equal(value[0, :, i : i + WINDOW, j : j + WINDOW], window)
        ]
        firsts += places
    assert len(firsts) == len(set(firsts)) == 3


def test_matrices_are_weights_again_and_channels_lie_where_they_are_said_to():
    for layer, x in ((nn.Conv2d(4, 6, 3, groups=2), torch.randn(2, 4, 8, 8)), (nn.Linear(4, 6), torch.randn(2, 3, 4))):
        network = capture(Net(lambda net, x: net.layer(x) * 1, layer=layer).eval(), x)
        node = layer_of(network)
        weight = layer.weight.detach()
        assert torch.equal(weight_from_matrix(weight_matrix(weight, groups_of(node)), weight.shape), weight)
        with torch.no_grad():
            value = layer(x)
        assert value.shape[channel_axis(node, value.dim())] == 6

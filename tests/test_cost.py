"""Costs against closed forms and against torch's own flop counter; what has no product is listed, not lost."""

from __future__ import annotations

from math import prod

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from zoo import BY_NAME, captured, images, shake, specimen

from downsize.errors import ArtifactError
from downsize.network.capture import capture
from downsize.network.cost import count
from downsize.structure import as_call


def macs_of(model: nn.Module, *inputs: torch.Tensor) -> int:
    shake(model)
    return count(capture(model.eval(), inputs), inputs).macs


# Closed forms ------------------------------------------------------------------------------------------------------------------------

# (module, input, output positions x kernel positions x inputs of a group x outputs)
CONVOLUTIONS: dict[str, tuple[nn.Module, tuple[int, ...], int]] = {
    "1d": (nn.Conv1d(4, 6, 3), (2, 4, 10), 2 * 8 * 3 * 4 * 6),
    "2d": (nn.Conv2d(4, 6, 3, padding=1), (2, 4, 10, 10), 2 * 100 * 9 * 4 * 6),
    "strided": (nn.Conv2d(4, 6, 3, stride=2), (2, 4, 11, 11), 2 * 25 * 9 * 4 * 6),
    "dilated": (nn.Conv2d(4, 6, 3, dilation=2), (2, 4, 11, 11), 2 * 49 * 9 * 4 * 6),
    "grouped": (nn.Conv2d(4, 6, 3, groups=2), (2, 4, 10, 10), 2 * 64 * 9 * 2 * 6),
    "depthwise": (nn.Conv2d(4, 8, 3, groups=4), (2, 4, 10, 10), 2 * 64 * 9 * 1 * 8),
    "named padding": (nn.Conv2d(4, 6, 3, padding="same"), (2, 4, 10, 10), 2 * 100 * 9 * 4 * 6),
    "3d": (nn.Conv3d(2, 3, 2), (2, 2, 5, 5, 5), 2 * 64 * 8 * 2 * 3),
    # Transposed: every input position meets the whole kernel.
    "transposed": (nn.ConvTranspose2d(4, 6, 3, stride=2), (2, 4, 5, 5), 2 * 25 * 9 * 4 * 6),
    "transposed grouped": (nn.ConvTranspose2d(4, 6, 3, groups=2), (2, 4, 5, 5), 2 * 25 * 9 * 4 * 3),
    "transposed 1d": (nn.ConvTranspose1d(4, 6, 5, stride=3, padding=1, output_padding=1), (2, 4, 7), 2 * 7 * 5 * 4 * 6),
}


@pytest.mark.parametrize("name", sorted(CONVOLUTIONS))
def test_convolutions(name):
    module, shape, expected = CONVOLUTIONS[name]
    assert macs_of(module, torch.randn(shape)) == expected


def test_linear_layers_and_products():
    assert macs_of(nn.Linear(7, 5), torch.randn(3, 2, 7)) == 6 * 7 * 5
    network = captured(lambda self, x, y: torch.bmm(x, y) @ self.linear.weight, (torch.randn(2, 3, 5), torch.randn(2, 5, 4)))
    assert count(network, (torch.randn(2, 3, 5), torch.randn(2, 5, 4))).macs == 2 * 3 * 5 * 4 + 2 * 3 * 4 * 4


@pytest.mark.parametrize(
    ("equation", "shapes", "expected"),
    [
        ("bij,bjk->bik", [(2, 3, 4), (2, 4, 5)], 2 * 3 * 4 * 5),
        ("bhqd, bhkd -> bhqk", [(2, 3, 4, 5), (2, 3, 6, 5)], 2 * 3 * 4 * 6 * 5),
        ("...i,ij->...j", [(2, 3, 4), (4, 5)], 2 * 3 * 4 * 5),
        ("bi,bi->b", [(2, 7), (2, 7)], 14),
        ("bij->bji", [(2, 3, 4)], 0),
    ],
)
def test_einsum(equation, shapes, expected):
    inputs = tuple(torch.randn(shape) for shape in shapes)
    network = captured(lambda self, *tensors: torch.einsum(equation, *tensors) * 1.0, inputs)
    assert count(network, inputs).macs == expected


@pytest.mark.parametrize(
    ("cell", "gates", "options"),
    [
        (nn.LSTM, 4, {}),
        (nn.LSTM, 4, {"num_layers": 2, "bidirectional": True}),
        (nn.LSTM, 4, {"bias": False}),
        (nn.GRU, 3, {}),
        (nn.GRU, 3, {"bias": False}),
        (nn.GRU, 3, {"num_layers": 3, "bidirectional": True}),
        (nn.RNN, 1, {"nonlinearity": "relu", "bias": False}),
    ],
)
def test_recurrent_layers(cell, gates, options):
    batch, steps, inputs, hidden = 2, 5, 6, 8
    layers, ways = options.get("num_layers", 1), 2 if options.get("bidirectional") else 1
    expected = sum(gates * hidden * ((inputs if layer == 0 else ways * hidden) + hidden) * ways for layer in range(layers))
    assert macs_of(cell(inputs, hidden, batch_first=True, **options), torch.randn(batch, steps, inputs)) == batch * steps * expected


def test_attention():
    batch, heads, queries, keys, size, values = 2, 3, 4, 5, 6, 7
    inputs = (torch.randn(batch, heads, queries, size), torch.randn(batch, heads, keys, size), torch.randn(batch, heads, keys, values))
    network = captured(lambda self, *qkv: torch.nn.functional.scaled_dot_product_attention(*qkv), inputs)
    assert count(network, inputs).macs == batch * heads * queries * keys * (size + values)


def test_a_transformer_block():
    n, t, d, f = 2, 9, 16, 32
    layer = 4 * t * d * d + 2 * t * t * d + 2 * t * d * f
    assert count(specimen("encoder")[1], BY_NAME["encoder"].inputs(n)).macs == n * (2 * layer + d * 4)


# Torch's own counter -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(set(BY_NAME) - {"lstm", "gru"}))
def test_flops_are_torchs(name):
    """It does not know recurrent layers, nor attention in one operator: made of matrix products, and with gradients, it counts all of the rest."""
    model, network = specimen(name)
    args, kwargs = as_call(BY_NAME[name].inputs(3))
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(*args, **kwargs)
    cost = count(network, BY_NAME[name].inputs(3))
    assert cost.flops == 2 * cost.macs == counter.get_total_flops() > 0


# Rows --------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(BY_NAME))
def test_totals_are_those_of_the_tensors(name):
    _, network = specimen(name)
    cost = count(network, BY_NAME[name].inputs(2))
    tensors = {id(tensor): tensor for _, tensor in network.named_tensors()}.values()
    assert cost.parameters == sum(tensor.numel() for tensor in tensors if isinstance(tensor, nn.Parameter))
    assert cost.bytes == sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    for field in ("macs", "parameters", "bytes"):
        assert getattr(cost, field) == sum(getattr(row, field) for row in cost.rows)
    calls = [node for node in network.graph.nodes if node.op == "call_function"]
    assert [(row.node, row.module, row.source) for row in cost.rows] == [(n.name, n.meta["module"], n.meta["source"]) for n in calls]


def test_costs_grow_with_the_inputs_given():
    _, network = specimen("depthwise")
    one, five = count(network, images()(1)), count(network, images()(5))
    assert 5 * one.macs == five.macs and one.parameters == five.parameters
    assert [prod(a.output_shape) * 5 for a in one.rows] == [prod(b.output_shape) for b in five.rows]


def test_rows_name_the_users_modules():
    _, network = specimen("plain")
    rows = {row.module: row for row in count(network, images()(2)).rows if row.operator == "conv2d"}
    assert set(rows) == {"0.0", "2.0"}
    row = rows["2.0"]
    assert (row.macs, row.parameters, row.bytes, row.output_shape) == (2 * 16 * 9 * 8 * 12, 12 * 8 * 9, 4 * 12 * 8 * 9, (2, 12, 4, 4))


def test_shared_tensors_are_counted_at_their_first_reader():
    _, network = specimen("tied")
    rows = count(network, BY_NAME["tied"].inputs(2)).rows
    assert [(row.operator, row.parameters) for row in rows if row.operator in ("embedding", "linear")] == [
        ("embedding", 600),
        ("linear", 156),
        ("linear", 0),
        ("linear", 0),
    ]


def test_what_has_no_product_is_listed():
    cost = count(specimen("plain")[1], images()(2))
    assert cost.not_counted == {"batch_norm": 2, "relu": 2, "max_pool2d": 1, "adaptive_avg_pool2d": 1}
    cost = count(specimen("encoder")[1], BY_NAME["encoder"].inputs(2))
    assert {"embedding", "layer_norm", "mean"} <= set(cost.not_counted)
    assert not {"view", "transpose", "getitem", "linear"} & set(cost.not_counted)


def test_operators_with_several_results_are_listed_too():
    network = captured(lambda self, x: (self.linear(x).max(1)[0], x.sort(1)[0], *x.topk(2)), torch.randn(2, 4))
    assert count(network, torch.randn(2, 4)).not_counted == {"max": 1, "sort": 1, "topk": 1}


def test_arithmetic_of_sizes_is_free():
    network = captured(lambda self, x: self.linear(x).view(x.shape[0], x.shape[1] // 2 * 2), torch.randn(2, 4))
    assert count(network, torch.randn(3, 4)).not_counted == {}


def test_wrong_inputs_are_refused():
    with pytest.raises(ArtifactError, match="the network takes x"):
        count(specimen("residual")[1], torch.zeros(1, 2))

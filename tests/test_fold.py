"""Constants that are computed from constants: folded to the same values, against the parametrizations of torch, and only where no file grows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from architectures import ARCHITECTURES
from small_nets import Net, weight
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm, weight_norm
from zoo import floats

from downsize.network.capture import capture
from downsize.network.cut import cut
from downsize.network.fold import fold_constants, part_constants
from downsize.network.lineage import Lineage
from downsize.network.masked import masked
from downsize.network.network import Network


def captured(model: nn.Module, inputs: Any = None) -> Network:
    torch.set_num_threads(1)
    return capture(model.eval(), floats(6)(2) if inputs is None else inputs)


def names(network: Network) -> set[str]:
    return {name for name, _ in network.named_tensors()}


def assert_same(network: Network, model: nn.Module, folded: int) -> None:
    assert fold_constants(network) == folded
    for batch in (1, 3):
        x = floats(6)(batch)
        torch.testing.assert_close(network.predict(x), model(x), rtol=1e-5, atol=1e-6)
    assert fold_constants(network) == 0


@pytest.mark.parametrize("norm", [weight_norm, spectral_norm], ids=["weight norm", "spectral norm"])
def test_parametrized_weights_become_plain(norm):
    torch.manual_seed(0)
    layer = norm(nn.Linear(6, 8))
    model = nn.Sequential(layer, nn.ReLU(), nn.Linear(8, 3)).eval()
    expected = layer.weight.detach()
    network = captured(model)
    assert_same(network, model, 1)
    assert names(network) == {"0.weight", "0.bias", "2.weight", "2.bias"}
    torch.testing.assert_close(network.tensor("0.weight").detach(), expected)
    assert isinstance(network.tensor("0.weight"), nn.Parameter)


def test_what_would_make_the_file_larger_is_not_folded():
    """A low-rank weight: 8 x 6 from 8 x 2 and 2 x 6."""
    model = Net(lambda net, x: F.linear(x, net.up @ net.down), up=weight(8, 2), down=weight(2, 6)).eval()
    network = captured(model)
    assert fold_constants(network) == 0 and names(network) == {"up", "down"}


def test_what_only_moves_a_constant_is_left():
    model = Net(lambda net, x: F.linear(x, net.w.t()) + net.b[None].view(-1), w=weight(6, 8), b=weight(8)).eval()
    network = captured(model)
    assert fold_constants(network) == 0 and names(network) == {"w", "b"}


def test_a_chain_is_folded_to_its_end_once():
    model = Net(lambda net, x: F.linear(x, (net.w - net.w.mean(1, keepdim=True)).tanh() * 2), w=weight(8, 6)).eval()
    network = captured(model)
    assert_same(network, model, 1)
    assert [str(node.target) for node in network.graph.nodes if node.op == "call_function"] == ["aten.linear.default"]


def test_a_value_that_is_read_in_the_middle_too_is_folded_at_both_places():
    def forward(net: Any, x: torch.Tensor) -> torch.Tensor:
        scaled = net.w * 2
        return F.linear(x, scaled) + F.linear(x, scaled.tanh())

    model = Net(forward, w=weight(8, 6)).eval()
    assert_same(captured(model), model, 2)


def test_a_constant_that_is_written_into_is_left():
    def forward(net: Any, x: torch.Tensor) -> torch.Tensor:
        y = net.w * 1.5
        y[:, 0] += x.sum()
        return F.linear(x, y)

    model = Net(forward, w=weight(8, 6)).eval()
    network = captured(model)
    fold_constants(network)
    for batch in (3, 1, 3):  # and it stays what it was, however often it runs
        x = floats(6)(batch)
        torch.testing.assert_close(network.predict(x), model(x), rtol=1e-5, atol=1e-6)


def test_buffers_stay_buffers():
    model = Net(lambda net, x: x * (net.scale * 2))
    model.register_buffer("scale", torch.rand(6))
    network = captured(model.eval())
    assert fold_constants(network) == 1
    assert not any(isinstance(tensor, nn.Parameter) for _, tensor in network.named_tensors())


def test_integers_are_left():
    model = Net(lambda net, x: net.table(net.places + 1).sum(0) * x, table=nn.Embedding(9, 6))
    model.register_buffer("places", torch.arange(5))
    assert fold_constants(captured(model.eval())) == 0


@pytest.mark.parametrize("name", ["tcn", pytest.param("wav2vec2", marks=pytest.mark.slow)])
def test_weight_normed_networks_can_be_cut_after_folding(name):
    specimen = ARCHITECTURES[name]
    network = captured(specimen.make(), specimen.inputs(2))
    before, whole = Lineage(network).coverage(), network.predict(specimen.inputs(3))
    assert fold_constants(network) > 0
    lineage = Lineage(network)
    assert "_weight_norm" not in lineage.frozen_by and lineage.coverage() > max(before + 0.01, 0.9)
    torch.testing.assert_close(network.predict(specimen.inputs(3)), whole, rtol=1e-4, atol=1e-5)
    dead = {axis.name: [0] for axis in lineage.axes if axis.units > 1 and axis.exact}
    made, oracle = cut(lineage, dead), masked(lineage, dead)
    torch.testing.assert_close(made.predict(specimen.inputs(3)), oracle.predict(specimen.inputs(3)), rtol=1e-4, atol=1e-5)


class Crossed(nn.Module):
    """Attention whose queries come from elsewhere: torch reads its one projection in parts."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.queries = weight(1, 3, 8)
        nn.init.normal_(self.attention.in_proj_bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.attention(self.queries.expand(x.shape[0], -1, -1), x, x, need_weights=False)[0]


def test_projections_that_are_read_in_parts_are_parted():
    torch.manual_seed(0)
    model, inputs = Crossed(), floats(5, 8)
    network = captured(model, inputs(2))
    whole = network.tensor("attention.in_proj_weight").detach()
    assert part_constants(network) == 2 and part_constants(network) == 0
    parts = [network.tensor(f"attention.in_proj_weight_{number}") for number in (0, 1)]
    assert all(isinstance(part, nn.Parameter) for part in parts) and "attention.in_proj_weight" not in names(network)
    assert torch.equal(torch.cat([part.detach() for part in parts]), whole)
    for batch in (1, 3):
        torch.testing.assert_close(network.predict(inputs(batch)), model(inputs(batch)), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("why", ["zeros", "whole"])
def test_what_must_keep_zeros_or_is_read_as_a_whole_is_not_parted(why):
    def forward(net: Any, x: torch.Tensor) -> torch.Tensor:
        one, two = net.w.split([2, 4])
        return F.linear(x, one).sum() + F.linear(x, two) + (0 if why == "zeros" else net.w.sum())

    network = captured(Net(forward, w=weight(6, 6)))
    if why == "zeros":
        with torch.no_grad():
            network.tensor("w")[0, 0] = 0
        network.keep_zeros("w")
    assert part_constants(network) == 0 and names(network) == {"w"}

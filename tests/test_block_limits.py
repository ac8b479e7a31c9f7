"""Where a block must stay, what must stay of one that goes, and the names of blocks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small_nets import Net, task_of
from test_blocks import WIDTH, names, regions, transformer
from torch import Tensor, nn
from zoo import assert_close, run

from downsize.errors import SpecError
from downsize.network.blocks import blocks, bypass, without
from downsize.network.capture import capture
from downsize.network.network import Network
from downsize.network.rewrite import aten
from downsize.testing import check_technique

# What must stay -------------------------------------------------------------------------------------------------------------------


def simple(function: Any, *example: Tensor, **parts: Any) -> Network:
    torch.manual_seed(0)
    return capture(Net(function, **parts).eval(), example)


def branch() -> nn.Module:
    return nn.Sequential(nn.Linear(WIDTH, 12), nn.GELU(), nn.Linear(12, WIDTH))


def test_a_branch_whose_inside_is_an_output_stays():
    def forward(net: Any, x: Tensor) -> Any:
        inner = net.one(x)
        return x + net.two(inner), inner

    x = torch.randn(2, WIDTH)
    assert names(simple(forward, x, one=nn.Linear(WIDTH, 12), two=nn.Linear(12, WIDTH))) == []
    assert names(simple(lambda net, x: (forward(net, x)[0], x), x, one=nn.Linear(WIDTH, 12), two=nn.Linear(12, WIDTH))) == ["add"]


def test_branches_side_by_side_share_their_norm():
    def forward(net: Any, x: Tensor) -> Tensor:
        y = net.norm(x)
        return x + net.one(y) + net.two(y)

    x = torch.randn(2, WIDTH)
    network = simple(forward, x, norm=nn.LayerNorm(WIDTH), one=branch(), two=branch())
    assert names(network) == ["one", "two"]
    y = network.predict(x)
    one, two, none = (bypass(network, gone).predict(x) for gone in (["two"], ["one"], ["one", "two"]))
    assert torch.equal(none, x)
    assert_close(one + two - x, y)
    assert "norm.weight" not in dict(bypass(network, ["one", "two"]).named_tensors())


def test_a_branch_of_a_sum_that_begins_with_branches():
    def forward(net: Any, x: Tensor) -> Tensor:
        return (net.one(x) + net.two(x)) + x

    x = torch.randn(2, WIDTH)
    network = simple(forward, x, one=branch(), two=branch())
    parts = {name: bypass(network, [name]).predict(x) for name in names(network)}
    assert set(parts) == {"one", "two", "add_1"}
    assert torch.equal(parts["add_1"], x)
    assert_close(parts["one"] + parts["two"] - x, network.predict(x))
    with pytest.raises(SpecError, match="overlap"):
        bypass(network, ["one", "two"])


def test_what_is_added_from_elsewhere_is_no_branch():
    x, y = torch.randn(2, WIDTH), torch.randn(2, WIDTH)
    assert names(simple(lambda net, x, y: net.one(x) + net.two(y), x, y, one=branch(), two=branch())) == []


@pytest.mark.parametrize("factor", [1, 2])
def test_a_scaled_sum(factor):
    x = torch.randn(2, WIDTH)
    scaled_branch = simple(lambda net, x: torch.add(x, net.f(x), alpha=factor), x, f=branch())
    scaled_entry = simple(lambda net, x: torch.add(net.f(x), x, alpha=factor), x, f=branch())
    difference = simple(lambda net, x: x - net.f(x), x, f=branch())
    assert names(scaled_branch) == names(difference) == ["f"]
    assert names(scaled_entry) == (["f"] if factor == 1 else [])


def test_equal_sizes_by_chance_are_no_equal_shapes():
    # [batch, 8] with a batch of 8: the transposed product only looks alike.
    class Turned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(WIDTH, WIDTH))

        def forward(self, x: Tensor) -> Tensor:
            return (x @ self.weight).transpose(0, 1)

    assert names(simple(lambda net, x: net.layers[0](x), torch.randn(WIDTH, WIDTH), layers=nn.ModuleList([Turned()]))) == []
    assert names(simple(lambda net, x: net.layers[0](x), torch.randn(WIDTH, WIDTH), layers=nn.ModuleList([nn.Linear(WIDTH, WIDTH)]))) == ["layers.0"]


def test_shapes_read_from_inside_are_read_from_the_entry():
    x = torch.randn(2, 5, WIDTH)
    network = simple(lambda net, x: (x + net.f(x)).reshape(x.shape[0] * 5, WIDTH), x, f=branch())
    size = next(node for node in network.graph.nodes if node.target is aten.sym_size.int)
    inner = [node for node in network.graph.nodes if node.target is aten.linear.default][-1]
    with network.graph.inserting_after(inner):
        inside = network.graph.call_function(aten.sym_size.int, (inner, 0))
    for reader in list(size.users):
        if reader < inside:
            inside.append(reader)
        reader.replace_input_with(size, inside)
    network.recompile()
    assert inside in network.graph.nodes
    made = bypass(network, ["f"])
    for batch in (1, 4):
        trial = torch.randn(batch, 5, WIDTH)
        assert torch.equal(made.predict(trial), trial.reshape(batch * 5, WIDTH))


def test_sums_in_place_on_a_view():
    def forward(net: Any, x: Tensor) -> Tensor:
        x = net.patch(x).flatten(2).transpose(1, 2)
        for layer in net.layers:
            x += layer(x)
        return x.mean(1)

    x = torch.randn(2, 3, 4, 4)
    model = Net(forward, patch=nn.Conv2d(3, WIDTH, 2, 2), layers=nn.ModuleList([branch(), branch()]))
    network = capture(model.eval(), x)
    assert [str(node.target) for node in network.graph.nodes].count("aten.add_.Tensor") == 2
    made = bypass(network, ["layers.0"])
    model.layers = nn.ModuleList(list(model.get_submodule("layers").children())[1:])
    assert_close(made.predict(x), run(model, x))


def test_a_branch_beside_a_value_that_is_written_stays():
    def forward(net: Any, x: Tensor) -> Any:
        x = net.patch(x).flatten(2).transpose(1, 2)
        y = x + net.f(x)
        x.mul_(2)
        return y, x

    network = simple(forward, torch.randn(2, 3, 4, 4), patch=nn.Conv2d(3, WIDTH, 2, 2), f=branch())
    assert "aten.mul_.Tensor" in [str(node.target) for node in network.graph.nodes]
    assert names(network) == []


def test_views_behind_a_block_take_the_layout_of_its_entry():
    class Turn(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.f = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.f(x.contiguous())

    x = torch.randn(2, 4, 4)
    network = simple(lambda net, x: net.layers[0](x.transpose(1, 2)).view(x.shape[0], 16), x, layers=nn.ModuleList([Turn()]))
    assert torch.equal(bypass(network, ["layers.0"]).predict(x), x.transpose(1, 2).reshape(2, 16))


@pytest.mark.slow
def test_outputs_that_become_one_value(tmp_path):
    def forward(net: Any, x: Tensor) -> Any:
        states = [x]
        for layer in net.layers:
            states.append(states[-1] + layer(states[-1]))
        return tuple(states)

    x = torch.randn(2, WIDTH)
    model = Net(forward, layers=nn.ModuleList([branch(), branch()]))
    network = capture(model.eval(), x)
    made = check_technique(lambda network, task: bypass(network, ["layers.0", "layers.1"]), network, task_of(model, x), tmp_path)
    assert all(torch.equal(output, x) for output in made.predict(x))


# Names ----------------------------------------------------------------------------------------------------------------------------


def test_unknown_names_are_refused_with_the_nearest():
    _, network = transformer(True)
    with pytest.raises(SpecError, match=r"no block 'layers.7'.*did you mean 'layers\.\d'"):
        bypass(network, ["layers.7"])


def test_the_network_given_stays_and_the_removal_is_noted():
    _, network = transformer(True)
    before = network.fingerprint()
    made = bypass(bypass(network, ["layers.2", "layers.0.ffn"]), ["layers.1"])
    assert network.fingerprint() == before and "bypassed" not in network.origin
    assert made.origin["bypassed"] == ["layers.0.ffn", "layers.2", "layers.1"]
    assert bypass(network, []).fingerprint() == before
    both = without(network, [block for block in blocks(network) if block.name in ("layers.1", "layers.1.ffn")])
    assert both.origin["bypassed"] == ["layers.1"]


def test_names_survive_saving(tmp_path):
    _, network = transformer(False)
    network.save(tmp_path / "network.safetensors")
    assert regions(Network.load(tmp_path / "network.safetensors")) == regions(network)

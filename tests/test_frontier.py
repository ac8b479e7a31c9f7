"""The frontier: in any stretches, in memory or not, it gives the bits of one walk, in the work of one walk, and holds no more than is read."""

from __future__ import annotations

import random
import weakref
from typing import Any

import pytest
import torch
from small_nets import Net, conv
from torch import Tensor, fx, nn
from torch.utils._python_dispatch import TorchDispatchMode
from zoo import BY_NAME, assert_close, captured, images, specimen

from downsize.network import frontier as frontier_module
from downsize.network.capture import capture
from downsize.network.frontier import Frontier, Joined
from downsize.network.network import Network
from downsize.network.rewrite import aten, set_bias, set_constant
from downsize.network.statistics import walk

NAMES = sorted(BY_NAME)


def pieces_of(name: str, network: Network) -> list[list[Tensor]]:
    return [network.flat(BY_NAME[name].inputs(batch)) for batch in (2, 3, 1)]


def boundaries(network: Network, seed: int) -> list[fx.Node | None]:
    nodes = list(network.graph.nodes)[1:]
    chosen = random.Random(seed).sample(range(len(nodes)), min(7, len(nodes)))
    return [*(nodes[i] for i in sorted(chosen)), None]


def between(network: Network, start: fx.Node | None, stop: fx.Node | None) -> list[fx.Node]:
    nodes = list(network.graph.nodes)
    return nodes[nodes.index(start) if start else len(nodes) : nodes.index(stop) if stop else len(nodes)]


def copies(tree: Any) -> Any:
    if isinstance(tree, (tuple, list)):
        return [copies(item) for item in tree]
    return tree.clone() if isinstance(tree, Tensor) else tree


def assert_same(one: Any, two: Any) -> None:
    """The same values to the bit; tensors also lie in memory in the same way."""
    if isinstance(two, list):
        assert len(one) == len(two)
        for left, right in zip(one, two, strict=True):
            assert_same(left, right)
    elif isinstance(two, Tensor):
        assert one.dtype == two.dtype and one.stride() == two.stride() and torch.equal(torch.nan_to_num(one), torch.nan_to_num(two))
    else:
        assert one == two or one is two


class Recorder:
    """Hooks for every node that keep what they are called with."""

    def __init__(self) -> None:
        self.seen: dict[fx.Node, list[Any]] = {}

    def hooks(self, nodes: list[fx.Node]) -> dict[fx.Node, Any]:
        return {node: lambda args, value, node=node: self.seen.setdefault(node, []).append(copies([args, value])) for node in nodes}


# In stretches it is one walk ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("memory", [2**28, 0], ids=["memory", "disk"])
@pytest.mark.parametrize("name", NAMES)
def test_random_stretches_are_one_walk_to_the_bit(name, memory):
    network = specimen(name)[1]
    pieces, walked, got = pieces_of(name, network), Recorder(), Recorder()
    expected = [walk(network, leaves, walked.hooks(list(network.graph.nodes))) for leaves in pieces]
    frontier = Frontier(network, pieces, memory)
    for stop in boundaries(network, len(name)):
        frontier.advance(stop, got.hooks(between(network, frontier.next, stop)))
    assert_same(copies(list(frontier.outputs())), copies(expected))
    assert got.seen.keys() == walked.seen.keys() == set(network.graph.nodes)
    for node, calls in walked.seen.items():
        assert_same(got.seen[node], calls)


class Calls(TorchDispatchMode):
    """Counts the operators that torch executes."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["residual", "bert", "lstm", "tied"])
def test_stopping_before_every_node_executes_what_one_walk_does(name):
    network = specimen(name)[1]
    pieces = pieces_of(name, network)
    with Calls() as walked:
        for leaves in pieces:
            walk(network, leaves, {})
    frontier = Frontier(network, pieces)
    with Calls() as got:
        for node in list(network.graph.nodes)[1:]:
            frontier.advance(node)
        frontier.advance(None)
    assert got.count == walked.count > len(pieces)


@pytest.mark.parametrize("name", NAMES)
def test_only_what_is_still_read_is_held(name):
    network = specimen(name)[1]
    frontier = Frontier(network, pieces_of(name, network))
    nodes = list(network.graph.nodes)
    for i, stop in enumerate(nodes[1:], 1):
        frontier.advance(stop)
        read = {source for node in nodes[i:] for source in node.all_input_nodes} & set(nodes[:i])
        assert frontier.live == {node for node in read if node.op not in ("get_attr", "placeholder")}
    frontier.advance(None)
    assert frontier.live == {nodes[-1]}


def test_values_go_as_soon_as_their_last_reader_has_run():
    network = captured(lambda self, x: self.linear(x).exp().tanh().sin().cos() + x)
    chain = [node for node in network.graph.nodes if node.op == "call_function"]
    seen: dict[fx.Node, Any] = {}
    alive: list[list[str]] = []

    def hook(node: fx.Node) -> Any:
        def watch(args: Any, value: Tensor) -> None:
            seen[node] = weakref.ref(value)
            alive.append([other.name for other, value in seen.items() if value() is not None])

        return watch

    Frontier(network, [[torch.randn(2, 4)]]).advance(None, {node: hook(node) for node in chain})
    # When a node has just run, itself and its argument are there.
    assert alive == [[node.name for node in chain[max(0, i - 1) : i + 1]] for i in range(len(chain))]


# Memory and files --------------------------------------------------------------------------------------------------------------------


def test_memory_is_counted_and_bounded_and_files_go_with_their_last_value(monkeypatch):
    spools: list[Any] = []

    class Watched(frontier_module.Spool):
        def __init__(self) -> None:
            super().__init__()
            spools.append(weakref.ref(self))

    monkeypatch.setattr(frontier_module, "Spool", Watched)
    network = capture(nn.Sequential(conv(3, 8), nn.ReLU(), conv(8, 4), nn.ReLU(), nn.Flatten()).eval(), images()(2))
    first, second = (node for node in network.graph.nodes if node.target is aten.relu.default)
    pieces = [network.flat(images()(batch)) for batch in (4, 4, 4)]
    sizes = {first: 4 * 8 * 256 * 4, second: 4 * 4 * 256 * 4}
    for memory, in_memory in ((2**28, 3), (2 * sizes[first], 2), (0, 0)):
        spools.clear()
        frontier = Frontier(network, pieces, memory)
        frontier.advance(first)
        assert frontier.bytes == in_memory * sizes[first]
        frontier.advance(first.next)
        assert frontier.bytes == in_memory * sizes[first] and [spool() is not None for spool in spools] == [False, in_memory < 3]
        frontier.advance(second.next)
        assert frontier.bytes == (3 if memory else 0) * sizes[second]
        assert [spool() is not None for spool in spools] == [False, False, memory == 0]
        list(frontier.outputs())


@pytest.mark.parametrize(
    "value",
    [
        torch.randn(2, 30, 20, 20).to(memory_format=torch.channels_last),
        torch.randn(2, 90, 60).transpose(1, 2),
        torch.randn(40, 90, 10)[3:35, ::3, 1:],
        torch.randn(1, 1, 160).expand(5, 90, 160),
        torch.randn(90, 100).to(torch.bfloat16),
        torch.arange(20000) % 2 == 0,
        torch.zeros(0, 3),
        torch.tensor(3.0),
    ],
    ids=("channels last", "transposed", "strided", "expanded", "bfloat16", "bool", "empty", "scalar"),
)
def test_values_come_back_from_files_as_they_lay(value):
    packed = frontier_module._packed(value)
    got = frontier_module._unpacked({**packed, "data": packed["data"].clone()})
    assert_same(got, value)
    assert packed["data"].numel() <= value.numel() * value.element_size()


def writes_into_a_view(self: Any, x: Tensor) -> Tensor:
    y = self.linear(x)
    left = y[:, :2]
    left.add_(1.0)
    z = y * 2
    left.mul_(3.0)
    return torch.cat([z, y, left], 1)


@pytest.mark.parametrize("memory", [2**28, 0])
def test_memory_that_is_written_to_stays_shared(memory):
    network = captured(writes_into_a_view)
    assert any(str(node.target) == "aten.add_.Tensor" for node in network.graph.nodes)
    pieces = [[torch.randn(5, 4)], [torch.randn(2000, 4)]]
    frontier = Frontier(network, pieces, memory)
    for node in list(network.graph.nodes)[1:]:
        frontier.advance(node)
    for got, leaves in zip(frontier.outputs(), pieces, strict=True):
        assert_close(got, tuple(walk(network, leaves, {})), 0)


# Edits between stretches -------------------------------------------------------------------------------------------------------------


def layers_of(network: Network) -> list[fx.Node]:
    return [node for node in network.graph.nodes if node.target in (aten.linear.default, aten.conv2d.default, aten.conv1d.default)]


@pytest.mark.parametrize("name", ["residual", "bert", "unet", "text"])
def test_weights_and_biases_replaced_before_their_layer_are_the_new_ones(name):
    network = specimen(name)[1].copy()
    pieces = pieces_of(name, network)
    before = [walk(network, leaves, {}) for leaves in pieces]
    frontier = Frontier(network, pieces)
    for layer in layers_of(network):
        frontier.advance(layer)
        weight = layer.args[1]
        assert isinstance(weight, fx.Node)
        old = network.tensor(str(weight.target)).detach()
        set_constant(network, weight, old * 1.25)
        set_bias(network, layer, torch.full(old.shape[:1], 0.125))
    got = list(frontier.outputs())
    network.recompile()
    for one, leaves, old in zip(got, pieces, before, strict=True):
        expected = walk(network, leaves, {})
        assert_close(one, tuple(expected), 0)
        assert any(not torch.equal(a, b) for a, b in zip(expected, old, strict=True))


def test_hooks_replace_values_of_inputs_constants_and_nodes():
    network = captured(lambda self, x: self.linear(x) + x + self.count)
    nodes = list(network.graph.nodes)
    x = next(node for node in nodes if node.op == "placeholder")
    count = next(node for node in nodes if node.op == "get_attr" and node.target.endswith("count"))
    linear = next(node for node in nodes if node.target is aten.linear.default)
    replaced = {x: torch.full((2, 4), 2.0), count: torch.tensor(5.0), linear: torch.full((2, 4), 3.0)}
    leaves = [torch.randn(2, 4)]
    for memory in (2**28, 0):
        frontier = Frontier(network, [leaves, leaves], memory)
        for node in nodes:
            frontier.advance(node.next if node.op != "output" else None, {node: lambda args, value, n=node: replaced[n]} if node in replaced else {})
        assert [output[0].tolist() for output in frontier.outputs()] == [[[10.0] * 4] * 2] * 2


def test_values_are_those_at_the_frontier():
    network = capture(Net(lambda net, x: net.two(net.one(x).relu()), one=nn.Linear(4, 5), two=nn.Linear(5, 3)).eval(), torch.randn(2, 4))
    one, two = layers_of(network)
    pieces = [[torch.randn(2, 4)], [torch.randn(3, 4)]]
    frontier = Frontier(network, pieces)
    frontier.advance(two)
    relu, weight = two.args[0], two.args[1]
    assert isinstance(relu, fx.Node) and isinstance(weight, fx.Node)
    found: dict[str, list[Tensor]] = {"relu": [], "two": []}
    for leaves in pieces:
        walk(network, leaves, {relu: lambda args, value: found["relu"].append(value), two: lambda args, value: found["two"].append(value)})
    assert_close(list(frontier.values(relu)), found["relu"], 0)
    assert_close(list(frontier.values(two)), found["two"], 0)
    assert_close(list(frontier.values(next(iter(frontier.ports)))), [leaves[0] for leaves in pieces], 0)
    set_constant(network, weight, torch.zeros(3, 5))
    assert [int(value.abs().sum()) for value in frontier.values(weight)] == [0, 0]
    with pytest.raises(ValueError, match=r"the value of linear is not known|the value of \w+ is not known"):
        list(frontier.values(network.graph.output_node()))
    with pytest.raises(ValueError, match="does not lie ahead: the frontier stands before"):
        frontier.advance(one)
    with pytest.raises(ValueError, match="has a hook but is not among"):
        frontier.advance(None, {one: lambda args, value: None})
    assert len(list(frontier.outputs())) == 2 and len(list(frontier.outputs())) == 2


def test_joined_pieces_are_read_as_they_are_asked_for():
    one, two = [[torch.tensor(1)], [torch.tensor(2)]], [[torch.tensor(3)]]
    joined = Joined(one, two)
    assert len(joined) == 3 and [int(leaves[0]) for leaves in joined] == [1, 2, 3]

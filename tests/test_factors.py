"""Layers as factors in the graph: what they compute, what they are called, what they cost, and which layers cannot be factored."""

# pyright: reportIndexIssue=false, reportArgumentType=false, reportOptionalMemberAccess=false, reportAttributeAccessIssue=false, reportCallIssue=false
# pyright: reportOperatorIssue=false

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from small_nets import Net, conv, like, operators, task_of, weight
from torch import nn
from zoo import ZOO, assert_close, specimen

from downsize.factoring.costs import Costs
from downsize.factoring.forms import Decomposed, Known, composed
from downsize.factoring.ladder import imitated, judged
from downsize.factoring.layers import Layer, joined, layers_of, say_as_linear
from downsize.factoring.options import Option, by_error, by_program, by_share, cost_of, error_of, undominated, ways_of
from downsize.factoring.rewriting import Product, put
from downsize.network.capture import capture
from downsize.network.cost import count
from downsize.network.fold import fold_constants
from downsize.network.lineage import Lineage
from downsize.network.network import Network
from downsize.pruning.latency import layer_shapes
from downsize.structure import flatten
from downsize.task import Task

KINDS = ("linear", "conv", "embedding")
FORMS = ("channel", "spatial", "tucker", "separable", "tensor_train", "cp")
IMAGE = torch.zeros(2, 6, 12, 12)


def plain(model: nn.Module, example: Any) -> Network:
    network = capture(model.eval(), example)
    say_as_linear(network)
    return network


def full_rank(*layers: Layer) -> tuple[list[Product], float]:
    """In the form that needs no kernel, at the rank that loses nothing."""
    made, dense = Decomposed(layers, [layer.dense.weight for layer in layers], Known(), ("channel",)), layers[0].dense
    ranks = (min(len(dense.weight) // dense.groups, dense.weight[0].numel()),)
    name = {"linear": "matrix", "conv": "channel", "embedding": "table"}[layers[0].kind]
    return made.products("tied" if made.is_tied else name, ranks)


def can_channel(layer: Layer) -> bool:
    return layer.kind != "conv" or layer.dense.weight.shape[1] > 1


def error(one: Network, two: Network, inputs: Any) -> float:
    pairs = zip(flatten(one.predict(inputs))[0], flatten(two.predict(inputs))[0], strict=True)
    return max(float((a - b).abs().max() / a.abs().max().clamp(min=1e-30)) for a, b in pairs if a.is_floating_point())


# In the graph -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [one.name for one in ZOO])
def test_factors_of_full_rank_compute_the_same(name: str):
    _, network = specimen(name)
    network = network.fork()
    fold_constants(network)
    say_as_linear(network)
    layers, _ = layers_of(network, KINDS)
    made = network.fork()
    put(made, [product for site in apart(layers) if can_channel(site[0]) for product in full_rank(*site)[0]])
    assert len(made.graph.nodes) > len(network.graph.nodes)
    for batch in (1, 3):
        inputs = next(one for one in ZOO if one.name == name).inputs(batch)
        assert_close(made.predict(inputs), specimen(name)[1].predict(inputs), 2e-5)


def test_factors_have_names_and_places_of_their_layer():
    torch.manual_seed(0)
    network = plain(nn.Sequential(conv(6, 8, bias=False), nn.Flatten(), nn.Linear(8 * 144, 5)), IMAGE)
    before = {str(node.target): node.name for node in network.graph.nodes if node.op == "call_function"}
    made = network.fork()
    layers, left = layers_of(made, KINDS)
    assert left == {} and [(layer.name, layer.kind) for layer in layers] == [("0.weight", "conv"), ("2.weight", "linear")]
    put(made, [product for layer in layers for product in full_rank(layer)[0]])
    assert {name for name, _ in made.named_tensors()} == {"0.first.weight", "0.second.weight", "2.first.weight", "2.second.weight", "2.bias"}
    assert all(isinstance(tensor, nn.Parameter) and tensor.requires_grad for _, tensor in made.named_tensors())
    assert operators(made)["conv2d"] == operators(made)["linear"] == 2
    last = {str(node.target): node for node in made.graph.nodes if node.op == "call_function"}
    assert last["aten.linear.default"].name == before["aten.linear.default"]
    assert {node.meta["module"] for node in made.graph.nodes if node.target is torch.ops.aten.linear.default} == {"2"}


def test_a_bias_takes_the_shift():
    torch.manual_seed(0)
    for bias in (True, False):
        network = plain(nn.Linear(4, 3, bias=bias), torch.zeros(2, 4))
        layer = layers_of(network, KINDS)[0][0]
        (product,), _ = full_rank(layer)
        put(network, [replace(product, shift=torch.tensor([1.0, 2.0, 3.0]))])
        x = torch.randn(5, 4)
        expected = x @ layer.dense.weight.T + torch.tensor([1.0, 2.0, 3.0])
        expected = expected + network.tensor("bias") - torch.tensor([1.0, 2.0, 3.0]) if bias else expected
        assert_close(network.predict(x), expected, 1e-5)


def test_names_that_are_taken_are_not_taken_again():
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.first = weight(4, 5), weight(4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.linear(x, self.weight, self.first)

    x = torch.randn(3, 5)
    network = plain(nn.Sequential(Own()), x)
    made = network.fork()
    put(made, full_rank(layers_of(made, KINDS)[0][0])[0])
    assert {name for name, _ in made.named_tensors()} == {"0.weight_first", "0.second.weight", "0.first"}
    assert error(network, made, x) < 1e-5
    put(made, [product for layer in layers_of(made, KINDS)[0] for product in full_rank(layer)[0]])
    assert error(network, made, x) < 1e-5


class Heads(nn.Module):
    """Three layers that read the same value, and one that reads another."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k, self.v, self.out = nn.Linear(12, 10), nn.Linear(12, 6, bias=False), nn.Linear(12, 8), nn.Linear(10, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.tanh(x)
        return torch.cat([self.out(self.q(x)), self.k(x), self.v(x)], -1)


def test_layers_that_read_the_same_value_share_the_first_factor():
    x = torch.randn(64, 12, generator=torch.Generator().manual_seed(0))
    network = plain(Heads(), x)
    layers, _ = layers_of(network, KINDS)
    groups = joined(network, layers)
    assert [[layer.name for layer in group] for group in groups] == [["q.weight", "k.weight", "v.weight"], ["out.weight"]]
    made = Decomposed(groups[0], [layer.dense.weight for layer in groups[0]], Known(), FORMS)
    products, loss = made.products("matrix", (12,))
    assert loss < 1e-20 and len({id(product.factors[0]) for product in products}) == 1
    joint = network.fork()
    put(joint, products)
    assert operators(joint)["linear"] == 5 and error(network, joint, x) < 1e-5
    assert [name for name, _ in joint.named_tensors() if "first" in name] == ["q.first.weight"]
    # Each layer counts alike, however large its outputs are: the mean of the relative errors is what is least.
    products, loss = made.products("matrix", (4,))
    parts = [(composed(product) - product.layer.dense.weight.double()).square().sum() for product in products]
    wholes = [product.layer.dense.weight.double().square().sum() for product in products]
    assert loss == pytest.approx(float(sum(a / b for a, b in zip(parts, wholes, strict=True)) / 3))


def test_a_weight_that_two_calls_use_is_factored_once():
    _, network = specimen("tied")
    layers, left = layers_of(network, ("linear",))
    assert [layer.name for layer in layers] == ["block.weight"] and len(layers[0].readers) == 2
    assert list(left.values()) == ["its weight is a table and a linear layer's in one: what must name both kinds"]
    made = network.fork()
    put(made, full_rank(layers[0])[0])
    assert operators(made)["linear"] == operators(network)["linear"] + 2
    assert {name for name, _ in made.named_tensors() if name.startswith("block")} == {"block.first.weight", "block.second.weight", "block.bias"}
    assert_close(made.predict(like(torch.zeros(2, 9, dtype=torch.int64), 3, 0)), network.predict(like(torch.zeros(2, 9, dtype=torch.int64), 3, 0)))


def test_a_weight_stays_where_one_of_its_layers_has_a_computed_bias():
    def forward(net: Net, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(torch.tanh(nn.functional.linear(x, net.w, net.b)), net.w, net.b * x.mean())

    network = plain(Net(forward, w=weight(6, 6), b=weight(6)), torch.zeros(2, 6))
    assert layers_of(network, KINDS) == ([], {"w": "its bias is computed"})


def test_products_with_a_constant_become_linear_layers():
    x = torch.randn(5, 4)
    network = capture(Net(lambda net, x: torch.addmm(net.b, x, net.a) @ net.c, a=weight(4, 7), b=weight(7), c=weight(7, 3)).eval(), x)
    expected = network.predict(x)
    say_as_linear(network)
    assert operators(network) == {"linear": 2}
    assert_close(network.predict(x), expected, 1e-6)
    assert [layer.name for layer in layers_of(network, KINDS)[0]] == ["a_transposed", "c_transposed"]


def test_what_cannot_be_factored_says_why():
    def forward(net: Net, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.conv2d(net.sparse(x), net.kernel * 2).mean((2, 3)) @ net.twice @ net.twice

    parts = {"sparse": conv(6, 6), "kernel": weight(4, 6, 1, 1), "twice": weight(4, 4)}
    network = capture(Net(forward, **parts).eval(), IMAGE)
    network.keep_zeros("sparse.weight")
    say_as_linear(network)
    layers, left = layers_of(network, KINDS)
    assert layers == []
    reasons = ["must stay: factorize first, then sparsify", "its weight is computed", "matmul.default has no"]
    assert all(any(reason in told for told in left.values()) for reason in reasons)


def test_the_rank_is_an_axis_of_the_lineage():
    network = plain(nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 4)), torch.zeros(2, 12))
    layer = layers_of(network, KINDS)[0][0]
    products, _ = Decomposed((layer,), (layer.dense.weight,), Known(), FORMS).products("matrix", (5,))
    put(network, products)
    axes = [axis for axis in Lineage(network).axes if ("0.first.weight", 0) in axis.carriers]
    assert len(axes) == 1 and axes[0].units == 5 and axes[0].exact and ("0.second.weight", 1) in axes[0].carriers


# What they compute and cost ---------------------------------------------------------------------------------------------------------


CONVOLUTIONS = {
    "plain": conv(6, 8),
    "stride, padding, dilation": nn.Conv2d(6, 10, (3, 5), (2, 1), (1, 3), (2, 1)),
    "groups": nn.Conv2d(6, 12, 3, 1, 1, groups=2),
    "1 x 1": nn.Conv2d(6, 8, 1, 2, bias=False),
}


def apart(layers: Sequence[Layer]) -> list[tuple[Layer, ...]]:
    """Each layer alone, but for a table and the linear layer that has its weight."""
    shared = {id(layer.dense): tuple(one for one in layers if one.dense is layer.dense) for layer in layers}
    return list(shared.values())


def of_every_form(layers: Sequence[Layer], share: float, forms: Sequence[str] = FORMS) -> list[tuple[str, list[Product]]]:
    """For each form a list of products, one for each layer that it suits, at a middle rank."""
    found: dict[str, list[Product]] = {}
    for site in apart(layers):
        made = Decomposed(site, [layer.dense.weight for layer in site], Known(), forms)
        for form, group in itertools.groupby(made.candidates(1), key=lambda one: one[0]):
            ranks = [ranks for _, ranks in group]
            found.setdefault(form, []).extend(made.products(form, ranks[int(share * (len(ranks) - 1))])[0])
    return list(found.items())


@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_a_product_is_one_weight(kind: str):
    """Oracle: the factors, run one after another."""
    network = plain(CONVOLUTIONS[kind], IMAGE)
    x = like(IMAGE, 3, 1)
    cases = of_every_form(layers_of(network, KINDS)[0], 0.5)
    assert len(cases) >= 1
    for _, products in cases:
        products = [replace(product, shift=torch.arange(product.layer.width).float()) for product in products]
        made = network.fork()
        put(made, products)
        assert error(made, imitated(network, products), x) < 1e-5


def test_so_is_that_of_a_convolution_over_time_and_of_a_table():
    model = Net(lambda net, ids: net.conv(net.table(ids).transpose(1, 2)), table=nn.Embedding(50, 6), conv=nn.Conv1d(6, 8, 3, 2, 1))
    ids = torch.randint(0, 50, (3, 11), generator=torch.Generator().manual_seed(0))
    network = plain(model, ids)
    cases = of_every_form(layers_of(network, KINDS)[0], 0.5)
    assert {form for form, _ in cases} >= {"table", "channel"}
    for _, products in cases:
        products = [replace(product, shift=torch.arange(product.layer.width).float()) for product in products]
        made = network.fork()
        put(made, products)
        assert error(made, imitated(network, products), ids) < 1e-5


class Ruler:
    """A clock whose times are the MACs of a layer with its bias, in nanoseconds."""

    def milliseconds(self, shapes: Sequence[Any]) -> list[float]:
        return [1e-6 * float(np.prod(shape.operands[1].shape)) * np.prod(shape.operands[0].shape) + 1e-3 * len(shape.operands) for shape in shapes]


@pytest.mark.parametrize("name", ["residual", "shuffle", "text", "tied", "encoder", "lstm"])
def test_costs_are_those_of_the_network_with_factors(name: str):
    """Oracle: the counts of the network in which the factors really stand, and the shapes of its layers."""
    model, network = specimen(name)
    example = next(one for one in ZOO if one.name == name).inputs(2)
    task = Task(model, example, {"calibrate": lambda: [(example, None)]}, clock=Ruler())
    layers, _ = layers_of(network, KINDS)
    assert {form for form, _ in of_every_form(layers, 0.3)} >= ({"tied"} if name == "tied" else set())
    for _, products in of_every_form(layers, 0.3, FORMS[:-1]):
        products = [replace(product, shift=torch.ones(product.layer.width)) for product in products]
        made = network.fork()
        put(made, products)
        kept = [layer for layer in layers if all(product.layer is not layer for product in products)]
        for measure in ("macs", "parameters", "size", "latency"):
            costs = Costs(network, task, measure)
            rest = costs.whole(network) - costs.dense(*layers)
            assert rest + costs.dense(*kept) + costs.of(products) == pytest.approx(costs.whole(made), rel=1e-9)


def test_a_shared_factor_costs_once():
    x = torch.randn(8, 12)
    network = plain(Heads(), x)
    layers = joined(network, layers_of(network, KINDS)[0])[0]
    products, _ = Decomposed(layers, [layer.dense.weight for layer in layers], Known(), FORMS).products("matrix", (4,))
    made = network.fork()
    put(made, products)
    rest = count(network, x), count(made, x)
    dense = 12 * (10 + 6 + 8)
    for measure, unit in (("macs", 8), ("parameters", 1), ("size", 4)):
        costs = Costs(network, task_of(Heads().eval(), x), measure)
        assert costs.of(products) == unit * 4 * (12 + 10 + 6 + 8)
        assert sum(map(costs.dense, layers)) == unit * dense
    assert rest[0].macs - rest[1].macs == 8 * (dense - 4 * (12 + 24))


def test_the_shapes_that_are_timed_are_those_of_the_layers():
    model = nn.Sequential(CONVOLUTIONS["stride, padding, dilation"], nn.ReLU(), conv(10, 4, bias=False)).eval()
    network = plain(model, IMAGE[:1])
    seen = []

    class Clock:
        def milliseconds(self, shapes: Sequence[Any]) -> list[float]:
            seen.extend(map(str, shapes))
            return [1.0] * len(shapes)

    task = Task(model, IMAGE[:1], {"calibrate": lambda: [(IMAGE, None)]}, clock=Clock())
    costs = Costs(network, task, "latency")
    layers, _ = layers_of(network, KINDS)
    # A network spells out fewer of a layer's arguments than the factors do, and yet a layer is measured once.
    costs.dense(*layers)
    assert seen == [str(shape) for shape in layer_shapes(network, IMAGE[:1]).values()]
    for _, products in of_every_form(layers, 0.5):
        made = network.fork()
        put(made, products)
        seen.clear()
        costs.of(products)
        assert set(seen) <= set(map(str, layer_shapes(made, IMAGE[:1]).values()))
        assert len(seen) == sum(len(product.factors) for product in products)


# Which is taken ---------------------------------------------------------------------------------------------------------------------


def options(seed: int, levels: int, layer: Layer) -> list[Option]:
    generator = np.random.default_rng(seed)
    costs, errors = generator.integers(1, 50, levels), generator.random(levels)
    return [Option((layer,), "matrix", (i,), float(e), float(c), float(e)) for i, (c, e) in enumerate(zip(costs, errors, strict=True))]


@pytest.fixture
def layer() -> Layer:
    return layers_of(plain(nn.Linear(4, 3), torch.zeros(2, 4)), KINDS)[0][0]


def test_ways_are_the_undominated_sums(layer: Layer):
    """Oracle: all combinations."""
    alone = [options(seed, 5, layer) for seed in range(3)]
    together = options(9, 6, layer)
    points = [(cost_of(way), error_of(way)) for way in [*itertools.product(*alone), *((one,) for one in together)]]
    front = {p for p in points if not any(q[0] <= p[0] and q[1] <= p[1] and q != p for q in points)}
    found = [(cost_of(way), error_of(way)) for way in ways_of(alone, together)]
    assert set(found) == front and len(found) == len(front) > 3
    assert found == sorted(found, reverse=True)


def test_the_program_takes_the_least_error_within_the_limit(layer: Layer):
    """Oracle: all combinations."""
    sites = [[(one,) for one in undominated(options(seed, 6, layer))] for seed in range(4)]
    for most in (60.0, 100.0):
        every = [sum(combination, ()) for combination in itertools.product(*sites)]
        best = min(error_of(way) for way in every if cost_of(way) + 20 <= most)
        found = by_program(sites, "macs", most, 20.0)
        assert cost_of(tuple(found)) + 20 <= most and error_of(tuple(found)) == pytest.approx(best, rel=2e-3)


def test_shares_and_energies_go_layer_by_layer(layer: Layer):
    site = [(one,) for one in undominated([Option((layer,), "dense", (), 0.0, 60.0), *options(3, 12, layer)])]
    (half,) = by_share([site], 0.5)
    assert half.cost <= 30 and half.error == min(error_of(way) for way in site if cost_of(way) <= 30)
    (near,) = by_error([site], 0.4)
    assert near.own <= 0.4 and near.cost == min(cost_of(way) for way in site if way[0].own <= 0.4)


def test_errors_between_those_judged_are_interpolated_and_never_fall(layer: Layer):
    rising = [Option((layer,), "matrix", (20 - i,), 0.001 * 1.3**i, 20.0 - i) for i in range(20)]
    seen = []

    def judge(option: Option) -> float:
        seen.append(option)
        return 0.5 * option.own**1.5

    found = judged(rising, judge)
    assert len(seen) == 5
    # A power law is a line in logarithms, so that the interpolation is exact.
    assert [option.error for option in found] == pytest.approx([0.5 * option.own**1.5 for option in found])
    noisy = judged(rising, lambda option: 1.0 if option is rising[5] else 0.1)
    errors = [option.error for option in noisy]
    assert errors == sorted(errors)

"""Reconstruction: regions by hand, errors measured by running the whole network, the best rounding by brute force, and real files."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from small_nets import FOLDER, Net, conv, like, plain, task_of, weight
from torch import Tensor, fx, nn
from torch.nn.functional import avg_pool2d, relu6
from zoo import BY_NAME, specimen

from downsize.network.capture import capture
from downsize.network.network import Network
from downsize.network.rewrite import constant, set_constant
from downsize.network.statistics import walk
from downsize.numerics.grids import weight_grid
from downsize.quantization import fitting
from downsize.quantization.fitting import Fitting
from downsize.quantization.insertion import FAKE, quantize_weights
from downsize.quantization.placement import WeightPoint, place
from downsize.quantization.reconstruction import Reconstruction, reconstruct
from downsize.quantization.regions import regions, twin_name
from downsize.quantization.rounding import round_weights
from downsize.techniques.quantize import Quantize
from downsize.testing import loaded_equals_live, simulation_equals_artifact

IMAGE = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
FEW = Reconstruction(steps=120)


def rounded(network: Network, bits: int) -> Network:
    """A fork with all weights on grids of so many bits, rounded to nearest."""
    made = network.fork()
    quantize_weights(made, place(made).weights, weight_grid(bits))
    made.recompile()
    return made


def pieces(network: Network, example: Any, seeds: range, batch: int = 8) -> list[list[Tensor]]:
    return [network.flat(like(example, batch, seed)) for seed in seeds]


def tensors(network: Network) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in network.named_tensors()}


def values_at(network: Network, name: str, data: list[list[Tensor]]) -> Tensor:
    found: list[Tensor] = []
    node = next(node for node in network.graph.nodes if node.name == name)
    for leaves in data:
        walk(network, leaves, {node: lambda args, value: found.append(value)})
    return torch.cat([value.flatten() for value in found])


def error_at(network: Network, reference: Network, part: Any, data: list[list[Tensor]]) -> float:
    found, wanted = values_at(network, part.exit.name, data), values_at(reference, twin_name(part.exit), data)
    return float((found - wanted).double().square().mean())


class Bottlenecks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.wide, self.deep, self.narrow = conv(3, 8), conv(8, 24, 1), conv(24, 24, groups=24), conv(24, 8, 1)
        self.inner, self.head = conv(8, 8), nn.Linear(128, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        x = self.narrow(relu6(self.deep(relu6(self.wide(x)))))
        x = torch.relu(x + self.inner(x))
        return self.head(avg_pool2d(x, 4).flatten(1))


def bottlenecks() -> nn.Module:
    torch.manual_seed(0)
    return Bottlenecks().eval()


# Regions -----------------------------------------------------------------------------------------------------------------------------


def test_parts_are_bottlenecks_branches_and_what_follows_them():
    network = rounded(plain(bottlenecks(), IMAGE), 3)
    found = [(part.name, part.entry.name, part.exit.name, len(part.layers), part.batched) for part in regions(network)]
    assert found == [
        ("stem", "x", "relu", 1, True),
        ("wide", "relu", "conv2d_3", 3, True),
        ("inner", "conv2d_3", "linear", 2, True),
    ]


def test_layers_that_share_their_way_with_others_are_parts_alone():
    two = Net(lambda net, x, y: net.c(torch.relu(net.a(x)) * torch.sigmoid(net.b(y))), a=conv(3, 8), b=conv(3, 8), c=conv(8, 4))
    example = (IMAGE, IMAGE + 1)
    network = rounded(plain(two, example), 3)
    found = {part.name: (part.entry.name, part.exit.name) for part in regions(network)}
    assert found == {"a": ("x_0", "relu"), "b": ("x_1", "conv2d_1"), "c": ("mul", "conv2d_2")}


@pytest.mark.parametrize("name", ["plain", "residual", "dense", "shuffle", "unet", "vit", "lstm", "tied"])
def test_parts_compute_their_exits_from_their_entries_and_share_nothing(name):
    _, reference = specimen(name)
    network = rounded(reference, 4)
    leaves = network.flat(BY_NAME[name].inputs(3))
    parts = regions(network)
    nodes = [node for part in parts for node in part.nodes]
    assert len(nodes) == len(set(nodes))
    assert {layer for part in parts for layer in part.layers} == set(place(reference).on(network).layers)
    seen: dict[fx.Node, Tensor] = {}
    ends = {node for part in parts for node in (part.entry, part.exit)}
    walk(network, leaves, {node: lambda args, value, node=node: seen.update({node: value.clone()}) for node in ends})
    for part in parts:
        assert torch.equal(Fitting(network, reference, part).output(seen[part.entry]), seen[part.exit]), part.name


# What it is worth --------------------------------------------------------------------------------------------------------------------


def test_the_rounding_of_rows_is_never_better_than_the_best_of_all_and_nearer_to_it_than_where_it_began(monkeypatch):
    monkeypatch.setattr(fitting, "FEWEST_COLUMNS", 1)
    torch.manual_seed(1)
    layer, mixing = nn.Linear(10, 32).eval(), torch.randn(3, 10)
    data = [[torch.randn(64, 3) @ mixing + 0.1 * torch.randn(64, 10)] for _ in range(4)]
    reference = plain(layer, data[0][0])
    network = rounded(reference, 4)
    weight, step, x = layer.weight.detach(), network.tensor("weight_step").detach()[:, None], torch.cat([leaves[0] for leaves in data])
    ups = torch.tensor(list(itertools.product((0.0, 1.0), repeat=10)))
    codes = ((weight / step).floor()[:, None] + ups).clamp(-8, 7)  # [rows, all choices, columns]
    # The bias takes the mean error.
    best = torch.stack([((code * one - row) @ x.T).var(1, correction=0).min() for code, one, row in zip(codes, step, weight, strict=True)])

    def errors(of: Network) -> Tensor:
        return (torch.cat([walk(of, leaves, {})[0] for leaves in data]) - layer(x).detach()).var(0, correction=0)

    before = errors(network)
    reconstruct(reference, network, data, data, Reconstruction(steps=300, most_samples=256))
    after = errors(network)
    assert (after >= best * 0.999).all()
    assert after.sum() - best.sum() < 0.6 * (before.sum() - best.sum())


@pytest.mark.parametrize("start", ["nearest", "gptq"])
def test_no_part_becomes_worse_on_held_back_data_and_the_whole_becomes_better(start):
    reference = plain(bottlenecks(), IMAGE)
    network = rounded(reference, 3)
    fit, held = pieces(reference, IMAGE, range(8)), pieces(reference, IMAGE, range(100, 103))
    if start == "gptq":
        round_weights(reference, network, fit)
    before, old = network.fork(), tensors(network)
    lines: list[str] = []
    reconstruct(reference, network, fit, held, FEW, lines.append)
    new, mixed = tensors(network), before.fork()
    for part in regions(network):
        errors = [error_at(mixed, reference, part, held)]
        # From here on the part's own tensors are the new ones; those ahead are the old ones.
        sources = {source for node in part.nodes for source in node.all_input_nodes}
        sources |= {source for node in sources if node.target is FAKE for source in node.all_input_nodes}
        for node in mixed.graph.nodes:
            if node.op == "get_attr" and node.target in {source.target for source in sources if source.op == "get_attr"}:
                set_constant(mixed, node, new[str(node.target)])
        mixed.recompile()
        errors.append(error_at(mixed, reference, part, held))
        assert errors[1] <= errors[0] * (1 + 1e-6), part.name
    changed = [name for name in old if not torch.equal(old[name], new[name])]
    assert changed and len(lines) == len(regions(network))
    last = regions(network)[-1]
    assert error_at(network, reference, last, held) < 0.9 * error_at(before, reference, last, held)


def test_weights_are_on_their_grids_and_zeros_stay():
    model = bottlenecks()
    with torch.no_grad():
        model.inner.weight[:, ::2] = 0.0  # type: ignore[union-attr, index]
    reference = plain(model, IMAGE)
    network = rounded(reference, 3)
    fit = pieces(reference, IMAGE, range(6))
    reconstruct(reference, network, fit, fit[:2], FEW)
    moved = network.tensor("inner.weight").detach()
    assert not torch.equal(moved, reference.tensor("inner.weight"))
    assert (moved[:, ::2] == 0).all() and moved.count_nonzero() > 0
    for node in [node for node in network.graph.nodes if node.target is FAKE]:
        tensor, step, zero = (constant(network, argument) for argument in node.args[:3])
        assert tensor is not None
        if str(node.args[0].target) == "inner.weight":
            assert torch.equal(FAKE(tensor, step, zero, *node.args[3:]), tensor.detach())


def test_groups_of_columns_are_rounded_too():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 48), nn.ReLU(), nn.Linear(48, 4)).eval()
    example = torch.randn(4, 40)
    reference = plain(model, example)
    network = rounded(reference, 3)
    grouped = torch.ops.downsize.fake_quantize_groups.default
    for node in [node for node in network.graph.nodes if node.target is FAKE]:
        matrix = network.tensor(str(node.args[0].target)).detach()
        step = matrix.reshape(len(matrix), -1, 4).abs().amax(2) / 3
        set_constant(network, node.args[1], step)
        set_constant(network, node.args[2], torch.ones_like(step, dtype=torch.int32))
        node.target, node.args = grouped, (*node.args[:3], 4, -4, 3)
    network.recompile()
    fit, held = pieces(reference, example, range(8), 16), pieces(reference, example, range(50, 54), 16)
    part = regions(network)[-1]
    before = error_at(network, reference, part, held)
    reconstruct(reference, network, fit, held, Reconstruction(steps=150))
    assert error_at(network, reference, part, held) < 0.8 * before
    for node in [node for node in network.graph.nodes if node.target is grouped]:
        tensor, *grid = (constant(network, argument) for argument in node.args[:3])
        assert tensor is not None and torch.allclose(grouped(tensor, *grid, *node.args[3:]), tensor, atol=1e-6)


# Laws --------------------------------------------------------------------------------------------------------------------------------


def test_no_steps_change_nothing_and_equal_seeds_give_equal_networks():
    reference = plain(bottlenecks(), IMAGE)
    fit = pieces(reference, IMAGE, range(4))

    def made(settings: Reconstruction) -> str:
        network = rounded(reference, 3)
        with torch.random.fork_rng():
            torch.manual_seed(torch.seed() % 1000)  # the global generator has no say
            reconstruct(reference, network, fit, fit[:2], settings)
        return network.fingerprint()

    assert made(Reconstruction(steps=0)) == rounded(reference, 3).fingerprint()
    once = made(Reconstruction(steps=20))
    assert once == made(Reconstruction(steps=20)) != made(Reconstruction(steps=0))
    assert once != made(Reconstruction(steps=20, seed=1))


@pytest.mark.parametrize("bits", [pytest.param(4, marks=pytest.mark.slow), 8])
def test_with_quantized_activations_steps_are_learned_and_the_file_computes_what_was_simulated(bits):
    model = bottlenecks()
    network = Quantize(bits=3, activation_bits=bits, rounding="nearest", equalize=False, correct=False)(capture(model, IMAGE), task_of(model, IMAGE))
    reference = plain(model, IMAGE)
    fit, held = pieces(reference, IMAGE, range(10)), pieces(reference, IMAGE, range(60, 63))
    old, x = tensors(network), like(IMAGE, 8, 500)
    expected = reference.predict(x)
    before = float((network.predict(x) - expected).norm())
    reconstruct(reference, network, fit, held, FEW)
    new = tensors(network)
    steps = [name for name in old if name.endswith("_step") and not torch.equal(old[name], new[name])]
    assert any(not name.endswith("weight_step") for name in steps) and float((network.predict(x) - expected).norm()) < before
    path = FOLDER / f"reconstructed-{bits}.onnx"
    from downsize.network.onnx_file import write

    write(network, path)
    simulation_equals_artifact(network, path, x)
    loaded_equals_live(network, x)


def test_a_shared_weight_stays():
    shared = Net(lambda net, x: nn.functional.linear(torch.relu(nn.functional.linear(x, net.w)), net.w), w=weight(6, 6))
    example = torch.randn(4, 6)
    reference = plain(shared, example)
    network = reference.fork()
    quantize_weights(network, [WeightPoint(point.node, point.axis) for point in place(network).weights], weight_grid(3))
    network.recompile()
    old = network.fingerprint()
    fit = pieces(reference, example, range(4))
    reconstruct(reference, network, fit, fit, FEW)
    assert network.fingerprint() == old


def test_weights_that_are_not_quantized_stay_and_get_no_gradients():
    reference = plain(bottlenecks(), IMAGE)
    network = reference.fork()
    quantize_weights(network, [point for point in place(network).weights if point.node.target == "inner.weight"], weight_grid(3))
    network.recompile()
    old, fit = tensors(network), pieces(reference, IMAGE, range(4))
    reconstruct(reference, network, fit, fit, FEW)
    new = tensors(network)
    assert {name for name in old if not torch.equal(old[name], new[name])} == {"inner.weight", "inner.bias"}
    assert all(parameter.grad is None for parameter in [*reference.parameters(), *network.parameters()])

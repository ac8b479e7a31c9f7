"""Hard concrete gates: formulas by hand and by Monte Carlo, gates in a graph, the expected cost, and prune(importance="gates")."""

# pyright: reportIndexIssue=false

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from digits_task import batches, convolutional, digits, mlp, task_of
from small_nets import Net, like
from torch import nn
from zoo import specimen

import downsize as ds
from downsize.errors import SpecError, TaskError
from downsize.network.capture import capture
from downsize.network.lineage import Lineage
from downsize.network.masked import masked
from downsize.network.network import Network
from downsize.pruning.costs import Costs, macs_of
from downsize.pruning.sites import sites
from downsize.techniques.finetune import Finetune
from downsize.techniques.prune import Prune
from downsize.testing import check_technique
from downsize.training.gates import NEAR, START, Gates, gated, openness, sampled, settled, train_gates
from downsize.training.hook import Learner
from downsize.training.plan import Training


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def network_and_task(model: nn.Module) -> tuple[Network, ds.Task]:
    task = task_of(model)
    return capture(model, digits()[0][:2]), dataclasses.replace(task, data={**task.data, "train": lambda: batches(0, 1000)})


def gates_of(network: Network, most: float = 0.5) -> tuple[Network, Gates]:
    lineage, edited = Lineage(network), network.fork()
    found = [site for site in sites(lineage) if site.whole]
    cost = Costs(lineage, [site.axis for site in found]).macs
    return edited, Gates(edited, found, cost, most * macs_of(network), 1e-3)


# Formulas --------------------------------------------------------------------------------------------------------------------------


def test_formulas_by_hand():
    """At location 0: s = 1/2, so the gate is 1/2; open with probability sigmoid(2/3 log 11) = 1 / (1 + 11^(-2/3))."""
    zero = torch.zeros(1, dtype=torch.float64)
    assert float(settled(zero)) == pytest.approx(0.5)
    assert float(openness(zero)) == pytest.approx(1 / (1 + 11 ** (-2 / 3)))
    assert float(sampled(zero, zero + 0.5)) == pytest.approx(0.5)
    # u = 0.9: s = sigmoid(1.5 log 9) = 27 / 28
    assert float(sampled(zero, zero + 0.8)) == pytest.approx(1.2 * 8 / 9 - 0.1)  # sigmoid(1.5 log 4) = 8 / 9
    assert float(sampled(zero, zero + 0.9)) == pytest.approx(1.0)  # sigmoid(1.5 log 9) = 27 / 28, stretched above 1
    assert settled(torch.tensor([-3.0, 3.0])).tolist() == [0.0, 1.0]
    assert float(settled(torch.tensor(START))) == 1.0


@pytest.mark.parametrize("location", [-2.0, -0.5, 0.0, 1.0, 2.5])
def test_the_probability_to_be_open_is_that_of_draws(location: float):
    """Oracle: 200,000 draws; five standard errors."""
    count = 200_000
    uniform = torch.rand(count, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    draws = sampled(torch.full((count,), location, dtype=torch.float64), uniform)
    chance = float(openness(torch.tensor(location, dtype=torch.float64)))
    assert float((draws > 0).double().mean()) == pytest.approx(chance, abs=5 * math.sqrt(chance * (1 - chance) / count))
    assert float(draws.min()) >= 0 and float(draws.max()) <= 1


def test_gradients_of_draws_are_those_of_finite_differences():
    location = torch.tensor([-0.7, 0.1, 0.6], dtype=torch.float64, requires_grad=True)
    uniform = torch.tensor([0.6, 0.5, 0.3], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: sampled(x, uniform), location)
    assert torch.autograd.gradcheck(openness, location)


def test_the_inputs_of_a_weight_are_multiplied_by_their_units_gates():
    location, drawing = torch.tensor([-9.0, 0.0]), torch.tensor(False)
    made = gated(torch.ones(2, 4, 1), location, torch.full((2,), 0.99), drawing, torch.tensor([0, 1, -1, 1]))
    assert made[:, :, 0].tolist() == [[0.0, 0.5, 1.0, 0.5]] * 2
    assert gated(torch.ones(1, 2), location, torch.full((2,), 0.99), ~drawing, torch.tensor([0, 1])).tolist() == [[0.0, 1.0]]


# In a graph ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["residual", "depthwise", "vit", "bert", "segformer"])
def test_closed_gates_compute_what_masks_do_and_open_ones_change_nothing(name: str):
    """Oracle: the uncut network in which what reads the closed units reads zeros."""
    _, network = specimen(name)
    edited, gates = gates_of(network)
    inputs = network.flat(_inputs(name))
    with torch.no_grad():
        before, same = network.graph_module(*inputs)[0], edited.graph_module(*inputs)[0]
        assert torch.equal(before, same)
        site, prefix = gates.found[0], gates.names[0]
        edited.tensor(f"{prefix}.location")[1] = -9.0
        closed = edited.graph_module(*inputs)[0]
        oracle = masked(Lineage(network), {site.axis.name: [1]}).graph_module(*inputs)[0]
    scale = float(before.abs().max())
    assert float((closed - oracle).abs().max()) <= 1e-5 * scale and not torch.equal(closed, before)


def _inputs(name: str) -> Any:
    from zoo import BY_NAME

    return BY_NAME[name].inputs(3)


def test_settled_gates_compute_the_same_in_the_old_graph():
    network, _ = network_and_task(convolutional())
    edited, gates = gates_of(network.copy())
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name in gates.names:
            location = edited.tensor(f"{name}.location")
            location.copy_(2 * torch.randn(location.shape, generator=generator))
        expected = edited.predict(digits()[0][:7])
        locations = {site.axis.name: edited.tensor(f"{name}.location").clone() for site, name in zip(gates.found, gates.names, strict=True)}
    scores = gates.settle(edited)
    torch.testing.assert_close(edited.predict(digits()[0][:7]), expected, rtol=1e-5, atol=1e-5)
    assert [str(node.target) for node in edited.graph.nodes] == [str(node.target) for node in network.graph.nodes]
    assert scores.keys() == locations.keys() and all(torch.equal(scores[axis].float(), locations[axis]) for axis in scores)
    edited.check()


def test_the_expected_cost_is_that_of_drawn_networks():
    """Oracle: the mean MACs over 4,000 draws of which units of 64-128-128-10 are open, counted as products of widths; five standard errors."""
    network, _ = network_and_task(mlp())
    edited, gates = gates_of(network)
    with torch.no_grad():
        for number, name in enumerate(gates.names):
            location = edited.tensor(f"{name}.location")
            location.copy_(torch.linspace(-3, 2 + number, len(location)))
    chances = [openness(edited.tensor(f"{name}.location").detach()) for name in gates.names]
    generator = torch.Generator().manual_seed(0)
    one, two = (torch.bernoulli(chance.expand(4000, -1), generator=generator).sum(1) for chance in chances)
    macs = (64 * one + one * two + two * 10) / (64 * 128 + 128 * 128 + 128 * 10)
    assert float(gates.expected(edited).detach()) == pytest.approx(float(macs.mean()), abs=5 * float(macs.std()) / math.sqrt(4000))


def test_the_multiplier_grows_while_too_much_is_open_and_falls_to_zero_else():
    network, _ = network_and_task(mlp())
    edited, gates = gates_of(network, most=0.3)
    learner = Learner(edited, {}, 100, step=60)
    gates.after(learner)
    first = float(gates.multiplier)
    gates.after(learner)
    assert 0 < first < float(gates.multiplier) and not gates.ready(learner)
    other = Gates(network.fork(), gates.found, gates.cost, 1.0, 1e-3)
    other.restore(gates.state())
    assert other.multiplier == gates.multiplier
    with torch.no_grad():
        for name in gates.names:
            edited.tensor(f"{name}.location").fill_(-2.0)
    for _ in range(50):
        gates.after(learner)
    assert float(gates.multiplier) == 0 and gates.ready(learner)


# Training and pruning --------------------------------------------------------------------------------------------------------------


def test_training_meets_the_cost_and_closes_what_is_of_no_use():
    """Half of the hidden units are read with almost nothing: nearly all of these close first."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 4)).eval()
    useless = torch.arange(32) % 2 == 0
    with torch.no_grad():
        model[2].weight[:, useless] *= 1e-3
    example = torch.zeros(2, 8)
    data = [(like(example, 32, seed), None) for seed in range(8)]
    network, task = capture(model, example), ds.Task(model, example, {"calibrate": lambda: data})
    settings = Prune(macs=0.5, importance="gates", tune=True).settings()
    settings = dataclasses.replace(settings, most=0.5 * macs_of(network))
    made, scores = train_gates(network, task, Training(steps=200), settings)
    ((name, score),) = scores.items()
    assert float(openness(score).mean()) == pytest.approx(0.5, abs=2 * NEAR)
    assert int(useless[score.argsort()[:16]].sum()) >= 14, name
    closed = settled(score) == 0
    assert int(closed.sum()) >= 12 and not bool(made.tensor("2.weight")[:, closed].any())


@pytest.mark.parametrize("model", [mlp, convolutional])
def test_pruning_by_gates_obeys_the_laws_and_keeps_the_skill(model: Any):
    network, task = network_and_task(model())
    technique = Prune(macs=0.5, importance="gates", tune=Finetune(epochs=10, rate=2e-3))
    made = technique(network, task)
    assert macs_of(made) <= 0.5 * macs_of(network) and made.origin["pruned"]["by"] == "gates"
    right = sum(int((made.predict(x).argmax(1) == y).sum()) for x, y in batches(1400, 1797)) / 397
    dense = sum(int((network.predict(x).argmax(1) == y).sum()) for x, y in batches(1400, 1797)) / 397
    assert right > dense - 0.04, (right, dense)
    check_technique(Prune(ratio=0.6, importance="gates", tune=Training(steps=20), samples=0), network, task)


@pytest.mark.parametrize("fields", [{"macs": 0.5}, {"latency": 0.5, "tune": True}, {"macs": 0.5, "what": ("layers",), "tune": True}])
def test_gates_without_a_plan_or_an_amount_for_them_are_refused(fields: dict[str, Any]):
    with pytest.raises(SpecError, match="expected one of these and tune"):
        Prune(importance="gates", **fields)


def test_a_network_whose_units_are_read_otherwise_has_no_place_for_gates():
    model = Net(lambda net, x: net.one(x).cumsum(1) * net.scale, one=nn.Linear(4, 6), scale=nn.Parameter(torch.ones(6))).eval()
    network = capture(model, torch.zeros(2, 4))
    task = ds.Task(model, torch.zeros(2, 4), {"calibrate": lambda: [(torch.randn(4, 4), None)]})
    with pytest.raises(TaskError, match="no place for gates"):
        train_gates(network, task, Training(steps=2), Prune(macs=0.5, importance="gates", tune=True).settings())

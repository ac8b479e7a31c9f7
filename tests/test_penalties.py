"""Proximal penalties: closed forms by hand, exact zeros in training, and what slimming leaves to prune()."""

# pyright: reportIndexIssue=false, reportCallIssue=false

from __future__ import annotations

import dataclasses

import pytest
import torch
from digits_task import batches, convolutional, digits, mlp, task_of
from small_nets import like
from small_nets import task_of as random_task
from torch import nn
from zoo import shake, specimen

import downsize as ds
from downsize.errors import TaskError
from downsize.network.capture import capture
from downsize.network.lineage import Lineage
from downsize.network.network import Network
from downsize.pruning.sites import sites
from downsize.techniques.finetune import Finetune
from downsize.techniques.prune import Prune
from downsize.training.hook import Learner
from downsize.training.penalties import PENALTIES, GroupL1, hooks_for, shrink_units, soft_threshold, unit_squares


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def parameters(network: Network) -> dict[str, nn.Parameter]:
    return {name: tensor for name, tensor in network.named_tensors() if isinstance(tensor, nn.Parameter)}


def convolutional_task() -> tuple[Network, ds.Task]:
    task = task_of(convolutional())
    return capture(convolutional(), digits()[0][:2]), dataclasses.replace(task, data={**task.data, "train": lambda: batches(0, 1000)})


def two_layers() -> tuple[nn.Sequential, Network]:
    """3 - 2 - 1: unit 0 has weights 3, 0, 4 and bias 0 and is read with 12; unit 1 has 0.3, 0, 0 and bias 0.4, read with 0."""
    model = nn.Sequential(nn.Linear(3, 2), nn.ReLU(), nn.Linear(2, 1))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[3.0, 0, 4], [0.3, 0, 0]]))
        model[0].bias.copy_(torch.tensor([0.0, 0.4]))
        model[2].weight.copy_(torch.tensor([[12.0, 0]]))
    return model, capture(model.eval(), torch.zeros(2, 3))


# Closed forms ----------------------------------------------------------------------------------------------------------------------


def test_soft_threshold_by_hand():
    tensor = torch.tensor([1.0, -1.0, 0.25, -0.25, 0.0, 0.5])
    soft_threshold(tensor, 0.5)
    assert tensor.tolist() == [0.5, -0.5, 0.0, 0.0, 0.0, 0.0]


@pytest.mark.parametrize("value", [-2.0, -0.3, 0.0, 0.1, 1.5])
def test_soft_threshold_is_the_minimum(value: float):
    """Oracle: brute force over a grid of (x - value)^2 / 2 + 0.4 |x|."""
    grid = torch.linspace(-3, 3, 60001, dtype=torch.float64)
    best = grid[((grid - value).square() / 2 + 0.4 * grid.abs()).argmin()]
    tensor = torch.tensor([value], dtype=torch.float64)
    soft_threshold(tensor, 0.4)
    assert float(tensor[0]) == pytest.approx(float(best), abs=2e-4)


def test_a_units_norm_goes_over_all_its_tensors_by_hand():
    """Unit 0: 3, 0, 4, 0 and 12: norm 13, 5 entries. Unit 1: 0.3 and 0.4: norm 0.5."""
    _, network = two_layers()
    (axis,) = [site.axis for site in sites(Lineage(network))]
    squares, entries = unit_squares(axis, parameters(network))
    assert squares.tolist() == pytest.approx([169.0, 0.25]) and entries.tolist() == [5.0, 5.0]


def test_units_shrink_by_the_threshold_and_small_ones_become_zero_by_hand():
    """A threshold of 1 (0.1 * strength 10 / sqrt(5) * sqrt(5)): 13 becomes 12; 0.5 becomes 0, bias and all; the output's bias stays."""
    _, network = two_layers()
    before = network.tensor("2.bias").detach().clone()
    learner = Learner(network, parameters(network), 1, step=1, rate=0.1)
    GroupL1(network, 10 / 5**0.5).after(learner)
    (axis,) = [site.axis for site in sites(Lineage(network))]
    assert unit_squares(axis, parameters(network))[0].sqrt().tolist() == pytest.approx([12.0, 0.0])
    assert network.tensor("0.weight").tolist() == [pytest.approx([3 * 12 / 13, 0, 4 * 12 / 13]), [0, 0, 0]]
    assert network.tensor("2.weight").tolist() == [pytest.approx([144 / 13, 0])] and float(network.tensor("0.bias")[1].detach()) == 0
    assert torch.equal(network.tensor("2.bias"), before)


def test_the_group_step_is_the_minimum():
    """Oracle: gradient descent on |x - x0|^2 / 2 + t sqrt(n) |x| over all weights of one unit, in double precision."""
    _, network = two_layers()
    (axis,) = [site.axis for site in sites(Lineage(network))]
    tensors = {name: tensor.detach().double().clone() for name, tensor in parameters(network).items()}
    start = torch.tensor([3.0, 0, 4, 0, 12], dtype=torch.float64)
    x = start.clone().requires_grad_()
    for _ in range(3000):
        (slope,) = torch.autograd.grad((x - start).square().sum() / 2 + 0.7 * 5**0.5 * x.norm(), x)
        x = (x - 0.02 * slope).detach().requires_grad_()
    shrink_units(axis, tensors, 0.7)
    found = torch.cat([tensors["0.weight"][0], tensors["0.bias"][:1], tensors["2.weight"][0, :1]])
    assert found.tolist() == pytest.approx(x.tolist(), abs=1e-6)


@pytest.mark.parametrize("name", ["residual", "depthwise", "shuffle", "vit", "bert", "llama"])
def test_shrunk_units_are_dead_in_every_architecture(name: str):
    """Oracle: what group_l1 makes zero can be cut, and the cut network gives what the whole one gives."""
    _, network = specimen(name)
    network = network.copy()
    found = sites(Lineage(network))
    site = next(site for site in found if site.axis.exact)
    tensors = parameters(network)
    squares, entries = unit_squares(site.axis, tensors)
    least = int((squares / entries).argmin())
    with torch.no_grad():
        for (key, dim), unit in site.axis.carriers.items():
            if key in tensors:
                tensors[key].index_fill_(dim, torch.from_numpy(unit == least).nonzero()[:, 0], 1e-6)
    shrink_units(site.axis, tensors, 1e-3)
    left = unit_squares(site.axis, tensors)[0]
    assert float(left[least]) == 0 and int((left == 0).sum()) == 1


# In training -----------------------------------------------------------------------------------------------------------------------


def zeros(network: Network, names: list[str]) -> float:
    return sum(float((network.tensor(name) == 0).sum()) for name in names) / sum(network.tensor(name).numel() for name in names)


def test_l1_makes_exact_zeros_more_of_them_when_stronger_and_none_at_zero():
    network, task = convolutional_task()
    shares = []
    for strength in (0.0, 0.3, 1.0):
        made = Finetune(steps=40, rate=2e-3).train(network, task, hooks=hooks_for(network, "l1", strength))
        shares.append(zeros(made, ["0.weight", "3.weight", "8.weight"]))
    assert shares[0] == 0 and 0.05 < shares[1] < shares[2] < 1, shares
    plain = Finetune(steps=40, rate=2e-3).train(network, task)
    neutral = Finetune(steps=40, rate=2e-3).train(network, task, hooks=hooks_for(network, "l1", 0.0))
    assert all(torch.equal(tensor, neutral.tensor(name)) for name, tensor in plain.named_tensors())


def test_group_l1_makes_the_weak_units_zero_and_prune_takes_them_without_any_change_of_outputs():
    """32 units, of which every other has weights 50 times smaller. Oracle: the network with the dead units itself."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 4)).eval()
    weak = torch.arange(32) % 2 == 0
    with torch.no_grad():
        model[0].weight[weak] *= 0.02
        model[0].bias[weak] *= 0.02
        model[2].weight[:, weak] *= 0.02
    example = torch.zeros(2, 8)
    network, task = capture(model, example), random_task(model, example, 8)
    plan = Finetune(steps=40, rate=0.01, optimizer="sgd")
    made = plan.train(network, task, hooks=hooks_for(network, "group_l1", 0.25))
    (site,) = sites(Lineage(made))
    dead = unit_squares(site.axis, parameters(made))[0] == 0
    assert torch.equal(dead, weak)
    cut = Prune(ratio=0.5, importance="l2", multiple=1)(made, task)
    assert cut.tensor("0.weight").shape == (16, 8)
    inputs = like(example, 64, 99)
    assert float((cut.predict(inputs) - made.predict(inputs)).norm() / made.predict(inputs).norm()) < 1e-5


def test_units_without_scale_are_cut_without_any_change_of_outputs():
    """Slimming, then prune(importance="scale"). Oracle: the slimmed network itself; its readers take over what dead units give for ever,
    exactly, as the reading convolution has no padding. Half of the units are dead before, and these are what goes."""
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Conv2d(3, 32, 3), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()])
    shake(model)
    example = torch.zeros(2, 3, 6, 6)
    network, task = capture(model.eval(), example), random_task(model, example, 24)
    hooks = hooks_for(network, "scale", 1.0)
    order = network.tensor("1.weight").detach().abs().argsort()
    made = network
    for _ in range(40):
        made = Finetune(steps=20, rate=5e-3, clip=None).train(made, task, hooks=hooks)
        if int((made.tensor("1.weight") == 0).sum()) >= 16:
            break
    dead = made.tensor("1.weight").detach() == 0
    assert 16 <= int(dead.sum()) < 32 and not torch.equal(order[:16].sort().values, torch.arange(16))
    left = (32 - int(dead.sum())) // 8 * 8 + 8 * (int(dead.sum()) % 8 != 0)
    cut = Prune(ratio=left / 32, importance="scale")(made, task)
    assert cut.tensor("0.weight").shape[0] == left and left < 32
    inputs = like(example, 16, 99)
    gap = (cut.predict(inputs) - made.predict(inputs)).norm() / made.predict(inputs).norm()
    assert float(gap) < 1e-4


# Names and refusals ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("penalty", "strength", "says"),
    [("l2", 1.0, "there is no penalty 'l2'"), ("l1", -1.0, "expected a number of 0 or more"), ("scale", 1.0, "no batch norm with a gain")],
)
def test_what_cannot_be_penalised_is_refused(penalty: str, strength: float, says: str):
    network = capture(mlp(), digits()[0][:2])
    with pytest.raises(TaskError, match=says):
        hooks_for(network, penalty, strength)


def test_a_network_without_layers_has_nothing_to_penalise():
    network = capture(nn.Sequential(nn.ReLU()).eval(), torch.zeros(2, 3))
    for penalty in PENALTIES:
        with pytest.raises(TaskError, match=f"nothing for penalty='{penalty}'"):
            hooks_for(network, penalty, 1.0)


def test_l1_and_scale_act_on_what_they_are_named_for():
    """Everything that l1 and scale act on is what is named so: weights of layers, gains of norms; biases are left alone."""
    network, _ = convolutional_task()
    learner = Learner(network.copy(), {}, 1, step=1, rate=1.0)
    learner.parameters = parameters(learner.network)
    before = {name: tensor.detach().clone() for name, tensor in learner.parameters.items()}

    def changed() -> set[str]:
        return {name for name, tensor in learner.parameters.items() if not torch.equal(tensor, before[name])}

    hooks_for(network, "scale", 0.01)[0].after(learner)
    assert changed() == {"1.weight", "4.weight"}
    hooks_for(network, "l1", 0.01)[0].after(learner)
    assert changed() == {"1.weight", "4.weight", "0.weight", "3.weight", "8.weight"}


def test_frozen_tensors_are_left_alone():
    network, task = convolutional_task()
    made = Finetune(steps=3, freeze=("0.weight",)).train(network, task, hooks=hooks_for(network, "l1", 1.0))
    assert torch.equal(made.tensor("0.weight"), network.tensor("0.weight"))
    assert not torch.equal(made.tensor("3.weight"), network.tensor("3.weight"))

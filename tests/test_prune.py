"""prune() as a whole: what it leaves, what it loses, chains with other techniques, and what it refuses."""

# pyright: reportIndexIssue=false, reportArgumentType=false, reportOptionalMemberAccess=false, reportAttributeAccessIssue=false, reportCallIssue=false

from __future__ import annotations

import functools
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from small_nets import Net, conv, like, task_of
from torch import Tensor, nn
from zoo import BY_NAME, block, head, shake, specimen

from downsize.errors import AllocationError, CutError, SpecError, TaskError
from downsize.network.capture import capture
from downsize.network.lineage import Lineage
from downsize.network.network import Network
from downsize.network.onnx_file import write
from downsize.pruning.costs import Costs, evaluate
from downsize.pruning.pieces import collected
from downsize.pruning.structure import prune as prune_in_rounds
from downsize.recipe import Recipe
from downsize.structure import flatten
from downsize.task import Task
from downsize.techniques import TECHNIQUES
from downsize.techniques.prune import Prune
from downsize.techniques.quantize import Quantize
from downsize.techniques.sparsify import Sparsify
from downsize.testing import check_technique, loaded_equals_live, neutral_equals_identity, simulation_equals_artifact

IMAGE = torch.zeros(2, 3, 16, 16)


class Residual(nn.Module):
    """Two residual blocks over 16 channels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = block(3, 16), head(16)
        self.ones = nn.ModuleList(nn.Sequential(block(16, 32), nn.Conv2d(32, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for one in self.ones:
            x = torch.relu(x + one(x))
        return self.head(x)


@functools.cache
def residual() -> tuple[Network, Task]:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = Residual()
    shake(model)
    model.eval()
    return capture(model, IMAGE), task_of(model, IMAGE, batches=12)


def perceptron(*widths: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for one, two in itertools.pairwise(widths):
        layers += [nn.Linear(one, two), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def made_by(model: nn.Module, example: Any, technique: Any, batches: int = 12) -> tuple[Network, Network, Task]:
    torch.manual_seed(0)
    network = capture(model.eval(), example)
    task = task_of(model, example, batches)
    return network, technique(network, task), task


def macs(network: Network) -> float:
    return evaluate(Costs(Lineage(network), ()).macs, ())


def error(one: Network, two: Network, inputs: Any) -> float:
    a, b = flatten(one.predict(inputs))[0][0], flatten(two.predict(inputs))[0][0]
    return float((a - b).norm() / a.norm())


# What remains -----------------------------------------------------------------------------------------------------------------------


def test_a_pruned_network_obeys_the_laws():
    network, task = residual()
    made = check_technique(Prune(macs=0.5), network, task)
    assert 0.4 * macs(network) < macs(made) <= 0.5 * macs(network)
    assert any("->" in told for told in made.origin["pruned"]["widths"].values())


@pytest.mark.parametrize("fields", [{"parameters": 0.5}, {"ratio": 0.5}, {"macs": 0.5, "scope": "layer"}, {"macs": 0.5, "refit": False}])
def test_what_remains_is_at_most_what_was_asked_for(fields: dict[str, Any]):
    network, task = residual()
    made = Prune(**fields)(network, task)
    elements = [sum(tensor.numel() for tensor in one.parameters()) for one in (network, made)]
    assert elements[1] < 0.6 * elements[0] and macs(made) < 0.6 * macs(network)


@pytest.mark.parametrize("importance", ["l1", "l2", "scale", "taylor", "geometric_median", "energy", "random"])
def test_every_importance_prunes(importance: Any):
    network, task = residual()
    made = Prune(macs=0.6, importance=importance, fold=False)(network, task)
    assert macs(made) <= 0.6 * macs(network)
    assert made.origin["pruned"]["by"] == importance


@pytest.mark.parametrize("fields", [{"ratio": 1.0}, {"macs": 1.0}, {"macs": 1.0, "fold": False}])
def test_nothing_to_remove_is_the_identity(fields: dict[str, Any]):
    network, task = residual()
    neutral_equals_identity(network, Prune(**fields)(network, task), like(IMAGE, 3, 1), tolerance=1e-5)


def test_absolute_amounts_are_those_numbers():
    network, task = residual()
    whole = macs(network)
    assert macs(Prune(macs=0.7 * whole)(network, task)) <= 0.7 * whole


def test_widths_are_multiples():
    torch.manual_seed(0)
    _, made, _ = made_by(perceptron(16, 64, 64, 4), torch.zeros(2, 16), Prune(macs=0.5))
    widths = [tensor.shape[0] for name, tensor in made.named_tensors() if name.endswith("weight")][:-1]
    assert all(width % 8 == 0 for width in widths) and min(widths) < 64


def test_rounds_reach_the_same_amount_and_tune_between():
    network, task = residual()
    seen = []

    def tune(one: Network) -> Network:
        seen.append(macs(one) / macs(network))
        return one

    prune_in_rounds(network, task, Prune(macs=0.5, rounds=2).settings(), tune)
    assert len(seen) == 2 and 0.5 < seen[0] <= 0.5**0.5 and seen[1] <= 0.5


def test_rounds_are_repaired_towards_the_original():
    """Oracle: one round. Two rounds lose about as much; with targets of other channels they would lose all."""
    torch.manual_seed(0)
    model = perceptron(32, 64, 64, 8)
    network, once, task = made_by(model, torch.zeros(2, 32), Prune(ratio=0.5), batches=80)
    twice = Prune(ratio=0.5, rounds=2)(network, task)
    inputs = like(torch.zeros(2, 32), 256, 999)
    assert error(network, twice, inputs) < 1.3 * error(network, once, inputs)


def test_ladders_rise_and_prune_nothing():
    network, task = residual()
    before = network.fingerprint()
    ladders = Prune(macs=0.5).ladder(network, task)
    assert len(ladders) == 3 and network.fingerprint() == before
    for ladder in ladders:
        assert ladder.errors[0] == 0 and list(ladder.errors) == sorted(ladder.errors)
        assert list(ladder.widths) == sorted(ladder.widths, reverse=True)


# What is lost -----------------------------------------------------------------------------------------------------------------------


def test_redundant_neurons_cost_nothing():
    """Oracle: a hidden layer whose second half repeats the first, with other factors, can be halved without any change."""
    torch.manual_seed(0)
    model = perceptron(16, 32, 4)
    with torch.no_grad():
        model[0].weight[16:], model[0].bias[16:] = 2 * model[0].weight[:16], 2 * model[0].bias[:16]
    network, made, _ = made_by(model, torch.zeros(2, 16), Prune(ratio=0.5, multiple=1, damping=0.01), batches=40)
    assert made.tensor("0.weight").shape == (16, 16)
    assert error(network, made, like(torch.zeros(2, 16), 64, 5)) < 2e-2


def test_constant_units_go_into_the_bias():
    """Oracle: units whose inputs have no weight give relu(bias); without them the readers' bias takes that over, with or without refit."""
    for refit in (True, False):
        torch.manual_seed(0)
        model = perceptron(16, 32, 4)
        with torch.no_grad():
            model[0].weight[::2] = 0
            model[0].bias[::2] = torch.rand(16) + 0.5
        network, made, _ = made_by(model, torch.zeros(2, 16), Prune(ratio=0.5, multiple=1, refit=refit), batches=40)
        assert error(network, made, like(torch.zeros(2, 16), 64, 5)) < (1e-2 if refit else 2e-2)


def test_repair_helps_and_surgery_beats_norms():
    """On held-out inputs: obs with refit < l2 with refit < l2 without."""
    torch.manual_seed(0)
    model = perceptron(32, 128, 64, 8)
    losses = []
    for fields in ({}, {"importance": "l2"}, {"importance": "l2", "refit": False}):
        network, made, _ = made_by(model, torch.zeros(2, 32), Prune(ratio=0.5, **fields), batches=80)
        losses.append(error(network, made, like(torch.zeros(2, 32), 256, 999)))
    assert losses[0] < losses[1] < losses[2]


def test_global_allocation_beats_the_same_share_everywhere():
    network, task = residual()
    inputs = like(IMAGE, 16, 77)
    assert error(network, Prune(macs=0.6)(network, task), inputs) < error(network, Prune(macs=0.6, scope="layer")(network, task), inputs)


def test_without_data_it_says_so():
    network, task = residual()
    made = Prune(macs=0.5, samples=0)(network, task)
    assert macs(made) <= 0.5 * macs(network)
    assert "without data" in made.origin["pruned"]["by"]


def test_batch_norms_that_were_not_folded_are_measured_again():
    """Oracle: a channel's share of a batch norm's input that was cut is missing in its mean and variance. A network that reads 48 channels
    which all say the same, of which half go, has half the mean: measured again, the norm makes up for it."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 48, 1), nn.ReLU(), nn.Conv2d(48, 8, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    ).train()
    with torch.no_grad():
        model[0].weight[:] = model[0].weight[:1] * (1 + 0.01 * torch.rand(48, 1, 1, 1))
        model[0].bias[:], model[2].weight[:] = 0.1, model[2].weight[:, :1]
    for seed in range(60):
        model(like(IMAGE, 8, seed))
    network, task = capture(model.eval(), IMAGE), task_of(model, IMAGE, batches=24)
    plain, again = (Prune(ratio=0.5, importance="l2", refit=False, fold=False, renormalise=wanted)(network, task) for wanted in (False, True))
    inputs = like(IMAGE, 16, 77)
    assert error(network, again, inputs) < 0.5 * error(network, plain, inputs)


# Layers -----------------------------------------------------------------------------------------------------------------------------


def test_layers_go_whole():
    network, task = residual()
    made = Prune(ratio=0.5, what=("layers",))(network, task)
    convolutions = [sum("conv2d" in str(node.target) for node in one.graph.nodes) for one in (network, made)]
    assert convolutions == [5, 3]


# Chains -----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "recipe",
    [
        "prune(macs=0.7) | prune(macs=0.7)",
        "prune(macs=0.6) | quantize()",
        "sparsify(sparsity=0.5) | quantize()",
        "sparsify(sparsity=0.5) | prune(macs=0.7)",
    ],
)
def test_chains_obey_the_laws(recipe: str, tmp_path: Path):
    network, task = residual()
    for technique in Recipe.parse(recipe, TECHNIQUES):
        network = technique(network, task)
    path = tmp_path / "model.onnx"
    write(loaded_equals_live(network, IMAGE), path)
    simulation_equals_artifact(network, path, like(IMAGE, 3, 5))


def test_zeros_stay_zeros():
    network, task = residual()
    sparse = Sparsify(sparsity=0.5)(network, task)
    made = Prune(macs=0.7)(sparse, task)
    made.check()
    left = dict(made.named_tensors())
    assert made.sparse == {name: most for name, most in sparse.sparse.items() if name in left} and made.sparse
    shares = [float((made.tensor(name) == 0).float().mean()) for name in made.sparse]
    assert min(shares) > 0.2


def test_a_quantized_network_is_refused():
    network, task = residual()
    with pytest.raises(CutError, match="prune first, then quantize"):
        Prune(macs=0.5)(Quantize(samples=16)(network, task), task)


@pytest.mark.parametrize("name", ["vit", "bert", "llama", "segformer", "unet", "dense", "gpt2", "lstm", "shuffle", "tied", "text"])
@pytest.mark.slow
def test_the_zoo_is_pruned(name: str):
    (model, network), inputs = specimen(name), BY_NAME[name].inputs
    data = [(inputs(batch), None) for batch in (4, 3, 5, 6)]
    task = Task(model, inputs(2), {"calibrate": lambda: data})
    kinds = {axis.kind for axis in Lineage(network).axes}
    what = tuple(kind for kind in ("channels", "heads", "neurons") if kind in kinds) or tuple(sorted(kinds))
    made = check_technique(Prune(macs=0.8, what=what, multiple=2), network, task)  # type: ignore[arg-type]
    assert macs(made) <= 0.8 * macs(network)


# Refusals ---------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({}, "no amount came; expected one of macs, parameters, latency, ratio"),
        ({"macs": 0.5, "ratio": 0.5}, "macs, ratio came; expected one of"),
        ({"macs": -1}, "greater than 0"),
        ({"ratio": 1.5}, "less than or equal to 1"),
        ({"macs": 0.5, "what": ("layers", "heads")}, "layers alone"),
        ({"macs": 0.5, "what": ("layers",), "samples": 0}, "samples above 0"),
        ({"latency": 0.5, "what": ("layers",)}, "instead of latency"),
        ({"macs": 0.5, "importance": "taylor", "samples": 0}, "needs data"),
        ({"mcas": 0.5}, "nearest: macs|did you mean|macs"),
    ],
)
def test_wrong_fields_are_refused(fields: dict[str, Any], says: str):
    with pytest.raises(SpecError, match=says):
        Prune(**fields)


def test_too_little_is_refused_with_what_can_be():
    network, task = residual()
    with pytest.raises(AllocationError, match="smallest value"):
        Prune(macs=1e-4)(network, task)


def test_nothing_to_cut_is_refused():
    model = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(TaskError, match="can be cut"):
        made_by(model, torch.zeros(2, 4), Prune(macs=0.5))


def test_one_sample_is_too_little():
    network, task = residual()
    data = [(like(IMAGE, 1, 0), None)]
    with pytest.raises(TaskError, match="expected at least two"):
        Prune(macs=0.5)(network, Task(task.model, IMAGE, {"calibrate": lambda: data}))


def test_three_samples_in_one_batch_are_parted():
    network, task = residual()
    data = [(like(IMAGE, 3, 0), None)]
    found = collected(network, Task(task.model, IMAGE, {"calibrate": lambda: data}), 512, 5)
    assert (len(found.fit), len(found.held)) == (2, 1)


def test_latency_needs_a_clock():
    network, task = residual()
    with pytest.raises(TaskError, match="measured in a runtime"):
        Prune(latency=0.5)(network, task)


class Clock:
    """Milliseconds as the multiply-accumulates of a layer, from its shape, in millions."""

    def milliseconds(self, shapes: Any) -> list[float]:
        found = []
        for shape in shapes:
            one, weight = shape.operands[0].shape, shape.operands[1].shape
            positions = one[-1] * one[-2] if "conv" in shape.operator else 1
            found.append(weight[0] * torch.Size(weight[1:]).numel() * positions * 1e-6)
        return found


def test_latency_is_met_by_the_clock():
    """Oracle: with a clock that counts multiply-accumulates, the summed latency of the pruned network's layers."""
    from dataclasses import replace

    from downsize.pruning.latency import predicted

    network, task = residual()
    made = Prune(latency=0.5)(network, replace(task, clock=Clock()))
    times = [predicted(Clock(), one, IMAGE[:1]) for one in (network, made)]
    assert 0.4 * times[0] < times[1] <= 0.5 * times[0]


def test_a_module_without_batch_norm_and_with_grouped_layers_is_pruned():
    parts = {"a": conv(3, 16), "b": conv(16, 16, groups=4), "c": conv(16, 16, groups=16), "d": nn.Linear(16, 5)}
    model = Net(lambda net, x: net.d(torch.relu(net.c(torch.relu(net.b(torch.relu(net.a(x)))))).mean((2, 3))), **parts)
    network, made, _ = made_by(model, IMAGE, Prune(macs=0.6, multiple=4))
    assert macs(made) <= 0.6 * macs(network)

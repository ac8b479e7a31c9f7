"""Sparsify on whole networks: what becomes zero, what the layers' errors are, and that no later step revives a zero."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import small_nets
import torch
from digits_task import batches, convolutional, digits, mlp, task_of
from small_nets import Net, conv
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm
from zoo import BY_NAME, specimen

import downsize as ds
from downsize.errors import SpecError, TaskError
from downsize.network.rewrite import aten
from downsize.network.statistics import walk
from downsize.numerics.sparsity import Quadratic
from downsize.pruning.sparsifying import Wanted, solve
from downsize.pruning.weights import Errors, ends, replace_weight, weights_of
from downsize.recipe import Recipe
from downsize.techniques.quantize import Quantize
from downsize.techniques.sparsify import Sparsify, split
from downsize.testing import check_technique, loaded_equals_live, neutral_equals_identity
from downsize.training.plan import Training

FAST = ("residual", "text")  # of what takes seconds each


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def net_task(model: nn.Module, example: Any, count: int = 8) -> tuple[ds.Network, ds.Task]:
    return ds.capture(model.eval(), example), small_nets.task_of(model, example, count)


def zeros(tensor: Tensor) -> Tensor:
    return tensor.detach() == 0


class Tied(nn.Module):
    """An autoencoder whose decoder reads the encoder's weight the other way round."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 4))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(nn.functional.linear(x, self.weight).relu(), self.weight.mT)


# What becomes zero -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"sparsity": 0.7}, {"pattern": "2:4"}], ids=str)
@pytest.mark.parametrize("name", [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in sorted(BY_NAME)])
def test_every_architecture_becomes_as_sparse_as_said(name, options, tmp_path):
    model, network = specimen(name)
    task = ds.Task(model, BY_NAME[name].inputs(2), {"calibrate": lambda: [(BY_NAME[name].inputs(batch), None) for batch in (3, 4, 5)]})
    taken = weights_of(network)
    if "pattern" in options and not any(weight.inputs % 4 == 0 for weight in taken):
        with pytest.raises(TaskError, match="multiple of 4 inputs"):
            Sparsify(keep_ends=False, **options)(network, task)
        return
    before = network.fingerprint()
    made = Sparsify(keep_ends=False, **options)(network, task)
    assert network.fingerprint() == before and made.sparse
    tensors, olds = dict(made.named_tensors()), dict(network.named_tensors())
    assert all(torch.equal(tensors[other], olds[other]) for other in olds if other not in made.sparse)
    assert {other for other in tensors} == set(olds)
    weights = {weight.name: weight for weight in taken}
    assert all(name in made.sparse for weight in taken for name in weight.names) or "pattern" in options or name in ("plain", "dense", "fusion")
    for weight in (weights[key] for key in made.origin["sparsified"]):
        matrix = weight.matrix(tensors[weight.name].detach())
        assert bool((matrix != 0).any(2).all()), weight.name
        if "pattern" in options:
            assert _most_of_four_inputs(tensors[weight.name].detach(), weight) == 2
    if "sparsity" in options:
        total = sum(weight.shape.numel() for weight in taken)
        kept = sum(int(torch.count_nonzero(tensors[weight.name])) for weight in taken)
        # one in each row stays
        assert kept == pytest.approx(0.3 * total, abs=sum(weight.rows for weight in taken)) and kept < total
    loaded_equals_live(made, BY_NAME[name].inputs(2), tmp_path)


def _most_of_four_inputs(tensor: Tensor, weight: Any) -> int:
    """The most values other than zero among four neighbouring inputs of one output at one position of the kernel."""
    if weight.layout == "columns":
        tensor = torch.cat([part.transpose(0, 1) for part in tensor.chunk(weight.groups)])
    return int((tensor != 0).unflatten(1, (-1, 4)).sum(2).max())


def test_magnitude_without_data_is_numpys_threshold():
    network, task = ds.capture(mlp(), digits()[0][:2]), task_of(mlp())
    made = Sparsify(sparsity=0.8, samples=0, allocation="uniform", keep_ends=False)(network, task)
    for name, new in made.named_tensors():
        old = network.tensor(name).detach().numpy()
        if name.endswith("weight"):
            kept = np.abs(old) >= np.sort(np.abs(old).ravel())[-round(0.2 * old.size)]
            kept[np.arange(len(old)), np.abs(old).argmax(1)] = True
            off = int((kept != (new.detach().numpy() != 0)).sum())
            # rows that would be empty take a place from the smallest of those above the threshold
            assert off <= 2 * len(old) and np.array_equal(new.detach().numpy(), np.where(zeros(new), 0, old))
            assert int(torch.count_nonzero(new)) == round(0.2 * old.size)
        else:
            assert np.array_equal(new.detach().numpy(), old)
    assert {told["method"] for told in made.origin["sparsified"].values()} == {"magnitude"}


@pytest.mark.parametrize("allocation", ["uniform", "global", "lamp", "erk"])
def test_every_allocation_keeps_the_same_number_and_uniform_the_same_share(allocation):
    network, task = ds.capture(mlp(), digits()[0][:2]), task_of(mlp())
    made = Sparsify(sparsity=0.9, samples=0, allocation=allocation, keep_ends=False)(network, task)
    kept = {name: int(torch.count_nonzero(made.tensor(name))) for name in ("1.weight", "3.weight", "5.weight")}
    sizes = {name: made.tensor(name).numel() for name in kept}
    assert sum(kept.values()) == pytest.approx(0.1 * sum(sizes.values()), abs=2)
    shares = {name: kept[name] / sizes[name] for name in kept}
    assert (max(shares.values()) < 0.101) == (allocation == "uniform")
    if allocation == "global":
        values = torch.cat([network.tensor(name).detach().abs().flatten() for name in kept])
        threshold = values.topk(sum(kept.values())).values[-1]
        above = {name: int((network.tensor(name).abs() >= threshold).sum()) for name in kept}
        assert all(kept[name] == pytest.approx(above[name], abs=10) for name in kept)
    if allocation == "erk":
        factors = [shares[name] * sizes[name] / sum(made.tensor(name).shape) for name in kept if shares[name] < 1]
        assert factors == pytest.approx([factors[0]] * len(factors), rel=0.01)


def test_the_first_and_last_layer_are_kept_unless_told():
    network, task = ds.capture(mlp(), digits()[0][:2]), task_of(mlp())
    assert set(Sparsify()(network, task).sparse) == {"3.weight"}
    assert set(Sparsify(keep_ends=False, allocation="uniform")(network, task).sparse) == {"1.weight", "3.weight", "5.weight"}
    # behind an embedding, the first layer is not the first
    _, encoder = specimen("text")
    first, last = weights_of(encoder)[0].name, weights_of(encoder)[-1].name
    assert ends(encoder, weights_of(encoder)) == {last} and first != last


def test_neutral_is_identity_and_leaves_no_mask():
    network, task = ds.capture(convolutional(), digits()[0][:2]), task_of(convolutional())
    made = Sparsify(sparsity=0.0, keep_ends=False)(network, task)
    assert neutral_equals_identity(network, made, digits()[0][:5]) == 0 and made.sparse == {}


@pytest.mark.slow
def test_the_contract_of_techniques_holds(tmp_path):
    for model in (mlp(), convolutional()):
        check_technique(Sparsify(sparsity=0.8, keep_ends=False), ds.capture(model, digits()[0][:2]), task_of(model), tmp_path)
    recipe = Recipe.parse("sparsify(pattern='2:4', method='surgeon') | quantize()")
    assert recipe == Recipe.parse(str(recipe)) and isinstance(recipe.steps[0], Sparsify) and recipe.steps[0].pattern == "2:4"


# Shared weights --------------------------------------------------------------------------------------------------------------------


def test_a_weight_that_runs_twice_is_pruned_once_and_an_embedding_never():
    model, network = specimen("tied")
    task = ds.Task(model, BY_NAME["tied"].inputs(2), {"calibrate": lambda: [(BY_NAME["tied"].inputs(8), None)]})
    made = Sparsify(sparsity=0.5, keep_ends=False)(network, task)
    assert [tensor.shape for name, tensor in made.named_tensors() if name in made.sparse] == [(12, 12)]
    assert int(torch.count_nonzero(made.tensor(next(iter(made.sparse))))) == 72
    linear = [node for node in made.graph.nodes if node.target is aten.linear.default]
    assert len(linear) == 3 and linear[0].args[1].target == linear[1].args[1].target
    told = next(iter(made.origin["sparsified"].values()))
    assert told["error"] is not None  # solved for, with both readings


def test_a_tensor_with_two_names_stays_one():
    one = nn.Linear(8, 8)
    model = Net(lambda net, x: net.two(torch.relu(net.one(x))), one=one, two=nn.Linear(8, 8))
    model.two.weight = one.weight  # type: ignore[union-attr]
    network, task = net_task(model, torch.randn(2, 8))
    made = Sparsify(keep_ends=False)(network, task)
    assert len({id(tensor) for name, tensor in made.named_tensors() if name.endswith("weight")}) == 1
    assert int(torch.count_nonzero(made.tensor(next(iter(made.sparse))))) == 32


# Errors and choices ----------------------------------------------------------------------------------------------------------------


def grouped() -> nn.Module:
    torch.manual_seed(0)
    layers = [conv(3, 8, stride=2), nn.ReLU(), conv(8, 12, groups=4, dilation=2), nn.ReLU(), nn.Flatten(2), nn.Conv1d(12, 6, 3), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(12, 5)).eval()


def test_errors_are_those_of_the_layers_outputs_in_the_changed_network():
    network, task = net_task(grouped(), torch.randn(2, 3, 8, 8))
    student, parts = network.fork(), split(network, lambda: task.batches("calibrate"), 32, 8)
    errors = Errors(network, student, parts)
    for weight in weights_of(network):
        quadratics = errors(weight)
        tensor = network.tensor(weight.name).detach()
        trial = tensor + 0.1 * torch.randn(tensor.shape, generator=torch.Generator().manual_seed(1))
        for part, quadratic in zip(parts, quadratics, strict=True):
            assert quadratic.error(weight.matrix(trial)) == pytest.approx(_error_by_running(network, student, weight, trial, part), rel=1e-3)
        replace_weight(student, weight, weight.matrix(tensor * (tensor.abs() > 0.1)))
    assert any(not torch.equal(student.tensor(w.name), network.tensor(w.name)) for w in weights_of(network))


def _error_by_running(teacher: ds.Network, student: ds.Network, weight: Any, trial: Tensor, part: Any) -> float:
    """The squared error of a layer's outputs without bias, relative, with the trial weight in the student as it is now."""
    changed = student.fork()
    replace_weight(changed, weight, weight.matrix(trial))
    gap = norm = 0.0
    for leaves in part:
        outputs = []
        for network in (teacher, changed):
            node = next(node for node in network.graph.nodes if node.name == weight.readers[0])
            met: list[Tensor] = []

            def hook(args: tuple[Any, ...], value: Tensor, met: list[Tensor] = met, node: Any = node) -> None:
                shape = [1] * value.dim()
                shape[-1 if node.target is aten.linear.default else 1] = -1
                met.append(value - args[2].reshape(shape))

            walk(network, leaves, {node: hook})
            outputs.append(met[0])
        gap += float((outputs[1] - outputs[0]).square().sum())
        norm += float(outputs[0].square().sum())
    return gap / norm


def test_samples_are_parted_evenly_and_none_is_in_both():
    network, task = net_task(nn.Sequential(nn.Linear(4, 4)), torch.randn(2, 4), count=6)
    fit, held = split(network, lambda: task.batches("calibrate"), 20, 5)
    rows = [torch.cat([leaves[0] for leaves in part]) for part in (fit, held)]
    everything = torch.cat([inputs for inputs, _ in task.batches("calibrate")])[:20]
    assert [len(part) for part in rows] == [15, 5]
    assert torch.equal(rows[1], everything[1::4])
    assert {tuple(row.tolist()) for row in torch.cat(rows)} == {tuple(row.tolist()) for row in everything}


def choice(seed: int = 0, fit_samples: int = 200) -> tuple[Tensor, Wanted, Quadratic, Quadratic]:
    generator = torch.Generator().manual_seed(seed)
    weight, mixing = torch.randn(1, 12, 24, generator=generator), torch.randn(24, 24, generator=generator)
    parts = []
    for samples in (fit_samples, 300):
        x = mixing @ torch.randn(1, 24, samples, generator=generator)
        parts.append(Quadratic.of(1, 12, 24))
        parts[-1].add(x, weight @ x)
    return weight, Wanted(72, None, torch.ones_like(weight, dtype=torch.bool)), parts[0], parts[1]


def test_auto_takes_the_method_with_the_least_error_on_held_back_data():
    methods = ("magnitude", "wanda", "sparsegpt", "surgeon")
    weight, wanted, fit, held = choice()
    alone = {method: solve(weight, wanted, fit, held, (method,), True) for method in methods}
    best = min(alone.values(), key=lambda solved: solved.error or 0)
    auto = solve(weight, wanted, fit, held, methods, True)
    assert auto.error == best.error == pytest.approx(held.error(auto.matrix)) and auto.method == best.method
    assert len({solved.error for solved in alone.values()}) == 4
    for solved in alone.values():
        assert int(torch.count_nonzero(solved.matrix)) == 72
    plain = solve(weight, wanted, fit, held, ("magnitude",), False)
    assert torch.equal(plain.matrix[plain.matrix != 0].float(), weight[plain.matrix != 0])
    assert alone["magnitude"].error is not None and plain.error is not None and alone["magnitude"].error < 0.9 * plain.error


def test_a_polish_that_does_not_help_on_held_back_data_is_not_taken():
    weight, wanted, _, held = choice()
    other = choice(seed=5, fit_samples=30)[2]
    wrong = Quadratic(other.gram, -other.cross, other.energy)  # what it learns is false
    kept = solve(weight, wanted, wrong, held, ("magnitude",), True)
    plain = solve(weight, wanted, wrong, held, ("magnitude",), False)
    assert kept.method == "magnitude" and torch.equal(kept.matrix, plain.matrix)


@pytest.mark.parametrize("share", [0.8, 0.9])
def test_sparsegpt_with_polish_is_before_magnitude_and_auto_is_near_dense_on_real_digits(share):
    def accuracy(network: ds.Network) -> float:
        return sum(int((network.predict(x).argmax(1) == y).sum()) for x, y in batches(1400, 1797)) / 397

    for model in (mlp(), convolutional()):
        network, task = ds.capture(model, digits()[0][:2]), task_of(model)
        same: dict[str, Any] = {"sparsity": share, "allocation": "uniform", "keep_ends": False}
        plain = accuracy(Sparsify(method="magnitude", polish=False, **same)(network, task))
        solved = accuracy(Sparsify(method="sparsegpt", **same)(network, task))
        auto = accuracy(Sparsify(sparsity=share, keep_ends=False)(network, task))
        assert solved > plain + 0.1, (solved, plain)
        assert auto > accuracy(network) - 0.03, auto


# Refusals --------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fields", [{}, {"train": Training(steps=2)}], ids=["solved", "trained"])
def test_weights_that_are_computed_become_sparse(fields):
    torch.manual_seed(0)
    model = nn.Sequential(weight_norm(nn.Linear(8, 16)), nn.ReLU(), weight_norm(nn.Linear(16, 4))).eval()
    network, task = net_task(model, torch.randn(4, 8))
    made = Sparsify(sparsity=0.5, keep_ends=False, **fields)(network, task)
    assert set(made.sparse) == {"0.weight", "2.weight"}
    assert sum(int((made.tensor(name) == 0).sum()) for name in made.sparse) == (8 * 16 + 16 * 4) // 2
    neutral_equals_identity(network, Sparsify(sparsity=0, keep_ends=False)(network, task), torch.randn(4, 8))


def test_what_cannot_be_made_sparse_is_refused():
    network, task = ds.capture(mlp(), digits()[0][:2]), task_of(mlp())
    with pytest.raises(TaskError, match="sparsify first, then quantize"):
        Sparsify()(Quantize()(network, task), task)
    none, without = net_task(nn.Sequential(nn.ReLU(), nn.Flatten()), torch.randn(2, 4))
    with pytest.raises(TaskError, match="nothing to make sparse"):
        Sparsify()(none, without)
    tied, of_tied = net_task(Tied(), torch.randn(2, 4))
    with pytest.raises(TaskError, match=r"of its own \(one that is read in another way too, as tied ones are"):
        Sparsify()(tied, of_tied)
    short, of_two = net_task(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)), torch.randn(2, 4))
    with pytest.raises(TaskError, match="keep_ends=False"):
        Sparsify()(short, of_two)
    with pytest.raises(TaskError, match="multiple of 7 inputs"):
        Sparsify(pattern="3:7", keep_ends=False)(short, of_two)
    single = ds.Task(mlp(), digits()[0][:1], {"calibrate": lambda: [(digits()[0][:1], None)]})
    with pytest.raises(TaskError, match="only one calibration sample"):
        Sparsify()(network, single)
    assert Sparsify(samples=0)(network, single).sparse


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"pattern": "4:2"}, "pattern='4:2' came; expected N:M"),
        ({"pattern": "2:4", "sparsity": 0.5}, "leave sparsity and allocation out"),
        ({"pattern": "2:4", "allocation": "erk"}, "leave sparsity and allocation out"),
        ({"sparsity": 1.0}, "less than 1"),
        ({"sparsity": -0.1}, "greater than or equal to 0"),
        ({"samples": 0, "method": "wanda"}, "needs data"),
        ({"method": "magnitudes"}, "magnitude"),
    ],
)
def test_wrong_fields_are_refused(fields, message):
    with pytest.raises(SpecError, match=message):
        Sparsify(**fields)


def test_transposed_convolutions_and_those_in_three_directions_are_solved_for():
    torch.manual_seed(0)
    parts = {"one": conv(3, 8, 3, padding="same"), "two": nn.ConvTranspose2d(8, 4, 3, 2, groups=2), "three": nn.Conv3d(4, 6, (1, 3, 3))}
    model = Net(lambda net, x: net.three(net.two(torch.relu(net.one(x)))[:, :, None]).mean((2, 3, 4)), **parts)
    network, task = net_task(model, torch.randn(2, 3, 8, 8))
    plan = Sparsify(sparsity=0.6, keep_ends=False, allocation="uniform", method="surgeon")
    made = plan(network, task)
    told = made.origin["sparsified"]
    assert all(one["method"].startswith("surgeon") and one["error"] < 1 for one in told.values())
    for name in made.sparse:
        old, new = network.tensor(name).detach(), made.tensor(name).detach()
        assert int(torch.count_nonzero(new)) == round(0.4 * old.numel())
    # the outputs of a transposed convolution lie along the second dimension, a group after the other
    assert bool((made.tensor("two.weight").detach().reshape(2, 4, 2, -1) != 0).any(3).any(1).all())
    x = small_nets.like(task.example, 64, 99)
    errors = [
        float((one.predict(x) - network.predict(x)).square().mean()) for one in (made, replace(plan, method="magnitude", polish=False)(network, task))
    ]
    assert errors[0] < 0.7 * errors[1]


def test_the_error_of_a_transposed_convolution_is_that_of_its_outputs():
    """Oracle: the squared error of torch's layer with the sparse weight, relative to its outputs."""
    torch.manual_seed(0)
    layer = nn.ConvTranspose2d(6, 4, 3, 2, 1, 1, groups=2, bias=False).eval()
    x = torch.randn(8, 6, 7, 7)
    network = ds.capture(layer, x)
    (weight,) = weights_of(network)
    matrix = weight.matrix(layer.weight.detach())
    assert torch.equal(weight.tensor(matrix), layer.weight)
    _, held = Errors(network.fork(), network, ([[x[:4]]], [[x[4:]]]))(weight)
    smaller = matrix * (torch.rand(matrix.shape) < 0.5)
    with torch.no_grad():
        right, found = layer(x[4:]), torch.func.functional_call(layer, {"weight": weight.tensor(smaller)}, (x[4:],))
    assert held.error(smaller) == pytest.approx(float((found - right).square().sum() / right.square().sum()), rel=1e-4)

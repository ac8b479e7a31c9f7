"""Training that quantizes: what it starts from, what it may move, what is folded and saved, and that it pays."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import downsize as ds
from downsize.network.network import Network
from downsize.network.onnx_file import write
from downsize.network.rewrite import constant, drop_identities, fold_batch_norm, fold_padding
from downsize.numerics.lowbit import binary_connect, codes_of, learned_step, trained_ternary
from downsize.quantization.insertion import FAKE
from downsize.quantization.learned import learnable, learned_nodes, settle_learned
from downsize.quantization.norms import fold, unfold
from downsize.recipe import Recipe
from downsize.techniques.quantize import Quantize
from downsize.testing import check_technique, loaded_equals_live, simulation_equals_artifact
from downsize.training.hook import Hook, Learner
from downsize.training.plan import Training
from downsize.training.quantizing import SMALLEST_FACTOR, SMALLEST_GAIN, Quantizing

LEVELS = ("uniform", "twn", "ttq", "xnor", "binary_connect")
FAST: dict[str, Any] = {"samples": 32, "equalize": False, "smooth": False}


def inputs(seed: int, count: int = 32) -> Tensor:
    """Images [count, 3, 8, 8] of six dimensions, so that what is learned on some holds for others."""
    basis = torch.randn(6, 192, generator=torch.Generator().manual_seed(1000))
    return (torch.randn(count, 6, generator=torch.Generator().manual_seed(seed)) @ basis / 6**0.5).reshape(count, 3, 8, 8)


def normed() -> nn.Module:
    """Layers with batch norms whose statistics are those of the data, some gains negative: [batch, 3, 8, 8] -> [batch, 4]."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        classifier = [nn.Flatten(), nn.Linear(8 * 16, 16, bias=False), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 4)]
        convolutions = [nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)]
        model = nn.Sequential(*convolutions, nn.ReLU(), nn.MaxPool2d(2), *classifier)
        for module in model.modules():
            if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.uniform_(module.bias, -0.3, 0.3)
                with torch.no_grad():
                    module.weight[::3] *= -1
        for seed in range(60):
            model(inputs(seed))
        return model.eval()


def plain_net() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(4)
        return nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(128, 16), nn.ReLU(), nn.Linear(16, 4)
        ).eval()


@functools.cache
def fresh() -> list[Tensor]:
    return [inputs(seed) for seed in range(100, 180)]


def task_of(model: nn.Module, validate: bool = False) -> ds.Task:
    data: dict[str, Any] = {"calibrate": lambda: [(inputs(seed), None) for seed in range(8)], "train": lambda: [(x, None) for x in fresh()]}
    if validate:
        data["validate"] = lambda: [(inputs(seed), None) for seed in range(20, 24)]
    return ds.Task(model, inputs(0, 4), data)


def gap(network: Network, model: nn.Module) -> float:
    x = inputs(99, 64)
    expected = model(x).detach()
    return float((network.predict(x) - expected).norm() / expected.norm())


def prepared(model: nn.Module, **fields: Any) -> tuple[Network, Network, Network]:
    """The network with its norms, without them, and quantized."""
    task = task_of(model)
    original = ds.capture(model, task.example)
    drop_identities(original)
    fold_padding(original)
    folded = original.fork()
    fold_batch_norm(folded)
    return original, folded, Quantize(**FAST, **fields)(original, task)


def levels_of(levels: str) -> dict[str, Any]:
    """What :func:`learnable` is told of the inner weights of ``normed``."""
    return {} if levels == "uniform" else {"3.weight": levels, "8.weight": levels}


# What training starts from --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fields", [{}, {"bits": 4, "activation_bits": 4}, {"bits": 2, "activation_bits": 2}, {"levels": "ttq"}, {"levels": "xnor"}])
def test_training_of_no_steps_is_the_quantized_network(fields):
    """Without norms to bit-equality; with norms, which are divided out and multiplied in again, to float precision."""
    x = inputs(99, 64)
    for build in (plain_net, normed):
        model = build()
        network, task = ds.capture(model, inputs(0, 4)), task_of(model)
        after = Quantize(**FAST, **fields)(network, task).predict(x)
        trained = Quantize(**FAST, **fields, train=Training(steps=0))(network, task).predict(x)
        if build is plain_net:
            assert torch.equal(trained, after)
        else:
            assert float((trained - after).abs().max()) <= 1e-5 * float(after.abs().max())


@pytest.mark.parametrize("levels", LEVELS)
def test_the_learnable_network_computes_the_same_and_settles_to_the_same(levels):
    fields = {"bits": 3, "activation_bits": 4} if levels == "uniform" else {"levels": levels, "activation_bits": 4}
    _, folded, quantized = prepared(normed(), **fields)
    x = inputs(50)
    student = learnable(quantized, folded, levels_of(levels))
    assert torch.equal(student.predict(x), quantized.predict(x))
    settle_learned(student)
    assert torch.equal(student.predict(x), quantized.predict(x))
    student.check()
    assert len([n for n in student.graph.nodes if n.target is FAKE]) == len([n for n in quantized.graph.nodes if n.target is FAKE])


def test_latent_weights_are_the_floats_where_these_have_the_code_and_the_nearest_with_the_code_elsewhere():
    _, folded, quantized = prepared(normed(), bits=3, activation_bits=4)
    student = learnable(quantized, folded, {})
    for node in learned_nodes(student):
        weight = constant(student, node.args[0])
        if weight is None:
            continue
        tensors = [constant(student, one) for one in node.args[:4]]
        codes, step = codes_of(node.target, *[one.detach() for one in tensors], *node.args[4:])  # type: ignore[union-attr]
        name = str(node.args[0].target)  # type: ignore[union-attr]
        rounded, original = quantized.tensor(name).detach(), folded.tensor(name).detach()
        steps = step.reshape(-1, *[1] * (weight.dim() - 1))
        assert torch.allclose(codes * steps, (rounded / steps).round().clamp(*node.args[-2:]) * steps)  # type: ignore[arg-type]
        moved = weight != original
        assert float(moved.float().mean()) < 0.5
        assert bool(((weight - original).abs() <= (codes * steps - original).abs() + 1e-7).all())


# Batch norms ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("levels", LEVELS)
def test_norms_come_back_and_go_again_without_moving_a_code(levels):
    fields = {"bits": 2, "activation_bits": 4} if levels == "uniform" else {"levels": levels, "activation_bits": 4}
    original, folded, quantized = prepared(normed(), **fields)
    student = learnable(quantized, folded, levels_of(levels))
    x, before = inputs(50), quantized.predict(inputs(50))
    names = unfold(student, original)
    assert len(names) == 3
    assert float((student.predict(x) - before).abs().max()) <= 1e-5 * float(before.abs().max())
    # As after a training: other gains, statistics and shifts.
    generator = torch.Generator().manual_seed(0)
    for norm in [node for node in student.graph.nodes if node.name in names]:
        for at in (1, 2, 3, 4):
            tensor = constant(student, norm.args[at])
            assert tensor is not None
            if at in (1, 4):
                assert float(tensor.detach().min()) > 0
            tensor.data.mul_(torch.rand(tensor.shape, generator=generator) + 0.5)
    live = student.predict(x)
    codes = _codes(student)
    fold(student, names)
    assert all(torch.equal(one, two) for one, two in zip(codes, _codes(student), strict=True)) and len(codes) == 4
    again = student.predict(x)
    assert float((again - live).abs().max()) <= 1e-4 * float(live.abs().max())
    settle_learned(student)
    assert torch.equal(student.predict(x), again)


def _codes(network: Network) -> list[Tensor]:
    found = []
    for node in learned_nodes(network):
        tensors = [constant(network, one) if hasattr(one, "op") else one for one in node.args]
        if tensors[0] is not None:
            found.append(codes_of(node.target, *[one.detach() if isinstance(one, Tensor) else one for one in tensors])[0])
    return found


def test_norms_that_cannot_be_divided_out_stay_folded():
    model = normed()
    with torch.no_grad():
        model[1].weight[2] = 0.0  # type: ignore[index, operator]
    original, folded, quantized = prepared(model, bits=4)
    assert len(unfold(learnable(quantized, folded, {}), original)) == 2


# The hook -------------------------------------------------------------------------------------------------------------------------


def test_rates_and_bounds():
    _, folded, quantized = prepared(normed(), levels="binary_connect", activation_bits=4)
    student = learnable(quantized, folded, {"3.weight": "binary_connect", "8.weight": "ttq"})
    learner = Learner(student, {name: tensor for name, tensor in student.named_tensors() if isinstance(tensor, nn.Parameter)}, 1)
    adam, sgd = (Quantizing(kind).rates(learner) for kind in ("adamw", "sgd"))
    assert set(adam) == set(sgd) == {name for name in learner.parameters if "factor" in name or "learned" in name}
    image_zero = "input_1_offset_learned"
    assert adam[image_zero] == 255.0 and adam["input_1_step_factor"] == 1.0
    assert sgd["input_1_step_factor"] == sgd[image_zero] == pytest.approx(1 / float(student.tensor("input_1_step")))
    for tensor in learner.parameters.values():
        tensor.data.sub_(1e3)
    Quantizing("adamw").after(learner)
    for node in learned_nodes(student):
        if node.target in (learned_step, trained_ternary):
            assert float(constant(student, node.args[2]).detach().min()) == pytest.approx(SMALLEST_FACTOR)  # type: ignore[union-attr]
        if node.target is binary_connect:
            weight, start = constant(student, node.args[0]), constant(student, node.args[1])
            assert weight is not None and start is not None and torch.equal(weight.detach()[:, 0, 0, 0], -start)
    assert float(student.tensor(image_zero).detach()) == 0.0


class Watching(Hook):
    """Keeps the smallest gain of the norms that it saw."""

    least = float("inf")

    def after(self, learner: Learner) -> None:
        for node in learner.network.graph.nodes:
            if node.target is torch.ops.aten.batch_norm.default:
                gain = constant(learner.network, node.args[1])
                assert gain is not None
                self.least = min(self.least, float(gain.detach().min()))


def test_gains_stay_positive_while_norms_are_trained():
    model = normed()
    original, folded, quantized = prepared(model, bits=4, activation_bits=4)
    student = learnable(quantized, folded, {})
    names = unfold(student, original)
    for node in [node for node in student.graph.nodes if node.name in names]:
        constant(student, node.args[1]).data.mul_(1e-3)  # type: ignore[union-attr]
    free, held = Watching(), Watching()
    Training(steps=20, rate=1e-2, warmup=0).train(student, task_of(model), hooks=[Quantizing("adamw"), free])
    Training(steps=20, rate=1e-2, warmup=0).train(student, task_of(model), hooks=[Quantizing("adamw", names), held])
    assert free.least < 0 and held.least == pytest.approx(SMALLEST_GAIN)


# Trained networks -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields",
    [
        {"bits": 2, "activation_bits": 2},
        {"levels": "xnor"},
        *(
            pytest.param(fields, marks=pytest.mark.slow)
            for fields in (
                {"bits": 2, "activation_bits": 2, "warmup_share": 0.0},
                {"bits": 2, "activation_bits": 8, "train": Training(steps=80, optimizer="sgd", rate=2e-2)},
                {"levels": "twn"},
                {"levels": "ttq"},
                {"levels": "binary_connect"},
            )
        ),
    ],
    ids=lambda fields: " ".join(str(value) for value in fields.values()),
)
def test_training_comes_nearer_to_the_original_and_is_what_the_file_computes(fields, tmp_path):
    model = normed()
    network, task = ds.capture(model, inputs(0, 4)), task_of(model)
    fields = {**FAST, "train": Training(steps=80, rate=3e-3), **fields}
    trained = Quantize(**fields)(network, task)
    untrained = Quantize(**{**fields, "train": False})(network, task)
    part = 0.98 if fields["train"].optimizer == "sgd" else 0.9
    assert gap(trained, model) < part * gap(untrained, model)
    loaded = loaded_equals_live(trained, inputs(7))
    write(loaded, tmp_path / "trained.onnx")
    simulation_equals_artifact(loaded, tmp_path / "trained.onnx", inputs(7))
    count: int = {"twn": 3, "ttq": 3, "xnor": 2, "binary_connect": 2}.get(str(fields.get("levels")), 4)
    assert max(row.unique().numel() for row in trained.tensor("3.weight").detach()) <= count


def test_the_contract_of_techniques_holds_with_training(tmp_path):
    model = normed()
    technique = Quantize(**FAST, bits=4, activation_bits=4, train=Training(steps=12))
    check_technique(technique, ds.capture(model, inputs(0, 4)), task_of(model, validate=True), tmp_path)


def test_the_best_state_by_validation_is_no_worse_than_the_start():
    model = normed()
    network, task = ds.capture(model, inputs(0, 4)), task_of(model, validate=True)
    wild = Quantize(**FAST, bits=4, activation_bits=4, train=Training(steps=6, rate=3.0, clip=None))(network, task)
    assert gap(wild, model) == pytest.approx(gap(Quantize(**FAST, bits=4, activation_bits=4)(network, task), model), rel=0.05)


def test_weights_read_twice_and_tables_are_trained_too(tmp_path):
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.table, self.layer = nn.Embedding(20, 8), nn.Linear(8, 8)

        def forward(self, ids: Tensor) -> Tensor:
            x = self.table(ids)
            return self.layer(torch.relu(self.layer(x))) @ self.table.weight.t()

    model = Tied().eval()
    ids = [torch.randint(0, 20, (16, 5), generator=torch.Generator().manual_seed(seed)) for seed in range(4)]
    task = ds.Task(model, ids[0], {"calibrate": lambda: [(one, None) for one in ids]})
    network = ds.capture(model, ids[0])
    fields: dict[str, Any] = {"samples": 16, "bits": 4, "activation_bits": 8, "profile": "x86"}
    made = Quantize(**fields, train=Training(steps=30, rate=3e-3))(network, task)
    before = Quantize(**fields)(network, task)
    gaps = [float((one.predict(ids[1]) - model(ids[1]).detach()).norm()) for one in (made, before)]
    assert gaps[0] < gaps[1]
    loaded_equals_live(made, ids[0])


# Chains ---------------------------------------------------------------------------------------------------------------------------


CHAINS = [
    "prune(parameters=0.7) | quantize(bits=4, activation_bits=4, samples=32, train=finetune(steps=9))",
    "sparsify(sparsity=0.6, samples=32) | quantize(bits=3, activation_bits=4, samples=32, train=True)",
    "sparsify(sparsity=0.6, samples=32) | quantize(levels='xnor', samples=32, train=distill(steps=9))",
    "finetune(steps=5) | quantize(levels='ttq', activation_bits=8, samples=32, train=finetune(steps=9))",
]


@pytest.mark.slow
@pytest.mark.parametrize("text", CHAINS)
def test_chains(text, tmp_path):
    model = normed()
    network, task = ds.capture(model, inputs(0, 4)), task_of(model)
    recipe = Recipe.parse(text)
    assert str(Recipe.parse(str(recipe))) == str(recipe)
    for step in recipe.steps:
        network = step(network, task)
    zeros = {name: int((network.tensor(name) == 0).sum()) for name in network.sparse}
    assert all(count >= 0.3 * network.tensor(name).numel() for name, count in zeros.items()) and bool(zeros) == ("sparsify" in text)
    loaded = loaded_equals_live(network, inputs(7))
    write(loaded, tmp_path / "chain.onnx")
    simulation_equals_artifact(loaded, tmp_path / "chain.onnx", inputs(7))

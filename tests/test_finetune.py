"""finetune(): the training that torch itself would do, what stays as it is, which state is kept, and what is refused."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from digits_task import batches, convolutional, digits
from digits_task import task_of as digits_of
from torch import Tensor, nn
from training_nets import CLASSES, distance, network_of, noisy, outputs, parts, samples, smooth, task_of

import downsize as ds
from downsize.errors import SpecError, TaskError, TrainingError
from downsize.network.capture import capture
from downsize.network.network import Network
from downsize.network.onnx_file import write
from downsize.task import Task
from downsize.techniques.finetune import Finetune
from downsize.techniques.quantize import Quantize
from downsize.testing import simulation_equals_artifact
from downsize.training.hook import Hook, Learner
from downsize.training.task_loss import class_loss

FIXED = {"train": parts, "validate": None}
SGD = Finetune(epochs=2, rate=0.05, optimizer="sgd", schedule="constant", warmup=0.0, clip=None)


def normed() -> nn.Sequential:
    """Convolution, batch norm, linear, without dropout."""
    with torch.random.fork_rng():
        torch.manual_seed(2)
        return nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, CLASSES)).eval()


def by_torch(model: nn.Module, epochs: int, norms: bool = True) -> nn.Module:
    """The plain loop: every batch, SGD with Nesterov momentum 0.9 at 0.05."""
    model = copy.deepcopy(model).train(norms)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, nesterov=True)
    for _ in range(epochs):
        for images, classes in parts():
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images), classes).backward()
            optimizer.step()
    return model.eval()


# Against torch --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norms", ["train", "freeze"])
def test_it_is_the_training_that_torch_does(norms):
    model = normed()
    task = task_of(model, data=FIXED)
    trained = replace(SGD, norms=norms)(capture(model, task.example), task)
    wanted = by_torch(model, 2, norms == "train")
    for name, value in [*wanted.named_parameters(), *wanted.named_buffers()]:
        if not name.endswith("num_batches_tracked"):
            assert torch.allclose(trained.tensor(name), value, rtol=1e-4, atol=1e-5), name
    assert torch.allclose(outputs(trained, samples()[0]), wanted(samples()[0]), atol=1e-4)
    moved = not torch.equal(trained.tensor("1.running_mean"), dict(model.named_buffers())["1.running_mean"])
    assert moved == (norms == "train")
    assert trained.origin["trained"] == [{"steps": 12, "best step": 12, "score before": None, "score": None}]


def test_the_given_network_and_model_stay_as_they_were():
    task = task_of(noisy())
    network, before = network_of(task), copy.deepcopy(noisy().state_dict())
    fingerprint = network.fingerprint()
    trained = Finetune(steps=3, rate=0.1)(network, task)
    assert network.fingerprint() == fingerprint != trained.fingerprint()
    assert all(torch.equal(value, before[name]) for name, value in noisy().state_dict().items())
    trained.check()


def test_no_steps_change_nothing():
    task = task_of(noisy())
    network = network_of(task)
    assert Finetune(steps=0)(network, task).fingerprint() == network.fingerprint()


def test_digits_are_learned():
    task = replace(digits_of(convolutional()), data={**digits_of(convolutional()).data, "train": lambda: batches(0, 1000)})
    network = capture(task.model, task.example)

    def judged(one: Network) -> tuple[float, float]:
        images, classes = digits()
        found = outputs(one, images[1400:])
        return float((found.argmax(1) == classes[1400:]).double().mean()), float(nn.functional.cross_entropy(found, classes[1400:]))

    before, after = judged(network), judged(Finetune(epochs=3, rate=3e-3)(network, task))
    assert after[0] > before[0] and after[1] < before[1]


# What stays -----------------------------------------------------------------------------------------------------------------------


def test_frozen_tensors_stay_bit_for_bit_and_can_be_trained_later():
    task = task_of(noisy(), data=FIXED)
    network = network_of(task)
    network.tensor("5.bias").requires_grad_(False)  # frozen by the user, for good
    trained = Finetune(steps=3, rate=0.1, decay=0.1, average=0.5, freeze=("0.*", "1.*"))(network, task)
    before = dict(network.named_tensors())
    moved = {name for name, tensor in trained.named_tensors() if not torch.equal(tensor, before[name])}
    assert moved == {"5.weight"}  # the statistics of the frozen batch norm did not move either
    assert {name for name, tensor in trained.named_tensors() if tensor.requires_grad} == {"0.weight", "0.bias", "1.weight", "1.bias", "5.weight"}


def test_a_pattern_that_matches_nothing_is_refused_with_the_nearest():
    task = task_of(noisy(), data=FIXED)
    with pytest.raises(TaskError, match=r"freeze='5\.wieght' matches none of the network's tensors; did you mean '5\.weight'"):
        Finetune(freeze=("5.wieght",))(network_of(task), task)
    with pytest.raises(TaskError, match="no tensor that can be trained: all are frozen"):
        Finetune(freeze=("*",))(network_of(task), task)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_zeros_that_must_stay_stay(optimizer):
    task = task_of(smooth())
    network = network_of(task)
    with torch.no_grad():
        network.tensor("3.weight")[:, ::2] = 0
        network.tensor("0.weight")[1] = 0
    network.keep_zeros("3.weight")
    zeros = network.tensor("3.weight") == 0
    trained = Finetune(steps=8, rate=0.1, decay=0.3, optimizer=optimizer, average=0.8)(network, task)
    assert bool((trained.tensor("3.weight")[zeros] == 0).all())
    assert bool((trained.tensor("3.weight")[~zeros] != network.tensor("3.weight")[~zeros]).all())
    assert bool((trained.tensor("0.weight")[1] != 0).any())  # nobody asked for those
    trained.check()


# Which state is kept --------------------------------------------------------------------------------------------------------------


class Steps(Hook):
    """Writes the step into a bias, to tell states apart."""

    def after(self, learner: Learner) -> None:
        with torch.no_grad():
            learner.parameters["3.bias"].fill_(learner.step)


@pytest.mark.parametrize(
    ("scores", "kept"), [([0.5, 0.7, 0.9, 0.6], 4), ([0.9, 0.5, 0.4, 0.3], 0), ([0.1, 0.2, 0.3, 0.4], 6), ([0.5, 0.5, 0.4, 0.5], 6)]
)
def test_validation_picks_the_best_epoch_the_start_included(scores, kept):
    told = iter(scores)
    task = task_of(smooth(), data={"train": lambda: parts(21)}, score=lambda predict, batches: next(told), loss=nn.functional.cross_entropy)
    network = network_of(task)
    trained = Finetune(epochs=3).train(network, task, hooks=[Steps()])
    wanted = network.tensor("3.bias").tolist() if kept == 0 else [float(kept)] * 3
    assert trained.tensor("3.bias").tolist() == wanted
    assert trained.origin["trained"] == [{"steps": 6, "best step": kept, "score before": scores[0], "score": max(scores)}]
    assert next(told, None) is None  # the start, and each of three epochs


def test_every_so_many_steps():
    asked: list[int] = []
    task = task_of(smooth(), score=lambda predict, batches: asked.append(1) or 0.5, loss=nn.functional.cross_entropy)
    Finetune(steps=7, every=3)(network_of(task), task)
    assert len(asked) == 4  # the start, and behind steps 3, 6 and 7


def test_test_data_is_never_opened():
    def forbidden() -> Any:
        raise AssertionError("opened")

    task = task_of(smooth(), data={"test": forbidden})
    Finetune(epochs=1, renormalise=True)(network_of(task), task)
    Finetune(epochs=1, loss="fidelity")(network_of(task), task)


def test_endless_data_can_be_trained_on_for_some_steps():
    def endless() -> Any:
        while True:
            yield from parts()

    task = task_of(smooth(), data={"train": endless})
    trained = Finetune(steps=4)(network_of(task), task)
    assert trained.origin["trained"][0]["steps"] == 4


def test_renormalising_is_kept_where_validation_agrees():
    model = normed()
    images = torch.cat([images for images, _ in parts()])
    inside = model[0](images)
    found = {}
    for name, scores in (("worse", [0.5, 0.9, 0.1]), ("better", [0.5, 0.9, 0.95])):
        told = iter(scores)
        task = task_of(model, data={"train": parts}, score=lambda predict, batches, told=told: next(told), loss=nn.functional.cross_entropy)
        found[name] = Finetune(steps=1, rate=1e-9, renormalise=True)(capture(model, task.example), task)
    wanted = inside.mean((0, 2, 3))
    assert torch.allclose(found["better"].tensor("1.running_mean"), wanted, atol=1e-5)
    assert not torch.allclose(found["worse"].tensor("1.running_mean"), wanted, atol=1e-2)


# Losses ---------------------------------------------------------------------------------------------------------------------------


def unlabelled() -> list[tuple[Tensor, None]]:
    return [(images, None) for images, _ in parts()]


def test_without_labels_the_original_is_imitated():
    task = task_of(smooth(), score=None, data={"train": unlabelled, "validate": unlabelled, "calibrate": unlabelled})
    network = network_of(task)
    with torch.no_grad():
        network.tensor("3.weight").add_(0.1 * torch.randn(3, 64, generator=torch.Generator().manual_seed(0)))
    images = samples()[0]

    def error(one: Network) -> float:
        with torch.no_grad():
            return float((outputs(one, images) - smooth()(images)).square().mean())

    trained = Finetune(epochs=20, rate=1e-2)(network, task)
    assert error(trained) < 0.05 * error(network)
    told = trained.origin["trained"][0]
    assert told["score"] > told["score before"] and told["score"] > 0.99
    labelled = task_of(smooth())
    assert (
        distance(Finetune(steps=3, loss="fidelity", optimizer="sgd")(network_of(labelled), labelled), network_of(labelled)) < 1e-6
    )  # it is the original


def test_labels_without_a_known_loss_are_refused():
    task = task_of(smooth(), score=lambda predict, batches: 0.5)
    with pytest.raises(TaskError, match="the task has targets but no loss; give it one"):
        Finetune(steps=1)(network_of(task), task)
    Finetune(steps=1, loss="fidelity")(network_of(task), task)


class Named(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = copy.deepcopy(smooth())

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        found = self.inner(x)
        return {"scores": found, "double": 2 * found}


def test_a_loss_of_ones_own_gets_outputs_in_the_models_structure():
    def loss(found: dict[str, Tensor], targets: dict[str, Tensor]) -> Tensor:
        return (found["double"] - targets["wanted"]).square().mean()

    targets = torch.randn(42, CLASSES, generator=torch.Generator().manual_seed(3))
    pairs = [(images, {"wanted": wanted}) for (images, _), wanted in zip(parts(), targets.split(8), strict=True)]
    model = Named().eval()
    task = Task(model, samples()[0][:2], {"calibrate": unlabelled, "train": lambda: pairs}, loss=loss)
    network = capture(model, task.example)

    def error(one: Network) -> float:
        return float((one.predict(samples()[0])["double"] - targets).square().mean())

    assert error(Finetune(epochs=10, rate=3e-2)(network, task)) < 0.5 * error(network)


@pytest.mark.parametrize(
    ("loss", "says"),
    [
        (lambda outputs, targets: outputs, r"the task's loss gave a tensor \[8, 3\]; expected a scalar tensor"),
        (lambda outputs, targets: 1.0, r"the task's loss gave 1\.0; expected a scalar tensor"),
        (lambda outputs, targets: outputs.mean().detach(), "expected a scalar tensor that depends on the outputs"),
        (lambda outputs, targets: outputs["scores"], r"the task's loss raised .*; it was given outputs of the shapes \[8, 3\]"),
    ],
)
def test_a_loss_that_is_none_is_refused(loss, says):
    task = task_of(smooth(), loss=loss)
    with pytest.raises(TaskError, match=f"(?s){says}"):
        Finetune(steps=1)(network_of(task), task)


def test_class_numbers_of_another_shape_are_refused():
    task = task_of(smooth(), data={"train": lambda: [(images, classes[:, None]) for images, classes in parts()], "validate": None})
    with pytest.raises(TaskError, match=r"targets are torch\.int64 \[8, 1\]; expected class numbers \[8\]"):
        Finetune(steps=1)(network_of(task), task)


# What breaks ----------------------------------------------------------------------------------------------------------------------


def broken(left: SimpleNamespace) -> Any:
    """A loss that is NaN when ``left.steps`` are done."""

    def loss(found: Tensor, targets: Tensor) -> Tensor:
        left.steps -= 1
        value = nn.functional.cross_entropy(found, targets)
        return value * math.nan if left.steps < 0 else value

    return loss


@pytest.mark.parametrize("validate", [True, False])
def test_a_loss_that_is_nan_stops_and_keeps_the_last_good_state(tmp_path, validate):
    data = {"train": parts} if validate else FIXED
    task = task_of(noisy(), data=data, loss=broken(SimpleNamespace(steps=8)), checkpoints=tmp_path)
    plan = Finetune(epochs=2, rate=1e-2, schedule="constant", warmup=0.0)
    says = r"the loss is nan at step 9 of 12, learning rate 0\.01, batch 3 of epoch 2 \(inputs\[0\] float32 \[8, 1, 4, 4\]\)"
    with pytest.raises(TrainingError, match=says) as caught:
        plan(network_of(task), task)
    kept = caught.value.network
    assert kept is not None and all(bool(torch.isfinite(tensor).all()) for _, tensor in kept.named_tensors())
    assert all(tensor.requires_grad for _, tensor in kept.named_tensors() if isinstance(tensor, nn.Parameter))
    assert str(next(tmp_path.iterdir())) in str(caught.value)
    if not validate:  # then it is the state behind step 8: two more batches than an epoch
        unbroken = replace(task, checkpoints=None, loss=nn.functional.cross_entropy)
        wanted = replace(plan, epochs=None, steps=8)(network_of(task), unbroken)
        assert distance(kept, wanted) == 0
    with pytest.raises(TrainingError, match="step 9 of 12"):  # and the checkpoint is the one before the step: it comes again
        plan(network_of(task), replace(task, loss=broken(SimpleNamespace(steps=0))))


def test_gradients_that_are_infinite_stop_before_the_step():
    def loss(found: Tensor, targets: Tensor) -> Tensor:
        return (found - found.detach()).abs().sum().sqrt()  # 0, whose slope is infinite

    task = task_of(smooth(), data=FIXED, loss=loss)
    network = network_of(task)
    with pytest.raises(TrainingError, match=r"the norm of the gradients at loss 0 is not finite at step 1 of 3") as caught:
        Finetune(steps=3)(network, task)
    assert caught.value.network is not None and distance(caught.value.network, network) == 0


def flat() -> nn.Module:
    """A batch norm that gets one value a channel and sample."""
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, CLASSES)).eval()


def test_a_batch_of_one_sample_is_passed_over_where_a_batch_norm_cannot_train_on_it():
    images, classes = samples()
    pairs = [(images[:8], classes[:8]), (images[8:9], classes[8:9]), (images[9:17], classes[9:17])]
    task = task_of(flat(), data={"train": lambda: pairs, "validate": None})
    network = capture(task.model, task.example)
    trained = Finetune(steps=4, rate=0.05, schedule="constant", warmup=0.0)(network, task)
    without = replace(task, data={**task.data, "train": lambda: [pairs[0], pairs[2]]})
    assert distance(trained, Finetune(steps=4, rate=0.05, schedule="constant", warmup=0.0)(network, without)) == 0
    single = replace(task, data={**task.data, "train": lambda: [pairs[1]]})
    with pytest.raises(TaskError, match='give larger batches, or norms="freeze"'):
        Finetune(steps=2)(network, single)
    Finetune(steps=2, norms="freeze")(network, single)


def test_a_batch_of_one_sample_is_used_where_a_batch_norm_can_train_on_it():
    images, classes = samples()
    model = normed()
    task = task_of(model, data={"train": lambda: [(images[:1], classes[:1])], "validate": None})
    network = capture(model, task.example)
    trained = replace(SGD, epochs=None, steps=1)(network, task)
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, nesterov=True)
    nn.functional.cross_entropy(model(images[:1]), classes[:1]).backward()
    optimizer.step()
    assert all(torch.allclose(trained.tensor(name), value, atol=1e-6) for name, value in model.named_parameters())
    assert torch.allclose(trained.tensor("1.running_var"), dict(model.named_buffers())["1.running_var"])


def test_epochs_and_steps_exclude_each_other():
    with pytest.raises(SpecError, match=r"epochs=2\.0 and steps=3 came; expected one of them"):
        Finetune(epochs=2, steps=3)


# What comes before and after ------------------------------------------------------------------------------------------------------


def test_a_quantized_network_is_trained_as_it_computes(tmp_path):
    task = replace(digits_of(convolutional()), data={**digits_of(convolutional()).data, "train": lambda: batches(0, 400)})
    network = capture(task.model, task.example)
    quantized = Quantize()(network, task)
    trained = Finetune(epochs=1, rate=1e-3, norms="freeze")(quantized, task)
    assert [str(node.target) for node in trained.graph.nodes] == [str(node.target) for node in quantized.graph.nodes]
    assert distance(trained, quantized) > 0
    write(trained, tmp_path / "model.onnx")
    simulation_equals_artifact(trained, tmp_path / "model.onnx", digits()[0][:64])


def test_recipes_spell_it():
    recipe = ds.Recipe.parse("finetune(epochs=2, rate=0.01, freeze=['0.*'])")
    assert tuple(recipe) == (Finetune(epochs=2, rate=0.01, freeze=("0.*",)),)
    assert ds.Recipe.from_yaml(recipe.to_yaml()) == recipe


@pytest.mark.parametrize("number", [-1, 3])
def test_a_class_that_does_not_exist_is_named(number):
    classes = torch.tensor([0, number, -100])
    with pytest.raises(TaskError, match=f"targets name class {number}; the model has the classes 0 to 2"):
        class_loss(torch.zeros(3, 3), classes)

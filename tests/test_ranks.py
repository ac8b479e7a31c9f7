"""Ranks learned in training: the pull against its formula, where it leads, resumption, and chains."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn
from training_nets import Signals, network_of, noisy, outputs, samples, task_of

from downsize.errors import AllocationError, SpecError
from downsize.factoring.factorize import nearest, ready
from downsize.network.capture import capture
from downsize.network.cost import count
from downsize.network.network import Network
from downsize.numerics.lowrank import spectrum
from downsize.recipe import Recipe
from downsize.task import Task
from downsize.techniques import TECHNIQUES
from downsize.techniques.factorize import Factorize
from downsize.techniques.quantize import Quantize
from downsize.training.hook import Learner
from downsize.training.plan import Training
from downsize.training.ranks import STRONGEST, WEAKEST, LearnedRanks


def planted(rank: int = 4) -> tuple[nn.Module, list[tuple[torch.Tensor, None]]]:
    """A network whose middle layer gives little that is not of low rank, and what it reads."""
    torch.manual_seed(0)
    first, middle, last = nn.Linear(24, 48), nn.Linear(48, 48), nn.Linear(48, 6)
    with torch.no_grad():
        middle.weight.copy_(torch.randn(48, rank) @ torch.randn(rank, 48) / 6 + 0.01 * torch.randn(48, 48))
    data = [(torch.randn(32, 24, generator=torch.Generator().manual_seed(seed)), None) for seed in range(6)]
    return nn.Sequential(first, nn.Tanh(), middle, nn.Tanh(), last).eval(), data


def planted_task() -> tuple[Task, Network]:
    model, data = planted()
    task = Task(model, data[0][0][:2], {"calibrate": lambda: data, "train": lambda: data})
    return task, capture(model, task.example)


def test_the_pull_is_half_the_strength_times_the_relative_squared_distances():
    task, network = planted_task()
    technique = Factorize(parameters=0.6, what=("linear",), multiple=1)
    made = ready(network, replace(technique.settings(), fold=False))
    hook = LearnedRanks(lambda one: nearest(one, task, technique.settings())[0])
    learner = Learner(made, {}, steps=60)
    assert hook.penalty(learner) is None
    hook.before(learner)
    expected = 0.0
    for name in hook.wanted:
        weight = made.tensor(name).detach()
        whole = spectrum(weight)
        rank = int(torch.linalg.matrix_rank(hook.wanted[name].double(), tol=1e-5))
        assert 0 < rank < min(weight.shape)
        values = whole.values.square()
        expected += float(values[rank:].sum() / values[:rank].sum())
    for step, strength in ((0, WEAKEST), (30, (WEAKEST * STRONGEST) ** 0.5), (60, STRONGEST)):
        learner.step = step
        pull = hook.penalty(learner)
        assert pull is not None and float(pull.detach()) == pytest.approx(strength / 2 * expected, rel=1e-4)


def test_training_leads_to_factors_within_the_amount_that_lose_less_than_those_solved_for():
    task, network = planted_task()
    plan = Training(steps=240, rate=3e-3, seed=1)
    solved = Factorize(parameters=0.45, what=("linear",), samples=0)(network, task)
    learned = Factorize(parameters=0.45, what=("linear",), train=plan)(network, task)
    whole = count(network, task.example).parameters
    assert count(learned, task.example).parameters <= 0.45 * whole
    assert any(".first." in name for name, _ in learned.named_tensors())
    x = torch.randn(64, 24, generator=torch.Generator().manual_seed(9))
    wanted = task.model(x).detach()
    errors = [float((made.predict(x).detach() - wanted).norm() / wanted.norm()) for made in (solved, learned)]
    assert errors[1] < 0.8 * errors[0]


def test_at_the_end_of_learning_weights_are_near_their_factors():
    task, network = planted_task()
    distances = []

    class Looks(LearnedRanks):
        def after(self, learner: Learner) -> None:
            gaps = [float((learner.network.tensor(name) - wanted).detach().norm() / wanted.norm()) for name, wanted in self.wanted.items()]
            distances.append(max(gaps))

    settings = Factorize(parameters=0.45, what=("linear",)).settings()
    made = ready(network, replace(settings, fold=False))
    hook = Looks(lambda one: nearest(one, task, settings)[0])
    Training(steps=300, rate=3e-3).train(made, task, hooks=[hook])
    assert distances[-1] < 0.2 * distances[0]


def test_stopped_it_goes_on_to_the_same_bits_and_another_amount_is_another_training(tmp_path):
    task = task_of(noisy())
    network = network_of(task)
    technique = Factorize(parameters=0.7, multiple=1, train=Training(steps=12, rate=1e-2))
    wanted = technique(network, task)
    kept = replace(task, checkpoints=tmp_path)
    settings = replace(technique.settings(), fold=False)
    start = ready(network, settings)
    plan = technique.train
    assert isinstance(plan, Training)

    def hook(most: float) -> LearnedRanks:
        asked = replace(settings, most=most)
        return LearnedRanks(lambda one: nearest(one, task, asked)[0], (most,))

    whole = plan.train(start, task, hooks=[hook(0.7)], share=(0.0, 0.6))
    with pytest.raises(KeyboardInterrupt):
        plan.train(start, kept, hooks=[hook(0.7), Signals(4)], share=(0.0, 0.6))
    other = plan.train(start, kept, hooks=[hook(0.8), Signals()], share=(0.0, 0.6))
    again = plan.train(start, kept, hooks=[hook(0.7), Signals()], share=(0.0, 0.6))
    assert again.fingerprint() == whole.fingerprint() != other.fingerprint()
    assert technique(network, task).fingerprint() == wanted.fingerprint()


def test_learned_factors_are_quantized_like_any_layers(tmp_path):
    task = task_of(noisy())
    task = replace(task, data={role: data for role, data in task.data.items() if role != "validate"})  # else the factors solved for might win
    recipe = Recipe.parse("factorize(parameters=0.7, multiple=1, train=finetune(steps=10)) | quantize()", TECHNIQUES)
    assert recipe == Recipe.parse(str(recipe), TECHNIQUES) == Recipe.from_yaml(recipe.to_yaml(), TECHNIQUES)
    made = network_of(task)
    for step in recipe.steps:
        made = step(made, task)
    made.save(tmp_path / "made.net")
    x = samples()[0]
    assert torch.equal(outputs(Network.load(tmp_path / "made.net"), x), outputs(made, x))


def test_what_cannot_be_is_said_before_any_training():
    task = task_of(noisy())
    network = network_of(task)
    with pytest.raises(AllocationError):
        Factorize(parameters=0.001, train=Training(steps=10**6))(network, task)
    with pytest.raises(SpecError, match="with train"):
        Factorize(ranks="energy", train=True)
    quantized = Quantize()(network, task)
    with pytest.raises(Exception, match="quantized already"):
        Factorize(parameters=0.5, train=True)(quantized, task)

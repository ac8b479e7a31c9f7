"""Weights that become zero in training: the schedule, the gradients, the masks over time, and sparsify(train=...) as a whole."""

# pyright: reportOptionalMemberAccess=false, reportIndexIssue=false

# pyright: reportOptionalSubscript=false

from __future__ import annotations

import dataclasses
import itertools
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from digits_task import batches, digits, mlp, task_of
from torch import Tensor, nn

import downsize as ds
from downsize.errors import SpecError
from downsize.network.network import Network
from downsize.numerics.sparsity import Pattern
from downsize.pruning.sparsifying import spread
from downsize.pruning.weights import weights_of
from downsize.techniques.distill import Distill
from downsize.techniques.finetune import Finetune
from downsize.techniques.sparsify import Sparsify
from downsize.testing import check_technique, neutral_equals_identity
from downsize.training.gradual import Gradual, cubic, masked
from downsize.training.hook import Hook, Learner
from downsize.training.plan import Training

GROWTHS = ("none", "shadow", "gradient")
SHORT = Training(steps=30, rate=3e-3)


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def network_and_task() -> tuple[Network, ds.Task]:
    task = task_of(mlp())
    data = {**task.data, "train": lambda: batches(0, 1000)}
    return ds.capture(mlp(), digits()[0][:2]), dataclasses.replace(task, data=data)


def unjudged() -> tuple[Network, ds.Task]:
    """Without data for "validate" the trained network is the result, whatever the closed form reaches."""
    network, task = network_and_task()
    return network, dataclasses.replace(task, data={role: data for role, data in task.data.items() if role != "validate"})


def accuracy(network: Network) -> float:
    return sum(int((network.predict(x).argmax(1) == y).sum()) for x, y in batches(1400, 1797)) / 397


def patterns(network: Network) -> dict[str, Tensor]:
    return {name: tensor.detach() != 0 for name, tensor in network.named_tensors() if name in network.sparse}


class Watch(Hook):
    """Remembers the masks in front of each step, and behind the last."""

    def __init__(self, hook: Gradual) -> None:
        self.hook, self.seen = hook, list[list[Tensor]]()

    def _look(self, learner: Learner) -> None:
        self.seen.append([learner.network.tensor(name).clone() for name in self.hook.masks])

    def gradients(self, learner: Learner) -> None:
        self._look(learner)


def watched(network: Network, task: ds.Task, plan: Training = SHORT, **options: Any) -> tuple[Network, Gradual, list[list[Tensor]]]:
    edited = network.fork().eval()
    weights = weights_of(edited)
    hook = Gradual(edited, weights, partial(spread, "lamp", weights), **options)
    watch = Watch(hook)
    made = plan.train(edited, task, hooks=[hook, watch])
    hook.settle(made)
    return made, hook, watch.seen


# Parts -----------------------------------------------------------------------------------------------------------------------------


def test_the_schedule_is_cubic():
    """By hand: from 0.2 to 0.9, half the way done: 0.9 - 0.7 / 8."""
    assert [cubic(0.2, 0.9, progress) for progress in (0.0, 0.5, 1.0, 3.0)] == pytest.approx([0.2, 0.9 - 0.7 / 8, 0.9, 0.9])


def test_masked_weights_are_zero_forward_and_have_the_dense_gradient():
    """Oracle: the gradient of the dense function at the masked weight, by hand x y' for a linear layer."""
    weight, mask = torch.tensor([[1.0, -2.0], [3.0, 4.0]], requires_grad=True), torch.tensor([[True, False], [False, True]])
    x, slope = torch.tensor([5.0, 7.0]), torch.tensor([11.0, 13.0])
    out = masked(weight, mask) @ x
    assert out.tolist() == [5.0, 28.0]
    out.backward(slope)
    assert weight.grad.tolist() == [[55.0, 77.0], [65.0, 91.0]]


@pytest.mark.parametrize("growth", ["none", "gradient"])
def test_masked_weights_have_no_gradient_in_the_step_unless_they_grow(growth: str):
    """No optimizer, so no momentum, ever sees a gradient of a masked weight."""
    network, _ = network_and_task()
    weights = weights_of(network)
    hook = Gradual(network, weights, partial(spread, "uniform", weights), 0.9, growth=growth, until=0.0)
    parameters = {name: tensor for name, tensor in network.named_tensors() if isinstance(tensor, nn.Parameter)}
    learner = Learner(network, parameters, 10)
    hook.begin(learner)
    hook.before(learner)
    network.graph_module(digits()[0][:16])[0].square().sum().backward()
    assert all(bool((parameters[w.name].grad[~network.tensor(m)] != 0).any()) for w, m in zip(weights, hook.masks, strict=True))
    hook.gradients(learner)
    for weight, mask in zip(weights, hook.masks, strict=True):
        grad, mask = parameters[weight.name].grad, network.tensor(mask)
        assert not bool(grad[~mask].any()) and bool(grad[mask].any())
        assert int(mask.sum()) == pytest.approx(0.1 * mask.numel(), abs=1)


# Masks over time -------------------------------------------------------------------------------------------------------------------


def test_without_growth_masks_only_shrink_by_the_schedule_and_then_stay():
    network, task = network_and_task()
    made, hook, seen = watched(network, task, sparsity=0.9, until=0.7, interval=4)
    total = sum(weight.shape.numel() for weight in hook.weights)
    for step, masks in enumerate(seen):
        last = min(step - step % 4 if step < 21 else 21, 21)  # 21 is the last change: 0.7 of 30 steps
        assert sum(int(mask.sum()) for mask in masks) == pytest.approx(total * (1 - cubic(0.0, 0.9, last / 21)), abs=2)
    for before, after in itertools.pairwise(seen):
        assert not any(bool((new & ~old).any()) for old, new in zip(before, after, strict=True))
    assert all(torch.equal(seen[-1][i], mask) for i, mask in enumerate(patterns(made).values()))
    assert made.origin["trained"][-1]["best step"] > 21


def test_shadow_weights_come_back_and_the_end_is_fixed():
    network, task = network_and_task()
    made, _, seen = watched(network, task, sparsity=0.9, growth="shadow", interval=3, until=0.7)
    grown = [sum(int((new & ~old).sum()) for old, new in zip(one, two, strict=True)) for one, two in itertools.pairwise(seen)]
    assert sum(grown) > 0 and not any(grown[21:])
    assert all(torch.equal(seen[-1][i], mask) for i, mask in enumerate(patterns(made).values()))


def test_growth_by_gradient_keeps_the_number_of_each_weight_and_moves_fewer_and_fewer():
    network, task = network_and_task()
    _, hook, seen = watched(network, task, sparsity=0.9, growth="gradient", interval=5, until=0.7)
    counts = [[int(mask.sum()) for mask in masks] for masks in seen]
    assert all(count == counts[0] for count in counts)
    total = sum(weight.shape.numel() for weight in hook.weights)
    assert sum(counts[0]) == pytest.approx(0.1 * total, abs=2)
    moved = {i + 1: sum(int((b & ~a).sum()) for a, b in zip(seen[i], seen[i + 1], strict=True)) for i in range(len(seen) - 1)}
    assert {step for step, count in moved.items() if count} <= {5, 10, 15, 20, 21}
    assert moved[5] > moved[20] > 0 and all(moved[step] <= 0.3 * sum(counts[0]) for step in moved)


def test_what_grows_begins_at_zero():
    """Oracle: right behind the change, before the optimizer's step, every weight that was masked before is zero."""
    network, task = network_and_task()

    class Zeros(Hook):
        def __init__(self, hook: Gradual) -> None:
            self.hook, self.old, self.checked = hook, None, 0

        def gradients(self, learner: Learner) -> None:
            masks = [learner.network.tensor(name).clone() for name in self.hook.masks]
            for i, weight in enumerate(self.hook.weights):
                if self.old is not None and bool((new := masks[i] & ~self.old[i]).any()):
                    assert not bool(learner.parameters[weight.name][new].any())
                    self.checked += int(new.sum())
            self.old = masks

    edited = network.fork().eval()
    weights = weights_of(edited)
    hook = Gradual(edited, weights, partial(spread, "erk", weights), 0.9, growth="gradient", interval=5)
    check = Zeros(hook)
    SHORT.train(edited, task, hooks=[hook, check])
    assert check.checked > 50


@pytest.mark.parametrize("growth", GROWTHS)
def test_zeros_from_before_never_become_weights(growth: str):
    network, task = unjudged()
    sparse = Sparsify(sparsity=0.6, samples=0, keep_ends=False)(network, task)
    made = Sparsify(sparsity=0.85, keep_ends=False, train=SHORT, growth=growth, interval=3)(sparse, task)  # type: ignore[arg-type]
    before, after = patterns(sparse), patterns(made)
    assert set(before) == set(after)
    for name in before:
        assert not bool((after[name] & ~before[name]).any()) and int(after[name].sum()) < int(before[name].sum())


# The technique ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("growth", GROWTHS)
def test_trained_sparsity_is_the_asked_one_and_obeys_the_laws(growth: Any):
    network, task = unjudged()
    before = network.fingerprint()
    made = check_technique(Sparsify(sparsity=0.9, keep_ends=False, train=SHORT, growth=growth, interval=5), network, task)
    assert network.fingerprint() == before
    total, kept = sum(made.tensor(name).numel() for name in made.sparse), sum(made.sparse.values())
    assert kept <= 0.1 * total + 2 and kept >= 0.09 * total
    assert all(bool((tensor.flatten(1) != 0).any(1).all()) for tensor in (made.tensor(name).detach() for name in made.sparse))
    assert [str(node.target) for node in made.graph.nodes] == [str(node.target) for node in network.graph.nodes]


@pytest.mark.parametrize("growth", GROWTHS)
def test_training_gives_back_what_magnitude_alone_loses(growth: Any):
    """At 96 % zeros of real digits; oracle: the same zeros without training, which right one in four."""
    network, task = unjudged()
    plain = Sparsify(sparsity=0.96, keep_ends=False, samples=0)(network, task)
    plan = Finetune(epochs=20, rate=5e-3)
    trained = Sparsify(sparsity=0.96, keep_ends=False, train=plan, growth=growth, interval=10)(network, task)
    assert accuracy(trained) > accuracy(plain) + 0.4, (accuracy(trained), accuracy(plain))


@pytest.mark.parametrize("growth", ["none", "shadow"])
def test_a_pattern_is_there_from_the_first_step_and_stays(growth: Any):
    network, task = unjudged()
    made = Sparsify(pattern="2:4", keep_ends=False, train=SHORT, growth=growth, interval=5)(network, task)
    for name in made.sparse:
        runs = (made.tensor(name).detach() != 0).unflatten(1, (-1, 4)).sum(2)
        assert int(runs.max()) == 2 and made.sparse[name] == made.tensor(name).numel() // 2
    weights = weights_of(network)
    hook = Gradual(network.fork(), [dataclasses.replace(weight, inputs_last=True) for weight in weights], lambda *_: [], pattern=Pattern(2, 4))
    assert hook.ready(Learner(network, {}, 10, step=8))


def test_nothing_to_make_zero_is_the_identity():
    network, task = unjudged()
    neutral_equals_identity(network, Sparsify(sparsity=0.0, keep_ends=False, train=SHORT)(network, task), digits()[0][:5], tolerance=0.0)


def test_no_steps_is_magnitude():
    """Oracle: without training it is what magnitude alone makes."""
    network, task = unjudged()
    for growth in GROWTHS:
        made = Sparsify(sparsity=0.9, keep_ends=False, train=Training(steps=0), growth=growth)(network, task)  # type: ignore[arg-type]
        plain = Sparsify(sparsity=0.9, keep_ends=False, samples=0)(network, task)
        assert all(torch.equal(made.tensor(name), plain.tensor(name)) for name in plain.sparse)


@pytest.mark.parametrize("plan", [Training(steps=24, average=0.9), Training(steps=24, optimizer="sgd", rate=0.02, decay=1e-3), Distill(steps=24)])
def test_averages_momentum_decay_and_distillation_revive_nothing(plan: Training):
    network, task = unjudged()
    made = Sparsify(sparsity=0.9, keep_ends=False, train=plan, growth="gradient", interval=4)(network, task)
    assert sum(made.sparse.values()) <= 0.1 * sum(made.tensor(name).numel() for name in made.sparse) + 2
    again = Finetune(steps=10, optimizer="sgd", rate=0.02)(made, task)
    assert all(not bool((patterns(again)[name] & ~mask).any()) for name, mask in patterns(made).items())
    again.check()


class Stop(Hook):
    """Interrupts the training behind one step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def after(self, learner: Learner) -> None:
        if learner.step == self.step:
            raise InterruptedError


@pytest.mark.parametrize("growth", GROWTHS)
@pytest.mark.parametrize("stop", [7, 25])
def test_resumed_equals_uninterrupted(growth: str, stop: int, tmp_path: Path):
    """Stopped while the masks change, and when they have stopped changing; bit-equal."""
    network, task = network_and_task()
    plan = dataclasses.replace(SHORT, minutes=0.0)
    whole, _, _ = watched(network, task, plan, sparsity=0.9, growth=growth, interval=3)
    task = dataclasses.replace(task, checkpoints=tmp_path)
    edited = network.fork().eval()
    weights = weights_of(edited)
    hook = Gradual(edited, weights, partial(spread, "lamp", weights), 0.9, growth=growth, interval=3)
    with pytest.raises(InterruptedError):
        plan.train(edited, task, hooks=[hook, Stop(stop)])
    assert list(tmp_path.iterdir())
    edited = network.fork().eval()
    hook = Gradual(edited, weights_of(edited), partial(spread, "lamp", weights), 0.9, growth=growth, interval=3)
    resumed = plan.train(edited, task, hooks=[hook, Stop(-1)])
    hook.settle(resumed)
    assert all(torch.equal(tensor, whole.tensor(name)) for name, tensor in resumed.named_tensors())


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"train": True, "method": "wanda"}, "leave out method or train"),
        ({"train": True, "pattern": "2:4", "growth": "gradient"}, "expected 'none' or 'shadow'"),
        ({"train": True, "until": 1.0}, "less than 1"),
        ({"train": True, "interval": 0}, "greater than or equal to 1"),
    ],
)
def test_wrong_fields_are_refused(fields: dict[str, Any], says: str):
    with pytest.raises(SpecError, match=says):
        Sparsify(**fields)


@pytest.mark.parametrize(("steps", "turns"), [(0, []), (10, [0, 1, 2, 3, 4, 5, 6, 7]), (1000, [0, 7, 14, 21, 28]), (20_000, [0, 50, 100, 150])])
def test_without_an_interval_masks_change_some_hundred_times_and_more_in_a_long_training(steps: int, turns: list[int]):
    network, _ = network_and_task()
    hook = Gradual(network.fork(), weights_of(network), lambda *_: [], 0.5)
    found = [step for step in range(steps) if hook._turn(Learner(network, {}, steps, step=step))]
    assert found[: len(turns)] == turns and (not steps or found[-1] == int(0.7 * steps))
    assert steps < 1000 or len(found) > 100

"""Rates, steps, clipping, averages and dropped precision of the loop, against closed forms and against torch on the plain module."""

from __future__ import annotations

import copy
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from training_nets import CLASSES, network_of, outputs, parts, samples, smooth, task_of

from downsize.errors import TaskError
from downsize.network.network import Network
from downsize.training.hook import Hook, Learner
from downsize.training.keeping import Average, snapshot, with_tensors
from downsize.training.objective import Batch, Objective
from downsize.training.optimizer import optimizer_of, rate_at, set_rate, set_state, state_of
from downsize.training.plan import Training

WHOLE = {"train": lambda: parts(42), "validate": None}  # one batch an epoch, and no choice between states
PLAIN = Training(steps=1, rate=0.01, schedule="constant", warmup=0.0, clip=None)


def torch_steps(optimizer_of_module: Any, steps: int, clip: float | None = None) -> nn.Module:
    """The plain module trained on the same batch by torch alone."""
    model = copy.deepcopy(smooth())
    optimizer = optimizer_of_module(model)
    images, classes = samples()
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), classes).backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
    return model


def same(network: Network, model: nn.Module, tolerance: float = 1e-6) -> bool:
    return all(torch.allclose(network.tensor(name), value, rtol=0, atol=tolerance) for name, value in model.named_parameters())


class Loss(Objective):
    """Cross-entropy, kept apart from the task's."""

    def forward(self, batch: Batch, outputs: tuple[Tensor, ...], tapped: dict[str, Tensor]) -> Tensor:
        return nn.functional.cross_entropy(outputs[0], batch.targets)


def decayed(model: nn.Module) -> list[dict[str, Any]]:
    """Weight decay for weights, none for biases."""
    return [
        {"params": [value for value in model.parameters() if value.dim() > 1], "weight_decay": 0.3},
        {"params": [value for value in model.parameters() if value.dim() <= 1], "weight_decay": 0.0},
    ]


@pytest.mark.parametrize(
    ("plan", "reference", "clip"),
    [
        (PLAIN, lambda model: torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.0), None),
        (replace(PLAIN, steps=4, decay=0.3), lambda model: torch.optim.AdamW(decayed(model), lr=0.01), None),
        (
            replace(PLAIN, steps=4, decay=0.3, optimizer="sgd", clip=0.05),
            lambda model: torch.optim.SGD(decayed(model), lr=0.01, momentum=0.9, nesterov=True),
            0.05,
        ),
    ],
    ids=["one AdamW step", "AdamW with decay", "SGD with decay and clipping"],
)
def test_steps_are_those_of_torch_on_the_plain_module(plan, reference, clip):
    task = task_of(smooth(), data=WHOLE)
    network = network_of(task)
    trained = plan.train(network, task, Loss())
    wanted = torch_steps(reference, plan.steps or 0, clip)
    assert same(trained, wanted)
    assert not same(trained, smooth(), 1e-3)


def test_clipping_is_of_all_gradients_together_and_only_of_larger_ones():
    class Norm(Hook):
        def after(self, learner: Learner) -> None:
            squares = [parameter.grad.square().sum() for parameter in learner.parameters.values() if parameter.grad is not None]
            found.append(float(torch.stack(squares).sum().sqrt()))

    found: list[float] = []
    task = task_of(smooth(), data=WHOLE)
    for clip in (None, 0.01, 1e3):
        replace(PLAIN, clip=clip).train(network_of(task), task, Loss(), [Norm()])
    assert found[1] == pytest.approx(0.01, rel=1e-3) and found[0] > 0.1
    assert found[2] == found[0]


@pytest.mark.parametrize(
    ("schedule", "closed"),
    [
        ("cosine", lambda done: (1 + math.cos(math.pi * done)) / 2),
        ("linear", lambda done: 1 - done),
        ("constant", lambda done: 1.0),
    ],
)
def test_rates_follow_the_closed_form(schedule, closed):
    rise, steps = 3, 12
    found = [rate_at(step, steps, 0.2, schedule, 0.25) for step in range(steps)]
    assert found[:rise] == pytest.approx([0.2 / 3, 0.4 / 3, 0.2])
    assert found[rise:] == pytest.approx([0.2 * closed(k / 9) for k in range(9)])
    assert rate_at(0, 1, 0.2, schedule, 0.0) == 0.2


def test_the_loop_uses_these_rates_and_stages_go_on_where_the_last_ended():
    class Rates(Hook):
        def after(self, learner: Learner) -> None:
            found.append(learner.rate)

    found: list[float] = []
    task = task_of(smooth(), data=WHOLE)
    plan = Training(steps=8, rate=0.1, warmup=0.25)
    network = network_of(task)
    plan.train(network, task, Loss(), [Rates()])
    whole, wanted = list(found), [rate_at(step, 8, 0.1, "cosine", 0.25) for step in range(8)]
    found.clear()
    middle = plan.train(network, task, Loss(), [Rates()], share=(0.0, 0.375))
    plan.train(middle, task, Loss(), [Rates()], share=(0.375, 1.0))
    assert whole == found == wanted


def test_factors_of_rates_scale_the_step_and_take_the_decay_away():
    class Slow(Hook):
        def rates(self, learner: Learner) -> dict[str, float]:
            return {"0.weight": 0.25}

    def reference(model: nn.Module) -> torch.optim.Optimizer:
        groups = [{"params": [value], "weight_decay": 0.3 * (name == "3.weight")} for name, value in model.named_parameters()]
        groups[0]["lr"] = 0.0025
        return torch.optim.SGD(groups, lr=0.01, momentum=0.9, nesterov=True)

    task = task_of(smooth(), data=WHOLE)
    trained = replace(PLAIN, steps=3, decay=0.3, optimizer="sgd").train(network_of(task), task, Loss(), [Slow()])
    assert same(trained, torch_steps(reference, 3))


def test_parameters_of_the_objective_are_trained_without_decay():
    class Scaled(Loss):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.full((2, 2), 2.0))

        def forward(self, batch: Batch, outputs: tuple[Tensor, ...], tapped: dict[str, Tensor]) -> Tensor:
            return super().forward(batch, outputs, tapped) + (self.scale * torch.tensor([[0.0, 1.0], [0.0, 1.0]])).sum()

    task = task_of(smooth(), data=WHOLE)
    objective = Scaled()
    replace(PLAIN, steps=2, decay=0.9, optimizer="sgd").train(network_of(task), task, objective)
    # gradient 1: Nesterov steps of 1.9 and 2.71 times the rate
    assert torch.allclose(objective.scale, torch.tensor([[2.0, 2 - 0.0461], [2.0, 2 - 0.0461]]))


def test_an_optimizers_state_comes_back():
    made = {name: nn.Parameter(torch.randn(3, 2)) for name in "ab"}
    twin = {name: nn.Parameter(value.detach().clone()) for name, value in made.items()}
    optimizers = [optimizer_of("adamw", one, [], 0.1, {"b": 2.0}) for one in (made, twin)]
    for number in range(4):
        if number == 2:
            set_state(optimizers[1], state_of(optimizers[0]))
            for name, value in made.items():
                twin[name].data.copy_(value.data)
        for which, one in enumerate((made, twin)):
            if which == 0 or number >= 2:
                for value in one.values():
                    value.grad = torch.full_like(value, number + 1.0)
                set_rate(optimizers[which], 0.1)
                optimizers[which].step()
    assert all(torch.equal(made[name], twin[name]) for name in "ab")


def test_the_average_is_the_closed_form():
    network = network_of(task_of(smooth()))
    start = network.tensor("3.bias").detach().clone()
    average = Average(network, 0.5)
    values, wanted = [start], start
    for step in range(1, 12):
        values.append(start + step)
        with torch.no_grad():
            network.tensor("3.bias").copy_(values[-1])
        average.update(network, step)
        factor = min(0.5, (1 + step) / (10 + step))
        wanted = factor * wanted + (1 - factor) * values[-1]
    assert torch.allclose(average.values["3.bias"], wanted)
    # from step 8 on the factor is 0.5: the limit of value - average is 1 for a line of slope 1
    assert float((values[-1] - wanted).max()) == pytest.approx(1.0, abs=0.1)


def test_what_is_given_back_is_the_average():
    class Values(Hook):
        def after(self, learner: Learner) -> None:
            found.append(learner.parameters["3.bias"].detach().clone())

    found: list[Tensor] = []
    task = task_of(smooth(), data=WHOLE)
    network = network_of(task)
    trained = replace(PLAIN, steps=3, average=0.99).train(network, task, Loss(), [Values()])
    wanted = network.tensor("3.bias").detach()
    for step, value in enumerate(found, start=1):
        factor = (1 + step) / (10 + step)
        wanted = factor * wanted + (1 - factor) * value
    assert torch.allclose(trained.tensor("3.bias"), wanted)


def test_a_network_with_other_tensors_shares_none_and_keeps_names_of_one_tensor_together():
    network = network_of(task_of(smooth()))
    made = with_tensors(network, snapshot(network))
    with torch.no_grad():
        made.tensor("3.bias").add_(1)
    assert not torch.equal(made.tensor("3.bias"), network.tensor("3.bias"))
    assert isinstance(made.tensor("3.bias"), nn.Parameter)


@pytest.mark.parametrize("precision", ["bfloat16", "auto"])
def test_products_in_16_bits_train_weights_of_32(precision):
    class Types(Objective):
        def forward(self, batch: Batch, outputs: tuple[Tensor, ...], tapped: dict[str, Tensor]) -> Tensor:
            types.add(outputs[0].dtype)
            rounded.append(bool((outputs[0] == outputs[0].bfloat16()).all()))
            return nn.functional.cross_entropy(outputs[0], batch.targets)

    types: set[torch.dtype] = set()
    rounded: list[bool] = []
    task = task_of(smooth())
    network = network_of(task)
    trained = Training(steps=6, rate=1e-2, precision=precision).train(network, task, Types())
    assert types == {torch.float32}
    assert precision == "auto" or all(rounded)
    assert all(tensor.dtype == torch.float32 and bool(torch.isfinite(tensor).all()) for _, tensor in trained.named_tensors())
    assert not torch.equal(trained.tensor("0.weight"), network.tensor("0.weight"))


def test_losses_read_values_inside_the_network():
    class Inside(Objective):
        taps = ("tanh",)

        def forward(self, batch: Batch, outputs: tuple[Tensor, ...], tapped: dict[str, Tensor]) -> Tensor:
            return tapped["tanh"].square().mean()

    task = task_of(smooth(), data=WHOLE)
    network = network_of(task)
    trained = replace(PLAIN, steps=20, rate=0.05).train(network, task, Inside())
    images = samples()[0]
    wanted = torch.tanh(nn.functional.conv2d(images, trained.tensor("0.weight"), trained.tensor("0.bias"), padding=1)).square().mean()
    before = torch.tanh(nn.functional.conv2d(images, network.tensor("0.weight"), network.tensor("0.bias"), padding=1)).square().mean()
    assert wanted.item() < 0.5 * before.item()
    assert torch.equal(trained.tensor("3.weight"), network.tensor("3.weight"))
    assert outputs(trained, images).shape == (42, CLASSES)
    Inside.taps = ("tahn",)
    with pytest.raises(TaskError, match="no node 'tahn' to look at; did you mean 'tanh'"):
        PLAIN.train(network, task, Inside())


def test_hooks_act_in_their_order_and_penalties_are_added():
    class Notes(Hook):
        def begin(self, learner: Learner) -> None:
            seen.append(("begin", learner.step, learner.share))

        def before(self, learner: Learner) -> None:
            seen.append(("before", learner.step, learner.share))

        def penalty(self, learner: Learner) -> Tensor:
            seen.append(("penalty", learner.step, learner.share))
            return 3.0 * learner.parameters["3.bias"].sum()

        def gradients(self, learner: Learner) -> None:
            gradient = learner.parameters["3.bias"].grad
            assert gradient is not None and float(gradient.sum()) == pytest.approx(9.0, abs=1e-5)  # cross-entropy's own sums to 0
            seen.append(("gradients", learner.step, learner.share))

        def after(self, learner: Learner) -> None:
            seen.append(("after", learner.step, learner.share))

    seen: list[tuple[str, int, float]] = []
    task = task_of(smooth(), data=WHOLE)
    replace(PLAIN, steps=2).train(network_of(task), task, Loss(), [Notes()])
    moments = [("before", 0), ("penalty", 0), ("gradients", 0), ("after", 1), ("before", 1), ("penalty", 1), ("gradients", 1), ("after", 2)]
    assert seen == [("begin", 0, 0.0), *((name, step, step / 2) for name, step in moments)]


def test_only_states_that_hooks_call_ready_are_chosen():
    class Late(Hook):
        def ready(self, learner: Learner) -> bool:
            return learner.step >= 3

        def after(self, learner: Learner) -> None:
            with torch.no_grad():
                learner.parameters["3.bias"].fill_(learner.step)

    scores = iter([0.9, 0.8, 0.7, 0.2, 0.3, 0.1])
    task = task_of(smooth(), data={"train": lambda: parts(42)}, score=lambda predict, batches: next(scores))
    trained = replace(PLAIN, steps=5).train(network_of(task), task, Loss(), [Late()])
    assert trained.tensor("3.bias").tolist() == [4.0] * 3  # 0.3 behind step 4 is the best of steps 3, 4 and 5
    assert trained.origin["trained"] == [{"steps": 5, "best step": 4, "score before": 0.9, "score": 0.3}]


def test_the_example_of_the_document_runs(capsys):
    text = (Path(__file__).parent.parent / "docs" / "training.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        names: dict[str, Any] = {"__name__": "example"}
        exec(code, names)
    told = names["trained"].origin["trained"]
    assert told[0]["steps"] == 30 and told[0]["score"] > told[0]["score before"]
    assert capsys.readouterr().out.strip() == str(told)
    assert all(float(tensor.detach().abs().max()) <= 0.5 for _, tensor in names["trained"].named_tensors())

"""A small network with everything that a training must keep in order, tasks over it, and a hook and an objective with states of their own."""

from __future__ import annotations

import functools
import os
import signal
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from downsize.network.capture import capture
from downsize.network.network import Network
from downsize.scores import top1
from downsize.structure import flatten
from downsize.task import Task
from downsize.training.hook import Hook, Learner
from downsize.training.objective import Batch, Objective
from downsize.training.task_loss import TaskLoss

CLASSES = 3


@functools.cache
def noisy() -> nn.Module:
    """Convolution, batch norm, dropout, linear: [batch, 1, 4, 4] -> [batch, 3]."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        layers = [nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Dropout(0.3), nn.Linear(64, CLASSES)]
        return nn.Sequential(*layers).eval()


@functools.cache
def smooth() -> nn.Module:
    """The same without batch norm and dropout."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(64, CLASSES)).eval()


def samples(count: int = 42, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Images [count, 1, 4, 4] and classes that a network can learn from them."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(count, 1, 4, 4, generator=generator)
    return images, images.flatten(1)[:, :CLASSES].argmax(1)


def parts(size: int = 8, count: int = 42, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    images, classes = samples(count, seed)
    return list(zip(images.split(size), classes.split(size), strict=True))


def shuffled(size: int = 8, count: int = 42) -> list[tuple[Tensor, Tensor]]:
    """Batches in an order and with a noise from torch's generator."""
    images, classes = samples(count)
    order = torch.randperm(count)
    return [(images[rows] + 0.1 * torch.randn(len(rows), 1, 4, 4), classes[rows]) for rows in order.split(size)]


def task_of(model: nn.Module, **options: Any) -> Task:
    data: dict[str, Callable[[], Any]] = {"calibrate": parts, "train": shuffled, "validate": lambda: parts(seed=5)}
    data = {**data, **options.pop("data", {})}
    return Task(model, samples()[0][:2], {role: entry for role, entry in data.items() if entry}, options.pop("score", top1), **options)


def network_of(task: Task) -> Network:
    return _captured(task.model).copy()


@functools.cache
def _captured(model: nn.Module) -> Network:
    return capture(model, samples()[0][:2])


class Scaled(Objective):
    """The task's loss with a trained temperature, and the distance from a moving average of the outputs."""

    def __init__(self, student: Network, task: Task) -> None:
        super().__init__()
        self.inner = TaskLoss(student, task)
        self.temperature = nn.Parameter(torch.tensor(1.5))
        self.register_buffer("mean", torch.zeros(CLASSES))

    def forward(self, batch: Batch, outputs: tuple[Tensor, ...], tapped: dict[str, Tensor]) -> Tensor:
        found = outputs[0]
        mean = self.get_buffer("mean")
        loss = self.inner(batch, (found * self.temperature,), tapped) + 0.01 * (found - mean).square().mean()
        mean.lerp_(found.detach().mean(0), 0.2)
        return loss


class Pulse(Hook):
    """Adds to the last bias what it has counted and seen of the gradients so far."""

    def __init__(self, name: str) -> None:
        self.name, self.seen = name, torch.zeros(2)

    def gradients(self, learner: Learner) -> None:
        gradient = learner.parameters[self.name].grad
        assert gradient is not None
        self.seen += torch.tensor([1.0, float(gradient.abs().sum())])

    def after(self, learner: Learner) -> None:
        with torch.no_grad():
            learner.parameters[self.name].add_(1e-3 * self.seen.sum())

    def state(self) -> dict[str, Tensor]:
        return {"seen": self.seen}

    def restore(self, state: Any) -> None:
        self.seen = state["seen"]


class Signals(Hook):
    """Sends this process a signal behind some steps."""

    def __init__(self, *steps: int, number: int = signal.SIGINT) -> None:
        self._steps, self._number = steps, number  # not settings: a training is the same with and without

    def after(self, learner: Learner) -> None:
        if learner.step in self._steps:
            os.kill(os.getpid(), self._number)


def distance(one: Network, other: Network) -> float:
    """The largest difference between the tensors of two networks, by name."""
    others = dict(other.named_tensors())
    return max(float((tensor.detach().double() - others[name].detach().double()).abs().max()) for name, tensor in one.named_tensors())


def outputs(network: Network, inputs: Any) -> Tensor:
    return flatten(network.predict(inputs))[0][0]

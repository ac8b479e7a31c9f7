"""Two small models trained for a second on scikit-learn's 1,797 real digits, as tasks; the file itself is a task for the command line."""

from __future__ import annotations

import functools
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import nn

import downsize as ds


@functools.cache
def digits() -> tuple[torch.Tensor, torch.Tensor]:
    """Images [1797, 1, 8, 8] in 0..1 and their classes [1797], in a fixed random order."""
    data: Any = load_digits()
    order = torch.randperm(1797, generator=torch.Generator().manual_seed(0))
    return (torch.tensor(data.images, dtype=torch.float32)[:, None] / 16)[order], torch.tensor(data.target)[order]


def batches(start: int, stop: int, size: int = 100) -> list[tuple[torch.Tensor, torch.Tensor]]:
    images, classes = digits()
    return [(images[i : min(i + size, stop)], classes[i : min(i + size, stop)]) for i in range(start, stop, size)]


def trained(model: nn.Module, steps: int) -> nn.Module:
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for step in range(steps):
        images, classes = batches(0, 1000)[step % 10]
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), classes).backward()
        optimizer.step()
    return model.eval()


@functools.cache
def mlp() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return trained(nn.Sequential(nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10)), 120)


@functools.cache
def convolutional() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        first = [nn.Conv2d(1, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU()]
        second = [nn.Conv2d(32, 64, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(64), nn.ReLU()]
        return trained(nn.Sequential(*first, *second, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10)), 60)


def task_of(model: nn.Module) -> ds.Task:
    data = {"calibrate": lambda: batches(0, 200), "validate": lambda: batches(1000, 1400), "test": lambda: batches(1400, 1797)}
    return ds.Task(model, digits()[0][:2], data, ds.scores.top1, name="digits")


def task() -> ds.Task:
    return task_of(mlp())

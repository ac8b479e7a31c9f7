"""Two small networks to factorize, with their tasks."""

# pyright: reportIndexIssue=false, reportArgumentType=false, reportOptionalMemberAccess=false, reportAttributeAccessIssue=false, reportCallIssue=false

from __future__ import annotations

import functools
from typing import Any

import torch
from small_nets import task_of
from torch import Tensor, nn
from zoo import block, head, shake

from downsize.network.capture import capture
from downsize.network.cost import count
from downsize.network.network import Network
from downsize.task import Task

IMAGE = torch.zeros(2, 3, 12, 12)


class Residual(nn.Module):
    """A residual block over 16 channels whose weights are nearly of low rank, so that something can be gained."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.one, self.two, self.head = block(3, 16), block(16, 24), nn.Conv2d(24, 16, 3, padding=1, bias=False), head(16)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head(torch.relu(x + self.two(self.one(x))))


@functools.cache
def residual() -> tuple[Network, Task]:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = Residual()
    shake(model)
    return capture(model.eval(), IMAGE), task_of(model, IMAGE, batches=12)


class Mixer(nn.Module):
    """Tokens, attention of one head and a residual network over them."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.table, self.out = nn.Embedding(50, width), nn.Linear(width, 8)
        self.q, self.k, self.v = (nn.Linear(width, width) for _ in range(3))
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        x = x + torch.softmax(self.q(x) @ self.k(x).mT / 6, -1) @ self.v(x)
        return self.out(x + self.down(torch.tanh(self.up(x))))


IDS = torch.zeros(2, 9, dtype=torch.int64)


@functools.cache
def mixer() -> tuple[Network, Task]:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = Mixer().eval()
    with torch.no_grad():
        for layer in (model.q, model.k, model.v, model.up, model.down):
            # Some directions matter more than others, as after training.
            left, values, right = torch.linalg.svd(layer.weight, full_matrices=False)
            layer.weight.copy_(left * values * torch.exp(-torch.arange(len(values)) / 8) * 3 @ right)
    return capture(model, IDS), task_of(model, IDS, batches=12)


def cost(network: Network, task: Task) -> Any:
    return count(network, task.example)

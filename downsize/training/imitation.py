"""The plainest objective: give what the original model gives."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import TaskError
from ..structure import flatten
from ..task import Task
from .objective import Batch, Objective


class Imitation(Objective):
    """The squared distance of all outputs from the original's, each output relative to its own squared size: 0 when they are equal.

    Args:
        task: its model is the one imitated.
    """

    def __init__(self, task: Task) -> None:
        super().__init__()
        self.task = task

    def forward(self, batch: Batch, outputs: tuple[Tensor, ...], tapped: dict[str, Tensor]) -> Tensor:
        expected = [torch.as_tensor(leaf) for leaf in flatten(self.task.predict(batch.inputs))[0]]
        if len(expected) != len(outputs):
            raise TaskError(f"the network has {len(outputs)} outputs, the original {len(expected)}: they cannot be compared.")
        return relative_error(outputs, expected)


def relative_error(outputs: tuple[Tensor, ...] | list[Tensor], expected: list[Tensor]) -> Tensor:
    """Mean over the outputs of |output - expected|^2 / |expected|^2; outputs of whole numbers, and entries that are not finite, are left out."""
    total, count = torch.zeros(()), 0
    for output, wanted in zip(outputs, expected, strict=True):
        if output.is_floating_point() and output.numel():
            finite = torch.isfinite(wanted)
            wanted = torch.where(finite, wanted, 0.0).to(output.device).float()
            error = torch.where(finite.to(output.device), output.float() - wanted, 0.0).square().sum()
            total, count = total + error / wanted.square().sum().clamp(min=1e-12), count + 1
    if not count:
        raise TaskError("the model has no outputs of real numbers: there is nothing to imitate; give the task a loss.")
    return total / count

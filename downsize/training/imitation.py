"""The plainest objective: give what the original model gives."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import TaskError
from ..structure import flatten
from ..task import Task
from .objective import Batch, Objective
from .stream import drawing

SMALLEST = 1e-12  # of the mean square that errors are divided by


class Imitation(Objective):
    """The mean squared distance of each output from the original's, relative to the mean square of that output on the first calibration
    batch: 0 when they are equal. The mean over the outputs; those of whole numbers, and entries that are not finite, are left out.

    Args:
        task: its model is the one imitated.

    Raises:
        TaskError: no output has real numbers.
    """

    def __init__(self, task: Task) -> None:
        super().__init__()
        self.task = task
        with drawing("imitation"):
            outputs = self._expected(next(task.batches("calibrate"))[0])
        self.sizes = [float(finite(one).square().mean().clamp(min=SMALLEST)) if one.is_floating_point() and one.numel() else None for one in outputs]
        if all(size is None for size in self.sizes):
            raise TaskError("the model has no outputs of real numbers: there is nothing to imitate; give the task a loss.")

    def forward(self, batch: Batch, outputs: tuple[Tensor, ...], tapped: dict[str, Tensor]) -> Tensor:
        expected = self._expected(batch.inputs)
        if len(expected) != len(outputs):
            raise TaskError(f"the network has {len(outputs)} outputs, the original {len(expected)}: they cannot be compared.")
        losses = []
        for output, wanted, size in zip(outputs, expected, self.sizes, strict=True):
            if size is not None and output.numel():
                wanted = wanted.to(output.device)
                error = torch.where(torch.isfinite(wanted), output.float() - finite(wanted), 0.0)
                losses.append(error.square().mean() / size)
        return torch.stack(losses).mean()

    def _expected(self, inputs: Any) -> list[Tensor]:
        return [torch.as_tensor(leaf) for leaf in flatten(self.task.predict(inputs))[0]]


def finite(tensor: Tensor) -> Tensor:
    """As float32, zero where it is not finite."""
    return torch.where(torch.isfinite(tensor), tensor, 0.0).float()

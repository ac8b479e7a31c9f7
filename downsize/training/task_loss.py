"""The task's own loss: the user's, or cross-entropy where the score says that classes are told apart."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from ..errors import TaskError
from ..network.network import Network
from ..scores import IGNORED, top1, top5
from ..structure import flatten, unflatten
from ..task import Task
from .objective import Batch, Objective


class TaskLoss(Objective):
    """``task.loss`` of the student's outputs in the model's own structure, and the targets; else cross-entropy on its class scores.

    Raises:
        TaskError: it is not known what the loss is: the task has none, and its score is neither top1 nor top5.
    """

    def __init__(self, student: Network, task: Task) -> None:
        super().__init__()
        if task.loss is None and task.score not in (top1, top5):
            raise TaskError("the task has targets but no loss; give it one, Task(..., loss=lambda outputs, targets: ...), or train by distill().")
        self.loss, self.structure = task.loss, student.outputs

    def forward(self, batch: Batch, outputs: tuple[Tensor, ...], tapped: dict[str, Tensor]) -> Tensor:
        found = unflatten(self.structure, list(outputs))
        if self.loss is None:
            return class_loss(found, batch.targets)
        try:
            value = self.loss(found, batch.targets)
        except Exception as error:
            shapes = unflatten(self.structure, [list(one.shape) for one in outputs])
            raise TaskError(f"the task's loss raised {type(error).__name__}: {error}; it was given outputs of the shapes {shapes}.") from error
        if not isinstance(value, Tensor) or value.dim() or not value.requires_grad:
            came = f"a tensor {list(value.shape)}" if isinstance(value, Tensor) and value.dim() else repr(value)
            raise TaskError(f"the task's loss gave {came}; expected a scalar tensor that depends on the outputs.")
        return value


def class_loss(outputs: Any, targets: Any) -> Tensor:
    """Cross-entropy (natural logarithm, mean over the samples) of class scores [..., classes] and class numbers [...]; -100 is left out.

    Raises:
        TaskError: targets are no whole numbers, of another shape, or name a class that does not exist.
    """
    scores = outputs["logits"] if isinstance(outputs, Mapping) and "logits" in outputs else flatten(outputs)[0][0]
    try:
        classes = torch.as_tensor(targets)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TaskError(
            f"targets are {type(targets).__name__}; expected class numbers {list(scores.shape[:-1])}, in every batch if in the first: give those, "
            "a loss of your own, Task(..., loss=...), or train by distill()."
        ) from error
    if classes.shape != scores.shape[:-1] or classes.dtype.is_floating_point:
        raise TaskError(f"targets are {classes.dtype} {list(classes.shape)}; expected class numbers {list(scores.shape[:-1])}.")
    wrong = classes[(classes != IGNORED) & ((classes < 0) | (classes >= scores.shape[-1]))]
    if wrong.numel():
        raise TaskError(f"targets name class {int(wrong[0])}; the model has the classes 0 to {scores.shape[-1] - 1}.")
    return cross_entropy(scores.float().flatten(0, -2), classes.long().flatten().to(scores.device), ignore_index=IGNORED)

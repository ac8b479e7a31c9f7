"""What a student's outputs lose to its teacher's, each output by the loss that fits it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from ..errors import TaskError
from ..numerics.distillation import dist, dkd, embedding, relative_error, soft_logits, standardized
from ..scores import IGNORED, top1, top5
from ..structure import Structure, unflatten
from ..task import Task

Kind = Literal["logits", "standardized", "dist", "dkd", "embedding", "error"]
CLASSES = ("logits", "standardized", "dist", "dkd")
# Of those that need no labels: (student [..., classes], teacher, temperature) -> loss.
SCORES = {"logits": soft_logits, "standardized": standardized, "dist": dist}
# Rows of embeddings have the length 1, but for rounding.
UNIT = 1e-3


class OutputLoss:
    """The mean over the float outputs of what each loses; ``kinds`` has a loss for each output, None for those of whole numbers.

    ``auto``: class scores by ``logits`` where the task's score is top1 or top5, or targets are class numbers that fit; vectors of length 1 by
    ``embedding``; others by ``error``. Another choice is for the main output, which is the one named "logits" or else the first that it
    fits; the rest goes by ``auto``.

    Args:
        structure: of the student's outputs.
        outputs, targets: the teacher's for one batch, and what the data gives for it.

    Raises:
        TaskError: no output fits the choice, or there is no float output at all.
    """

    def __init__(self, choice: str, temperature: float, structure: Structure, outputs: Sequence[Tensor], targets: Any, task: Task) -> None:
        self.temperature = temperature
        floats = [number for number, one in enumerate(outputs) if one.is_floating_point() and one.numel()]
        if not floats:
            raise TaskError("the teacher has no outputs of real numbers: there is nothing to learn from it.")
        named = main_output(structure, len(outputs))
        self.main = named if named in floats else floats[0]
        classes = task.score in (top1, top5) or class_dimension(outputs[self.main], targets) is not None
        self.kinds: list[Kind | None] = [_fitting(one) if number in floats else None for number, one in enumerate(outputs)]
        if choice == "auto" and classes and outputs[self.main].dim() > 1:
            self.kinds[self.main] = "logits"
        elif choice == "error":
            self.kinds = ["error" if kind else None for kind in self.kinds]
        elif choice != "auto":
            self.main = _main_for(choice, outputs, [self.main, *floats])
            self.kinds[self.main] = choice  # type: ignore[call-overload]

    def __call__(self, student: Sequence[Tensor], teacher: Sequence[Tensor], targets: Any, real: Tensor | None) -> Tensor:
        """The loss, a scalar.

        Args:
            student, teacher: flat outputs.
            real: bool [samples, positions], False where a position is padding: outputs [samples, positions, ...] do not count there.
        """
        parts = [
            self._loss(kind, one, two.to(one.device), targets if number == self.main else None, real)
            for number, (kind, one, two) in enumerate(zip(self.kinds, student, teacher, strict=True))
            if kind is not None
        ]
        return torch.stack(parts).mean()

    def _loss(self, kind: Kind, student: Tensor, teacher: Tensor, targets: Any, real: Tensor | None) -> Tensor:
        right = None
        if kind in CLASSES:
            dimension = class_dimension(teacher, targets)
            right = None if dimension is None else torch.as_tensor(targets).to(student.device)
            dimension = (1 if teacher.dim() == 4 else teacher.dim() - 1) if dimension is None else dimension
            student, teacher = student.movedim(dimension, -1), teacher.movedim(dimension, -1)
        if real is not None and student.dim() > 2 and student.shape[:2] == real.shape:
            kept = real.to(student.device)
            student, teacher, right = student[kept], teacher[kept], None if right is None else right[kept]
        if kind == "embedding":
            return embedding(student, teacher)
        if kind == "dkd":
            return self._decoupled(student, teacher, right)
        if kind in CLASSES:
            return SCORES[kind](student, teacher, self.temperature)
        return relative_error(student, teacher)

    def _decoupled(self, student: Tensor, teacher: Tensor, right: Tensor | None) -> Tensor:
        """Without labels the teacher's choice is the right class."""
        best = teacher.argmax(-1)
        right = best if right is None else torch.where(right == IGNORED, best, right)
        return dkd(student, teacher, right, self.temperature)


def main_output(structure: Structure, count: int) -> int:
    """The number of the output named "logits", or 0."""
    tree = unflatten(structure, list(range(count)))
    return tree["logits"] if isinstance(tree, Mapping) and isinstance(tree.get("logits"), int) else 0


def class_dimension(outputs: Tensor, targets: Any) -> int | None:
    """The dimension of the classes, where targets are class numbers of these outputs; None where they are not."""
    if not hasattr(targets, "dtype") or outputs.dim() < 2:
        return None
    numbers = torch.as_tensor(targets)
    if numbers.is_floating_point() or numbers.is_complex() or numbers.dtype == torch.bool:
        return None
    if numbers.shape == outputs.shape[:-1]:
        return outputs.dim() - 1
    return 1 if numbers.shape == (*outputs.shape[:1], *outputs.shape[2:]) else None


def _fitting(outputs: Tensor) -> Kind:
    lengths = outputs.double().norm(dim=-1) if outputs.dim() == 2 and outputs.shape[1] > 1 else None
    return "embedding" if lengths is not None and bool(((lengths - 1).abs() < UNIT).all()) else "error"


def _main_for(choice: str, outputs: Sequence[Tensor], order: Sequence[int]) -> int:
    """The first output that a loss fits: class scores have two dimensions or more, vectors two."""
    for number in order:
        rank = outputs[number].dim()
        if rank == 2 or (rank > 2 and choice in CLASSES):
            return number
    wanted = "class scores [..., classes]" if choice in CLASSES else "vectors [samples, width]"
    raise TaskError(f"outputs={choice!r} needs {wanted}; the outputs are {[list(one.shape) for one in outputs]}: use outputs='error'.")

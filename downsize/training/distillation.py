"""Learning from a teacher, as an objective of the training loop."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import TaskError
from ..network.network import Network
from ..network.padding import padding_port
from ..network.statistics import Pieces
from ..scores import top1, top5
from ..task import Task
from .answers import tensors_in
from .branches import Branches
from .features import Features
from .objective import Batch, Objective
from .outputs import CLASSES, OutputLoss
from .pairing import Layer
from .stream import drawing
from .task_loss import TaskLoss
from .teacher import Teacher

# Calibration samples on which layers are compared, and on which it is found out what is padding.
SAMPLES = 64


class Distillation(Objective):
    """``(1 - weight) task's loss + weight outputs' loss + feature_weight features' loss`` (+ that of early exits).

    Where a batch has no targets, or it is not known what the task's loss is, the outputs' loss stands alone.

    Args:
        student: the network to be trained, in evaluation mode.
        teacher: gives outputs in the student's structure, and the values that ``features`` reads.
        outputs, temperature: see :class:`~downsize.training.outputs.OutputLoss`.
        features: what inner values lose, with ``feature_weight``.
        port: the input that marks padding.

    Raises:
        TaskError: student and teacher give outputs of other shapes; no output fits the choice.
    """

    def __init__(
        self,
        student: Network,
        task: Task,
        teacher: Teacher,
        outputs: str = "auto",
        temperature: float = 4.0,
        weight: float = 0.9,
        features: Features | None = None,
        feature_weight: float = 1.0,
        port: int | None = None,
    ) -> None:
        super().__init__()
        self.teacher, self.weight, self.feature_weight, self.port = teacher, weight, feature_weight, port
        self.choice, self.temperature = outputs, temperature  # beside the weights, what tells one distillation from another
        with drawing("distillation"):
            inputs, targets = next(task.batches("train" if "train" in task.data else "calibrate"))
        expected = teacher.outputs(inputs)
        refuse_unlike(student, inputs, expected)
        self.outputs = OutputLoss(outputs, temperature, student.outputs, expected, targets, task)
        self.form = list(expected[self.outputs.main].shape)
        self.hard = TaskLoss(student, task) if weight < 1 and (task.loss is not None or task.score in (top1, top5)) else None
        self.features = features
        self.branches: Branches | None = None
        self.taps = () if features is None else features.student_taps

    def with_branches(self, found: Sequence[Layer], count: int, seed: int) -> Distillation:
        """Itself, with so many early exits on the student's layers to train along.

        Raises:
            TaskError: the main output is not [samples, width], or there are fewer layers than exits.
        """
        if len(self.form) != 2:
            raise TaskError(f"branches={count} needs an output [samples, width]; the main one is {self.form}: use branches=0.")
        classes = self.outputs.kinds[self.outputs.main] in CLASSES
        self.branches = Branches(found, count, self.form[1], classes, seed)
        self.taps = tuple(dict.fromkeys([*self.taps, *self.branches.taps]))
        return self

    def forward(self, batch: Batch, outputs: tuple[Tensor, ...], tapped: dict[str, Tensor]) -> Tensor:
        real = None if self.port is None else batch.leaves[self.port].bool()
        loss = self._outputs_loss(batch, outputs, tapped, real)
        if self.branches is not None:
            loss = loss + self.branches(tapped, outputs[self.outputs.main], batch.targets, real)
        return loss

    def _outputs_loss(self, batch: Batch, outputs: tuple[Tensor, ...], tapped: dict[str, Tensor], real: Tensor | None) -> Tensor:
        hard = self.hard(batch, outputs, tapped) if self.hard is not None and batch.targets is not None else None
        if hard is not None and self.weight == 0 and self.features is None:
            return hard
        expected, values = self.teacher(batch.inputs)
        loss = self.outputs(outputs, expected, batch.targets, real)
        if hard is not None:
            loss = (1 - self.weight) * hard + self.weight * loss
        if self.features is not None:
            loss = loss + self.feature_weight * self.features(tapped, values, real)
        return loss


def refuse_unlike(student: Network, inputs: Any, expected: list[Tensor]) -> None:
    """Refuse a student whose outputs cannot be compared with its teacher's.

    Raises:
        TaskError: their number or shapes differ.
    """
    with torch.no_grad():
        found = student.graph_module(*student.flat(tensors_in(inputs)))
    mine, theirs = [list(one.shape) for one in found], [list(one.shape) for one in expected]
    if mine != theirs:
        raise TaskError(f"the student's outputs are {mine}, the teacher's {theirs}; expected the same shapes.")


def calibration(student: Network, task: Task) -> tuple[Pieces, int | None]:
    """Some calibration samples, and which input marks padding."""
    pieces = Pieces.of(student, task.batches("calibrate"), SAMPLES)
    return pieces, padding_port(student, pieces)

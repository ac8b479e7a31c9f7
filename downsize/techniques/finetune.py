"""Training on the task's own loss, which gives back what cutting and rounding have cost."""

from __future__ import annotations

from typing import Literal

from ..network.network import Network
from ..spec import frozen
from ..task import Task
from ..training.objective import Objective
from ..training.plan import Training
from ..training.stream import drawing
from ..training.task_loss import TaskLoss


@frozen
class Finetune(Training):
    """Train the network on the task's loss; where the data for training has no targets, to imitate the original model.

    ``finetune(epochs=2, rate=1e-3)``: the state that the data for "validate" likes best is kept, the start included, so that it never gets
    worse there; without such data, the last one. Zeros made by ``sparsify`` stay zeros. A quantized network is trained as it computes: rounded,
    with gradients straight through.

    Fields: those of :class:`~downsize.training.plan.Training`, and
        loss: ``auto`` (the task's if there are targets), ``task`` or ``fidelity`` (the original's outputs).
    """

    loss: Literal["auto", "task", "fidelity"] = "auto"

    def objective(self, student: Network, task: Task) -> Objective:
        role = "train" if "train" in task.data else "calibrate"
        with drawing("targets"):
            labelled = self.loss == "task" or (self.loss == "auto" and next(task.batches(role))[1] is not None)
        return TaskLoss(student, task) if labelled else super().objective(student, task)

    def __call__(self, network: Network, task: Task) -> Network:
        """The trained network. Raises as :meth:`~downsize.training.plan.Training.train`."""
        return self.train(network, task)

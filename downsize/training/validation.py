"""How good a network is while it trains, on the data for "validate"; the data for "test" is never looked at."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ..network.network import Network
from ..scores import evaluate, fidelity
from ..spool import Spool
from ..structure import flatten
from ..task import Task


class Validation:
    """The task's score, or, where the data has no targets or the task no score, fidelity to the original model.

    Args:
        task: without data for "validate" there is no score, and the last state of a training is its result.
    """

    def __init__(self, task: Task) -> None:
        self.task = task
        self.possible = "validate" in task.data
        self._recorded: Spool | None = None
        if self.possible and (task.score is None or next(task.batches("validate"))[1] is None):
            self._recorded = Spool()
            for inputs, _ in task.batches("validate"):
                self._recorded.append([inputs, list(flatten(task.predict(inputs))[0])])

    def __call__(self, network: Network) -> float | None:
        """The score of a network in evaluation mode, higher is better; None when there is no data for it."""
        if not self.possible:
            return None
        if self._recorded is not None:
            return evaluate(fidelity, network.predict, self._pairs(self._recorded), "the network in training")
        assert self.task.score is not None  # else there would be a recording
        return evaluate(self.task.score, network.predict, self.task.batches("validate"), "the network in training")

    def _pairs(self, recorded: Spool) -> Iterator[tuple[Any, Any]]:
        for number in range(len(recorded)):
            inputs, outputs = recorded.read(number)
            yield inputs, outputs

"""What training minimises: an objective reads a batch, the student's outputs and the values it asked for, and gives one number."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn


@dataclass(frozen=True)
class Batch:
    """One batch of training data: ``inputs`` and ``targets`` as the task gave them, ``leaves`` the inputs as the network takes them, flat."""

    inputs: Any
    targets: Any
    leaves: list[Tensor]


class Objective(nn.Module):
    """A loss. What it holds as parameters is trained with the network, what it holds as buffers is part of every checkpoint.

    Attributes:
        taps: names of nodes of the student's graph whose values it reads.
    """

    taps: tuple[str, ...] = ()

    def forward(self, batch: Batch, outputs: tuple[Tensor, ...], tapped: dict[str, Tensor]) -> Tensor:
        """The loss, a scalar that is the mean over the samples.

        Args:
            outputs: the student's, flat, in training mode.
            tapped: for each name in ``taps`` the value of that node.
        """
        raise NotImplementedError

    def state(self) -> dict[str, Tensor]:
        """Its parameters, buffers and extra state, as far as they are tensors, for a checkpoint."""
        return {name: value for name, value in self.state_dict().items() if isinstance(value, Tensor)}

    def restore(self, state: dict[str, Tensor]) -> None:
        """The inverse of :meth:`state`."""
        self.load_state_dict(state, strict=False)

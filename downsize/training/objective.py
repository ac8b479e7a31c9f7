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

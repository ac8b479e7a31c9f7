"""Where a technique acts inside the loop: on gradients, on weights, on what the network computes with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from ..network.network import Network


@dataclass
class Learner:
    """The training as it stands.

    Attributes:
        network: what is trained, in training mode; its tensors may be changed in place, its graph may not.
        parameters: what the optimizer changes of the network's tensors, by name.
        step: how many optimizer steps were made. ``steps``: how many there will be.
        rate: the learning rate of the step that was just made, or is being made.
    """

    network: Network
    parameters: dict[str, nn.Parameter]
    steps: int
    step: int = 0
    rate: float = 0.0

    @property
    def share(self) -> float:
        """How much of the training is done, 0 to 1."""
        return self.step / max(1, self.steps)


class Hook:
    """Does nothing at each of these moments; what inherits says which of them it is about."""

    def begin(self, learner: Learner) -> None:
        """Before the first step, and before the first step after a resumption (then :meth:`restore` follows)."""

    def rates(self, learner: Learner) -> Mapping[str, float]:
        """By parameter name what its learning rate is multiplied by (1 where it says nothing); such parameters have no weight decay."""
        return {}

    def before(self, learner: Learner) -> None:
        """Before the forward pass of a step."""

    def penalty(self, learner: Learner) -> Tensor | None:
        """What is added to the loss of this step, a scalar."""
        return None

    def gradients(self, learner: Learner) -> None:
        """Behind the backward pass: gradients are there, not yet clipped."""

    def after(self, learner: Learner) -> None:
        """Behind the optimizer's step."""

    def ready(self, learner: Learner) -> bool:
        """Whether the network as it stands is of the kind that was asked for, so that validation may choose it."""
        return True

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint needs of the hook beside the network's tensors."""
        return {}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """The inverse of :meth:`state`."""

"""Whom a student learns from: outputs, and values inside a network, without gradients and in evaluation mode."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import TaskError, nearest
from ..network.network import Network
from .answers import Answers, tensors_in


class Teacher(nn.Module):
    """Called with a batch's inputs it gives flat outputs and, by node name, the values asked for.

    Args:
        predict: gives its outputs; they are kept by sample (see :class:`~downsize.training.answers.Answers`).
        network: the teacher as a network, in evaluation mode, where ``taps``, names of its nodes, are asked for. Then it runs for each batch.
        name: tells teachers apart.
    """

    def __init__(self, predict: Callable[[Any], Any], network: Network | None = None, taps: Sequence[str] = (), name: str = "") -> None:
        super().__init__()
        self.taps, self.name = tuple(taps), name
        self.tapped = None if network is None or not self.taps else with_values(network, self.taps)
        self.answers = Answers(predict)

    def forward(self, inputs: Any) -> tuple[list[Tensor], dict[str, Tensor]]:
        """Flat outputs, and the values of ``taps``."""
        inputs = tensors_in(inputs)
        if self.tapped is None:
            return self.answers(inputs), {}
        with torch.no_grad():
            values = list(self.tapped.graph_module(*self.tapped.flat(inputs)))
        count = len(values) - len(self.taps)
        return values[:count], dict(zip(self.taps, values[count:], strict=True))

    def outputs(self, inputs: Any) -> list[Tensor]:
        """Flat outputs; nothing is kept."""
        return self.answers.ask(tensors_in(inputs))


def with_values(network: Network, names: Sequence[str]) -> Network:
    """A fork over the same tensors whose graph gives the values of these nodes behind its outputs.

    Raises:
        TaskError: there is no such node.
    """
    made = network.fork()
    nodes = {node.name: node for node in made.graph.nodes}
    output: Any = made.graph.output_node()
    for name in names:
        if name not in nodes:
            raise TaskError(f"the network has no node {name!r} to look at; {nearest(name, nodes)}")
    output.args = ((*output.args[0], *(nodes[name] for name in names)),)
    made.recompile()
    return made

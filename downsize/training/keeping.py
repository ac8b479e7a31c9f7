"""States of a network in training: its tensors by name, their moving average, the best one so far."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..network.network import Network
from ..network.parts import assign


def snapshot(network: Network) -> dict[str, Tensor]:
    """Copies of all tensors by name."""
    return {name: tensor.detach().clone() for name, tensor in network.named_tensors()}


def put(network: Network, tensors: Mapping[str, Tensor]) -> None:
    """Write values into a network's tensors, in place: forks see them."""
    with torch.no_grad():
        for name, tensor in network.named_tensors():
            if name in tensors:
                tensor.copy_(tensors[name])


def with_tensors(network: Network, tensors: Mapping[str, Tensor]) -> Network:
    """A fork in evaluation mode that has these tensors and shares nothing that is trained; names that share a tensor go on sharing it."""
    made = network.fork().eval()
    own: dict[int, Tensor] = {}
    for name, tensor in list(made.named_tensors()):
        if id(tensor) not in own:
            value = tensors[name].detach().clone(memory_format=torch.contiguous_format)
            own[id(tensor)] = torch.nn.Parameter(value, tensor.requires_grad) if isinstance(tensor, torch.nn.Parameter) else value
        assign(made.graph_module, name, own[id(tensor)])
    return made


class Average:
    """The moving average of a network's tensors, ``mean = factor * mean + (1 - factor) * value`` a step (Polyak & Juditsky 1992).

    The factor grows from zero as ``(1 + step) / (10 + step)`` until it is what was asked, so that the start is forgotten. Tensors of whole
    numbers are taken as they are.
    """

    def __init__(self, network: Network, factor: float) -> None:
        self.factor, self.values = factor, snapshot(network)

    def update(self, network: Network, step: int) -> None:
        """Take in the tensors behind step ``step``, counted from 1."""
        factor = min(self.factor, (1 + step) / (10 + step))
        with torch.no_grad():
            for name, tensor in network.named_tensors():
                if tensor.is_floating_point():
                    self.values[name].lerp_(tensor, 1 - factor)
                else:
                    self.values[name].copy_(tensor)

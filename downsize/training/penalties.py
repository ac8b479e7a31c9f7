"""Penalties that make weights, or all weights of a unit, exactly zero: proximal steps behind those of the optimizer.

Each takes ``rate * strength`` from the size of what it acts on, where ``rate`` is the plain learning rate of the step: with an optimizer
that scales gradients (AdamW) the loss is scaled, the penalty is not.
"""

# pyright: reportArgumentType=false
# (torch.fx types every argument as a union of everything)

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor, fx

from ..errors import TaskError, nearest
from ..network.lineage import Axis, Lineage
from ..network.network import Network
from ..network.rewrite import argument, aten, constant
from ..pruning.sites import sites
from ..pruning.weights import weights_of
from .hook import Hook, Learner


def soft_threshold(tensor: Tensor, amount: float) -> None:
    """Bring every entry nearer to zero by ``amount``, in place, and to exactly zero what was nearer than that."""
    with torch.no_grad():
        tensor.copy_(tensor.sign() * (tensor.abs() - amount).clamp(min=0))


class Penalty(Hook):
    """A hook that makes zeros by steps of its own: the training's last state is what was asked for, whatever validation likes."""

    strength: float

    def ready(self, learner: Learner) -> bool:
        return self.strength == 0 or learner.step == learner.steps


class L1(Penalty):
    """``strength * sum |w|`` over the weights of linear layers and convolutions, by its proximal step (Daubechies et al. 2004, arXiv
    math/0307152): weights become exactly zero.

    Raises:
        TaskError: the network has no such weights.
    """

    def __init__(self, network: Network, strength: float) -> None:
        self.strength = strength
        self.names = [weight.name for weight in weights_of(network)]
        if not self.names:
            raise TaskError("The network has no convolution or linear layer with a constant weight: there is nothing for penalty='l1'.")

    def after(self, learner: Learner) -> None:
        for name in self.names:
            if name in learner.parameters:
                soft_threshold(learner.parameters[name], learner.rate * self.strength)


class Slimming(Penalty):
    """``strength * sum |gain|`` over the gains of batch norms (network slimming; Liu et al. 2017, arXiv 1708.06519): channels whose gain is
    zero give the same for every input, and ``prune(importance="scale")`` takes them first.

    Raises:
        TaskError: the network has no batch norm with a gain.
    """

    def __init__(self, network: Network, strength: float) -> None:
        self.strength = strength
        gains = [argument(node, 1, "weight") for node in network.graph.nodes if node.target is aten.batch_norm.default]
        self.names = list(dict.fromkeys(str(gain.target) for gain in gains if isinstance(gain, fx.Node) and constant(network, gain) is not None))
        if not self.names:
            raise TaskError("The network has no batch norm with a gain: there is nothing for penalty='scale'; expected 'group_l1' or 'l1'.")

    def after(self, learner: Learner) -> None:
        for name in self.names:
            if name in learner.parameters:
                soft_threshold(learner.parameters[name], learner.rate * self.strength)


class GroupL1(Penalty):
    """``strength * sum over units of sqrt(entries) * |all weights of the unit|`` (group lasso; Yuan & Lin 2006): whole units become zero.

    The weights of a unit are those of every trained tensor that carries it: what makes it, its batch norm, what reads it. A weight belongs
    to a unit of each axis that its tensor has, so groups overlap; the proximal steps are made axis after axis, which is exact for each axis
    and approximate for their sum. ``rate * strength * sqrt(entries)`` goes from each unit's norm.

    Raises:
        TaskError: the network has no axis that can be cut.
    """

    def __init__(self, network: Network, strength: float) -> None:
        self.strength = strength
        self.axes = [site.axis for site in sites(Lineage(network))]
        if not self.axes:
            raise TaskError("The network has no channels, heads or neurons that can be cut: there is nothing for penalty='group_l1'.")

    def after(self, learner: Learner) -> None:
        for axis in self.axes:
            shrink_units(axis, learner.parameters, learner.rate * self.strength)


def unit_squares(axis: Axis, tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Of each unit of an axis the squared norm over these tensors, and how many entries it has there: [units] each."""
    squares, entries = torch.zeros(axis.units), torch.zeros(axis.units)
    for tensor, dim, unit in _carriers(axis, tensors):
        known = unit >= 0
        rows = tensor.detach().movedim(dim, 0).flatten(1) if tensor.dim() > 1 else tensor.detach()[:, None]
        squares.index_add_(0, unit[known], rows.float().square().sum(1).to(squares.device)[known])
        entries.index_add_(0, unit[known], torch.full((int(known.sum()),), float(rows.shape[1])))
    return squares, entries


def shrink_units(axis: Axis, tensors: Mapping[str, Tensor], amount: float) -> None:
    """Take ``amount * sqrt(entries)`` from the norm of every unit, in place; units with less become zero."""
    squares, entries = unit_squares(axis, tensors)
    factor = (1 - amount * entries.sqrt() / squares.sqrt().clamp(min=1e-30)).clamp(min=0)
    with torch.no_grad():
        for tensor, dim, unit in _carriers(axis, tensors):
            each = torch.where(unit >= 0, factor[unit.clamp(min=0)], 1.0).to(tensor)
            tensor.mul_(each.reshape(-1, *[1] * (tensor.dim() - 1 - dim)))


def _carriers(axis: Axis, tensors: Mapping[str, Tensor]) -> list[tuple[Tensor, int, Tensor]]:
    found = axis.carriers.items()
    return [(tensors[name], dim, torch.from_numpy(np.asarray(unit))) for (name, dim), unit in found if name in tensors]


PENALTIES: dict[str, Callable[[Network, float], Hook]] = {"l1": L1, "group_l1": GroupL1, "scale": Slimming}


def hooks_for(network: Network, penalty: str, strength: float) -> list[Hook]:
    """The hooks of a penalty by name: ``l1`` (single weights), ``group_l1`` (whole units), ``scale`` (gains of batch norms).

    Raises:
        TaskError: there is no such penalty, the strength is negative, or the network has nothing that it could act on.
    """
    if penalty not in PENALTIES:
        raise TaskError(f"there is no penalty {penalty!r}; {nearest(penalty, PENALTIES)}")
    if not (math.isfinite(strength) and strength >= 0):
        raise TaskError(f"penalty={penalty!r} with strength {strength} came; expected a number of 0 or more, such as 1e-3.")
    return [PENALTIES[penalty](network, strength)]

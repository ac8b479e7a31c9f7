"""Gates on units that training opens and closes, so that it finds out itself which units a smaller network can do without.

A gate is a number from 0 to 1 that multiplies a unit wherever it is read; how likely it is to be open is learned (hard concrete gates;
Louizos et al. 2018, arXiv 1712.01312). The expected cost over all gates is held to what may remain by a multiplier that grows as long as it is
above (Lagrangian, as in Wang et al. 2020, arXiv 1910.04732).
"""

# pyright: reportArgumentType=false, reportReturnType=false, reportAssignmentType=false, reportOptionalMemberAccess=false
# pyright: reportAttributeAccessIssue=false
# (torch.fx types every argument as a union of everything)

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, fx, nn

from ..errors import TaskError
from ..network.lineage import Lineage
from ..network.network import Network
from ..network.rewrite import add_constant, insert_after
from ..pruning.costs import Costs, Polynomial, evaluate
from ..pruning.sites import Site, sites
from ..pruning.structure import Settings
from ..task import Task
from .hook import Hook, Learner
from .plan import Training

# Of the hard concrete distribution: temperature, and the ends of the stretched interval.
BETA, LOW, HIGH = 2 / 3, -0.1, 1.1
START = 2.5  # where gates begin: at 1 in evaluation
TRAVEL = 40.0  # the largest learning rate of gates, whatever that of the weights, times the number of steps
SHRINKING = 0.5  # the share of the training in which the expected cost is led down to what may remain
GROWTH = 200.0  # what the multiplier grows by over a whole training at an excess of 1
NEAR = 0.02  # how far above what may remain the expected cost may be in the end, as a share of the whole network's
NARROWEST = 0.1  # the share of an axis that gates are not led below


def sampled(location: Tensor, uniform: Tensor) -> Tensor:
    """A draw of the gates, 0 to 1, from uniform random numbers of the same shape."""
    s = torch.sigmoid((uniform.log() - (-uniform).log1p() + location) / BETA)
    return (s * (HIGH - LOW) + LOW).clamp(0, 1)


def settled(location: Tensor) -> Tensor:
    """The gates in evaluation, 0 to 1."""
    return (torch.sigmoid(location) * (HIGH - LOW) + LOW).clamp(0, 1)


def openness(location: Tensor) -> Tensor:
    """How likely each gate is not zero."""
    return torch.sigmoid(location - BETA * math.log(-LOW / HIGH))


def gated(weight: Tensor, location: Tensor, uniform: Tensor, drawing: Tensor, unit: Tensor) -> Tensor:
    """A reader's weight with its inputs (dimension 1) multiplied by their units' gates.

    Args:
        location, uniform: [units]; drawing: whether gates are drawn, else they are as in evaluation; unit: of each input, -1 for none.
    """
    gates = torch.where(drawing, sampled(location, uniform), settled(location))
    factor = torch.where(unit >= 0, gates[unit.clamp(min=0)], 1.0)
    return weight * factor.to(weight.dtype).reshape(1, -1, *[1] * (weight.dim() - 2))


class Gates(Hook):
    """Gates at all readers of each site, trained with the network.

    Args:
        network: its graph is edited here, before training.
        found: sites of it all of whose readers are linear layers or convolutions.
        cost: what the network costs by the relative widths of these sites. ``most``: what it may, in the same unit.
        rate: the largest learning rate of the plan.
    """

    def __init__(self, network: Network, found: Sequence[Site], cost: Polynomial, most: float, rate: float) -> None:
        self.found, self.cost, self.rate = tuple(found), cost, rate
        self.whole = float(evaluate(cost, [1.0] * len(found)))
        self.most = max(most, float(evaluate(cost, [NARROWEST] * len(found)))) / self.whole
        self.multiplier = torch.zeros((), dtype=torch.float64)
        self.names = [_insert(network, site, number) for number, site in enumerate(self.found)]
        network.recompile()

    def expected(self, network: Network) -> Tensor:
        """The expected cost as a share of the whole network's, as if gates of one axis were all as open as their mean."""
        return evaluate(self.cost, [openness(network.tensor(f"{name}.location")).mean() for name in self.names]) / self.whole  # type: ignore[return-value]

    def excess(self, learner: Learner) -> Tensor:
        """How far the expected cost is above what it may be at this step."""
        may = 1 - (1 - self.most) * min(1.0, learner.share / SHRINKING)
        return self.expected(learner.network) - may

    # What the loop calls ------------------------------------------------------------------------------------------------------------

    def rates(self, learner: Learner) -> Mapping[str, float]:
        return {f"{name}.location": TRAVEL / max(1, learner.steps) / self.rate for name in self.names}

    def before(self, learner: Learner) -> None:
        for name in self.names:
            uniform = learner.network.tensor(f"{name}.uniform")
            uniform.copy_(torch.rand(uniform.shape).clamp(1e-6, 1 - 1e-6))
            learner.network.tensor(f"{name}.drawing").fill_(True)

    def penalty(self, learner: Learner) -> Tensor:
        excess = self.excess(learner)
        return float(self.multiplier) * excess + GROWTH / 2 * excess.clamp(min=0).square()

    def after(self, learner: Learner) -> None:
        with torch.no_grad():
            grown = self.multiplier + GROWTH / learner.steps * float(self.excess(learner).detach())
            self.multiplier = grown.clamp(min=0)
        for name in self.names:
            learner.network.tensor(f"{name}.drawing").fill_(False)

    def ready(self, learner: Learner) -> bool:
        return learner.steps == 0 or (learner.share > SHRINKING and float(self.expected(learner.network).detach()) <= self.most + NEAR)

    def state(self) -> dict[str, Tensor]:
        return {"multiplier": self.multiplier}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        self.multiplier = state["multiplier"]

    # -----------------------------------------------------------------------------------------------------------------------------------

    def settle(self, network: Network) -> dict[str, Tensor]:
        """Multiply the gates into the trained network's readers, in place, and take them out of its graph. Returns how open each site's
        units are, by name of axis: [units], in double precision."""
        for node in [node for node in network.graph.nodes if node.op == "call_function" and node.target is gated]:
            weight, *rest = (network.tensor(str(one.target)) for one in (_constant_of(node), *node.args[1:]))
            with torch.no_grad():
                weight.copy_(gated(weight, *rest))
            node.replace_all_uses_with(node.args[0])
        scores = {site.axis.name: network.tensor(f"{name}.location").detach().double() for site, name in zip(self.found, self.names, strict=True)}
        network.recompile()
        return scores


def _insert(network: Network, site: Site, number: int) -> str:
    """Put gates before what a site's readers read; returns the name under which their tensors are."""
    name = f"gates_{number}"
    units = site.axis.units
    tensors = {"location": nn.Parameter(torch.full((units,), START)), "uniform": torch.full((units,), 0.5), "drawing": torch.tensor(False)}
    nodes = {node.name: node for node in network.graph.nodes}
    first = next(iter(network.graph.nodes))
    own = [add_constant(network, f"{name}.{key}", tensor, first) for key, tensor in tensors.items()]
    for order, reader in enumerate(site.readers):
        layer = nodes[reader.node]
        weight = layer.args[1]
        unit = torch.from_numpy(site.axis.carriers[(str(_constant_of(weight).target), 1)].copy())
        place = add_constant(network, f"{name}.unit_{order}", unit, first)
        insert_after(network, weight, gated, (*own, place), [layer])
    return name


def _constant_of(node: fx.Node) -> fx.Node:
    """The weight behind the gates that it has already."""
    while node.op != "get_attr":
        node = node.args[0]
    return node


def train_gates(network: Network, task: Task, plan: Training, settings: Settings) -> tuple[Network, dict[str, Tensor]]:
    """Train a network together with gates on its units, so that what is expected to be open costs what may remain.

    Args:
        settings: of pruning: kinds of axes, the amount, and what may remain of it. Axes that are read otherwise than by linear layers and
            convolutions get no gates.

    Returns: the trained network, closed units' weights being zero where they are read; and by name of axis how open each unit's gate is.

    Raises:
        TaskError: no axis can have gates, or the network cannot be trained.
    """
    lineage = Lineage(network)
    found = [site for site in sites(lineage, settings.what) if site.whole]
    if not found:
        raise TaskError(f"No {', '.join(settings.what)} are read by layers alone: there is no place for gates; expected another importance.")
    costs = Costs(lineage, [site.axis for site in found])
    if settings.amount == "ratio":
        units = sum(site.axis.units for site in found)
        cost: Polynomial = {(number,): site.axis.units / units for number, site in enumerate(found)}
    else:
        cost = costs.macs if settings.amount == "macs" else costs.parameters
    edited = network.fork()
    gates = Gates(edited, found, cost, settings.most, plan.rate)
    made = plan.train(edited, task, hooks=[gates])
    return made, gates.settle(made)

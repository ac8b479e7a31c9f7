"""Training of quantizers: the rates of their steps, and the bounds that steps, zero points, gains and latent weights keep."""

# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportOptionalMemberAccess=false, reportCallIssue=false
# pyright: reportOperatorIssue=false
# (torch.fx types every argument as a union of everything)

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import fx

from ..network.network import Network
from ..network.rewrite import constant
from ..numerics.grids import per_axis
from ..numerics.lowbit import binary_connect, learned_step, trained_ternary
from ..quantization.learned import learned_nodes
from .hook import Hook, Learner

# Steps and levels do not fall below this part of what they were, nor gains below that number: neither may become zero or negative.
SMALLEST_FACTOR, SMALLEST_GAIN = 1e-2, 1e-5


class Quantizing(Hook):
    """Lets a network of learned quantizers (``quantization/learned.py``) be trained.

    With AdamW a step moves relative to its own size, and a zero point relative to the width of its grid. With SGD a step moves by the gradient of
    Esser et al. 2020 times its own size, which for small steps is slower and steadier than without, and a zero point as its offset relative to
    the step. None has weight decay.

    Args:
        optimizer: ``adamw`` or ``sgd``, which the factors of the rates are for.
        norms: names of batch norms that will be folded into the layers before them: their gains stay positive.
    """

    def __init__(self, optimizer: str, norms: Sequence[str] = ()) -> None:
        self.optimizer, self.norms = optimizer, norms

    def rates(self, learner: Learner) -> Mapping[str, float]:
        found: dict[str, float] = {}
        for node in learned_nodes(learner.network):
            if node.target is learned_step:
                _, start, factor, zero, _, low, high = node.args
                size = constant(learner.network, start).detach().double().mean().item()
                found[str(factor.target)] = 1.0 if self.optimizer == "adamw" else 1 / size
                found[str(zero.target)] = float(high - low) if self.optimizer == "adamw" else 1 / size
            elif node.target is trained_ternary:
                found[str(node.args[2].target)] = 1.0
        return {name: rate for name, rate in found.items() if name in learner.parameters}

    def begin(self, learner: Learner) -> None:
        self.after(learner)

    def after(self, learner: Learner) -> None:
        network = learner.network
        with torch.no_grad():
            for node in learned_nodes(network):
                _bound(network, node)
            for norm in network.graph.nodes:
                if norm.name in self.norms:
                    constant(network, norm.args[1]).clamp_(min=SMALLEST_GAIN)


def _bound(network: Network, node: fx.Node) -> None:
    if node.target is learned_step:
        _, _, factor, zero, _, low, high = node.args
        constant(network, factor).clamp_(min=SMALLEST_FACTOR)
        if constant(network, zero).is_floating_point():
            constant(network, zero).clamp_(low, high)
    elif node.target is trained_ternary:
        constant(network, node.args[2]).clamp_(min=SMALLEST_FACTOR)
    elif node.target is binary_connect:
        weight, start, axis, _ = node.args
        tensor = constant(network, weight)
        limit = per_axis(constant(network, start), axis, tensor.dim())
        tensor.copy_(torch.minimum(torch.maximum(tensor, -limit), limit))

"""Normalisations in training: which of them move their statistics, and on what they cannot."""

# pyright: reportArgumentType=false, reportAttributeAccessIssue=false

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from ..network.network import TRAINING_FLAGS, Network
from ..network.rewrite import aten, constant

BATCH_NORM = aten.batch_norm.default
NORMS = (BATCH_NORM, aten.instance_norm.default)


def to_training(network: Network, norms: str, frozen: Callable[[str], bool]) -> None:
    """Switch to training, in place. Norms stay as they were captured where ``norms`` is "freeze", or where their statistics are frozen."""
    network.train()
    for node in network.graph.nodes:
        if node.target in NORMS:
            names = [str(part.target) for part in node.args[3:5] if isinstance(part, fx.Node)]
            if norms == "freeze" or any(map(frozen, names)):
                node.update_arg(TRAINING_FLAGS[str(node.target)], node.meta["captured_flag"])
    network.recompile()


def moving(network: Network) -> list[Tensor]:
    """The running statistics that the forward pass changes."""
    found = [constant(network, part) for node in network.graph.nodes if node.target in NORMS and _trains(node) for part in node.args[3:5]]
    return list({id(tensor): tensor for tensor in found if tensor is not None}.values())


def alone(network: Network, leaves: Sequence[Tensor]) -> bool:
    """Whether a batch norm in training would get a single value a channel on these inputs, which has no variance (torch refuses it)."""
    names = {node.name for node in network.graph.nodes if node.target is BATCH_NORM and _trains(node)}
    if not names:
        return False
    before = [(tensor, tensor.clone()) for tensor in moving(network)]
    sizes = _Sizes(network.graph_module)
    with torch.no_grad():
        sizes.run(*leaves)
        for tensor, value in before:
            tensor.copy_(value)
    return any(sizes.found[name] == 1 for name in names)


class _Sizes(fx.Interpreter):
    """Runs a graph and notes how many values a channel each batch norm gets."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.found: dict[str, int] = {}

    def run_node(self, n: fx.Node) -> Any:
        if n.target is BATCH_NORM:
            given = self.env[n.args[0]]
            self.found[n.name] = given.numel() // given.shape[1]
        return super().run_node(n)


def _trains(node: fx.Node) -> bool:
    position = TRAINING_FLAGS[str(node.target)]
    return len(node.args) > position and bool(node.args[position])

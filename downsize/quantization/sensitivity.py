"""How much the outputs of a network notice an error in one of its values."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, fx

from ..network.network import Network
from ..network.statistics import walk

# Random directions in which the outputs are looked at, for each piece of data.
DIRECTIONS = 2


def output_grams(network: Network, nodes: Sequence[fx.Node], pieces: Iterable[list[Tensor]], seed: int = 0) -> dict[fx.Node, Tensor]:
    """For each node the sum of ``J^T J`` over the positions of its value, J the derivative of the outputs by one position: [channels, channels].

    An error ``e`` there, the same at each position, changes the outputs by ``e^T G e``, squared and summed, to first order. Found without
    J, from the gradients of random combinations of the outputs (Hutchinson 1990), where every output counts by its own size: the expected
    outer product of such a gradient is ``J^T J``. Channels are the last dimension, as of what tables and linear layers give.
    """
    generator = torch.Generator().manual_seed(seed)
    found: dict[fx.Node, Tensor] = {}
    for leaves in pieces:
        cut: dict[fx.Node, Tensor] = {}

        def leaf(node: fx.Node, cut: dict[fx.Node, Tensor] = cut):
            def hook(args: tuple[object, ...], value: Tensor) -> Tensor:
                # What depends on an earlier node goes on depending on it.
                cut[node] = value if value.requires_grad else value.detach().requires_grad_()
                return cut[node]

            return hook

        outputs = [one for one in walk(network, leaves, {node: leaf(node) for node in nodes}, gradients=True) if one.requires_grad]
        if not outputs:
            continue
        for _ in range(DIRECTIONS):
            signs = [torch.randn(one.shape, generator=generator) / one.detach().norm().clamp(min=1e-30) for one in outputs]
            gradients = torch.autograd.grad(outputs, list(cut.values()), signs, retain_graph=True, allow_unused=True)
            for node, gradient in zip(cut, gradients, strict=True):
                if gradient is not None:
                    rows = gradient.flatten(0, -2).double()
                    found[node] = found.get(node, 0) + rows.T @ rows / DIRECTIONS
    return found

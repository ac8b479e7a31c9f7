"""Which positions of a batch are padding, found out from what they do to the outputs: nothing."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from .network import Network
from .statistics import walk

# On how many pieces with padding it is tried out that padding does nothing.
TRIALS = 3
TOLERANCE = 1e-4


def padding_port(network: Network, pieces: Iterable[list[Tensor]]) -> int | None:
    """The input that marks padding with 0 (an attention mask), as its number among ``network.ports``; None where there is none.

    It is an integer or bool input [batch, length] that holds only 0 and 1 over all pieces, somewhere a 0, and in every sample a 1. As other
    inputs look like that too (which sentence a token belongs to), it is tried out: with the other inputs [batch, length, ...] changed
    where it is 0, outputs must stay within 1e-4 of their largest value; of outputs [batch, length, ...] those where it is 1.
    """
    trials = {i: [] for i, port in enumerate(network.ports) if len(port.dims) == 2 and not port.dtype.is_floating_point}
    for leaves in pieces:
        trials = {i: found for i, found in trials.items() if _is_mask(leaves[i])}
        for i, found in trials.items():
            if len(found) < TRIALS and not bool(leaves[i].all()):
                found.append(leaves)
    return next((i for i, found in trials.items() if found and all(_does_nothing(network, leaves, i) for leaves in found)), None)


def _is_mask(leaf: Tensor) -> bool:
    return bool(((leaf == 0) | (leaf == 1)).all() & (leaf == 1).any(1).all())


def _does_nothing(network: Network, leaves: list[Tensor], port: int) -> bool:
    """Whether nothing depends on the values of the other inputs where this one is 0."""
    real = leaves[port].bool()
    first = real.int().argmax(1)
    changed = []
    for i, leaf in enumerate(leaves):
        if i != port and leaf.shape[:2] == real.shape:
            inside = leaf[torch.arange(len(leaf)), first][:, None].expand_as(leaf)
            leaf = torch.where(real.reshape(*real.shape, *[1] * (leaf.dim() - 2)), leaf, inside)
        changed.append(leaf)
    if all(torch.equal(one, two) for one, two in zip(leaves, changed, strict=True)):
        return False
    return all(_near(one, two, real) for one, two in zip(walk(network, leaves, {}), walk(network, changed, {}), strict=True))


def _near(one: Tensor, two: Tensor, real: Tensor) -> bool:
    if one.shape[:2] == real.shape:
        one, two = one[real], two[real]
    if not one.is_floating_point():
        return torch.equal(one, two)
    same = (one == two) | (one.isnan() & two.isnan())
    largest = torch.where(one.isfinite(), one.abs(), 0.0).amax() if one.numel() else 0.0
    return bool((same | ((one - two).abs() <= TOLERANCE * largest)).all())

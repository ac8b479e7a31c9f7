"""Batch norms measured again: a network that was cut gives them other inputs than those their statistics were taken of."""

# pyright: reportArgumentType=false, reportCallIssue=false, reportAttributeAccessIssue=false, reportOptionalMemberAccess=false

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, fx

from ..network.frontier import Frontier
from ..network.network import Network
from ..network.rewrite import argument, aten, constant, set_constant


def reestimate_batch_norms(network: Network, pieces: Sequence[list[Tensor]]) -> list[str]:
    """Set every batch norm's mean and variance to those of its input over the pieces, in place, in order: later ones see corrected ones.

    The variance is the unbiased one, as torch's ``running_var`` (all pieces being one batch; Ioffe & Szegedy 2015, arXiv 1502.03167,
    algorithm 2). Left alone: a batch norm in training, without statistics, with statistics that others read too (a layer used twice),
    or with fewer than 2 values a channel or values that are not finite.

    Returns: the names of the nodes that were set. Whether the network got better, the caller must judge.
    """
    readings = [id(constant(network, node)) for node in network.graph.nodes if node.op == "get_attr"]
    norms = [node for node in network.graph.nodes if node.target is aten.batch_norm.default and _is_own(network, node, readings)]
    frontier = Frontier(network, pieces)
    done = []
    for norm in norms:
        frontier.advance(norm)
        count, mean, variance = channel_statistics(frontier.values(norm.args[0]))
        if count < 2 or not bool(torch.isfinite(mean + variance).all()):
            continue
        for node, value in ((norm.args[3], mean), (norm.args[4], variance * count / (count - 1))):
            set_constant(network, node, value.to(constant(network, node).dtype))
        done.append(norm.name)
    return done


def channel_statistics(values: Iterable[Tensor]) -> tuple[int, Tensor, Tensor]:
    """How many values a channel has, their mean and (biased) variance: float64 [channels], of tensors [batch, channels, ...].

    Merged from those of each tensor (Chan, Golub & LeVeque 1979), so that a large mean costs no accuracy.
    """
    count, mean, squares = 0, torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    for value in values:
        flat = value.transpose(0, 1).flatten(1).double()
        size = flat.shape[1]
        if not size:
            continue
        own, other = flat.mean(1), count
        count += size
        squares = squares + (flat - own[:, None]).square().sum(1) + (own - mean).square() * (other * size / count)
        mean = mean + (own - mean) * (size / count)
    return count, mean, squares / max(count, 1)


def _is_own(network: Network, norm: fx.Node, readings: list[int]) -> bool:
    """Whether the batch norm uses its running statistics, and nothing else does."""
    statistics = [norm.args[3], norm.args[4]]
    if argument(norm, 5, "training") or any(constant(network, node) is None for node in statistics):
        return False
    return all(len(node.users) == 1 and readings.count(id(constant(network, node))) == 1 for node in statistics)

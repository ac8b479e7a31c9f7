"""Heads of attention in the basis in which their last dimensions carry least: queries with keys, values with the layer that reads them."""

# pyright: reportArgumentType=false

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from ..errors import CutError
from ..network.lower_weights import PRODUCTS
from ..network.network import Network
from ..network.parts import assign
from ..network.statistics import Hook, walk
from ..numerics.lowrank_products import balance, centred_moment
from .contractions import Contraction, contractions
from .tracing import Side

# What a rotated network may differ from the original by, of the outputs' largest value.
TOLERANCE = 1e-3


def rotate(network: Network, pieces: Sequence[list[Tensor]], port: int | None) -> list[str]:
    """Give every head, in place, the basis of its inner dimension in which each coordinate carries less than the one before it.

    The network computes what it did. A score is ``q^T k``, so queries may become ``R q`` and keys ``R^-T k``; what a layer W reads of values
    is a mixture of them, so they may become ``R v`` and W ``W R^-1``. The basis is that of the singular vectors of the product, on the
    activations of the data: keys about their mean, whose part shifts all scores of a query alike, which softmax does not see; mixtures about
    theirs, whose part a bias can give. So cutting the last dimensions of heads is the product's best approximation of low rank.

    Args:
        pieces: calibration inputs. port: the input that marks padding (see :func:`~downsize.network.padding.padding_port`): positions of
            activations [batch, length, features] where it is 0 do not count.

    Returns: which products were rotated, as ``queries x keys`` or ``values x reader``, by the names of their weights. Where anything but views,
    splits and numbers stands between the layers and the product (a rotary embedding, a norm), or the weight is sparse, shared or computed,
    they are left as they are.

    Raises:
        CutError: the network gives other outputs than before, which would be a fault of downsize.
    """
    found = contractions(network)
    before = network.fork().eval()
    moments = _moments(before, found, pieces, port)
    tensors: dict[str, Tensor] = {}
    for one in found:
        left = sum(moments[side] for side in one.left)
        right = sum(moments[side] for side in one.right)
        basis = balance(torch.as_tensor(left), torch.as_tensor(right))
        for sides, turn in ((one.left, basis.basis), (one.right, basis.inverse.mT)):
            for side in sides:
                _turn(network, tensors, side, turn)
    for name, tensor in tensors.items():
        _replace(network, name, tensor)
    network.recompile()
    _prove(before, network.fork().eval(), pieces[0])
    return list(dict.fromkeys(f"{left.weight} x {right.weight}" for one in found for left in one.left for right in one.right))


def _turn(network: Network, tensors: dict[str, Tensor], side: Side, matrix: Tensor) -> None:
    """``matrix`` [d, d] before the side's positions, of its weight and bias as they are among ``tensors``, in double precision."""
    for name, dim in ((side.weight, side.dim), (side.bias, 0)):
        if name is not None:
            tensor = tensors.setdefault(name, network.tensor(name).detach().double().clone())
            rows = tensor.movedim(dim, 0)
            positions = list(side.positions)
            rows[positions] = torch.tensordot(matrix, rows[positions], 1)


def _replace(network: Network, name: str, tensor: Tensor) -> None:
    """The new values under all names of the old tensor, of its dtype, and trainable if it was."""
    old = network.tensor(name)
    made: Tensor = tensor.to(old.dtype).contiguous()
    if isinstance(old, torch.nn.Parameter):
        made = torch.nn.Parameter(made, old.requires_grad)
    for other in [other for other, held in network.named_tensors() if held is old]:
        assign(network.graph_module, other, made)


def _prove(before: Network, network: Network, leaves: list[Tensor]) -> None:
    given = []
    for one in (before, network):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # dropout that the model leaves switched on
            given.append(walk(one, leaves, {}))
    for one, other in zip(*given, strict=True):
        if one.is_floating_point() and one.numel():
            gap, scale = float((one - other).nan_to_num().abs().max()), float(one.nan_to_num().abs().max())
            if gap > TOLERANCE * max(scale, 1e-30):
                raise CutError(f"The rotated network differs from the original by {gap:.3g} of {scale:.3g}, a fault of downsize: please report it.")


# Second moments -----------------------------------------------------------------------------------------------------------------------


def _moments(network: Network, found: Sequence[Contraction], pieces: Sequence[list[Tensor]], port: int | None) -> dict[Side, Tensor]:
    """The second moment [d, d] of each side: of what a layer gives, or, of a layer that reads values, of its weight.

    The left side of values is measured where they are read, as the mixtures they are in there.
    """
    outputs = [side for one in found if one.kind == "scores" for side in (*one.left, *one.right)]
    inputs = [side for one in found if one.kind == "values" for side in one.right]
    sums = _sums(network, outputs, inputs, pieces, port)
    moments: dict[Side, Tensor] = {}
    for one in found:
        if one.kind == "scores":
            moments |= {side: sums[side][:-1, :-1] / sums[side][-1, -1].clamp(min=1) for side in one.left}
            moments |= {side: centred_moment(sums[side]) / sums[side][-1, -1].clamp(min=1) for side in one.right}
            continue
        read = [centred_moment(sums[side]) / sums[side][-1, -1].clamp(min=1) for side in one.right]
        moments |= {side: torch.stack(read).sum(0) / len(one.left) for side in one.left}
        for side in one.right:
            weight = network.tensor(side.weight).detach().movedim(side.dim, 0)[list(side.positions)].double()
            moments[side] = weight @ weight.mT
    return moments


def _sums(network: Network, outputs: Sequence[Side], inputs: Sequence[Side], pieces: Sequence[list[Tensor]], port: int | None) -> dict[Side, Tensor]:
    """Of each side the sum [d + 1, d + 1] of ``x x^T`` over all positions, with a 1 behind x, of its layers' outputs or inputs."""
    sums = {side: torch.zeros(len(side.positions) + 1, len(side.positions) + 1, dtype=torch.float64) for side in (*outputs, *inputs)}
    by_node: dict[str, tuple[list[Side], list[Side]]] = {}
    for which, sides in enumerate((outputs, inputs)):
        for side in sides:
            for reader in side.readers:
                by_node.setdefault(reader, ([], []))[which].append(side)
    nodes = {node: by_node[node.name] for node in network.graph.nodes if node.name in by_node}
    for leaves in pieces:
        mask = leaves[port].bool() if port is not None else None
        walk(network, leaves, {node: _recorder(node, wanted, sums, mask) for node, wanted in nodes.items()})
    return sums


def _recorder(node: fx.Node, wanted: tuple[list[Side], list[Side]], sums: dict[Side, Tensor], mask: Tensor | None) -> Hook:
    def record(args: tuple[Any, ...], value: Tensor) -> None:
        for data, sides in zip((value, args[PRODUCTS[node.target][0]]), wanted, strict=True):
            rows = data.reshape(-1, data.shape[-1])
            if mask is not None and data.dim() == 3 and data.shape[:2] == mask.shape:
                rows = rows[mask.reshape(-1)]
            for side in sides:
                own = rows[:, list(side.positions)].double()
                own = torch.cat([own, own.new_ones(len(own), 1)], 1)
                sums[side] += own.mT @ own

    return record

"""Gram matrices of what layers read, on calibration data: the Hessians of their squared output errors."""

# pyright: reportArgumentType=false, reportCallIssue=false, reportAttributeAccessIssue=false

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from ..network.columns import groups_of, input_rows
from ..network.network import Network
from ..network.rewrite import aten
from ..network.statistics import Hook, walk
from .sites import Site

# Gram matrices held at a time, in elements: more sites take more passes over the data, not more memory.
GRAM_ELEMENTS = 2**26


def with_grams(network: Network, found: Sequence[Site], pieces: Sequence[list[Tensor]], port: int | None) -> Iterator[tuple[Site, dict[str, Tensor]]]:
    """Each site with the Gram matrix of each of its readers, [groups, columns + 1, columns + 1] in double precision.

    Behind the columns stands a 1 (the bias): its row holds the sums of the inputs, its corner the number of positions.

    Args:
        port: the number of the input that marks padding (see :func:`~downsize.network.padding.padding_port`): positions of linear layers on
            [batch, length, features] where it is 0 do not count.
    """
    nodes = {node.name: node for node in network.graph.nodes}
    batch: list[Site] = []
    room = GRAM_ELEMENTS
    for site in found:
        size = sum(reader.groups * (len(reader.unit) + 1) ** 2 for reader in site.readers)
        if batch and size > room:
            yield from _measured(network, nodes, batch, pieces, port)
            batch, room = [], GRAM_ELEMENTS
        batch.append(site)
        room -= size
    yield from _measured(network, nodes, batch, pieces, port)


def _measured(
    network: Network, nodes: dict[str, fx.Node], batch: Sequence[Site], pieces: Sequence[list[Tensor]], port: int | None
) -> Iterator[tuple[Site, dict[str, Tensor]]]:
    grams = gram_matrices(network, [nodes[name] for name in dict.fromkeys(reader.node for site in batch for reader in site.readers)], pieces, port)
    for site in batch:
        yield site, {reader.node: grams[reader.node] for reader in site.readers}


def gram_matrices(network: Network, layers: Sequence[fx.Node], pieces: Sequence[list[Tensor]], port: int | None) -> dict[str, Tensor]:
    """The Gram matrix of each layer, by its name; see :func:`with_grams`."""
    grams: dict[str, Tensor] = {}
    for number, leaves in enumerate(pieces):
        mask = leaves[port].bool() if port is not None else None
        walk(network, leaves, {layer: _recorder(layer, grams, number, mask) for layer in layers})
    return grams


def _recorder(layer: fx.Node, grams: dict[str, Tensor], visit: int, mask: Tensor | None) -> Hook:
    def record(args: tuple[Any, ...], value: Tensor) -> None:
        groups = groups_of(layer)
        rows = input_rows(layer, args, groups, visit)
        if mask is not None and layer.target is aten.linear.default and args[0].dim() == 3 and args[0].shape[:2] == mask.shape:
            rows = rows[:, :, mask.reshape(-1)]
        rows = torch.cat([rows, rows.new_ones(groups, 1, rows.shape[2])], 1)
        gram = (rows @ rows.mT).double()
        grams[layer.name] = grams[layer.name] + gram if layer.name in grams else gram

    return record

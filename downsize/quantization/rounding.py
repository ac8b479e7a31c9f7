"""Rounding of weights by the inputs they meet: Gram matrices of layer inputs, and GPTQ on them."""

# pyright: reportArgumentType=false, reportCallIssue=false, reportAttributeAccessIssue=false, reportOptionalMemberAccess=false
# pyright: reportOptionalSubscript=false, reportReturnType=false

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from ..network.columns import MATRIX_LAYERS, can_unfold, groups_of, input_rows, weight_matrix
from ..network.network import Network
from ..network.rewrite import constant, set_constant
from ..network.statistics import walk
from ..numerics.hessian import gptq
from .insertion import FAKE, grid_of

# Gram matrices held at a time, in elements: more layers take more passes over the data, not more memory.
GRAM_ELEMENTS = 2**24
# Wider layers are rounded to nearest: solving takes the cube of this in time and the square in memory, and wants as many samples.
LARGEST_COLUMNS = 1536


def round_weights(reference: Network, quantized: Network, data: Sequence[list[Tensor]]) -> None:
    """Move the weights of ``quantized`` onto their grids by GPTQ, in place, with the inputs that the layers of ``reference`` meet.

    Convolutions (in any groups) and linear layers whose weight is theirs alone; others keep rounding to nearest.
    """
    twins = {node.name: node for node in quantized.graph.nodes}
    layers = [node for node in reference.graph.nodes if _can_round(reference, node, twins.get(node.name))]
    for group in _groups(reference, layers):
        grams = _grams(reference, group, data)
        for node in group:
            _round(quantized, twins[node.name], grams.pop(node))


def _can_round(network: Network, node: fx.Node, twin: fx.Node | None) -> bool:
    if twin is None or node.target not in MATRIX_LAYERS or not can_unfold(node):
        return False
    fake = twin.args[1]
    per_row = isinstance(fake, fx.Node) and fake.target is FAKE and fake.args[3] == 0
    narrow = network.tensor(node.args[1].target)[0].numel() <= LARGEST_COLUMNS if per_row else False
    return narrow and len(fake.users) == 1 and len(fake.args[0].users) == 1


def _shape(network: Network, node: fx.Node) -> tuple[int, int, int]:
    """Groups, rows a group and columns of a layer's weight as a matrix."""
    weight = constant(network, node.args[1])
    groups = groups_of(node)
    return groups, weight.shape[0] // groups, weight[0].numel()


def _groups(network: Network, layers: list[fx.Node]) -> list[list[fx.Node]]:
    groups: list[list[fx.Node]] = []
    room = 0
    for node in layers:
        count, _, columns = _shape(network, node)
        if not groups or room < count * columns**2:
            groups.append([])
            room = GRAM_ELEMENTS
        groups[-1].append(node)
        room -= count * columns**2
    return groups


def _grams(network: Network, nodes: list[fx.Node], data: Sequence[list[Tensor]]) -> dict[fx.Node, Tensor]:
    grams = {}
    for node in nodes:
        groups, _, columns = _shape(network, node)
        grams[node] = torch.zeros(groups, columns, columns)

    def recorder(node: fx.Node) -> Any:
        def record(args: tuple[Any, ...], value: Tensor) -> None:
            rows = input_rows(node, args, grams[node].shape[0], record.visits)  # type: ignore[attr-defined]
            record.visits += 1  # type: ignore[attr-defined]
            grams[node] += rows @ rows.mT

        record.visits = 0  # type: ignore[attr-defined]
        return record

    hooks = {node: recorder(node) for node in nodes}
    for leaves in data:
        walk(network, leaves, hooks)
    return grams


def _round(network: Network, layer: fx.Node, gram: Tensor) -> None:
    fake = layer.args[1]
    weight, scale = constant(network, fake.args[0]).detach(), constant(network, fake.args[1])
    matrix = weight_matrix(weight, gram.shape[0])
    rounded = gptq(matrix, gram, scale.reshape(matrix.shape[:2]), grid_of(fake))
    set_constant(network, fake.args[0], rounded.reshape(weight.shape))

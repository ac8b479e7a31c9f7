"""Every weight rounded in several formats by the inputs that its layer meets, in one pass along the float network."""

# pyright: reportArgumentType=false, reportCallIssue=false, reportAttributeAccessIssue=false, reportOptionalMemberAccess=false
# pyright: reportOptionalSubscript=false

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor, fx

from ..network.columns import MATRIX_LAYERS, can_unfold, groups_of, input_rows, weight_from_matrix, weight_matrix
from ..network.frontier import Frontier
from ..network.network import Network
from ..network.rewrite import argument, constant
from ..progress import Progress
from .formats import Format
from .grouped import solved, steps_of
from .in_order import GRAM_ELEMENTS

K = TypeVar("K", bound=Hashable)


def solved_changes(
    network: Network, formats: Mapping[str, Mapping[K, Format]], pieces: Sequence[list[Tensor]], progress: Progress | None = None
) -> dict[str, dict[K, dict[str, Tensor]]]:
    """What GPTQ makes of each weight in each of its formats (Frantar et al. 2023, arXiv 2210.17323), each with the inputs of the float network.

    A bias of its own takes up the mean of the error. Weights that no linear layer or convolution reads alone are not there.
    """
    layers = [node for node in network.graph.nodes if _is_solvable(network, node) and str(node.args[1].target) in formats]
    frontier = Frontier(network, pieces)
    found: dict[str, dict[K, dict[str, Tensor]]] = {}
    with (progress or Progress(quiet=True)).counting("rounding", "weight", len(layers)) as show:
        for number, layer in enumerate(layers, 1):
            if frontier.next is not layer:
                frontier.advance(layer)
            name = str(layer.args[1].target)
            found[name] = _solve(network, layer, *_moments(network, layer, frontier), formats[name])
            show(number, name)
    return found


def _is_solvable(network: Network, layer: fx.Node) -> bool:
    """Whether it is a layer that can be unfolded, with a weight that it alone reads."""
    if layer.target not in MATRIX_LAYERS or (weight := constant(network, layer.args[1])) is None:
        return False
    name = str(layer.args[1].target)
    readers = {user for node in network.graph.nodes if node.op == "get_attr" and str(node.target) == name for user in node.users}
    narrow = groups_of(layer) * (weight[0].numel() + 1) ** 2 <= GRAM_ELEMENTS
    return narrow and readers == {layer} and layer.args[0] is not layer.args[1] and can_unfold(layer)


def _moments(network: Network, layer: fx.Node, frontier: Frontier) -> tuple[Tensor, Tensor, int]:
    """Of the layer's inputs as columns: the sum of outer products [groups, columns, columns], the mean [groups, columns], the count."""
    groups, weight = groups_of(layer), constant(network, layer.args[1])
    columns = weight[0].numel()
    gram, total, count = torch.zeros(groups, columns, columns), torch.zeros(groups, columns), 0
    for visit, value in enumerate(frontier.values(layer.args[0])):
        rows = input_rows(layer, (value, weight), groups, visit)
        gram += rows @ rows.mT
        total += rows.sum(2)
        count += rows.shape[2]
    return gram, total / max(1, count), count


def _solve(network: Network, layer: fx.Node, gram: Tensor, mean: Tensor, count: int, formats: Mapping[K, Format]) -> dict[K, dict[str, Tensor]]:
    weight = constant(network, layer.args[1]).detach()
    matrix = weight_matrix(weight, len(gram))
    node = argument(layer, 2, "bias")
    bias = constant(network, node)
    alone = bias is not None and len(node.users) == 1
    if alone:  # the mean of the error is no error then
        gram = gram - count * mean[:, :, None] * mean[:, None, :]
    ways: dict[K, dict[str, Tensor]] = {}
    for key, wanted in formats.items():
        values = solved(matrix, gram, wanted, steps_of(matrix.flatten(0, 1), wanted)).to(weight.dtype)
        ways[key] = {str(layer.args[1].target): weight_from_matrix(values, weight.shape)}
        if alone:
            shift = ((matrix - values) @ mean[:, :, None]).reshape(-1)
            ways[key][str(node.target)] = bias.detach() + shift.to(bias.dtype)
    return ways

"""Low-rank branches beside layers: what rounding, zeros or a cut have taken from a layer's output, given back by two thin layers."""

# pyright: reportArgumentType=false, reportCallIssue=false, reportAttributeAccessIssue=false, reportOptionalMemberAccess=false
# pyright: reportOptionalSubscript=false

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from ..errors import TaskError
from ..network.columns import groups_of, weight_from_matrix, weight_matrix
from ..network.frontier import Frontier, Joined
from ..network.goals import Goal, goals_of
from ..network.network import Network
from ..network.padding import padding_port
from ..network.pairs import Pairs, moments
from ..network.rewrite import add_constant, argument, aten, constant, insert_after
from ..numerics import grids
from ..numerics.grids import SYMMETRIC_INT8
from ..numerics.lowrank import spectrum
from ..numerics.refit import Moments, best_refit, residual
from ..progress import Progress
from ..pruning.refitting import GRAM_ELEMENTS
from ..quantization.insertion import extremes, quantize_weights, settle
from ..quantization.placement import WeightPoint


@dataclass(frozen=True, eq=False)
class Branch:
    """``second (first x) + shift`` beside a layer: ``first`` [rank, inputs, *kernel], ``second`` [outputs, rank], ``shift`` [outputs].

    ``before`` and ``after``: the layer's relative squared output error on held-back data without and with it.
    """

    layer: str
    first: Tensor
    second: Tensor
    shift: Tensor
    before: float
    after: float


def add_branches(
    original: Network,
    network: Network,
    layers: Sequence[str],
    rank: int,
    bits: int,
    fit: Sequence[list[Tensor]],
    held: Sequence[list[Tensor]],
    progress: Progress,
) -> list[Branch]:
    """Give layers of ``network`` a branch each, in place and in order, so that their outputs come nearer to those of ``original``.

    Each is the best of its rank on the inputs that the layers before give, branches and all: of the least-squares change of the weight the
    most telling directions (Zhang et al. 2024, LQER, arXiv 2402.02446, and Liu et al. 2024, EoRA, arXiv 2410.21271, take those of the weight
    that rounding changed). Kept where held-back data agrees.

    Args:
        original: with nodes of the same names. Both networks in evaluation mode.
        layers: names of nodes, of which one at least must be the original's (TaskError); those that would have to grow are left out.
        bits: of the branch's weights: 8, one scale a row, or 32.
        fit: flat inputs to solve on. held: others, to choose by.
    """
    student = settle(network)
    goals = _goals(original, student, layers, rank)
    originals, smaller = (Frontier(each, Joined(fit, held)) for each in (original, student))
    port = padding_port(original, originals.pieces)
    found = []
    with progress.counting("compensating", "layer", len(goals)) as show:
        for number, goal in enumerate(goals, 1):
            smaller.advance(goal.layer)
            originals.advance(goal.target.next)
            branch = _branch(student, goal.layer, Pairs(originals, smaller, goal, port), rank, bits, len(fit))
            if branch is not None:
                attach(student, branch)
                attach(network, branch, bits)
                found.append(branch)
            show(number, goal.layer.name)
    network.recompile()
    return found


def attach(network: Network, branch: Branch, bits: int = 32) -> fx.Node:
    """Put the branch beside its layer, in place. Returns the sum, which everything that read the layer reads now."""
    layer = next(node for node in network.graph.nodes if node.name == branch.layer)
    name = _path(layer)
    parts = {"first.weight": branch.first, "second.weight": branch.second, "second.bias": branch.shift}
    nodes = {part: add_constant(network, f"{name}.{part}", torch.nn.Parameter(value.contiguous()), layer) for part, value in parts.items()}
    # Behind the layer, not before it: a frontier that stands there must meet them.
    with network.graph.inserting_after(layer):
        first = network.graph.call_function(layer.target, (layer.args[0], nodes["first.weight"], None, *layer.args[3:]))
        first.kwargs = {key: value for key, value in layer.kwargs.items() if key != "bias"}
    with network.graph.inserting_after(first):
        second = network.graph.call_function(layer.target, (first, nodes["second.weight"], nodes["second.bias"]))
    made = insert_after(network, layer, aten.add.Tensor, (second,))
    for node in (first, second, made):
        node.meta = {"module": layer.meta.get("module", ""), "source": layer.meta.get("source", "")}
    if bits == 8:
        quantize_weights(network, [WeightPoint(nodes[part], 0) for part in ("first.weight", "second.weight")], SYMMETRIC_INT8)
    network.recompile()
    return made


def _goals(original: Network, student: Network, layers: Sequence[str], rank: int) -> list[Goal]:
    here = {node.name for node in student.graph.nodes}
    matched = [goal for goal in goals_of(original, student, [name for name in layers if name in here], {}, {}) if not goal.reason]
    if not matched:
        raise TaskError(f"None of the layers {', '.join(layers)} is, by name and shape of its output, one of the original's: compensate earlier.")
    return [goal for goal in matched if _is_worth_it(student, goal.layer, rank)]


def _is_worth_it(network: Network, layer: fx.Node, rank: int) -> bool:
    """Whether the branch has fewer weights than the layer, which has one group and is not too wide to solve."""
    weight = constant(network, layer.args[1])
    rows, columns = weight.shape[0], weight[0].numel()
    return groups_of(layer) == 1 and rank * (rows + columns) < rows * columns and (columns + 1) ** 2 <= GRAM_ELEMENTS


def _branch(student: Network, layer: fx.Node, pairs: Pairs, rank: int, bits: int, fitted: int) -> Branch | None:
    """The layer's branch; None where it would not help on the held-back pieces, or the values are not finite."""
    old, bias = constant(student, layer.args[1]).detach(), constant(student, argument(layer, 2, "bias"))
    weight = weight_matrix(old, 1)
    shift = torch.zeros(weight.shape[:2], dtype=old.dtype) if bias is None else bias.detach().reshape(weight.shape[:2])
    try:
        fit, held = moments(layer, weight, pairs, fitted)
    except ValueError:
        return None
    whole, _, before, after = best_refit(fit, held, weight.double(), shift.double())
    if after >= before:
        return None
    first, second, _ = spectrum((whole - weight)[0], fit.gram[0]).factors(min(rank, *weight.shape[1:]))
    first, second = (_rounded(factor.to(old.dtype)) if bits == 8 else factor.to(old.dtype) for factor in (first, second))
    full = weight.double() + (second.double() @ first.double())[None]
    moved = _mean_shift(fit, full)
    after = residual(held, full, moved)
    if after >= before:
        return None
    kernel = [1] * (old.dim() - 2)
    change = (moved - shift.double())[0].to(old.dtype)
    return Branch(layer.name, weight_from_matrix(first, (len(first), *old.shape[1:])), second.reshape(*second.shape, *kernel), change, before, after)


def _rounded(factor: Tensor) -> Tensor:
    """On the grid of int8, a scale a row."""
    scale, zero = grids.symmetric(extremes(factor, 0), SYMMETRIC_INT8)
    return grids.values(grids.codes(factor, scale, zero, 0, SYMMETRIC_INT8), scale, zero, 0)


def _mean_shift(moments: Moments, weight: Tensor) -> Tensor:
    """The bias with which outputs have the targets' mean: [1, rows]."""
    mean, target = moments.gram[:, :-1, -1] / moments.count, moments.cross[:, :, -1] / moments.count
    return target - (weight @ mean[:, :, None])[:, :, 0]


def _path(layer: fx.Node) -> str:
    """The path that the branch's tensors get, beside the layer's weight; a tensor has no parts."""
    weight = layer.args[1]
    while weight.op != "get_attr":
        weight = weight.args[0]
    name = str(weight.target)
    return f"{name.removesuffix('.weight')}.branch" if name.endswith(".weight") else f"{name}_branch"

"""Weights rounded layer after layer, each for the inputs that the layers rounded before it give, to give what the original gives.

Before a layer is rounded its weight is fitted in closed form: to the original's outputs, from the quantized network's inputs, less the
error that the residual stream carries already (see ``pruning/refitting.py``). Then it is rounded by GPTQ with the Gram matrix of these
inputs, and its bias takes up what is left of the mean. Several ways compete for every layer, and the one with the least error on
held-back data is taken, so that a fit to few samples cannot do harm.
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportAttributeAccessIssue=false, reportOptionalMemberAccess=false
# pyright: reportReturnType=false

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor, fx

from ..network.columns import MATRIX_LAYERS, can_unfold, groups_of, weight_from_matrix, weight_matrix
from ..network.frontier import Frontier, Joined
from ..network.goals import goals_of
from ..network.network import Network
from ..network.padding import padding_port
from ..network.pairs import Pairs, moments
from ..network.rewrite import argument, constant, set_bias, set_constant
from ..numerics.refit import Moments, best_refit, residual
from ..progress import Progress
from .formats import Format
from .grouped import Steps, nearest, solved, steps_of

# The most elements of one Gram matrix, of all groups: wider layers are rounded without data.
GRAM_ELEMENTS = 6000**2


@dataclass(frozen=True)
class Rounded:
    """What became of a weight: its steps; its layer's relative squared output error on held-back data by rounding to nearest, and now."""

    steps: Steps
    nearest: float = 0.0
    error: float = 0.0


class _Way(NamedTuple):
    """One way to round a layer."""

    weight: Tensor
    bias: Tensor | None
    steps: Steps
    error: float


def round_in_order(
    reference: Network,
    network: Network,
    formats: Mapping[str, Format],
    fit: Sequence[list[Tensor]],
    held: Sequence[list[Tensor]],
    refit: bool = True,
    progress: Progress | None = None,
) -> dict[str, Rounded]:
    """Put the weights of ``network`` named in ``formats`` on their grids, in place; biases move. It has no weight quantizers yet.

    Args:
        reference: the float network, with nodes of the same names.
        fit: flat inputs to solve on. held: others, to choose by.
        refit: whether weights are fitted before they are rounded.
        progress: shows how far it is.

    Returns: by weight what became of it. Weights that no layer reads alone are not there, and stay as they are.
    """
    layers = [node for node in network.graph.nodes if node.target in MATRIX_LAYERS and isinstance(node.args[1], fx.Node)]
    names = [node.name for node in layers if str(node.args[1].target) in formats and _is_narrow(network, node)]
    goals = [goal for goal in goals_of(reference, network, names, {}, {}) if not goal.reason]
    originals, smaller = (Frontier(each, Joined(fit, held)) for each in (reference, network))
    port = padding_port(reference, originals.pieces)
    found = {}
    with (progress or Progress(quiet=True)).counting("rounding", "weight", len(goals)) as show:
        for number, goal in enumerate(goals, 1):
            name = str(goal.layer.args[1].target)
            smaller.advance(goal.layer)
            originals.advance(goal.target.next)
            pairs = Pairs(originals, smaller, goal, port)
            found[name] = _round(network, goal.layer, pairs, formats[name], len(fit), refit)
            show(number, name)
    network.recompile()
    return found


def _is_narrow(network: Network, layer: fx.Node) -> bool:
    weight = constant(network, layer.args[1])
    return weight is not None and groups_of(layer) * (weight[0].numel() + 1) ** 2 <= GRAM_ELEMENTS and can_unfold(layer)


def _round(network: Network, layer: fx.Node, pairs: Pairs, wanted: Format, fitted: int, refit: bool) -> Rounded:
    groups = groups_of(layer)
    old, bias = constant(network, layer.args[1]).detach(), constant(network, argument(layer, 2, "bias"))
    weight = weight_matrix(old, groups)
    shift = None if bias is None else bias.detach().reshape(weight.shape[:2])
    fit, held = moments(layer, weight, pairs, fitted)
    plain = _nearest(weight, shift, wanted, held)
    support = weight != 0 if str(layer.args[1].target) in network.sparse else None
    starts = [(weight, shift)]
    if refit:
        made, moved, before, after = best_refit(fit, held, weight, shift, support=support)
        starts += [(made, moved)] if after < before else []
    ways = [plain, *(_solved(start, moved, fit, held, wanted, weighed) for start, moved in starts for weighed in (False, True))]
    best = min(ways, key=lambda way: way.error)
    set_constant(network, layer.args[1], weight_from_matrix(best.weight, old.shape).to(old.dtype))
    if best.bias is not None:
        set_bias(network, layer, best.bias.reshape(-1).to(bias.dtype))
    return Rounded(best.steps, plain.error, best.error)


def _nearest(weight: Tensor, bias: Tensor | None, wanted: Format, held: Moments) -> _Way:
    matrix = weight.flatten(0, 1)
    steps = steps_of(matrix, wanted)
    rounded = nearest(matrix, wanted, steps).reshape(weight.shape)
    return _Way(rounded, bias, steps, residual(held, rounded, bias))


def _solved(weight: Tensor, bias: Tensor | None, fit: Moments, held: Moments, wanted: Format, weighed: bool) -> _Way:
    """By GPTQ; with a bias, which then gives the mean of the targets, errors count about the mean. ``weighed``: scales are chosen for the
    error of the outputs, not of the weights."""
    gram, mean = fit.gram[:, :-1, :-1], fit.gram[:, :-1, -1] / fit.count
    if bias is not None:
        gram = gram - fit.count * mean[:, :, None] * mean[:, None, :]
    importance = gram.diagonal(dim1=1, dim2=2)[0].clamp(min=0) if weighed and len(gram) == 1 else None
    steps = steps_of(weight.flatten(0, 1), wanted, importance)
    rounded = solved(weight, gram, wanted, steps)
    if bias is not None:
        target = fit.cross[:, :, -1] / fit.count
        bias = (target - (rounded.double() @ mean[:, :, None])[:, :, 0]).to(bias.dtype)
    return _Way(rounded, bias, steps, residual(held, rounded, bias))

"""Factors chosen layer after layer on what the layers read behind those before them, to give what the original gives.

With W the least squares map from those inputs to the original's outputs, the best map of low rank is the truncation of W in the metric of
these inputs (reduced rank regression; Izenman 1975), so that a layer can make up for some of what the layers before it have lost.
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportAttributeAccessIssue=false, reportOptionalMemberAccess=false

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx

from ..network.columns import groups_of, weight_from_matrix, weight_matrix
from ..network.frontier import Frontier, Joined
from ..network.goals import Goal, goals_of
from ..network.network import Network
from ..network.pairs import Pairs, moments
from ..network.rewrite import argument, constant
from ..numerics.refit import Moments, best_refit, residual
from ..pruning.pieces import Data
from .forms import Decomposed, Known, composed
from .ladder import LARGEST_GRAM
from .layers import Layer
from .options import Option
from .rewriting import Product, put


@dataclass(frozen=True)
class Anchored:
    """What became of the layers of an option: their squared output errors on held-back data, with the factors made from the original's inputs
    and with those that were taken (summed over the layers, each relative to its targets)."""

    before: float
    after: float


def anchored(teacher: Network, own: Mapping[Option, Sequence[Product]], data: Data, damping: float) -> tuple[Network, dict[Option, Anchored]]:
    """The network with these options' layers as factors, fitted one after another.

    Args:
        own: for each option that is taken the products made from what the layers read in the teacher.
    """
    student = teacher.fork()
    rank = {node.name: number for number, node in enumerate(teacher.graph.nodes)}
    fitted = [option for option in own if all(_can_fit(layer) for layer in option.layers)]
    put(student, [product for option, products in own.items() if option not in fitted for product in products])
    names = [layer.readers[0] for option in fitted for layer in option.layers]
    goals = {goal.layer.name: goal for goal in goals_of(teacher, student, names, {}, {})}
    originals, smaller = (Frontier(network, Joined(data.fit, data.held)) for network in (teacher, student))
    told: dict[Option, Anchored] = {}
    for option in sorted(fitted, key=lambda option: min(rank[layer.readers[0]] for layer in option.layers)):
        mine = sorted((goals[layer.readers[0]] for layer in option.layers), key=lambda goal: rank[goal.layer.name])
        products = own[option]
        smaller.advance(mine[0].layer)
        if not any(goal.reason for goal in mine):
            products, told[option] = _fit(option, products, _ready(originals, teacher, mine), smaller, originals, data, damping)
        _put_ahead(student, smaller, products, mine[0].layer)
    student.recompile()
    return student, told


def _can_fit(layer: Layer) -> bool:
    groups = layer.dense.groups
    return layer.kind != "embedding" and len(layer.readers) == 1 and groups * (layer.dense.weight[0].numel() + 1) ** 2 <= LARGEST_GRAM


def _ready(originals: Frontier, teacher: Network, goals: Sequence[Goal]) -> list[Goal]:
    """Goals whose targets are known where the teacher then stands: of several layers together the layers' own outputs."""
    if len(goals) == 1:
        originals.advance(goals[0].target.next)
        return list(goals)
    twins = {node.name: node for node in teacher.graph.nodes}
    originals.advance(twins[goals[0].layer.name])
    return [Goal(goal.layer, twins[goal.layer.name], (), goal.rows) for goal in goals]


def _fit(
    option: Option, own: Sequence[Product], goals: Sequence[Goal], smaller: Frontier, originals: Frontier, data: Data, damping: float
) -> tuple[Sequence[Product], Anchored]:
    """The products of least error on held-back data: those given, with or without another bias, or new ones."""
    layers = {layer.readers[0]: layer for layer in option.layers}
    found = [_solved(layers[goal.layer.name], goal, Pairs(originals, smaller, goal, data.port), len(data.fit), smaller.network) for goal in goals]
    option_layers = [one.layer for one in found]
    ordered = [next(product for product in own if product.layer is layer) for layer in option_layers]
    made = Decomposed(option_layers, [one.weight for one in found], Known(found[0].fit.gram, None, damping), (option.form,))
    fresh, _ = made.products(option.form, option.ranks)
    trials = [ordered, [one.centred(product) for one, product in zip(found, ordered, strict=True)]]
    trials.append([one.centred(product) for one, product in zip(found, fresh, strict=True)])
    errors = [sum(one.error(product) for one, product in zip(found, trial, strict=True)) for trial in trials]
    best = min(range(len(trials)), key=errors.__getitem__)
    return trials[best], Anchored(errors[0], errors[best])


@dataclass(frozen=True, eq=False)
class _Solved:
    """A layer with the moments of what it reads and should give, on two parts of the data, and its weight by least squares."""

    layer: Layer
    fit: Moments
    held: Moments
    weight: Tensor
    bias: Tensor

    def centred(self, product: Product) -> Product:
        """With the shift that gives the outputs the mean of the targets."""
        matrix = weight_matrix(composed(product), self.layer.dense.groups).double()
        x, y = self.fit.gram[:, :-1, -1] / self.fit.count, self.fit.cross[:, :, -1] / self.fit.count
        return replace(product, shift=(y - (matrix @ x[:, :, None])[:, :, 0]).reshape(-1) - self.bias.double())

    def error(self, product: Product) -> float:
        """On the held-back part, relative to the targets."""
        groups = self.layer.dense.groups
        bias = (self.bias.double() + product.shift).reshape(groups, -1)
        return residual(self.held, weight_matrix(composed(product), groups), bias)


def _solved(layer: Layer, goal: Goal, data: Pairs, fitted: int, student: Network) -> _Solved:
    node, groups = goal.layer, groups_of(goal.layer)
    old, bias = layer.dense.weight, constant(student, argument(goal.layer, 2, "bias"))
    shift = torch.zeros(layer.width, dtype=old.dtype) if bias is None else bias.detach()
    fit, held = moments(node, weight_matrix(old, groups), data, fitted)
    weight, _, _, _ = best_refit(fit, held, weight_matrix(old, groups).double(), shift.double().reshape(groups, -1))
    return _Solved(layer, fit, held, weight_from_matrix(weight, old.shape), shift)


def _put_ahead(student: Network, frontier: Frontier, products: Sequence[Product], layer: fx.Node) -> None:
    """Put factors where the frontier stands, and let it go on with the first of them."""
    before = {node.name for node in student.graph.nodes}
    put(student, products)
    start = layer
    while start.prev.op != "root" and start.prev.name not in before:
        start = start.prev
    frontier.next = start

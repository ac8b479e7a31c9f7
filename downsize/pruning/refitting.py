"""Layers of a pruned network refitted in closed form, one after another, to what the original's layers give.

Each layer's inputs are those that the layers refitted before it give, its targets the original's values (He, Zhang & Sun 2017, arXiv
1707.06168, section 3.2, made sequential). Where a layer's output goes into a residual sum and nowhere else (through operators that hand it
on), its target is the original's sum less the pruned network's other summand: so it also makes up for the error that the residual stream
carries already. This needs the other summand to come before the layer; a batch norm between the layer and the sum hides the sum: fold it
before. Where an input marks padding (see ``network/padding.py``), padded positions of linear layers on [batch, length, features] do not
count. Zeros of a sparse weight stay.
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportAttributeAccessIssue=false, reportOptionalMemberAccess=false
# pyright: reportReturnType=false, reportOptionalSubscript=false

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..network.columns import groups_of, weight_from_matrix, weight_matrix
from ..network.frontier import Frontier, Joined
from ..network.goals import Goal, goals_of, resolve_spans
from ..network.network import Network
from ..network.padding import padding_port
from ..network.pairs import Pairs, is_right, moments
from ..network.rewrite import argument, constant, set_bias, set_constant
from ..numerics.refit import best_refit

# The most elements of one Gram matrix, of all groups: wider layers are left, as solving takes the cube of their width in time.
GRAM_ELEMENTS = 6000**2


@dataclass(frozen=True)
class Refitted:
    """What became of one layer.

    ``before`` and ``after``: its relative squared output error on the held-back pieces (:func:`~downsize.numerics.refit.residual`).
    ``form``: what it was fitted to: its own output in the teacher, the sum that it goes into, the value behind a removed span; ``none``:
    it was left as it was, for the reason in ``note``. A refit that does not help on the held-back pieces is not taken: then ``after`` is
    ``before``.
    """

    layer: str
    before: float
    after: float
    form: Literal["output", "sum", "span", "none"]
    note: str = ""


def refit_layers(
    teacher: Network,
    student: Network,
    fit: Sequence[list[Tensor]],
    held: Sequence[list[Tensor]],
    layers: Sequence[str] | None = None,
    rows: Mapping[str, Tensor] | None = None,
    spans: Mapping[str, str] | None = None,
    progress: Callable[[str], None] | None = None,
) -> list[Refitted]:
    """Fit weights and biases of ``student`` to ``teacher``, in place and in order: of linear layers and convolutions whose weight is
    a constant that nothing else reads.

    Args:
        teacher: the original; nodes are matched by name. Both networks in evaluation mode.
        fit: flat inputs to solve on. held: others, to choose the damping by.
        layers: names of nodes to refit, default all that can be. progress: is told each name.
        rows: for each layer with fewer outputs than the teacher's, which of the teacher's they are: int64 [outputs].
        spans: where layers were removed behind a node of the student, its name, to the name of the teacher's node behind the removed
            layers, whose value it should now give. Of two layer norms the inputs, and the student's takes the teacher's gain and shift.

    Raises:
        ValueError: a layer or span that is in neither graph.
    """
    goals = goals_of(teacher, student, layers, rows or {}, resolve_spans(teacher, student, spans or {}))
    originals, smaller = (Frontier(network, Joined(fit, held)) for network in (teacher, student))
    port = padding_port(teacher, originals.pieces)
    results = []
    for goal in goals:
        if goal.reason:
            results.append(Refitted(goal.layer.name, 0.0, 0.0, "none", goal.reason))
            continue
        if progress:
            progress(goal.layer.name)
        smaller.advance(goal.layer)
        originals.advance(goal.target.next)
        results.append(_refit(student, goal, Pairs(originals, smaller, goal, port), len(fit)))
    student.recompile()
    return results


def _refit(student: Network, goal: Goal, data: Pairs, fitted: int) -> Refitted:
    layer = goal.layer
    if all(map(is_right, data, data.smaller.values(layer))):
        return Refitted(layer.name, 0.0, 0.0, "none", "it gives what it should")
    groups = groups_of(layer)
    old = constant(student, layer.args[1]).detach()
    bias = constant(student, argument(layer, 2, "bias"))
    weight = weight_matrix(old, groups)
    shift = torch.zeros(weight.shape[:2], dtype=old.dtype) if bias is None else bias.detach().reshape(weight.shape[:2])
    if groups * (weight.shape[2] + 1) ** 2 > GRAM_ELEMENTS:
        return Refitted(layer.name, 0.0, 0.0, "none", f"it is too wide: {groups} x {weight.shape[2]} columns")
    try:
        fit, held = moments(layer, weight, data, fitted)
    except ValueError as error:
        return Refitted(layer.name, 0.0, 0.0, "none", str(error))
    support = weight != 0 if layer.args[1].target in student.sparse else None
    made, moved, before, after = best_refit(fit, held, weight, shift, support=support)
    if after < before:
        set_constant(student, layer.args[1], weight_from_matrix(made, old.shape).to(old.dtype))
        set_bias(student, layer, moved.reshape(-1).to(old.dtype))
    return Refitted(layer.name, before, after, goal.form)

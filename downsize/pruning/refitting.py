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

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor, fx

from ..network.columns import channel_axis, groups_of, input_rows, output_rows, weight_from_matrix, weight_matrix
from ..network.frontier import Frontier, Joined
from ..network.network import Network
from ..network.padding import padding_port
from ..network.rewrite import argument, aten, constant, set_bias, set_constant
from ..numerics.refit import Moments, best_refit
from .goals import Goal, goals_of, resolve_spans

# The most elements of one Gram matrix, of all groups: wider layers are left, as solving takes the cube of their width in time.
GRAM_ELEMENTS = 6000**2
# A layer is left alone when its output is off by less than this, relative to what it is compared in.
UNCHANGED = 1e-6


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
    """Fit weights and biases of ``student`` to ``teacher``, in place and in order: of linear layers, 1-D and 2-D convolutions whose weight is
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
        results.append(_refit(student, goal, _Data(originals, smaller, goal, port), len(fit)))
    student.recompile()
    return results


class _Sample(NamedTuple):
    """One piece of what a layer reads and should give. ``whole``: the value of the teacher that ``target`` is a part of; ``real``: which
    positions are no padding, None for all."""

    x: Tensor
    target: Tensor
    whole: Tensor
    real: Tensor | None


class _Data:
    """What a layer reads and should give, piece by piece."""

    def __init__(self, originals: Frontier, smaller: Frontier, goal: Goal, port: int | None) -> None:
        self.originals, self.smaller, self.goal = originals, smaller, goal
        self.mask = None if port is None else list(originals.ports)[port]

    def __iter__(self) -> Iterator[_Sample]:
        goal, layer = self.goal, self.goal.layer
        streams = [self.smaller.values(layer.args[0]), self.originals.values(goal.target), *map(self.smaller.values, goal.others)]
        masks = self.originals.values(self.mask) if self.mask is not None and layer.target is aten.linear.default else None
        for x, whole, *others in zip(*streams, strict=True):
            mask = next(masks) if masks is not None else None
            whole = whole if goal.rows is None else whole.index_select(channel_axis(layer, whole.dim()), goal.rows)
            target = whole
            for other in others:
                target = target - other
            real = mask.bool() if mask is not None and x.dim() == 3 and x.shape[:2] == mask.shape else None
            yield _Sample(x, target, whole, real)


def _refit(student: Network, goal: Goal, data: _Data, fitted: int) -> Refitted:
    layer = goal.layer
    if all(map(_is_right, data, data.smaller.values(layer))):
        return Refitted(layer.name, 0.0, 0.0, "none", "it gives what it should")
    groups = groups_of(layer)
    old = constant(student, layer.args[1]).detach()
    bias = constant(student, argument(layer, 2, "bias"))
    weight = weight_matrix(old, groups)
    shift = torch.zeros(weight.shape[:2], dtype=old.dtype) if bias is None else bias.detach().reshape(weight.shape[:2])
    if groups * (weight.shape[2] + 1) ** 2 > GRAM_ELEMENTS:
        return Refitted(layer.name, 0.0, 0.0, "none", f"it is too wide: {groups} x {weight.shape[2]} columns")
    try:
        fit, held = _moments(layer, weight, data, fitted)
    except ValueError as error:
        return Refitted(layer.name, 0.0, 0.0, "none", str(error))
    support = weight != 0 if layer.args[1].target in student.sparse else None
    made, moved, before, after = best_refit(fit, held, weight, shift, support=support)
    if after < before:
        set_constant(student, layer.args[1], weight_from_matrix(made, old.shape).to(old.dtype))
        set_bias(student, layer, moved.reshape(-1).to(old.dtype))
    return Refitted(layer.name, before, after, goal.form)


def _is_right(sample: _Sample, output: Tensor) -> bool:
    """Whether the layer gives what it should, but for rounding errors of the value that its target is a part of."""
    gap, whole = (value if sample.real is None else value[sample.real] for value in (sample.target - output, sample.whole))
    return bool(gap.double().square().sum() <= UNCHANGED**2 * whole.double().square().sum())


def _moments(layer: fx.Node, weight: Tensor, data: _Data, fitted: int) -> tuple[Moments, Moments]:
    """Of the first ``fitted`` pieces, and of the others."""
    groups, rows, columns = weight.shape
    both = Moments.zero(groups, rows, columns), Moments.zero(groups, rows, columns)
    for number, sample in enumerate(data):
        args = (sample.x, data.smaller.network.tensor(str(layer.args[1].target)))
        x, y = input_rows(layer, args, groups, number), output_rows(layer, sample.target, groups, number)
        if sample.real is not None:
            x, y = x[:, :, sample.real.reshape(-1)], y[:, :, sample.real.reshape(-1)]
        both[number >= fitted].add(x, y)
    return both

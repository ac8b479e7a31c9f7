"""What a layer of a compressed network reads and should give, piece by piece, and the moments of both."""

# pyright: reportArgumentType=false, reportCallIssue=false, reportAttributeAccessIssue=false, reportOptionalMemberAccess=false

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, fx

from ..numerics.refit import Moments
from .columns import channel_axis, input_rows, output_rows
from .frontier import Frontier
from .goals import Goal
from .rewrite import aten

# So many positions are added to the moments at a time.
POSITIONS = 2048
# A layer is right when its output is off by less than this, relative to what it is compared in.
UNCHANGED = 1e-6


class Sample(NamedTuple):
    """One piece of what a layer reads and should give. ``whole``: the value of the teacher that ``target`` is a part of; ``real``: which
    positions are no padding, None for all."""

    x: Tensor
    target: Tensor
    whole: Tensor
    real: Tensor | None


class Pairs:
    """What a layer reads and should give, piece by piece."""

    def __init__(self, originals: Frontier, smaller: Frontier, goal: Goal, port: int | None) -> None:
        self.originals, self.smaller, self.goal = originals, smaller, goal
        self.mask = None if port is None else list(originals.ports)[port]

    def __iter__(self) -> Iterator[Sample]:
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
            yield Sample(x, target, whole, real)


def is_right(sample: Sample, output: Tensor) -> bool:
    """Whether the layer gives what it should, but for rounding errors of the value that its target is a part of."""
    gap, whole = (value if sample.real is None else value[sample.real] for value in (sample.target - output, sample.whole))
    return bool(gap.double().square().sum() <= UNCHANGED**2 * whole.double().square().sum())


def moments(layer: fx.Node, weight: Tensor, data: Pairs, fitted: int) -> tuple[Moments, Moments]:
    """Of the first ``fitted`` pieces, and of the others."""
    groups, rows, columns = weight.shape
    both = Moments.zero(groups, rows, columns), Moments.zero(groups, rows, columns)
    waiting: tuple[list[tuple[Tensor, Tensor]], list[tuple[Tensor, Tensor]]] = [], []
    for number, sample in enumerate(data):
        args = (sample.x, data.smaller.network.tensor(str(layer.args[1].target)))
        x, y = input_rows(layer, args, groups, number), output_rows(layer, sample.target, groups, number)
        if sample.real is not None:
            x, y = x[:, :, sample.real.reshape(-1)], y[:, :, sample.real.reshape(-1)]
        part = number >= fitted
        waiting[part].append((x, y))
        if sum(one.shape[2] for one, _ in waiting[part]) >= POSITIONS:
            _take(both[part], waiting[part])
    for part in (0, 1):
        _take(both[part], waiting[part])
    return both


def _take(moments: Moments, waiting: list[tuple[Tensor, Tensor]]) -> None:
    """Several pieces at once: adding to a Gram matrix takes as long as many positions do."""
    if waiting:
        moments.add(torch.cat([x for x, _ in waiting], 2), torch.cat([y for _, y in waiting], 2))
        waiting.clear()

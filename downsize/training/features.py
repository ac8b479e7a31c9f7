"""What a student's inner values lose to its teacher's: hints, maps of attention, relations between positions or samples."""

# pyright: reportArgumentType=false, reportAttributeAccessIssue=false

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn

from ..errors import TaskError
from ..network.dry import shapes
from ..network.network import Network
from ..network.rewrite import aten
from ..numerics.distillation import (
    attention_maps,
    regression,
    relational_angle,
    relational_distance,
    relations,
    relative_error,
    similarity_preserving,
)
from .pairing import Pair, Rows, pair

Kind = Literal["hint", "attention", "relations", "similarity"]
# Angles take samples^3 numbers.
ANGLE_SAMPLES = 64
# How distances and angles are weighted by the authors of relational distillation.
DISTANCE, ANGLE = 1.0, 2.0


class Features(nn.Module):
    """A loss of inner values, the mean over pairs of layers.

    Attributes:
        student_taps, teacher_taps: names of the nodes whose values it reads.
    """

    student_taps: tuple[str, ...] = ()
    teacher_taps: tuple[str, ...] = ()

    def forward(self, student: Mapping[str, Tensor], teacher: Mapping[str, Tensor], real: Tensor | None) -> Tensor:
        """The loss, a scalar.

        Args:
            student, teacher: by node name the values of the taps.
            real: bool [samples, positions], False where a position is padding; None: there is no padding.
        """
        raise NotImplementedError


def features(kind: Kind, student: Network, teacher: Network, pieces: Sequence[list[Tensor]], derived: bool, port: int | None) -> Features:
    """The loss of a kind between a student and its teacher, their layers paired on calibration data (see :func:`~.pairing.pair`).

    ``hint``: what the student gives, through a linear layer of its own where widths differ, relative to the teacher's square. ``attention``:
    where features are large. ``similarity``: which samples are alike. ``relations``: of attention's queries, keys and values where both
    have attention, else of the samples' distances and angles.

    Raises:
        TaskError: the two have no layers that could be paired.
    """
    if kind == "relations" and (found := attentions(student, teacher)):
        return Relations(*found)
    pairs, rows = pair(student, teacher, pieces, derived, port)
    if not pairs:
        raise TaskError(
            f"features={kind!r} needs a layer of the student and one of the teacher that have equal positions, and found none: use features='none'."
        )
    return Layers(kind, pairs, rows)


class Layers(Features):
    """The loss of paired layers. A regressor is a linear layer from the student's width to the teacher's, at first the one of least squares."""

    def __init__(self, kind: Kind, pairs: Sequence[Pair], rows: Rows) -> None:
        super().__init__()
        self.kind, self.pairs = kind, tuple(pairs)
        self.student_taps = tuple(dict.fromkeys(one.student.name for one in pairs))
        self.teacher_taps = tuple(dict.fromkeys(one.teacher.name for one in pairs))
        self.regressors = nn.ModuleList(_regressor(one, rows) if kind == "hint" else nn.Identity() for one in pairs)

    def forward(self, student: Mapping[str, Tensor], teacher: Mapping[str, Tensor], real: Tensor | None) -> Tensor:
        losses = []
        for one, regressor in zip(self.pairs, self.regressors, strict=True):
            mine, theirs = one.student.rows(student[one.student.name]), one.teacher.rows(teacher[one.teacher.name])
            theirs = theirs.to(mine.device)
            kept = real.to(mine.device) if real is not None and one.student.kind == "tokens" and real.shape == mine.shape[:2] else None
            losses.append(self._loss(mine, theirs, kept, regressor))
        return torch.stack(losses).mean()

    def _loss(self, student: Tensor, teacher: Tensor, real: Tensor | None, regressor: nn.Module) -> Tensor:
        if self.kind == "attention":
            return attention_maps(student, teacher, real)
        if self.kind == "relations":
            one, two = (pooled(rows, real)[:ANGLE_SAMPLES] for rows in (student, teacher))
            return DISTANCE * relational_distance(one, two) + ANGLE * relational_angle(one, two)
        if self.kind == "similarity":
            one, two = (rows if real is None else rows * real[..., None] for rows in (student, teacher))
            return similarity_preserving(one, two)
        student, teacher = (rows if real is None else rows[real] for rows in (student, teacher))
        return relative_error(regressor(student.to(teacher.dtype)), teacher)


def _regressor(one: Pair, rows: Rows) -> nn.Module:
    if one.student.width == one.teacher.width:
        return nn.Identity()
    weight, bias = regression(rows.student[one.student.name], rows.teacher[one.teacher.name])
    made: Any = torch.nn.utils.skip_init(nn.Linear, one.student.width, one.teacher.width)  # draws no random numbers
    with torch.no_grad():
        made.weight.copy_(weight)
        made.bias.copy_(bias)
    return made


def pooled(rows: Tensor, real: Tensor | None) -> Tensor:
    """The mean over the real positions of [samples, positions, channels]."""
    if real is None:
        return rows.mean(1)
    return (rows * real[..., None]).sum(1) / real.sum(1, keepdim=True).clamp(min=1)


# Attention --------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Heads:
    """Queries, keys or values of an attention: the node that gives them, [samples, heads, positions, width of a head], and their whole width."""

    name: str
    width: int

    def rows(self, value: Tensor) -> Tensor:
        """[samples, positions, width]."""
        return value.transpose(1, 2).flatten(2)


class Relations(Features):
    """How positions relate to one another in the last attention of both, by its queries, keys and values; widths may differ."""

    def __init__(self, student: Sequence[Heads], teacher: Sequence[Heads], heads: int) -> None:
        super().__init__()
        self.pairs = tuple(zip(student, teacher, strict=True))
        self.heads = heads
        self.student_taps = tuple(dict.fromkeys(one.name for one in student))
        self.teacher_taps = tuple(dict.fromkeys(one.name for one in teacher))

    def forward(self, student: Mapping[str, Tensor], teacher: Mapping[str, Tensor], real: Tensor | None) -> Tensor:
        losses = []
        for one, two in self.pairs:
            mine = one.rows(student[one.name])
            theirs = two.rows(teacher[two.name]).to(mine.device)
            kept = real.to(mine.device) if real is not None and real.shape == mine.shape[:2] else None
            heads = shared_heads(one.width, two.width, self.heads)
            losses.append(relations(mine, theirs, heads, kept))
        return torch.stack(losses).mean()


def attentions(student: Network, teacher: Network) -> tuple[list[Heads], list[Heads], int] | None:
    """Queries, keys and values of the last attention of both, and the teacher's heads; None where one of them has no attention."""
    found = [_last_attention(network) for network in (student, teacher)]
    if found[0] is None or found[1] is None:
        return None
    return found[0][0], found[1][0], found[1][1]


def _last_attention(network: Network) -> tuple[list[Heads], int] | None:
    nodes = [node for node in network.graph.nodes if node.target is aten.scaled_dot_product_attention.default]
    if not nodes:
        return None
    sizes = shapes(network)
    parts = [part for part in nodes[-1].args[:3] if isinstance(part, fx.Node)]
    if len(parts) < 3 or any(len(sizes[part]) != 4 for part in parts):
        return None
    return [Heads(part.name, sizes[part][1] * sizes[part][3]) for part in parts], sizes[parts[0]][1]


def shared_heads(one: int, two: int, most: int) -> int:
    """The largest number of heads, at most ``most``, into which both widths can be split.

    >>> shared_heads(384, 192, 12), shared_heads(10, 15, 4)
    (12, 1)
    """
    common = math.gcd(one, two)
    return max(heads for heads in range(1, min(common, most) + 1) if common % heads == 0)

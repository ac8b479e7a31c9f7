"""Convolutions as several smaller ones in a row, with nothing between them: the forms there are, and their best weights at each rank.

On zero padding the factors compute just what their product computes, as a convolution without a bias keeps zeros. So the padding, the
stride and the dilation of each direction go to the factor whose kernel has it, and only the last factor gets a bias.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from .lowrank_cp import cp
from .lowrank_fitting import Goal, goal_of
from .lowrank_solvers import Solver, Weights, channel, separable, spatial, tucker

# A form is tried at no more ranks than this; Tucker's two ranks at this many each.
LEVELS = 10
TUCKER_LEVELS = 6
# How far apart the kept parts of inputs and outputs may be.
TUCKER_SPREAD = 0.2


@dataclass(frozen=True, eq=False)
class Convolution:
    """A convolution without a bias. weight: [outputs, inputs / groups, *kernel]; stride, padding, dilation: a number for each direction."""

    weight: Tensor
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int = 1

    @property
    def kernel(self) -> tuple[int, ...]:
        """The kernel's size in each direction."""
        return tuple(self.weight.shape[2:])

    @property
    def inputs(self) -> int:
        """How many channels it reads."""
        return self.weight.shape[1] * self.groups

    @property
    def parameters(self) -> int:
        """How many weights it has."""
        return self.weight.numel()

    @property
    def is_identity(self) -> bool:
        """Whether it gives each channel as it is."""
        trivial = all((k, s, p) == (1, 1, 0) for k, s, p in zip(self.kernel, self.stride, self.padding, strict=True))
        return trivial and self.groups == self.inputs == len(self.weight) and bool((self.weight == 1).all())

    def output_size(self, size: Sequence[int]) -> tuple[int, ...]:
        """Positions in each direction of the output, from those of the input."""
        parts = zip(size, self.kernel, self.stride, self.padding, self.dilation, strict=True)
        return tuple((n + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1 for n, kernel, stride, padding, dilation in parts)


def macs_of(factors: Sequence[Convolution], size: Sequence[int]) -> float:
    """Multiply-accumulates of convolutions in a row for one sample whose input has that many positions in each direction."""
    total = 0.0
    for factor in factors:
        size = factor.output_size(size)
        total += float(factor.parameters * prod(size))
    return total


@dataclass(frozen=True, eq=False)
class Factored:
    """factors: convolutions to apply in order. shift: [outputs], to be added to the bias of the last. error: the squared output error as a
    part of the centred output's energy on the Gram matrix; without one, of the weight's squares."""

    factors: tuple[Convolution, ...]
    shift: Tensor
    error: float


@dataclass(frozen=True)
class Form:
    """One way to split a convolution.

    parts: for each factor the directions its kernel has, and whether it reads each channel apart (depthwise). sizes: from outputs, inputs,
    height and width to the weights of each factor of one group at some ranks. tried: the ranks worth trying, before costs. solver: from
    the goal of a group to its weights at some ranks; what all ranks share is computed once.
    """

    parts: tuple[tuple[str, bool], ...]
    sizes: Callable[[tuple[int, int, int, int], tuple[int, ...]], tuple[int, ...]]
    tried: Callable[[tuple[int, int, int, int], int], list[tuple[int, ...]]]
    solver: Callable[[Goal], Solver]

    def ranks(self, conv: Convolution, multiple: int = 1) -> list[tuple[int, ...]]:
        """The ranks of each group worth trying, falling in cost: multiples, with fewer weights or fewer multiply-accumulates than the layer.

        The multiple is halved for a layer that has not room for two. Nothing where the form does not apply: see the forms below.
        """
        shape = _shape(conv)
        if shape[1] == 1:
            return []
        dense = self._costs(conv, None)
        found = {ranks: self._costs(conv, ranks) for ranks in self.tried(shape, max(1, multiple // conv.groups))}
        paying = [ranks for ranks, costs in found.items() if costs[0] < dense[0] or costs[1] < dense[1]]
        return sorted(paying, key=lambda ranks: (*found[ranks], ranks), reverse=True)

    def prepare(self, conv: Convolution, gram: Tensor | None = None, damping: float = 0.0) -> Callable[[tuple[int, ...]], Factored]:
        """A function from ranks to factors, for asking many ranks of one layer.

        Args:
            gram: [groups, columns + 1, columns + 1] of the unfolded inputs with a 1 behind them (or without the first dimension for one
                group). None: all inputs count alike.
            damping: see :func:`~.lowrank.spectrum`.

        Raises:
            ValueError: the shapes do not fit, or the form does not apply to the layer.
        """
        if not self.tried(_shape(conv), 1) or conv.weight.shape[1] == 1:
            raise ValueError(f"a kernel {list(conv.weight.shape)} in {conv.groups} groups came; this form does not apply to it: ranks() is empty.")
        if gram is not None and gram.dim() == 2:
            gram = gram[None]
        if gram is not None and len(gram) != conv.groups:
            raise ValueError(f"Gram matrices {list(gram.shape)} came for {conv.groups} groups; expected one for each.")
        weights = (conv.weight if conv.weight.dim() == 4 else conv.weight[:, :, None]).chunk(conv.groups)
        goals = [goal_of(weight, None if gram is None else gram[number], damping) for number, weight in enumerate(weights)]
        solvers = [self.solver(goal) for goal in goals]
        return lambda ranks: self._joined(conv, goals, [solver(ranks) for solver in solvers])

    def factor(self, conv: Convolution, ranks: tuple[int, ...], gram: Tensor | None = None, damping: float = 0.0) -> Factored:
        """The factors at one tuple of ranks; see :meth:`prepare`."""
        return self.prepare(conv, gram, damping)(ranks)

    def _joined(self, conv: Convolution, goals: Sequence[Goal], found: Sequence[Weights]) -> Factored:
        factors: list[Convolution] = []
        channels = conv.inputs
        for number, (axes, depthwise) in enumerate(self.parts):
            weight = torch.cat([weights[number] for weights, _ in found])
            factors.append(_part(conv, weight, axes, channels if depthwise else conv.groups))
            channels = len(weight)
            if depthwise and factors[-1].is_identity:
                factors.pop()
        error = sum(goal.error(matrix) for goal, (_, matrix) in zip(goals, found, strict=True))
        shift = torch.cat([(goal.matrix - matrix) @ goal.mean for goal, (_, matrix) in zip(goals, found, strict=True)])
        return Factored(tuple(factors), shift, error / (sum(goal.energy for goal in goals) or 1.0))

    def _costs(self, conv: Convolution, ranks: tuple[int, ...] | None) -> tuple[float, float]:
        """Weights, and multiply-accumulates for each output position of a large input; of the layer itself without ranks."""
        sizes = (prod(_shape(conv)),) if ranks is None else self.sizes(_shape(conv), ranks)
        parts = (("yx", False),) if ranks is None else self.parts
        strides, macs = dict(zip("xy", reversed(conv.stride), strict=False)), 0.0
        ahead = prod(strides.values())
        for size, (axes, _) in zip(sizes, parts, strict=True):
            ahead /= prod(strides.get(axis, 1) for axis in axes)
            macs += size * ahead
        return float(sum(sizes)), macs


def _shape(conv: Convolution) -> tuple[int, int, int, int]:
    """Outputs and inputs of a group, height and width of the kernel (height 1 for one direction)."""
    height, width = (1, *conv.kernel)[-2:]
    return conv.weight.shape[0] // conv.groups, conv.weight.shape[1], height, width


def _part(conv: Convolution, weight: Tensor, axes: str, groups: int) -> Convolution:
    """The factor with that weight [outputs, inputs, height, width], which has the stride, padding and dilation of these directions."""
    names = "yx"[-len(conv.kernel) :]
    weight = (weight if len(names) == 2 else weight[:, :, 0]).to(conv.weight.dtype)

    def of(values: tuple[int, ...], neutral: int) -> tuple[int, ...]:
        return tuple(value if name in axes else neutral for name, value in zip(names, values, strict=True))

    return Convolution(weight.contiguous(), of(conv.stride, 1), of(conv.padding, 0), of(conv.dilation, 1), groups)


def levels(most: int, multiple: int, count: int = LEVELS) -> list[int]:
    """Multiples up to ``most``, at most ``count`` of them, denser where they are small."""
    while multiple > 1 and most < 2 * multiple:
        multiple = (multiple + 1) // 2
    steps = most // multiple
    if steps <= count:
        return [multiple * step for step in range(1, steps + 1)]
    return sorted({multiple * max(1, round(steps * ((i + 1) / count) ** 1.5)) for i in range(count)})


Shape = tuple[int, int, int, int]


def _channel_ranks(shape: Shape, multiple: int) -> list[tuple[int, ...]]:
    outputs, inputs, height, width = shape
    return [(rank,) for rank in levels(min(outputs, inputs * height * width), multiple)]


def _spatial_ranks(shape: Shape, multiple: int) -> list[tuple[int, ...]]:
    outputs, inputs, height, width = shape
    return [(rank,) for rank in levels(min(inputs * height, outputs * width), multiple)] if min(height, width) > 1 else []


def _tucker_ranks(shape: Shape, multiple: int) -> list[tuple[int, ...]]:
    outputs, inputs, height, width = shape
    if max(height, width) == 1:
        return []
    read, given = (levels(channels, multiple, TUCKER_LEVELS) for channels in (inputs, outputs))
    pairs = [(r, s) for r in read for s in given if s <= r * height * width and r <= s * height * width]
    return [(r, s) for r, s in pairs if abs(r / inputs - s / outputs) <= TUCKER_SPREAD]


def _cp_ranks(shape: Shape, multiple: int) -> list[tuple[int, ...]]:
    outputs, inputs, height, width = shape
    if max(height, width) == 1:
        return []
    # Beyond, even a tensor of full rank costs less as it is.
    return [(rank,) for rank in levels(prod(shape) // (outputs + inputs + height + width), multiple)]


def _separable_ranks(shape: Shape, multiple: int) -> list[tuple[int, ...]]:
    outputs, _, height, width = shape
    return [(rank,) for rank in range(1, min(outputs, height * width) + 1)] if height * width > 1 else []


# What each form does not apply to: channel, nothing; spatial, kernels of one direction or of size 1 in one; the others, 1 x 1 kernels. And
# none to depthwise convolutions.
FORMS = {
    "channel": Form((("yx", False), ("", False)), lambda s, r: (r[0] * s[1] * s[2] * s[3], s[0] * r[0]), _channel_ranks, channel),
    "spatial": Form((("y", False), ("x", False)), lambda s, r: (r[0] * s[1] * s[2], s[0] * r[0] * s[3]), _spatial_ranks, spatial),
    "tucker": Form(
        (("", False), ("yx", False), ("", False)),
        lambda s, r: (r[0] * s[1], r[1] * r[0] * s[2] * s[3], s[0] * r[1]),
        _tucker_ranks,
        tucker,
    ),
    "cp": Form(
        (("", False), ("y", True), ("x", True), ("", False)),
        lambda s, r: (r[0] * s[1], r[0] * s[2], r[0] * s[3], s[0] * r[0]),
        _cp_ranks,
        cp,
    ),
    "separable": Form((("yx", True), ("", False)), lambda s, r: (s[1] * r[0] * s[2] * s[3], s[0] * s[1] * r[0]), _separable_ranks, separable),
}

"""Convolutions as several smaller ones in a row, with nothing between them: the forms there are, and their best weights at each rank.

On zero padding the factors compute just what their product computes, as a convolution without a bias keeps zeros. So the padding, the
stride and the dilation of each direction go to the factor whose kernel has it, and only the last factor gets a bias.

The solvers know two directions, y and x. Of three directions the last two are one of them, so that ``spatial`` is k x 1 x 1, then 1 x k x k
(of a kernel 1 x k x k: 1 x k x 1, then 1 x 1 x k). A transposed convolution is one over an input with zeros between its values, with the kernel
turned round; the direction's zeros, too, go to the factor whose kernel has it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import product
from math import gcd, prod
from typing import TypeVar

import torch
from torch import Tensor

from .lowrank_cp import cp
from .lowrank_fitting import Goal, goal_of
from .lowrank_solvers import Solver, Weights, channel, separable, spatial, tucker
from .lowrank_trains import tensor_train
from .transposed import cropped, turned

# Of forms with several ranks: how far apart the parts of them that are kept may be.
SPREAD = 0.2

T = TypeVar("T")

# Outputs and inputs of a group, height and width of the kernel (height 1 for one direction).
Shape = tuple[int, int, int, int]


@dataclass(frozen=True, eq=False)
class Convolution:
    """A convolution without a bias. weight: [outputs, inputs / groups, *kernel]; stride, padding, dilation: a number for each direction.

    A transposed one (:func:`transposed`) has a ``spread`` for each direction, how many positions apart it puts its inputs, zeros between them,
    and ``more`` zeros behind them.
    """

    weight: Tensor
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int = 1
    spread: tuple[int, ...] = ()
    more: tuple[int, ...] = ()

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
        trivial = trivial and all((spread, more) == (1, 0) for spread, more in zip(self.spread, self.more, strict=True))
        return trivial and self.groups == self.inputs == len(self.weight) and bool((self.weight == 1).all())

    def output_size(self, size: Sequence[int]) -> tuple[int, ...]:
        """Positions in each direction of the output, from those of the input."""
        if self.spread:
            size = [(n - 1) * spread + 1 + more for n, spread, more in zip(size, self.spread, self.more, strict=True)]
        parts = zip(size, self.kernel, self.stride, self.padding, self.dilation, strict=True)
        return tuple((n + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1 for n, kernel, stride, padding, dilation in parts)

    def macs(self, size: Sequence[int]) -> float:
        """Multiply-accumulates for one sample whose input has that many positions in each direction: zeros between inputs cost none."""
        return float(self.parameters * prod(size if self.spread else self.output_size(size)))

    def stored(self, weight: Tensor) -> Tensor:
        """A weight as the layer has it: of a transposed convolution [inputs, outputs / groups, *kernel], the kernel turned round."""
        return turned(weight, self.groups) if self.spread else weight


def transposed(
    weight: Tensor,
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    more: tuple[int, ...],
    groups: int,
    dilation: tuple[int, ...],
) -> Convolution:
    """A transposed convolution as the convolution that it is, from its weight [inputs, outputs / groups, *kernel] and torch's other arguments."""
    around = cropped(weight.shape[2:], padding, dilation)
    return Convolution(turned(weight, groups), (1,) * len(around), around, dilation, groups, stride, more)


def macs_of(factors: Sequence[Convolution], size: Sequence[int]) -> float:
    """Multiply-accumulates of convolutions in a row for one sample whose input has that many positions in each direction."""
    total = 0.0
    for factor in factors:
        total += factor.macs(size)
        size = factor.output_size(size)
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
    height and width to the weights of each factor of one group at some ranks. most: from those to the largest ranks, at which nothing is
    lost; empty where the form does not apply. solver: from the goal of a group to its weights at some ranks; what all ranks share is
    computed once. count: at how many values of each rank the form is worth trying. grained: whether its ranks are numbers of channels.
    sound: whether no rank is larger than its neighbours can fill.
    """

    parts: tuple[tuple[str, bool], ...]
    sizes: Callable[[Shape, tuple[int, ...]], tuple[int, ...]]
    most: Callable[[Shape], tuple[int, ...]]
    solver: Callable[[Goal], Solver]
    count: int = 10
    grained: bool = True
    sound: Callable[[Shape, tuple[int, ...]], bool] = lambda shape, ranks: True

    def ranks(self, conv: Convolution, multiple: int = 1) -> list[tuple[int, ...]]:
        """The ranks of each group worth trying, falling in cost: with fewer weights or fewer multiply-accumulates than the layer.

        The ranks of all groups together are multiples, of half as much for a layer that has not room for two. Nothing where the form does
        not apply: to depthwise convolutions, to 1 x 1 kernels (but for ``channel``), and ``spatial`` and ``tensor_train`` to kernels of size 1 in
        one direction.
        """
        most = self.most_of(conv)
        grain = multiple // gcd(multiple, conv.groups) if self.grained else 1
        axes = [_multiples(limit, grain) for limit in most]
        if len(axes) == 1:
            return _thinned(self._paying(conv, [(rank,) for rank in axes[0]]), self.count)
        tried = product(*(_thinned(axis, self.count) for axis in axes)) if axes else ()
        kept = {ranks: [rank / limit for rank, limit in zip(ranks, most, strict=True)] for ranks in tried}
        near = [ranks for ranks, parts in kept.items() if max(parts) - min(parts) <= SPREAD]
        return self._paying(conv, [ranks for ranks in near if self.sound(_shape(conv), ranks)])

    def most_of(self, conv: Convolution) -> tuple[int, ...]:
        """The largest ranks of each group, at which nothing is lost; empty where the form does not apply."""
        depthwise = conv.groups > 1 and conv.weight.shape[1] == 1
        return () if depthwise else self.most(_shape(conv))

    def _paying(self, conv: Convolution, tried: Sequence[tuple[int, ...]]) -> list[tuple[int, ...]]:
        """Those of the ranks that cost less than the layer, falling in cost."""
        dense = self._costs(conv, None)
        found = {ranks: self._costs(conv, ranks) for ranks in tried}
        paying = [ranks for ranks, costs in found.items() if costs[0] < dense[0] or costs[1] < dense[1]]
        return sorted(paying, key=lambda ranks: (*found[ranks], ranks), reverse=True)

    def prepare(self, conv: Convolution, gram: Tensor | None = None, damping: float = 0.0) -> Callable[[tuple[int, ...]], Factored]:
        """A function from ranks to factors, for asking many ranks of one layer.

        Args:
            gram: [groups, columns + 1, columns + 1] of the unfolded inputs with a 1 behind them (or without the first dimension for one
                group). None: all inputs count alike.
            damping: see :func:`~.lowrank.spectrum`.

        Raises:
            ValueError: the shapes do not fit, a value is NaN or infinite, or the form does not apply to the layer; later, ranks out of range.
        """
        most = self.most_of(conv)
        if not most:
            raise ValueError(f"a kernel {list(conv.weight.shape)} in {conv.groups} groups came; this form does not apply to it: ranks() is empty.")
        if gram is not None and gram.dim() == 2:
            gram = gram[None]
        if gram is not None and len(gram) != conv.groups:
            raise ValueError(f"Gram matrices {list(gram.shape)} came for {conv.groups} groups; expected one for each.")
        weights = conv.weight.reshape(*conv.weight.shape[:2], *_shape(conv)[2:]).chunk(conv.groups)
        goals = [goal_of(weight, None if gram is None else gram[number], damping) for number, weight in enumerate(weights)]
        solvers = [self.solver(goal) for goal in goals]

        def factored(ranks: tuple[int, ...]) -> Factored:
            if len(ranks) != len(most) or not all(1 <= rank <= limit for rank, limit in zip(ranks, most, strict=True)):
                raise ValueError(f"ranks {ranks} came for a kernel {list(conv.weight.shape)} in {conv.groups} groups; expected 1 to {most}.")
            return self._joined(conv, goals, [solver(ranks) for solver in solvers])

        return factored

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
        # By how much each direction multiplies the positions.
        growth = _along(conv, conv.spread) if conv.spread else {axis: 1 / step for axis, step in _along(conv, conv.stride).items()}
        before, macs = 1 / prod(growth.values()), 0.0
        for size, (axes, _) in zip(sizes, parts, strict=True):
            behind = before * prod(growth[axis] for axis in axes)
            macs += size * min(before, behind)
            before = behind
        return float(sum(sizes)), macs


def _directions(conv: Convolution) -> dict[str, tuple[int, ...]]:
    """Which directions of a kernel are the solvers' y and x: of three the first, and the others (the first two, where the first has size 1)."""
    dims = len(conv.kernel)
    split = dims - 1 if dims < 3 or conv.kernel[0] == 1 else 1
    return {"y": tuple(range(split)), "x": tuple(range(split, dims))}


def _along(conv: Convolution, values: Sequence[int]) -> dict[str, int]:
    """The product of a number for each direction over those of y and of x."""
    return {axis: prod(values[number] for number in numbers) for axis, numbers in _directions(conv).items()}


def _shape(conv: Convolution) -> Shape:
    sizes = _along(conv, conv.kernel)
    return conv.weight.shape[0] // conv.groups, conv.weight.shape[1], sizes["y"], sizes["x"]


def _part(conv: Convolution, weight: Tensor, axes: str, groups: int) -> Convolution:
    """The factor with that weight [outputs, inputs, height, width], which has what belongs to these directions: stride, padding, dilation."""
    own = {number for axis in axes for number in _directions(conv)[axis]}

    def of(values: Sequence[int], neutral: int) -> tuple[int, ...]:
        return tuple(value if number in own else neutral for number, value in enumerate(values))

    kernel = of(conv.kernel, 1)
    weight = weight.reshape(*weight.shape[:2], *kernel).to(conv.weight.dtype).contiguous()
    made = Convolution(weight, of(conv.stride, 1), of(conv.padding, 0), of(conv.dilation, 1), groups)
    return replace(made, spread=of(conv.spread, 1), more=of(conv.more, 0)) if conv.spread and own else made


def _multiples(most: int, multiple: int) -> list[int]:
    """Those up to ``most``; of half as much where there are not two."""
    while multiple > 1 and most < 2 * multiple:
        multiple = (multiple + 1) // 2
    return list(range(multiple, most + 1, multiple))


def _thinned(ranks: list[T], count: int) -> list[T]:
    """At most so many of them, the first and the last among them."""
    if len(ranks) <= count:
        return ranks
    return [ranks[round(i * (len(ranks) - 1) / (count - 1))] for i in range(count)]


def _most_channel(shape: Shape) -> tuple[int, ...]:
    outputs, inputs, height, width = shape
    return (min(outputs, inputs * height * width),)


def _most_spatial(shape: Shape) -> tuple[int, ...]:
    outputs, inputs, height, width = shape
    return (min(inputs * height, outputs * width),) if min(height, width) > 1 else ()


def _most_tucker(shape: Shape) -> tuple[int, ...]:
    outputs, inputs, height, width = shape
    return (inputs, outputs) if height * width > 1 else ()


def _most_train(shape: Shape) -> tuple[int, ...]:
    outputs, inputs, height, width = shape
    if min(height, width) == 1:
        return ()
    return min(inputs, outputs * height * width), min(inputs * height, outputs * width), min(outputs, inputs * height * width)


def _most_cp(shape: Shape) -> tuple[int, ...]:
    outputs, inputs, height, width = shape
    return (min(outputs, inputs) * height * width,) if height * width > 1 else ()


def _most_separable(shape: Shape) -> tuple[int, ...]:
    outputs, _, height, width = shape
    return (min(outputs, height * width),) if height * width > 1 else ()


FORMS = {
    "channel": Form((("yx", False), ("", False)), lambda s, r: (r[0] * s[1] * s[2] * s[3], s[0] * r[0]), _most_channel, channel),
    "spatial": Form((("y", False), ("x", False)), lambda s, r: (r[0] * s[1] * s[2], s[0] * r[0] * s[3]), _most_spatial, spatial),
    "tucker": Form(
        parts=(("", False), ("yx", False), ("", False)),
        sizes=lambda s, r: (r[0] * s[1], r[1] * r[0] * s[2] * s[3], s[0] * r[1]),
        most=_most_tucker,
        solver=tucker,
        count=6,
    ),
    "tensor_train": Form(
        parts=(("", False), ("y", False), ("x", False), ("", False)),
        sizes=lambda s, r: (r[0] * s[1], r[1] * r[0] * s[2], r[2] * r[1] * s[3], s[0] * r[2]),
        most=_most_train,
        solver=tensor_train,
        count=6,
        sound=lambda s, r: r[1] <= s[2] * r[0] <= s[2] ** 2 * r[1] and r[2] <= s[3] * r[1] <= s[3] ** 2 * r[2],
    ),
    "cp": Form(
        parts=(("", False), ("y", True), ("x", True), ("", False)),
        sizes=lambda s, r: (r[0] * s[1], r[0] * s[2], r[0] * s[3], s[0] * r[0]),
        most=_most_cp,
        solver=cp,
        count=6,
    ),
    "separable": Form(
        parts=(("yx", True), ("", False)),
        sizes=lambda s, r: (s[1] * r[0] * s[2] * s[3], s[0] * s[1] * r[0]),
        most=_most_separable,
        solver=separable,
        grained=False,
    ),
}

"""Which weights to keep, and the best values of those that are kept: tensors in, tensors out.

A weight is a matrix a group, [groups, rows, columns]: a row makes one output, a column reads one input. A mask is a bool tensor of that
shape, True where a weight stays.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .hessian import BLOCK, DAMPING, inverse_factor, sweep

# Rows that are solved at once hold at most so many elements of their Gram matrices.
SOLVED_ELEMENTS = 2**23
# The diagonal of an input that was never seen, as a fraction of the mean: its weights count for next to nothing.
UNSEEN = 1e-6


@dataclass(frozen=True)
class Pattern:
    """At most ``keep`` weights of every ``of`` neighbours in a row (N:M sparsity, Mishra et al. 2021, arXiv 2104.08378)."""

    keep: int
    of: int

    @staticmethod
    def parse(text: str) -> Pattern:
        """``"2:4"`` keeps two of four. Raises ValueError for anything that is not N:M with 0 < N < M."""
        match = re.fullmatch(r"(\d{1,4}):(\d{1,4})", text)
        if match is None or not 0 < int(match[1]) < int(match[2]):
            raise ValueError("expected N:M with 0 < N < M, such as 2:4")
        return Pattern(int(match[1]), int(match[2]))


@dataclass
class Quadratic:
    """The squared output error of a layer, sum |y - W x|^2 over samples, as a function of its weight W.

    ``x`` is what the layer reads in the changed network, ``y`` what it gave (without its bias) in the original one. ``gram``: sum of x x^T,
    [groups, columns, columns]; ``cross``: sum of y x^T, [groups, rows, columns]; ``energy``: sum of |y|^2. In float64, of products in the
    inputs' type.
    """

    gram: Tensor
    cross: Tensor
    energy: float = 0.0

    @staticmethod
    def of(groups: int, rows: int, columns: int) -> Quadratic:
        """One of no samples."""
        return Quadratic(torch.zeros(groups, columns, columns, dtype=torch.float64), torch.zeros(groups, rows, columns, dtype=torch.float64))

    def add(self, x: Tensor, y: Tensor) -> None:
        """Take in samples: x [groups, columns, samples], y [groups, rows, samples]."""
        self.gram += x @ x.mT
        self.cross += y @ x.mT
        self.energy += float(y.double().square().sum())

    def error(self, weight: Tensor) -> float:
        """The error with that weight, as a fraction of ``energy``; not below zero."""
        wide = weight.double()
        total = self.energy - 2 * float((wide * self.cross).sum()) + float((wide @ self.gram * wide).sum())
        return max(0.0, total) / max(self.energy, 1e-30)


# How many to keep ------------------------------------------------------------------------------------------------------------------


def lamp(weight: Tensor) -> Tensor:
    """The share of each squared weight in itself and all larger ones of its layer (Lee et al. 2021, arXiv 2010.07611): comparable between
    layers, and 1 for the largest weight of each. Same shape, float64."""
    squares, order = weight.double().square().flatten().sort()
    larger = squares.flip(0).cumsum(0).flip(0)
    scores = torch.empty_like(squares).scatter_(0, order, squares / larger.clamp(min=1e-300))
    return scores.reshape(weight.shape)


def erk(shapes: Sequence[Sequence[int]], density: float) -> list[float]:
    """The share of weights to keep in each layer, so that together it is ``density``: in proportion to the sum of a layer's dimensions over
    their product (Erdos-Renyi kernel, Evci et al. 2020, arXiv 1911.11134), where that would be above 1 all of them."""
    sizes = [float(torch.Size(shape).numel()) for shape in shapes]
    raw = [sum(shape) / size for shape, size in zip(shapes, sizes, strict=True)]
    full: set[int] = set()
    while len(full) < len(sizes):
        left = density * sum(sizes) - sum(sizes[i] for i in full)
        factor = left / sum(raw[i] * sizes[i] for i in range(len(sizes)) if i not in full)
        above = {i for i in range(len(sizes)) if i not in full and factor * raw[i] > 1}
        if not above:
            return [1.0 if i in full else factor * raw[i] for i in range(len(sizes))]
        full |= above
    return [1.0] * len(sizes)


def counts_above(scores: Sequence[Tensor], count: int) -> list[int]:
    """How many of each layer's scores ([groups, rows, columns] each) are among the ``count`` highest of all; the best of each row always is."""
    masks = keep_best(torch.cat([_with_row_floors(score).flatten() for score in scores]).reshape(1, 1, -1), count).flatten()
    return [int(part.sum()) for part in masks.split([score.numel() for score in scores])]


def _with_row_floors(scores: Tensor) -> Tensor:
    """The scores, infinite for the best of each row."""
    return scores.double().scatter(2, scores.argmax(2, keepdim=True), torch.inf)


# Which to keep ---------------------------------------------------------------------------------------------------------------------


def keep_best(scores: Tensor, count: int, per_row: bool = False) -> Tensor:
    """The mask of the ``count`` highest scores [groups, rows, columns], among them the best of each row; ``per_row``: of each row the same
    number (or one more, where it does not divide)."""
    scores = _with_row_floors(scores)
    rows = scores.shape[0] * scores.shape[1]
    if per_row and count >= rows:
        scores = scores.scatter(2, scores.topk(count // rows, dim=2).indices, torch.inf)
    chosen = scores.flatten().topk(min(max(count, rows), scores.numel())).indices
    return torch.zeros(scores.numel(), dtype=torch.bool).scatter_(0, chosen, True).reshape(scores.shape)


def keep_pattern(scores: Tensor, pattern: Pattern) -> Tensor:
    """The mask of the highest scores in every run of ``pattern.of`` columns; their number must be a multiple of it."""
    runs = scores.unflatten(2, (-1, pattern.of))
    return torch.zeros(runs.shape, dtype=torch.bool).scatter_(3, runs.topk(pattern.keep, dim=3).indices, True).flatten(2)


def wanda(weight: Tensor, gram: Tensor) -> Tensor:
    """Each weight's magnitude times the norm of the input it reads (Sun et al. 2024, arXiv 2306.11695); to be compared within a row."""
    return weight.double().abs() * gram.diagonal(dim1=1, dim2=2).double().clamp(min=0).sqrt()[:, None]


def sparsegpt(
    weight: Tensor, gram: Tensor, count: int, pattern: Pattern | None = None, allowed: Tensor | None = None, damping: float = DAMPING
) -> Tensor:
    """Zero weights column after column, the loss of each made up for by the columns after it (Frantar & Alistarh 2023, arXiv 2301.00774).

    Which go is decided as the sweep arrives: by ``w^2 / [H^-1]`` on the weights as they are by then, in every block of columns so many that
    ``count`` are left in the end (one in each row at least), or by the pattern in every run of it.

    Args:
        weight: [groups, rows, columns]; gram: [groups, columns, columns].
        allowed: the mask outside which weights must be zero.
        damping: added to the diagonal, as a fraction of its mean.

    Returns: the weight, float64, with zeros.
    """
    diagonal = gram.diagonal(dim1=1, dim2=2).double()
    mean = diagonal.mean(1, keepdim=True).clamp(min=1e-30)
    upper = inverse_factor(gram.double() + torch.diag_embed(torch.where(diagonal > 0, damping * mean, UNSEEN * mean)))
    wide = weight.double()
    allowed = torch.ones_like(wide, dtype=torch.bool) if allowed is None else allowed
    choice = _Choice(wide, upper, allowed, count, pattern)
    size = BLOCK if pattern is None else max(1, BLOCK // pattern.of) * pattern.of
    step = size if pattern is None else pattern.of
    kept = torch.zeros_like(allowed)

    def decide(start: int, block: Tensor, i: int) -> Tensor:
        if i % step == 0:
            kept[:, :, start + i : start + i + step] = choice(start + i, block[:, :, i : i + step])
        return block[:, :, i] * kept[:, :, start + i]

    return sweep(wide, upper, decide, size)


class _Choice:
    """Which weights of a run of columns stay, when the sweep arrives at it."""

    def __init__(self, weight: Tensor, upper: Tensor, allowed: Tensor, count: int, pattern: Pattern | None) -> None:
        self.diagonal, self.allowed, self.pattern = upper.diagonal(dim1=1, dim2=2)[:, None].square(), allowed, pattern
        first = torch.where(allowed, weight.square() / upper.square().sum(1)[:, None], -1.0)
        self.floors = torch.zeros_like(allowed).scatter_(2, first.argmax(2, keepdim=True), True)
        others = (~self.floors).sum((0, 1)).cumsum(0).tolist()
        free = min(max(0, count - int(self.floors.sum())), others[-1])
        # How many, beside the best of each row, are to be left before each column.
        self.left = [0, *(round(free * seen / max(1, others[-1])) for seen in others)]

    def __call__(self, first: int, run: Tensor) -> Tensor:
        """The mask of the columns from ``first`` on, whose weights are ``run`` by now."""
        columns = slice(first, first + run.shape[2])
        scores = torch.where(self.allowed[:, :, columns], run.square() / self.diagonal[:, :, columns], -1.0)
        if self.pattern is not None:
            return keep_pattern(scores, self.pattern) & self.allowed[:, :, columns]
        floors = self.floors[:, :, columns]
        count = self.left[columns.stop] - self.left[first] + int(floors.sum())
        best = torch.where(floors, torch.inf, scores).flatten().topk(count).indices
        mask = torch.zeros(scores.numel(), dtype=torch.bool).scatter_(0, best, True).reshape(scores.shape)
        return mask & self.allowed[:, :, columns]


# The best values -------------------------------------------------------------------------------------------------------------------


def least_squares(weight: Tensor, mask: Tensor, quadratic: Quadratic, ridge: float) -> Tensor:
    """The weight of least error among those that are zero outside the mask, drawn towards ``weight`` by a ridge.

    It minimises, exactly and for each row on its own, sum |y - W x|^2 + ridge * mean(diagonal of the Gram matrix) * |W - weight|^2, the last
    over the mask. Shapes as in :class:`Quadratic`. Returns float64.
    """
    return _solve(weight, mask, quadratic, ridge, costs=False)[0]


def surgeon(weight: Tensor, quadratic: Quadratic, counts: Sequence[int | Pattern], allowed: Tensor, ridge: float) -> Tensor:
    """Take weights away in rounds; after each the others are solved for anew, and what goes next is what then costs least.

    The cost of a weight is ``w^2 / [H^-1]`` with H the Gram matrix over the weights that its row still has (optimal brain surgeon for rows:
    Frantar & Alistarh 2022, arXiv 2208.11580, there one weight at a time).

    Args:
        counts: how many stay after each round, falling (one in each row at least); or patterns.
        allowed: the mask outside which weights must be zero.

    Returns: the weight, float64 [groups, rows, columns], the solution of :func:`least_squares` on its mask.
    """
    mask = allowed
    for count in counts:
        _, costs = _solve(weight, mask, quadratic, ridge, costs=True)
        mask = mask & (keep_pattern(costs, count) if isinstance(count, Pattern) else keep_best(costs, count))
    return least_squares(weight, mask, quadratic, ridge)


def _solve(weight: Tensor, mask: Tensor, quadratic: Quadratic, ridge: float, costs: bool) -> tuple[Tensor, Tensor]:
    """The least squares solution and, if asked for, what each of its weights costs to take away (-1 outside the mask). Both as ``weight``."""
    gram, wide = quadratic.gram, weight.double()
    pull = (ridge * gram.diagonal(dim1=1, dim2=2).mean(1)).clamp(min=1e-30)
    wanted = quadratic.cross + pull[:, None, None] * wide
    if bool(mask.all()):
        factor = torch.linalg.cholesky(gram + pull[:, None, None] * torch.eye(gram.shape[1], dtype=torch.float64))
        full = torch.cholesky_solve(wanted.mT, factor).mT
        return full, full.square() / torch.cholesky_inverse(factor).diagonal(dim1=1, dim2=2)[:, None] if costs else full
    solved, cost = torch.zeros_like(wide).flatten(0, 1), torch.full_like(wide, -1.0).flatten(0, 1)
    group = torch.arange(wide.shape[0]).repeat_interleave(wide.shape[1])
    flat, wanted, counts = mask.flatten(0, 1), wanted.flatten(0, 1), mask.sum(2).flatten()
    for rows in _alike(counts):
        width = int(counts[rows].max())
        kept = flat[rows].to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :width]
        inside = torch.arange(width) < counts[rows, None]
        part = gram[group[rows, None, None], kept[:, :, None], kept[:, None, :]] * (inside[:, :, None] & inside[:, None, :])
        part.diagonal(dim1=1, dim2=2).add_(torch.where(inside, pull[group[rows], None], 1.0))
        factor = torch.linalg.cholesky(part)
        values = torch.cholesky_solve((wanted[rows].gather(1, kept) * inside)[:, :, None], factor)[:, :, 0]
        solved[rows] = solved[rows].scatter(1, kept, values * inside)
        if costs:
            each = values.square() / torch.cholesky_inverse(factor).diagonal(dim1=1, dim2=2)
            cost[rows] = cost[rows].scatter(1, kept, torch.where(inside, each, -1.0))
    return solved.reshape(wide.shape), cost.reshape(wide.shape)


def _alike(counts: Tensor) -> list[Tensor]:
    """The numbers of all rows that have something to solve, in parts of rows with about as many unknowns."""
    order = counts.argsort(descending=True)
    order = order[counts[order] > 0]
    parts, start = [], 0
    while start < len(order):
        many = max(1, SOLVED_ELEMENTS // int(counts[order[start]]) ** 2)
        parts.append(order[start : start + many])
        start += many
    return parts


def solving_work(mask: Tensor) -> float:
    """About how many multiplications :func:`least_squares` takes on that mask, which is not full."""
    return float((mask.sum(2).double() ** 3).sum()) / 3


def surgeon_work(mask: Tensor, counts: Sequence[int | Pattern]) -> float:
    """About how many multiplications :func:`surgeon` takes from that mask on."""
    groups, rows, columns = mask.shape
    shares = [count.keep / count.of if isinstance(count, Pattern) else count / mask.numel() for count in counts]
    return groups * rows * sum((columns * share) ** 3 for share in shares)

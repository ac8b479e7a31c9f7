"""Learned rounding: each weight takes one of two neighbouring codes, and a continuous variable between them is trained.

After Nagel et al. 2020 (AdaRound, arXiv 2004.10568): a weight is ``step * (lower + h(v) - zero)`` with ``h`` a rectified sigmoid of the
variable ``v``, and a regulariser that is annealed drives every ``h(v)`` to 0 or 1. There the lower code is the floor of the original
weight; here the two codes are the one that a solver chose before and its neighbour on the side of the original weight.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .grids import Grid

# The sigmoid is stretched to (-GAMMA, 1 + GAMMA) and clipped, so that 0 and 1 are reached and gradients do not vanish on the way there.
GAMMA = 0.1
# At the start ``h`` is at most so far from the chosen code (a solver's codes are good together, and not where all are half way to others), and
# at least so far from it, where gradients are not zero.
FARTHEST, NEAREST = 0.25, 0.01
# The regulariser's exponent, from the first step that it acts in to the last; before WARM_UP, a fraction of the steps, it does not act.
FIRST_BETA, LAST_BETA = 20.0, 2.0
WARM_UP = 0.2


def rectified_sigmoid(v: Tensor) -> Tensor:
    """``clip((1 + 2 * GAMMA) * sigmoid(v) - GAMMA, 0, 1)``, any shape."""
    return ((1 + 2 * GAMMA) * torch.sigmoid(v) - GAMMA).clamp(0, 1)


def inverse_rectified(h: Tensor) -> Tensor:
    """The ``v`` nearest to zero with ``rectified_sigmoid(v) == h``, for ``h`` between 0 and 1."""
    return torch.logit((h + GAMMA) / (1 + 2 * GAMMA))


def undecided(h: Tensor, beta: float) -> Tensor:
    """``1 - |2 h - 1| ** beta``, same shape: 0 where ``h`` is 0 or 1, 1 where it is 1/2."""
    return 1 - (2 * h - 1).abs().pow(beta)


def annealed(step: int, steps: int) -> float | None:
    """The regulariser's exponent in step 0, 1, ... of so many: falls with a half cosine, so that first what is nearly decided settles, then
    all; None while it does not act."""
    begin = WARM_UP * steps
    if step < begin:
        return None
    share = torch.tensor((step - begin) / max(steps - 1 - begin, 1e-9)).clamp(max=1) * torch.pi
    return LAST_BETA + (FIRST_BETA - LAST_BETA) * (1 + float(torch.cos(share))) / 2


@dataclass(frozen=True)
class Rounding:
    """The two codes that each weight of a tensor may take, and where it starts between them.

    Attributes, all of the weight's shape or broadcast to it:
        lower: the lower code, as float. ``step``, ``zero``: of its grid.
        start: ``v`` at the start. ``kept``: False where the weight stays exactly zero.
    """

    lower: Tensor
    step: Tensor
    zero: Tensor
    start: Tensor
    kept: Tensor

    @staticmethod
    def of(chosen: Tensor, original: Tensor, step: Tensor, zero: Tensor, grid: Grid) -> Rounding:
        """To begin with a weight's ``chosen`` values, on the grid; the other code is the next towards ``original``, which is what the
        soft weight is at the start, or as near to it as ``FARTHEST`` lets it be. Zeros of ``original`` stay zero."""
        code = (torch.round(chosen / step) + zero).clamp(grid.low, grid.high)
        exact = original / step + zero
        lower = torch.where(exact >= code, code, code - 1).clamp(grid.low, grid.high - 1)
        h = exact - lower
        up = code > lower
        h = torch.where(up, h.clamp(1 - FARTHEST, 1 - NEAREST), h.clamp(NEAREST, FARTHEST))
        return Rounding(lower, step, zero, inverse_rectified(h), original != 0)

    def soft(self, h: Tensor) -> Tensor:
        """The weight where the share ``h`` of the way from the lower to the upper code is gone."""
        return (self.lower + h - self.zero) * self.step * self.kept

    def hard(self, v: Tensor) -> Tensor:
        """The weight on its grid: the upper code where ``rectified_sigmoid(v)`` is at least 1/2."""
        return self.soft((v >= 0).to(self.lower.dtype))

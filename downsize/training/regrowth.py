"""Weights that grow again while others go: the number stays, the places move to where the loss falls most."""

from __future__ import annotations

from math import cos, pi

import torch
from torch import Tensor

# The share of a layer's weights that move at first.
FRACTION = 0.3


def moving(progress: float) -> float:
    """The share of the weights that move, falling as a cosine from :data:`FRACTION` to 0 while ``progress`` goes from 0 to 1."""
    return FRACTION / 2 * (1 + cos(pi * min(1.0, progress)))


def regrown(mask: Tensor, weight: Tensor, gradient: Tensor, share: float, allowed: Tensor) -> Tensor:
    """The mask in which the smallest weights made way for those with the largest gradients (RigL; Evci et al. 2020, arXiv 1911.11134).

    What went may grow again at once, then it has not moved. The largest weight of each row stays.

    Args:
        mask, weight, allowed: [groups, rows, columns]; gradient: of the loss by the weight as if none were masked, of the same shape.
        share: of the mask's weights that move.
        allowed: where there may be weights at all; the mask lies within.

    Returns: a mask with as many weights.
    """
    active = int(mask.sum())
    sizes = torch.where(mask, weight.abs().double(), -1.0)
    largest = torch.zeros_like(mask).scatter_(2, sizes.argmax(2, keepdim=True), True) & mask
    staying = max(active - round(share * active), int(largest.sum()))
    kept = _highest(torch.where(largest, torch.inf, sizes), staying)
    free = allowed & ~kept
    return kept | _highest(torch.where(free, gradient.abs().double(), -1.0), active - staying)


def _highest(scores: Tensor, count: int) -> Tensor:
    """The mask of the ``count`` highest scores."""
    chosen = scores.flatten().topk(count).indices
    return torch.zeros(scores.numel(), dtype=torch.bool, device=scores.device).scatter_(0, chosen, True).reshape(scores.shape)

"""Ranks that are learned: while a network trains, its layers are drawn towards the factors that would stand for them."""

# pyright: reportArgumentType=false

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..factoring.forms import composed
from ..factoring.rewriting import Product
from ..network.network import Network
from .hook import Hook, Learner

# How often the factors are chosen anew, and the strength of the pull at the first choice and at the last.
CHOICES = 12
WEAKEST, STRONGEST = 0.03, 30.0


class LearnedRanks(Hook):
    """``strength / 2 * sum |W - W'|^2 / |W'|^2`` over the layers that would be factored, where W' is what the factors nearest to W compute.

    Forms and ranks are chosen anew every while, all together under what may remain, so that layers whose weights bend to few directions get
    few, and the pull grows: the learning-compression scheme of Idelbayev & Carreira-Perpinan (2020, "Low-rank compression of neural nets:
    learning the rank of each layer", CVPR), with a limit instead of a price, relative distances, and any form of factors.

    Args:
        nearest: the factors that are nearest to a network's weights. ``asked``: what tells this function from others.
        choices: how often they are chosen in the training.
    """

    def __init__(self, nearest: Callable[[Network], Sequence[Product]], asked: tuple[Any, ...] = (), choices: int = CHOICES) -> None:
        self._nearest, self.asked, self.choices = nearest, asked, choices
        self.wanted: dict[str, Tensor] = {}

    def begin(self, learner: Learner) -> None:
        self.wanted = {}

    def before(self, learner: Learner) -> None:
        every = max(1, learner.steps // self.choices)
        if learner.step % every == 0:
            with torch.no_grad():
                products = self._nearest(learner.network)
            self.wanted = {one.layer.name: one.layer.dense.stored(composed(one)).to(one.layer.dense.weight) for one in products}

    def penalty(self, learner: Learner) -> Tensor | None:
        strength = WEAKEST * (STRONGEST / WEAKEST) ** learner.share
        parts = [
            (weight - wanted).square().sum() / wanted.square().sum().clamp(min=torch.finfo(wanted.dtype).tiny)
            for name, wanted in self.wanted.items()
            if isinstance(weight := learner.network.tensor(name), torch.nn.Parameter) and weight.requires_grad
        ]
        return strength / 2 * torch.stack(parts).sum() if parts else None

    def ready(self, learner: Learner) -> bool:
        """Only behind the last step is the pull at its strongest."""
        return learner.step == learner.steps

    def state(self) -> dict[str, Tensor]:
        return dict(self.wanted)

    def restore(self, state: Mapping[str, Tensor]) -> None:
        self.wanted = dict(state)

"""How much a changed network has lost, by its outputs on data that the change was not fitted on."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .network import Network
from .statistics import walk


class Judge:
    """How far a network's outputs are from the reference's on held-back data: sum |other - reference|^2 / sum |reference|^2.

    Args:
        reference: runs once over the data, when the judge is made; its outputs are kept in memory.
        pieces: flat inputs, see :func:`~downsize.network.statistics.chunks`.
        prepare: makes of a network the one to run, with the same outputs, such as a faster one.
    """

    def __init__(self, reference: Network, pieces: Sequence[list[Tensor]], prepare: Callable[[Network], Network] | None = None) -> None:
        self.pieces, self.prepare = pieces, prepare
        self.expected = [walk(reference, leaves, {}) for leaves in pieces]

    def __call__(self, other: Network) -> float:
        """The squared relative error, a fraction: over all float outputs, where the reference's are finite."""
        runs = self.prepare(other) if self.prepare else other
        error = norm = 0.0
        for leaves, outputs in zip(self.pieces, self.expected, strict=True):
            for one, two in zip(outputs, walk(runs, leaves, {}), strict=True):
                if one.is_floating_point():
                    finite = torch.isfinite(one)
                    error += float((two - one)[finite].double().square().sum())
                    norm += float(one[finite].double().square().sum())
        return error / max(norm, 1e-30)

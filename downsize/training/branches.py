"""Early exits that are there only while training: what the end knows, the middle learns too."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ..errors import TaskError
from ..numerics.distillation import relative_error, soft_logits
from ..scores import IGNORED
from .features import pooled
from .outputs import class_dimension
from .pairing import Layer

# As weighted by the authors: what the end says against what the labels say, and how near the inner values are.
TEMPERATURE, SOFT, HINT = 3.0, 0.3, 0.03


class Branches(nn.Module):
    """A classifier on each of some inner layers, taught by the labels and by the network's own end (Zhang et al. 2019, Be Your Own Teacher,
    arXiv 1905.08094): ``0.7 cross-entropy + 0.3 T^2 KL`` with T = 3, plus 0.03 times how far its adapted features are from those of the last
    layer. Without labels the end alone teaches; where outputs are no class scores, by their relative squared error.

    Args:
        found: the network's layers, in order (see :func:`~downsize.training.pairing.layers`); the last one teaches the others.
        count: how many exits, spread evenly over the others.
        outputs: the width of the main output [samples, width]. ``classes``: whether these are class scores.
        seed: of the classifiers' first weights.

    Raises:
        TaskError: there are fewer layers than exits.
    """

    def __init__(self, found: Sequence[Layer], count: int, outputs: int, classes: bool, seed: int) -> None:
        super().__init__()
        if len(found) <= count:
            raise TaskError(f"branches={count} came; the network has {max(0, len(found) - 1)} inner layers before its last one: take fewer.")
        self.exits = tuple(found[(i + 1) * (len(found) - 1) // (count + 1)] for i in range(count))
        self.last, self.classes = found[-1], classes
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.adapters = nn.ModuleList(nn.Linear(layer.width, self.last.width) for layer in self.exits)
            self.heads = nn.ModuleList(nn.Linear(self.last.width, outputs) for _ in self.exits)

    @property
    def taps(self) -> tuple[str, ...]:
        """Names of the nodes whose values it reads."""
        return tuple(dict.fromkeys(layer.name for layer in (*self.exits, self.last)))

    def forward(self, tapped: Mapping[str, Tensor], outputs: Tensor, targets: Any, real: Tensor | None) -> Tensor:
        """The mean loss of the exits, a scalar.

        Args:
            tapped: by node name the values of ``taps``.
            outputs: the network's own, [samples, width]; taken as they are: their teacher is not taught by them.
            real: bool [samples, positions], False where a position is padding.
        """
        deepest = _pooled(self.last, tapped, real).detach()
        losses = []
        for layer, adapter, head in zip(self.exits, self.adapters, self.heads, strict=True):
            features = adapter(_pooled(layer, tapped, real))
            answer = head(torch.relu(features))
            losses.append(self._loss(answer, outputs.detach(), targets) + HINT * relative_error(features, deepest))
        return torch.stack(losses).mean()

    def _loss(self, answer: Tensor, end: Tensor, targets: Any) -> Tensor:
        if not self.classes:
            return relative_error(answer, end)
        soft = soft_logits(answer, end, TEMPERATURE)
        if class_dimension(answer, targets) is None:
            return soft
        classes = torch.as_tensor(targets).long().to(answer.device)
        return (1 - SOFT) * cross_entropy(answer, classes, ignore_index=IGNORED) + SOFT * soft


def _pooled(layer: Layer, tapped: Mapping[str, Tensor], real: Tensor | None) -> Tensor:
    rows = layer.rows(tapped[layer.name]).float()
    kept = real if real is not None and layer.kind == "tokens" and real.shape == rows.shape[:2] else None
    return pooled(rows, None if kept is None else kept.to(rows.device))

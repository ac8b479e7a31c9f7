"""What a training is at one moment, as tensors by name: what a checkpoint holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..network.network import Network
from .hook import Hook
from .keeping import Average, put
from .objective import Objective
from .optimizer import set_state, state_of


@dataclass
class Best:
    """The state that validation likes best so far: its tensors, score, and behind which step it was. ``chosen``: it was ready for use."""

    tensors: dict[str, Tensor]
    score: float | None = None
    step: int = 0
    chosen: bool = False


@dataclass(frozen=True)
class State:
    """All that changes in a training beside a few numbers; its members are changed in place."""

    network: Network
    objective: Objective
    optimizer: torch.optim.Optimizer
    average: Average | None
    hooks: Sequence[Hook]

    def tensors(self, best: Best) -> dict[str, Tensor]:
        """Everything, under ``<part>/<name>``."""
        parts: dict[str, Mapping[str, Tensor]] = {
            "network": dict(self.network.named_tensors()),
            "best": best.tensors,
            "optimizer": state_of(self.optimizer),
            "objective": self.objective.state(),
            "average": {} if self.average is None else self.average.values,
            **{f"hook{number}": hook.state() for number, hook in enumerate(self.hooks)},
        }
        return {f"{part}/{name}": tensor for part, tensors in parts.items() for name, tensor in tensors.items()}

    def restore(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The inverse of :meth:`tensors`. Returns those of the best state."""
        parts: dict[str, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            part, _, rest = name.partition("/")
            parts.setdefault(part, {})[rest] = tensor
        put(self.network, parts["network"])
        self.objective.restore(parts.get("objective", {}))
        set_state(self.optimizer, parts.get("optimizer", {}))
        if self.average is not None:
            for name, value in self.average.values.items():
                value.copy_(parts["average"][name])
        for number, hook in enumerate(self.hooks):
            hook.restore(parts.get(f"hook{number}", {}))
        return parts["best"]

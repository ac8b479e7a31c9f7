"""The optimizer and its learning rate, from torch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

MOMENTUM = 0.9


def optimizer_of(
    kind: str, parameters: Mapping[str, nn.Parameter], others: Sequence[nn.Parameter], decay: float, factors: Mapping[str, float]
) -> torch.optim.Optimizer:
    """AdamW (Loshchilov & Hutter 2019, arXiv 1711.05101) or SGD with Nesterov momentum, with a group of parameters for each rate and decay.

    Args:
        parameters: by name. ``others``: what the objective brings. ``factors``: by name what the rate is multiplied by.
        decay: of parameters of two dimensions and more without a factor.

    Each group has its factor under "factor".
    """
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in parameters.items():
        own = decay if parameter.dim() > 1 and name not in factors else 0.0
        groups.setdefault((factors.get(name, 1.0), own), []).append(parameter)
    if others:
        groups.setdefault((1.0, 0.0), []).extend(others)
    made = [{"params": members, "weight_decay": own, "factor": factor} for (factor, own), members in groups.items()]
    if kind == "sgd":
        return torch.optim.SGD(made, lr=0.0, momentum=MOMENTUM, nesterov=True)
    return torch.optim.AdamW(made, lr=0.0)


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the learning rate of each group: ``rate`` times the group's factor."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["factor"]


def rate_at(step: int, steps: int, largest: float, schedule: str, warmup: float) -> float:
    """The learning rate of step ``step`` of ``steps``: a straight rise in the first ``warmup`` of them, then as ``schedule`` says.

    "cosine" is half a period from the largest rate to zero (Loshchilov & Hutter 2017, arXiv 1608.03983).

    >>> [round(rate_at(step, 4, 1.0, "linear", 0.5), 2) for step in range(4)]
    [0.5, 1.0, 1.0, 0.5]
    """
    rise = round(warmup * steps)
    if step < rise:
        return largest * (step + 1) / rise
    done = (step - rise) / max(1, steps - rise)
    return largest * {"cosine": 0.5 * (1 + math.cos(math.pi * done)), "linear": 1 - done, "constant": 1.0}[schedule]


def state_of(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Its moments and counts, by "<number of the parameter>.<name>"."""
    found: dict[str, Tensor] = {}
    for number, parameter in enumerate(_parameters(optimizer)):
        for name, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                found[f"{number}.{name}"] = value
    return found


def set_state(optimizer: torch.optim.Optimizer, state: Mapping[str, Tensor]) -> None:
    """The inverse of :func:`state_of`, for an optimizer of the same parameters."""
    parameters: list[Any] = _parameters(optimizer)
    for key, value in state.items():
        number, _, name = key.partition(".")
        parameter = parameters[int(number)]
        # torch keeps AdamW's count of steps on the CPU
        optimizer.state[parameter][name] = value.to("cpu" if name == "step" else parameter.device, copy=True)


def _parameters(optimizer: torch.optim.Optimizer) -> list[Any]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]

"""Whether products in 16 bits are faster here."""

from __future__ import annotations

import time

import torch
from torch import Tensor

from ..network.network import Network

TRIALS = 3
GAIN = 0.9  # of the time in 32 bits that 16 bits may take to be chosen


def faster_in_bfloat16(network: Network, leaves: list[Tensor]) -> bool:
    """Time forward and backward passes on these inputs in both, in turns; the best of each counts."""
    taken = {False: float("inf"), True: float("inf")}
    buffers = [(tensor, tensor.detach().clone()) for _, tensor in network.named_tensors() if not tensor.requires_grad]
    for _ in range(TRIALS):
        for sixteen in taken:
            started = time.perf_counter()
            with torch.autocast(leaves[0].device.type, torch.bfloat16, enabled=sixteen):
                values = network.graph_module(*leaves)
            total = sum(value.float().sum() for value in values if value.is_floating_point() and value.requires_grad)
            if isinstance(total, Tensor):
                total.backward()
            taken[sixteen] = min(taken[sixteen], time.perf_counter() - started)
    with torch.no_grad():
        for tensor, value in buffers:
            tensor.copy_(value)
    for parameter in network.parameters():
        parameter.grad = None
    return taken[True] < GAIN * taken[False]

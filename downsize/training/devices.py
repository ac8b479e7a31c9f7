"""Where training runs: this process on the CPU, a GPU, or several processes that each take a part of every batch."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import RuntimeMissing
from ..network.network import Network, batch_of
from ..network.parts import assign

MEND = 'training on GPUs or in several processes needs accelerate: pip install "downsize[train]"'


@dataclass(frozen=True)
class Devices:
    """This process among those that train together.

    Attributes:
        rank, count: which of how many processes. ``device``: where its tensors are. ``accelerator``: of Hugging Face accelerate; None on a
            CPU alone.
    """

    rank: int = 0
    count: int = 1
    device: torch.device = torch.device("cpu")  # noqa: RUF009 (it cannot be changed)
    accelerator: Any = None

    @staticmethod
    def found() -> Devices:
        """What ``accelerate launch`` (or torchrun) has set up; without it a GPU if torch sees one and accelerate is there, else the CPU.

        Raises:
            RuntimeMissing: there are several processes, but accelerate is not installed.
        """
        several = int(os.environ.get("WORLD_SIZE", "1")) > 1
        if not several and not torch.cuda.is_available():
            return Devices()
        try:
            from accelerate import Accelerator  # pyright: ignore[reportMissingImports]  (an extra)
        except ImportError as error:
            if several:
                raise RuntimeMissing(f"{MEND} ({error})") from error
            return Devices()
        made = Accelerator()
        return Devices(made.process_index, made.num_processes, made.device, made)

    @property
    def main(self) -> bool:
        """Whether this process is the one that writes and tells."""
        return self.rank == 0

    def part(self, inputs: Any, targets: Any) -> tuple[Any, Any, float]:
        """This process' rows of a batch, and what its loss counts: the mean over processes is then the mean over the batch's rows.

        A batch of fewer rows than processes gives the others a row that counts nothing.
        """
        size = next((leaf.shape[0] for leaf in _tensors((inputs, targets)) if leaf.dim()), 1)
        if self.count == 1 or size == 1:
            return inputs, targets, 1.0
        rows = list(range(size))[self.rank :: self.count]
        weight = len(rows) * self.count / size
        rows = rows or [0]
        # the targets' own first tensor may be shorter than the batch: then they are of the whole batch
        own = next((leaf.shape[0] for leaf in _tensors(targets) if leaf.dim()), None)
        return batch_of(inputs, rows), batch_of(targets, rows) if own == size else targets, weight

    def to(self, leaves: list[Tensor]) -> list[Tensor]:
        """The tensors on this process' device."""
        return [leaf.to(self.device) for leaf in leaves]

    def mean(self, tensors: Iterable[Tensor]) -> None:
        """Set each tensor to its mean over the processes, in place."""
        if self.count > 1:
            for tensor in tensors:
                tensor.copy_(self.accelerator.reduce(tensor.detach().clone(), reduction="mean"))

    def any(self, flag: bool) -> bool:
        """Whether the flag is set in any process."""
        if self.count == 1:
            return flag
        return bool(self.accelerator.reduce(torch.tensor(float(flag), device=self.device), reduction="sum") > 0)


def _tensors(tree: Any) -> list[Tensor]:
    if isinstance(tree, Tensor):
        return [tree]
    items = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, (tuple, list)) else ()
    return [leaf for item in items for leaf in _tensors(item)]


def move(network: Network, device: torch.device) -> None:
    """Put a network's tensors on a device, in place, and let its graph make new ones there."""
    if device.type == "cpu" and all(tensor.device.type == "cpu" for _, tensor in network.named_tensors()):
        return
    moved: dict[int, Tensor] = {}
    for name, tensor in list(network.named_tensors()):
        if id(tensor) not in moved:
            there = tensor.detach().to(device)
            moved[id(tensor)] = torch.nn.Parameter(there, tensor.requires_grad) if isinstance(tensor, torch.nn.Parameter) else there
        assign(network.graph_module, name, moved[id(tensor)])
    for node in network.graph.nodes:
        if "device" in node.kwargs:
            node.kwargs = {**node.kwargs, "device": device}
    network.recompile()

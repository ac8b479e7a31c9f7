"""Where training runs: this process on the CPU, a GPU, or several processes that each take a part of every batch."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import RuntimeMissing
from ..network.network import Network
from ..network.parts import assign
from ..structure import is_named, looks_like_tensor

MEND = 'training on GPUs or in several processes needs accelerate: pip install "downsize[train]"'
WORLD_SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")  # where launchers tell how many there are


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
        """What ``accelerate launch``, torchrun or mpirun has set up; without them a GPU if torch sees one and accelerate is there, else the CPU.

        Raises:
            RuntimeMissing: there are several processes, but accelerate is not installed, or does not join them.
        """
        several = max(int(os.environ.get(name, "1")) for name in WORLD_SIZES)
        if several == 1 and not torch.cuda.is_available():
            return Devices()
        try:
            from accelerate import Accelerator  # pyright: ignore[reportMissingImports]  (an extra)
        except ImportError as error:
            if several > 1:
                raise RuntimeMissing(f"{MEND} ({error})") from error
            return Devices()
        # Unless it is told that they are CPUs, accelerate lets each of several processes without GPUs believe that it is alone.
        made = Accelerator(cpu=several > 1 and not torch.accelerator.is_available())
        if made.num_processes != several:
            raise RuntimeMissing(f"{several} processes were started, but accelerate joins {made.num_processes}: start them as it wants it.")
        return Devices(made.process_index, made.num_processes, made.device, made)

    @property
    def main(self) -> bool:
        """Whether this process is the one that writes and tells."""
        return self.rank == 0

    def part(self, inputs: Any, targets: Any, size: int) -> tuple[Any, Any, float]:
        """This process' rows of a batch of ``size`` rows, and what its loss counts: for a loss that is a mean over rows, the mean over
        processes is then the mean over the batch. Each process takes a batch whole that has not two rows for each of them."""
        if self.count == 1 or size < 2 * self.count:
            return inputs, targets, 1.0
        rows = list(range(size))[self.rank :: self.count]
        return rows_of(inputs, rows, size), rows_of(targets, rows, size), len(rows) * self.count / size

    def there(self, tree: Any) -> Any:
        """The same with its torch tensors on this process' device."""
        if isinstance(tree, Tensor):
            return tree.to(self.device)
        if self.device.type == "cpu":
            return tree
        if isinstance(tree, Mapping):
            return {key: self.there(item) for key, item in tree.items()}
        if is_named(tree):
            return type(tree)(*map(self.there, tree))
        return type(tree)(map(self.there, tree)) if type(tree) in (tuple, list) else tree

    def mean(self, tensors: Sequence[Tensor]) -> None:
        """Set each tensor to its mean over the processes, in place; one message for all of a type."""
        if self.count == 1:
            return
        for dtype in {tensor.dtype: None for tensor in tensors}:
            some = [tensor for tensor in tensors if tensor.dtype == dtype]
            joined = self.accelerator.reduce(torch.cat([tensor.detach().flatten() for tensor in some]), reduction="mean")
            for tensor, value in zip(some, joined.split([tensor.numel() for tensor in some]), strict=True):
                tensor.copy_(value.view_as(tensor))

    def wait(self) -> None:
        """Nobody goes on before all have come here."""
        self.any(False)

    def any(self, flag: bool) -> bool:
        """Whether the flag is set in any process."""
        if self.count == 1:
            return flag
        return bool(self.accelerator.reduce(torch.tensor(float(flag), device=self.device), reduction="sum") > 0)


def rows_of(tree: Any, rows: list[int], size: int) -> Any:
    """Those rows of every tensor or array in ``tree`` whose first dimension is ``size``, and those items of lists of ``size`` that hold none."""
    if looks_like_tensor(tree):
        return tree[rows] if len(tree.shape) and tree.shape[0] == size else tree
    if isinstance(tree, Mapping):
        return {key: rows_of(item, rows, size) for key, item in tree.items()}
    if not isinstance(tree, (tuple, list)):
        return tree
    if len(tree) == size and not _has_rows(tree, size):
        made = [tree[row] for row in rows]
        return made if isinstance(tree, list) else tuple(made)
    made = [rows_of(item, rows, size) for item in tree]
    return made if isinstance(tree, list) else type(tree)(*made) if hasattr(tree, "_fields") else tuple(made)


def _has_rows(tree: Any, size: int) -> bool:
    if looks_like_tensor(tree):
        return bool(len(tree.shape)) and tree.shape[0] == size
    items = tree.values() if isinstance(tree, Mapping) else tree if isinstance(tree, (tuple, list)) else ()
    return any(_has_rows(item, size) for item in items)


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

"""The parts of a Network that have no behaviour: its inputs' description, and the tree of modules that holds its tensors."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Port:
    """One tensor input: its name, its dtype, its dimensions (a number where fixed, a symbol such as ``batch`` where any size goes), and the
    sizes of the example it was captured with."""

    name: str
    dtype: torch.dtype
    dims: tuple[int | str, ...]
    example: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.name}: {str(self.dtype).removeprefix('torch.')}[{', '.join(map(str, self.dims))}]"


def assign(root: torch.nn.Module, name: str, tensor: Tensor) -> None:
    """Put ``tensor`` at the dotted ``name`` under ``root``, making the modules between: a parameter stays one, the rest are buffers."""
    path, _, leaf = name.rpartition(".")
    module = root
    for part in path.split(".") if path else []:
        if part not in module._modules:
            module.add_module(part, torch.nn.Module())
        module = module.get_submodule(part)
    for table in (module._parameters, module._buffers):
        table.pop(leaf, None)
    module.__dict__.pop(leaf, None)
    if isinstance(tensor, torch.nn.Parameter):
        module.register_parameter(leaf, tensor)
    else:
        module.register_buffer(leaf, tensor)

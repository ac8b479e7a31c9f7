"""The parts of a Network that have no behaviour: its inputs' description, and the tree of modules that holds its tensors."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor, fx

# Names that the modules of the tree need for themselves.
_OF_MODULES = frozenset(dir(torch.nn.Module()))
_OF_THE_ROOT = frozenset(dir(fx.GraphModule(torch.nn.Module(), fx.Graph())))


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


def is_name(name: str) -> bool:
    """Whether ``name`` is a dotted name that tensors of a Network can have: ASCII letters, digits and ``_``, and no name of the modules' own."""
    first, *rest = name.split(".")
    return all(map(_is_part, [first, *rest])) and first not in _OF_THE_ROOT and not _OF_MODULES & set(rest)


def _is_part(text: str) -> bool:
    return re.fullmatch(r"[A-Za-z0-9_]+", text) is not None


def legal_name(name: str, taken: Collection[str] = ()) -> str:
    """``name``, changed where it must be to be a name (see :func:`is_name`) that is not taken.

    >>> legal_name("layers.conv-1.weight"), legal_name("graph.weight"), legal_name("a.b", {"a.b"})
    ('layers.conv_1.weight', 'graph_.weight', 'a.b_2')
    """
    parts = [re.sub(r"[^A-Za-z0-9_]", "_", part) or "_" for part in name.split(".")]
    parts = [part + "_" if part in (_OF_MODULES if i else _OF_THE_ROOT) else part for i, part in enumerate(parts)]
    made, number = ".".join(parts), 1
    while made in taken:
        number += 1
        made = f"{'.'.join(parts)}_{number}"
    return made


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

"""One hash of what a training depends on beside its network: settings, functions with what they refer to, models, data."""

from __future__ import annotations

import functools
import hashlib
import os
import sysconfig
import types
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

PACKAGE = __name__.partition(".")[0]
DEPTH = 8  # of values inside values; deeper ones count by their type
LIBRARIES = tuple(os.path.realpath(path) + os.sep for path in {*sysconfig.get_paths().values(), os.path.dirname(os.__file__)})


def digest(*values: Any) -> str:
    """A hash (hex) that is equal for equal values, in any process.

    Numbers, text, tensors, and containers of them count by value; functions by their code, defaults, what they enclose, and the constants
    and functions of their module that they name; modules by type and state; other things that can be called, and settings of this package,
    by type and attributes; functions and types of libraries by name, and everything else by its type.
    """
    reader = _Reader()
    for value in values:
        reader.read(value, DEPTH)
    return reader.hash.hexdigest()


def digest_of_settings(part: Any) -> str:
    """A hash of an object's type and of those of its attributes that :func:`digest` tells apart, for a module of its parts' too: names that
    begin with ``_``, other modules, tensors' places and what else an object of this package holds do not count."""
    parts = list(part.modules()) if isinstance(part, nn.Module) else [part]
    found = [(type(one).__qualname__, {name: value for name, value in vars(one).items() if name[0] != "_"}) for one in parts]
    return digest(found)


class _Reader:
    def __init__(self) -> None:
        self.hash = hashlib.sha256()
        self.open: set[int] = set()  # what is being read: it may hold itself
        self.read_before: set[Any] = set()  # functions

    def say(self, *words: object) -> None:
        self.hash.update(repr(words).encode())

    def read(self, value: Any, depth: int) -> None:
        if value is None or isinstance(value, (bool, int, float, complex, str, bytes, os.PathLike, torch.dtype, torch.device)):
            self.say(type(value).__name__, value)
        elif isinstance(value, (Tensor, np.ndarray, np.generic)):
            self.array(value)
        elif depth == 0 or id(value) in self.open:
            self.say("deep", type(value).__qualname__)
        else:
            self.open.add(id(value))
            self.parts(value, depth - 1)
            self.open.remove(id(value))

    def array(self, value: Any) -> None:
        tensor = value.detach().cpu() if isinstance(value, Tensor) else torch.from_numpy(np.array(value)) if value.dtype.kind in "biufc" else None
        if tensor is None:  # numpy's text and objects
            self.say(str(value.dtype), value.tolist())
            return
        self.say(str(tensor.dtype), list(tensor.shape))
        self.hash.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())

    def parts(self, value: Any, depth: int) -> None:
        if isinstance(value, Mapping):
            self.say("mapping", len(value))
            for key, item in value.items():
                self.read(key, depth)
                self.read(item, depth)
        elif isinstance(value, (tuple, list)):
            self.say(type(value).__name__, len(value))
            for item in value:
                self.read(item, depth)
        elif isinstance(value, (set, frozenset)):
            self.say("set", sorted(map(digest, value)))
        elif isinstance(value, (types.FunctionType, types.CodeType)):
            self.function(value, depth)
        elif isinstance(value, types.MethodType):
            self.read(value.__func__, depth)
            self.read(value.__self__, depth)
        elif isinstance(value, functools.partial):
            self.read(("partial", value.func, value.args, value.keywords), depth)
        else:
            self.instance(value, depth)

    def instance(self, value: Any, depth: int) -> None:
        kind = value if isinstance(value, type) else type(value)
        self.say(kind.__module__, kind.__qualname__, getattr(value, "__name__", ""))
        own = kind.__module__.split(".")[0] == PACKAGE
        if isinstance(value, type) or (own and not hasattr(kind, "__pydantic_fields__") and not isinstance(value, nn.Module)):
            return
        if isinstance(value, nn.Module):
            self.read(dict(value.state_dict()), depth)
            self.read([(name, type(one).__qualname__, one.training) for name, one in value.named_modules()], depth)
            self.read([{k: v for k, v in vars(one).items() if k[0] != "_"} for one in value.modules()], depth)
        elif callable(value) or hasattr(kind, "__pydantic_fields__"):
            self.read(dict(getattr(value, "__dict__", {})), depth)
        for method in ("__call__", "forward"):
            if isinstance(code := getattr(kind, method, None), types.FunctionType) and not own:
                self.read(code, depth)

    def function(self, value: types.FunctionType | types.CodeType, depth: int) -> None:
        code = value.__code__ if isinstance(value, types.FunctionType) else value
        if os.path.realpath(code.co_filename).startswith(LIBRARIES):
            self.say("of a library", code.co_filename.rpartition(os.sep)[2], code.co_name)
            return
        if value in self.read_before:
            self.say("again", code.co_name)
            return
        self.read_before.add(value)
        self.hash.update(code.co_code)
        self.say(code.co_names, code.co_freevars, code.co_cellvars, code.co_argcount, code.co_kwonlyargcount)
        self.read(code.co_consts, depth)
        if isinstance(value, types.FunctionType):
            self.read((value.__defaults__, value.__kwdefaults__), depth)
            self.read([cell.cell_contents for cell in value.__closure__ or () if _filled(cell)], depth)
            self.read([value.__globals__[name] for name in _names(code) if _counts(value.__globals__.get(name))], depth)


def _filled(cell: types.CellType) -> bool:
    try:
        return cell.cell_contents is not cell
    except ValueError:  # not assigned yet
        return False


def _names(code: types.CodeType) -> list[str]:
    """The global names (and names of attributes) in a function's code and in the functions inside it."""
    inner = [name for const in code.co_consts if isinstance(const, types.CodeType) for name in _names(const)]
    return list(dict.fromkeys([*code.co_names, *inner]))


def _counts(value: Any) -> bool:
    """Whether a global is a constant or a function."""
    if isinstance(value, (tuple, list, frozenset)):
        return all(map(_counts, value))
    return isinstance(value, (bool, int, float, str, Tensor, np.ndarray, types.FunctionType, functools.partial))

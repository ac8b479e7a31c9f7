"""What torch's exporter does again and again, done once: reading how operators are said in ONNX, and which operators there are."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

LISTING = "_materialize_cpp_cia_ops"
# What was read, by the arguments it was asked for with.
_read: dict[Any, Any] = {}


@contextlib.contextmanager
def read_once() -> Iterator[None]:
    """While inside, torch's exporter gets copies of the table that it read the first time.

    It parses the sources of some 500 functions for every file it writes, which takes about as long as the rest of a small network's export;
    limits of time, tables of latency and searches write such files by the dozen. The table is private to torch: where it is not what is
    known here, the exporter goes on as it does by itself.
    """
    try:
        from torch.onnx._internal.exporter._registration import ONNXRegistry

        build, own = ONNXRegistry.from_torchlib, vars(ONNXRegistry)["from_torchlib"]
    except (ImportError, AttributeError, KeyError):
        yield
        return

    def copied(*args: Any, **kwargs: Any) -> Any:
        key = (args, tuple(sorted(kwargs.items())))
        if key not in _read:
            _read[key] = build(*args, **kwargs)
        return _copy(_read[key])

    ONNXRegistry.from_torchlib = staticmethod(copied)  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        ONNXRegistry.from_torchlib = own


@contextlib.contextmanager
def traced_briefly() -> Iterator[None]:
    """While inside, where no operator is added, torch's exporter leaves out what takes a seventh of its time and is not in the file.

    It asks its dispatcher some thirty times a file for all composite operators (here once), and keeps the stack of Python calls of every node.
    """
    try:
        from torch._export import utils
        from torch.fx import config
    except ImportError:
        yield
        return
    getattr(utils, LISTING, lambda: None)()
    with _set(utils, LISTING, lambda: None), _set(config, "do_not_emit_stack_traces", True):
        yield


@contextlib.contextmanager
def _set(module: Any, name: str, value: Any) -> Iterator[None]:
    """While inside, that attribute has another value; one that torch no longer has is not made."""
    if not hasattr(module, name):
        yield
        return
    own = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, own)


def _copy(table: Any) -> Any:
    """Another table of the same translations, to which the exporter may add those of one file."""
    if not isinstance(getattr(table, "functions", None), dict):
        return copy.deepcopy(table)
    made = type(table)()
    vars(made).update(vars(table))
    made.functions = {target: list(found) for target, found in table.functions.items()}
    return made

"""What torch's exporter does again and again, done once, or not where it changes nothing."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import torch

from . import exporter_words

LISTING = "_materialize_cpp_cia_ops"
# Composite operators that give views, which the exporter takes apart although it can say them.
SAID_AS_THEY_ARE = {torch.ops.aten.flatten.using_ints, torch.ops.aten.reshape.default, torch.ops.aten.contiguous.default}
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
def retraced_where_needed() -> Iterator[None]:
    """While inside, torch's exporter does not run a program again to take operators apart, or to cast numbers, where a few nodes say it.

    These runs are two thirds of the time that a file takes. Without them the file computes the same; sizes that are known are constants, inner
    values have other names, and a view that changes nothing may stay.
    """
    try:
        from torch.onnx._internal.exporter import _decomp, _fx_passes

        said_by, take_apart, cast = _decomp.get_onnx_implemented_overloads, _fx_passes.decompose_with_registry, _fx_passes.insert_type_promotion_nodes
        exporter_words.rules()
    except (ImportError, AttributeError):
        yield
        return

    def decompose(program: torch.export.ExportedProgram, registry: Any) -> torch.export.ExportedProgram:
        exporter_words.respell(program.graph)
        said = set(said_by(registry))
        targets = {node.target for node in program.graph.nodes if node.op == "call_function"}
        # What is no operator takes a part of a tuple or computes with sizes.
        whole = all(_is_said(target, said) for target in targets if isinstance(target, torch._ops.OperatorBase))
        return program if whole else take_apart(program, registry)

    def promote(module: torch.fx.GraphModule) -> None:
        if not exporter_words.numbers_cast(module.graph):
            cast(module)

    with _set(_fx_passes, "decompose_with_registry", decompose), _set(_fx_passes, "insert_type_promotion_nodes", promote):
        yield


def _is_said(target: Any, said: set[Any]) -> bool:
    """Whether the exporter leaves an operator whole: it can say it, and it is no composite that gives a view, which its trace takes apart."""
    if target not in said or not isinstance(target, torch._ops.OpOverload):
        return False
    composite = torch._C._dispatch_has_kernel_for_dispatch_key(target.name(), "CompositeImplicitAutograd")
    views = any(value.alias_info is not None for value in (*target._schema.arguments, *target._schema.returns))
    return target in SAID_AS_THEY_ARE or not (composite and views)


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

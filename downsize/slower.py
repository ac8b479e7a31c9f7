"""Layers whose integer kernels are slower than float ones on the target, by the profiles of both files."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from .inspection import FileGraph
from .measure import per_operator
from .runtimes import OperatorTime
from .target import show_time

SLOWER = 1.1  # of the float time: less is within what two profiles of one file differ by
GAIN = 0.03  # of the integer file's time that must be won for a trial to be worth it
INTEGERS = (2, 3)  # TensorProto.UINT8, INT8


class Slow(NamedTuple):
    """The weights of a module, and the seconds of one call that it takes in integers and in float."""

    module: str
    weights: tuple[str, ...]
    integer: float
    float: float

    def __str__(self) -> str:
        return f"{self.module} {show_time(self.integer)} in integers and {show_time(self.float)} in float"


def slower_layers(baseline: Path, quantized: Path, weights: Collection[str], inputs: Any, runtime: str, threads: int) -> list[Slow]:
    """The modules that are clearly slower in the ``quantized`` file than in the ``baseline``, the quantizing of what they read included.

    Args: ``weights``: the names of the network's tensors, which files made from it bear.

    Returns: the slowest first; none where all are slower (that file is the baseline itself) or keeping them in float would win too little.
    """
    ran, ran_before = (per_operator(path, inputs, runtime, threads) for path in (quantized, baseline))
    return choose(FileGraph(quantized), ran, FileGraph(baseline), ran_before, weights)


def choose(
    graph: FileGraph, ran: Iterable[OperatorTime], before: FileGraph, ran_before: Iterable[OperatorTime], weights: Collection[str]
) -> list[Slow]:
    """See :func:`slower_layers`; from the graphs of the quantized file and of the original, and what ran in them."""
    integer, real = by_module(graph, ran), by_module(before, ran_before)
    modules = integer_weights(graph, weights)
    found = [Slow(module, tuple(names), integer[module], real[module]) for module, names in modules.items() if integer[module] and real[module]]
    slow = sorted((one for one in found if one.integer > SLOWER * one.float), key=lambda one: one.float - one.integer)
    gain = sum(one.integer - one.float for one in slow)
    return slow if len(slow) < len(modules) and gain > GAIN * sum(integer.values()) else []


def by_module(graph: FileGraph, ran: Iterable[OperatorTime]) -> Counter[str]:
    """The seconds of each module. What quantizes or decodes a tensor counts for the layer that reads it."""
    seconds: Counter[str] = Counter()
    for item in ran:
        node = graph.owner(item)
        if node is not None and "Quantize" in node.operator:
            node = graph.layer_of(node.outputs[0]) or node
        seconds["" if node is None else node.module] += item.seconds  # type: ignore[assignment]  # a counter of floats
    return seconds


def integer_weights(graph: FileGraph, weights: Collection[str]) -> dict[str, list[str]]:
    """The weights that a file holds as integers, by the module that multiplies with them; they have an ending there, as in ``fc.weight_codes``."""
    found: dict[str, list[str]] = {}
    for stored, item in graph.weights.items():
        name = stored.rpartition("_")[0]
        layer = graph.layer_of(stored)
        if item.data_type in INTEGERS and name in weights and stored.endswith(("_codes", "_packed")) and layer is not None and layer.module:
            found.setdefault(layer.module, []).append(name)
    return found

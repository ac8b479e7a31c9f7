"""What factors cost in the measure that is asked for: multiply-accumulates, parameters, bytes, or measured milliseconds."""

# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportReturnType=false

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import fx
from torch.nn import Parameter

from ..network.cost import count
from ..network.network import Network, batch_of
from ..network.operators import name_of
from ..network.rewrite import argument, aten
from ..network.statistics import Hook, walk
from ..numerics.lowrank_convolutions import Convolution
from ..pruning.latency import LayerShape, Operand, predicted, spelled
from ..pruning.latency_limit import need_clock
from ..task import Task
from .layers import Layer, input_node
from .rewriting import OPERATORS, TURNED, Product, geometry, operator_of


@dataclass(frozen=True)
class Stage:
    """One factor on an input of shape ``x`` that gives ``y``. ``is_table``: it is looked up by whole numbers."""

    factor: Convolution
    x: tuple[int, ...]
    y: tuple[int, ...]
    is_table: bool

    @property
    def macs(self) -> float:
        """Multiply-accumulates."""
        if self.is_table:
            return 0.0
        if not self.factor.kernel:
            return float(prod(self.y) * self.factor.weight.shape[1])
        start = len(self.x) - len(self.factor.kernel)  # the channels stand before it, and perhaps a batch before these
        return prod(self.x[: start - 1]) * self.factor.macs(self.x[start:])

    def shape(self, dtype: torch.dtype, has_bias: bool) -> LayerShape:
        """It as a runtime sees it."""
        name = str(dtype).removeprefix("torch.")
        outputs, inputs, *kernel = self.factor.weight.shape
        groups = self.factor.groups
        weight = (inputs * groups, outputs // groups, *kernel) if self.factor.spread else (outputs, inputs, *kernel)
        operands = [Operand(self.x, name, False), Operand(weight, name, True), *([Operand((outputs,), name, True)] if has_bias else [])]
        graph = fx.Graph()
        nodes = [graph.placeholder(f"operand{number}") for number in range(len(operands))]
        arguments = (*nodes, *([] if has_bias else [None]), *geometry(self.factor))
        target = operator_of(self.factor)
        return LayerShape(name_of(target), tuple(operands), spelled(target, arguments, {}))


def stages(layer: Layer, factors: Sequence[Convolution], shape: tuple[int, ...]) -> Iterator[Stage]:
    """The factors one after another, from the shape of the layer's input on."""
    x = shape
    for number, factor in enumerate(factors):
        is_table = layer.kind == "embedding" and number == 0
        y = (*x, factor.weight.shape[1]) if is_table else _output(factor, x)
        yield Stage(factor, x, y, is_table)
        x = y


def _output(factor: Convolution, x: tuple[int, ...]) -> tuple[int, ...]:
    rows, kernel = factor.weight.shape[0], factor.weight.shape[2:]
    if not kernel:
        return (*x[:-1], rows)
    start = len(x) - len(kernel)
    return (*x[: start - 1], rows, *factor.output_size(x[start:]))


def as_they_are(layers: Sequence[Layer]) -> list[Product]:
    """The layers, each as its own only factor."""
    return [Product(layer, (layer.dense,), torch.zeros(0)) for layer in layers]


TABLE = aten.embedding.default
LOOKED_AT = (*OPERATORS.values(), *TURNED.values(), TABLE)


class Costs:
    """The cost of layers, and of what takes their place, at the example's sizes.

    Args:
        measure: ``macs``, ``parameters``, ``size`` (bytes of all constants), ``latency`` (milliseconds of the layers with products on one
            sample, by the task's clock), or ``ratio``: a layer's multiply-accumulates, a table's weights.

    Raises:
        TaskError: latency is asked for, and the task has no clock.
    """

    def __init__(self, network: Network, task: Task, measure: str) -> None:
        self.network, self.measure = network, measure
        self.clock = need_clock(task.clock) if measure == "latency" else None
        self.example = batch_of(task.example, [0]) if measure == "latency" else task.example
        self._nodes = {node.name: node for node in network.graph.nodes}
        self._inputs: dict[str, tuple[int, ...]] = {}
        readers = [node for node in network.graph.nodes if node.target in LOOKED_AT]
        walk(network, network.flat(self.example), {node: self._recorder(node) for node in readers})

    def whole(self, network: Network) -> float:
        """What a network has of the measure."""
        if self.clock:
            return predicted(self.clock, network, self.example)
        cost = count(network, self.example)
        return float({"parameters": cost.parameters, "size": cost.bytes}.get(self.measure, cost.macs))

    def dense(self, *layers: Layer) -> float:
        """Of layers as they are; a weight that two of them have counts once."""
        return self.of(as_they_are(layers))

    def of(self, products: Sequence[Product]) -> float:
        """Of what takes layers' places; a factor that several have counts once."""
        return self.several([products])[0]

    def several(self, alternatives: Sequence[Sequence[Product]]) -> list[float]:
        """Of each of several such lists: shapes are measured together."""
        if self.measure in ("parameters", "size"):
            return [self._held(products) for products in alternatives]
        found = [list(self._calls(products)) for products in alternatives]
        if self.clock is None:
            tables = [self.measure == "ratio" and any(one.layer.kind == "embedding" for one in products) for products in alternatives]
            return [
                self._elements(products) if is_table else sum(stage.macs for stage, _, _ in calls)
                for products, calls, is_table in zip(alternatives, found, tables, strict=True)
            ]
        shapes = [[stage.shape(dtype, bias) for stage, dtype, bias in calls if not stage.is_table] for calls in found]
        times = iter(self.clock.milliseconds([shape for each in shapes for shape in each]))
        return [sum(next(times) for _ in each) for each in shapes]

    def lighter(self, products: Sequence[Product], others: Sequence[Product]) -> bool:
        """Whether products have fewer multiply-accumulates or fewer weights than others, whatever the measure."""
        macs, elements = ([kind(one) for one in (products, others)] for kind in (self._macs, self._elements))
        return macs[0] < macs[1] or elements[0] < elements[1]

    def _macs(self, products: Sequence[Product]) -> float:
        return sum(stage.macs for stage, _, _ in self._calls(products))

    def _elements(self, products: Sequence[Product]) -> float:
        return float(sum(weight.numel() for weight in {id(f): f.weight for one in products for f in one.factors}.values()))

    def _recorder(self, node: fx.Node) -> Hook:
        at = 1 if node.target is TABLE else 0

        def record(args: tuple[Any, ...], value: Any) -> None:
            self._inputs[node.name] = tuple(args[at].shape)

        return record

    def _calls(self, products: Sequence[Product]) -> Iterator[tuple[Stage, torch.dtype, bool]]:
        """Every call with the type of its weight, and whether it has a bias."""
        seen: set[tuple[int, fx.Node]] = set()
        for product in products:
            dtype = self.network.tensor(product.layer.name).dtype
            for name in product.layer.readers:
                node = self._nodes[name]
                for stage in stages(product.layer, product.factors, self._inputs[name]):
                    is_last = stage.factor is product.factors[-1]
                    key = id(stage.factor), input_node(node)
                    if is_last or key not in seen:
                        seen.add(key)
                        yield stage, dtype, is_last and (self._had_bias(node) or bool(product.shift.any()))

    def _held(self, products: Sequence[Product]) -> float:
        """Parameters or bytes, with the biases that layers are given."""
        weights: dict[int, float] = {}
        added = 0.0
        for product in products:
            tensor = self.network.tensor(product.layer.name)
            unit = tensor.element_size() if self.measure == "size" else int(isinstance(tensor, Parameter))
            weights |= {id(factor): float(unit * factor.weight.numel()) for factor in product.factors}
            brings = bool(product.shift.any()) and not all(self._had_bias(self._nodes[name]) for name in product.layer.readers)
            added += product.layer.width * (tensor.element_size() if self.measure == "size" else 1) if brings else 0.0
        return sum(weights.values()) + added

    def _had_bias(self, node: fx.Node) -> bool:
        return node.target is not TABLE and argument(node, 2, "bias") is not None

"""What a network loses when one of its weights, or the input of one of its layers, has fewer bits, and nothing else is changed."""

# pyright: reportArgumentType=false, reportCallIssue=false, reportAttributeAccessIssue=false

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, fx

from ..network.judge import TailJudge
from ..network.network import Network
from ..network.rewrite import set_constant
from ..network.statistics import Distribution, Hook, walk
from ..numerics import grids
from ..numerics.grids import SYMMETRIC_INT8, Grid, activation_grid
from ..numerics.lowbit import least_error_step
from ..progress import Progress
from .formats import Format
from .grouped import nearest, steps_of
from .insertion import extremes
from .placement import WEIGHT_LAYERS, WeightPoint
from .ranges import Range, fake, mean_squared_error

K = TypeVar("K", bound=Hashable)
# What constants of the network become, by name.
Change = Mapping[str, Tensor]
# Changes of a weight (and of what belongs to it) by weight, and by what was done to it, such as how many bits it got.
Changes = Mapping[str, Mapping[K, Change]]
Found = dict[str, dict[K, float]]
# Random combinations of the outputs that are differentiated, for each piece of data.
DIRECTIONS = 2


def format_at(point: WeightPoint, wanted: Format) -> Format:
    """The format that a weight can have: one whose outputs do not lie along its first dimension has one scale an output, or one in all."""
    return wanted if point.axis == 0 else Format(wanted.bits)


def matrix_shape(weight: Tensor, point: WeightPoint) -> tuple[int, int]:
    """How many rows with scales of their own, and columns, a weight has."""
    rows = 1 if point.axis is None else weight.shape[point.axis]
    return rows, weight.numel() // rows


def rounded(weight: Tensor, point: WeightPoint, wanted: Format) -> Tensor:
    """A weight rounded to nearest, by itself: of the same shape."""
    wanted = format_at(point, wanted)
    if point.axis == 0:
        matrix = weight.flatten(1)
        return nearest(matrix, wanted, steps_of(matrix, wanted)).reshape(weight.shape)
    if wanted.grid == SYMMETRIC_INT8:
        scale, _ = grids.symmetric(extremes(weight, point.axis), wanted.grid)
    else:
        scale = least_error_step(weight, point.axis, wanted.grid)
    zero = torch.zeros_like(scale, dtype=torch.int32)
    return grids.values(grids.codes(weight, scale, zero, point.axis, wanted.grid), scale, zero, point.axis)


def nearest_changes(network: Network, points: Iterable[WeightPoint], formats: Mapping[str, Mapping[K, Format]]) -> dict[str, dict[K, Change]]:
    """Each weight rounded to nearest in each of its formats."""
    found: dict[str, dict[K, Change]] = {}
    for point in points:
        name = str(point.node.target)
        weight = network.tensor(name).detach()
        found[name] = {key: {name: rounded(weight, point, wanted)} for key, wanted in formats[name].items()}
    return found


# The error of the layer itself ------------------------------------------------------------------------------------------------------


def output_errors(network: Network, pieces: Iterable[list[Tensor]], changes: Changes[K]) -> Found[K]:
    """Of what reads a changed weight, with the inputs it has in the network, the squared error of the output over its square, both summed."""
    sums = {name: {key: torch.zeros(2, dtype=torch.float64) for key in ways} for name, ways in changes.items()}
    hooks: dict[fx.Node, Hook] = {}
    for name, node in _readers(network, changes):
        hooks[node] = _layer_error(node, changes[name], sums[name], hooks.get(node))
    for leaves in pieces:
        walk(network, leaves, hooks)
    return {name: {key: float(each[0] / each[1].clamp(min=1e-30)) for key, each in ways.items()} for name, ways in sums.items()}


def _readers(network: Network, names: Iterable[str]) -> Iterator[tuple[str, fx.Node]]:
    """In the graph's order, the nodes that read the constants of these names."""
    wanted = set(names)
    for node in network.graph.nodes:
        for name in dict.fromkeys(str(one.target) for one in node.all_input_nodes if one.op == "get_attr"):
            if name in wanted and node.op == "call_function":
                yield name, node


def _layer_error(node: fx.Node, ways: Mapping[K, Change], sums: Mapping[K, Tensor], before: Hook | None) -> Hook:
    def measure(args: tuple[Any, ...], value: Any) -> None:
        for key, change in ways.items():
            # Recurrent layers give their states, too.
            got = node.target(*_changed_arguments(node.args, args, change), **node.kwargs)  # type: ignore[operator]
            pairs = zip(got, value, strict=True) if isinstance(value, (tuple, list)) else [(got, value)]
            for one, other in pairs:
                sums[key].add_(torch.stack(((one - other).double().square().sum(), other.double().square().sum())))
        if before is not None:
            before(args, value)

    return measure


def _changed_arguments(names: Any, values: Any, change: Change) -> Any:
    """The arguments of an operator, in lists too, with other values for the constants that are changed."""
    if isinstance(names, (tuple, list)):
        return [_changed_arguments(name, value, change) for name, value in zip(names, values, strict=True)]
    return change.get(str(names.target), values) if isinstance(names, fx.Node) and names.op == "get_attr" else values


# What the outputs lose --------------------------------------------------------------------------------------------------------------


def losses(network: Network, pieces: Sequence[list[Tensor]], changes: Changes[K], progress: Progress | None = None) -> Found[K]:
    """The squared relative error of the outputs (see :class:`~downsize.network.judge.Judge`) under each change alone.

    In one pass along the graph: of each trial only what follows the changed weight runs.
    """
    judge, trial = TailJudge(network, pieces), network.fork()
    first = {name: node for name, node in reversed([*_readers(network, changes)])}
    order = dict.fromkeys(name for name, _ in _readers(network, changes))
    found: Found[K] = {}
    with (progress or Progress(quiet=True)).counting("sensitivity", "weight", len(order)) as show:
        for number, name in enumerate(order, 1):
            judge.move(first[name])
            found[name] = {}
            for key, change in changes[name].items():
                with changed(trial, change):
                    found[name][key] = judge(trial)
            show(number, name)
    return found


@contextmanager
def changed(network: Network, change: Change) -> Iterator[None]:
    """The network with other constants while the block runs."""
    nodes = {str(node.target): node for node in network.graph.nodes if node.op == "get_attr" and str(node.target) in change}
    old = {name: network.tensor(name) for name in nodes}
    try:
        for name, node in nodes.items():
            set_constant(network, node, change[name])
        yield
    finally:
        for name, node in nodes.items():
            set_constant(network, node, old[name])


def fisher(network: Network, pieces: Iterable[list[Tensor]], changes: Changes[K], seed: int = 0) -> Found[K]:
    """An estimate of :func:`losses` from derivatives: of each element of a weight the mean squared derivative of random combinations of the
    outputs, times its squared change, summed, as a part of the squared outputs (after Dong et al. 2020, HAWQ-V2, arXiv 1911.03852).

    To first order, and as if the changes of single elements did not add up. Of each change only the weight counts.
    """
    generator = torch.Generator().manual_seed(seed)
    squares = {name: torch.zeros_like(network.tensor(name), dtype=torch.float64).detach() for name in changes}
    norm = 0.0
    for leaves in pieces:
        own: dict[str, Tensor] = {}
        nodes = [node for node in network.graph.nodes if node.op == "get_attr" and str(node.target) in changes]
        outputs = walk(network, leaves, {node: _leaf(str(node.target), own) for node in nodes}, gradients=True)
        norm += sum(float(one.detach().double().square().sum()) for one in outputs if one.is_floating_point())
        moved = [one for one in outputs if one.requires_grad]
        for _ in range(DIRECTIONS if moved else 0):
            signs = [torch.randn(one.shape, generator=generator) for one in moved]
            for name, gradient in zip(own, torch.autograd.grad(moved, list(own.values()), signs, retain_graph=True, allow_unused=True), strict=True):
                if gradient is not None:
                    squares[name] += gradient.double().square() / DIRECTIONS
    return {
        name: {key: float((squares[name] * (change[name] - network.tensor(name).detach()).double().square()).sum()) / max(norm, 1e-30)
               for key, change in ways.items()}
        for name, ways in changes.items()
    }  # fmt: skip


def _leaf(name: str, own: dict[str, Tensor]) -> Hook:
    """A hook that gives all readers of a constant the same tensor to differentiate by."""
    return lambda args, value: own.setdefault(name, value.detach().requires_grad_())


# Inputs -----------------------------------------------------------------------------------------------------------------------------


def input_losses(
    network: Network,
    layers: Iterable[fx.Node],
    pieces: Sequence[list[Tensor]],
    measured: Mapping[fx.Node, Distribution],
    widths: Sequence[int],
    clipped: bool = False,
    progress: Progress | None = None,
) -> dict[str, dict[int, float]]:
    """What the outputs lose when the input of one layer alone is quantized, by the layer's name.

    Args:
        layers: in the graph's order.
        measured: the distributions of their inputs.
        clipped: on the range of least squared error, not on the full one.
    """
    judge, trial = TailJudge(network, pieces), network.fork()
    twins = {node.name: node for node in trial.graph.nodes}
    found: dict[str, dict[int, float]] = {}
    layers = list(layers)
    with (progress or Progress(quiet=True)).counting("sensitivity", "input", len(layers)) as show:
        for number, layer in enumerate(layers, 1):
            judge.move(layer)
            position = WEIGHT_LAYERS[layer.target][0]
            known, twin, target = measured[layer.args[position]], twins[layer.name], layer.target
            found[layer.name] = {}
            for bits in widths:
                grid = activation_grid(bits)
                bounds = mean_squared_error(known, grid) if clipped else (known.low, known.high)
                # The trial runs node by node: what a node calls need be no operator.
                twin.target = _on_grid(target, position, bounds, grid)
                found[layer.name][bits] = judge(trial)
            twin.target = target
            show(number, layer.name)
    return found


def _on_grid(target: Callable[..., Tensor], position: int, bounds: Range, grid: Grid) -> Callable[..., Tensor]:
    """The operator with one of its inputs quantized before."""
    return lambda *args, **kwargs: target(*args[:position], fake(args[position], bounds, grid), *args[position + 1 :], **kwargs)

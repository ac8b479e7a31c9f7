"""The bits of each weight of a network under limits of size, bit operations or time."""

# pyright: reportArgumentType=false, reportAttributeAccessIssue=false

from __future__ import annotations

import tempfile
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import fx

from ..errors import SpecError
from ..network.network import Network, batch_of
from ..network.statistics import Pieces
from ..task import Task
from .bits import FLOAT
from .building import Build
from .floating import Shells
from .formats import Format
from .latency import Layers, TimeLimit, choose_types
from .mixed import By, Losses, amount_of, choose_bits, measured, size_limit
from .placement import WEIGHT_LAYERS, Placement, WeightPoint
from .timing import Files, Spent, Timed, file_clock
from .weight_only import Data


@dataclass(frozen=True)
class Limits:
    """What may be used at most, as :class:`~downsize.techniques.quantize.Quantize` has it, and how the loss is estimated."""

    size: str | float | None
    bops: float | None
    latency: str | float | None
    by: By
    solve: bool

    def check(self, widths: Sequence[int], kind: str, plain: bool) -> None:
        """Whether they fit the widths to choose among, the ``kind`` of activations, and (``plain``) nothing else being said of weights.

        Raises:
            SpecError: they do not. TargetError: a limit makes no sense.
        """
        given = [name for name in ("size", "bops", "latency") if getattr(self, name) is not None]
        if self.size is not None:
            size_limit(self.size, 1.0)
        if given and not widths:
            raise SpecError(f"quantize: {given[0]} came without widths; expected bits to choose among, e.g. widths=[2, 3, 4, 5, 6, 8].")
        if len(set(widths)) > 1 and not given:
            raise SpecError(f"quantize: widths={list(widths)} came without a limit; expected size, bops or latency, e.g. size=60%.")
        if widths and (not plain or kind == "dynamic"):
            raise SpecError("quantize: widths choose the bits of uniform levels, with static activations or none; leave bits, levels or dynamic out.")
        if self.bops is not None and kind != "static":
            raise SpecError("quantize: bops count products of integers; expected static activations, or size.")
        if self.latency is not None:
            TimeLimit.of(self.latency)
            self._check_latency(widths, kind, given)

    def _check_latency(self, widths: Sequence[int], kind: str, given: Sequence[str]) -> None:
        if not set(widths) <= {8, FLOAT}:
            raise SpecError(f"quantize: widths={list(widths)} came with latency; fewer bits are no faster than 8: expected [8, 32].")
        if kind != "static":
            raise SpecError("quantize: latency is that of integer kernels; expected static activations.")
        if len(given) > 1:
            raise SpecError(f"quantize: {' and '.join(given)} came; latency is a limit of its own: leave the other out.")


def bits_within(
    original: Network,
    network: Network,
    placement: Placement,
    build: Build,
    wanted: Format,
    widths: set[int],
    limits: Limits,
    pieces: tuple[Pieces, Pieces],
    task: Task,
) -> dict[str, int]:
    """The bits of each weight, of ``widths``, with the least loss of the held-back outputs.

    Args:
        original: the float network whose file's time is the measure.
        network: the same, batch norms folded and scales moved between layers. placement: what may be quantized in it. build: how.
        wanted: the format of weights, but for the bits.

    Raises:
        AllocationError: a limit is less than the fewest bits take, or than the fastest file.
        TaskError: there is no weight.
    """
    points, data = _in_order(network, [point for point in placement.weights if build.takes(point)]), Data(*pieces)
    ways: Mapping[int, Format | None] = {bits: None if bits == FLOAT else Format(bits, wanted.group, wanted.symmetric) for bits in sorted(widths)}
    shells, names = Shells(network, placement, build, pieces[0]), [str(point.node.target) for point in points]

    def losses() -> Losses:
        spared = shells.spared(names, data, task.progress) if FLOAT in ways else {}
        return measured(network, shells, points, ways, data, limits.by, limits.solve, spared, task.progress)

    if limits.latency is None or not points or set(ways) == {FLOAT}:
        layers = build.counts.of_inputs(network, placement) if limits.bops is not None else {}
        return choose_bits(network, points, ways, amount_of(network, points, limits.size, limits.bops, layers), losses, task.progress)
    with tempfile.TemporaryDirectory(prefix="downsize-") as folder:
        files = Files(file_clock(task.clock), original, batch_of(task.example, [0]), _modules(points), Path(folder))
        layers = Layers(names, _parents(network, placement, points), [shells.may_stay(name) for name in names])
        choice = losses if FLOAT in ways else None
        levels = choose_types(layers, TimeLimit.of(limits.latency), Written(files, shells, names), choice, task.progress)
    return {name: list(ways)[level] for name, level in levels.items()}


class Written:
    """A :class:`~downsize.quantization.latency.Stopwatch` of real files, each written once."""

    def __init__(self, files: Files, shells: Shells, names: Sequence[str]) -> None:
        self.files, self.shells, self.whole = files, shells, frozenset(names)
        self.paths: dict[frozenset[str], Path] = {}

    def spent(self, kept: Collection[str]) -> dict[str, Spent]:
        """By weight; under "" what belongs to none."""
        return self.files.spent(self._path(kept))

    def timed(self, kept: Collection[str]) -> Timed:
        """Beside the float file, which is as fast as itself."""
        if frozenset(kept) == self.whole:
            return Timed(self.files.timed(self.files.baseline).seconds, 1.0)
        return self.files.timed(self._path(kept))

    def _path(self, kept: Collection[str]) -> Path:
        key = frozenset(kept)
        if key not in self.paths:
            self.paths[key] = self.files.write(self.shells.network if key == self.whole else self.shells.rounded(kept))
        return self.paths[key]


def _in_order(network: Network, points: Sequence[WeightPoint]) -> list[WeightPoint]:
    """By the first that reads each."""
    order = {node: number for number, node in enumerate(network.graph.nodes)}
    return sorted(points, key=lambda point: min(order[user] for user in point.node.users))


def _modules(points: Sequence[WeightPoint]) -> dict[str, str]:
    """Of each weight the module that reads it, where that reads no other."""
    found = {str(point.node.target): str(next(iter(point.node.users)).meta.get("module", "")) for point in points}
    return {name: module if list(found.values()).count(module) == 1 else "" for name, module in found.items()}


def _parents(network: Network, placement: Placement, points: Sequence[WeightPoint]) -> list[int | None]:
    """Of each weight the number of the last one in the graph whose layer's output reaches its layer's input with no other layer between."""
    numbers = {point.node: number for number, point in enumerate(points)}
    owners = {layer: numbers.get(layer.args[WEIGHT_LAYERS[layer.target][1]]) for layer in placement.layers}
    order = {node: number for number, node in enumerate(network.graph.nodes)}
    found: list[int | None] = [None] * len(points)
    for layer in reversed(placement.layers):  # the first layer of a shared weight counts
        number = owners[layer]
        above = _layers_above(layer.args[WEIGHT_LAYERS[layer.target][0]], owners)
        if number is not None:
            parent = owners[max(above, key=order.__getitem__)] if above else None
            found[number] = parent if parent is not None and parent < number else None
    return found


def _layers_above(node: fx.Node, owners: Mapping[fx.Node, int | None]) -> list[fx.Node]:
    seen, queue, found = {node}, [node], []
    while queue:
        node = queue.pop()
        if node in owners:
            found.append(node)
            continue
        queue += [source for source in node.all_input_nodes if source not in seen]
        seen.update(node.all_input_nodes)
    return found

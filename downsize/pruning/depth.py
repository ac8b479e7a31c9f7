"""Which blocks of a network to take out: by what they change in the value that runs through, and by what is lost at the end without them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from math import comb, inf, isfinite
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import Parameter

from ..errors import SpecError, TaskError
from ..network.blocks import SUMS, Block, blocks, outermost, without
from ..network.flow import macs as macs_by_node
from ..network.judge import Judge
from ..network.network import Network
from ..network.rewrite import CONVOLUTIONS, TRANSPOSED, aten
from ..network.statistics import Hook, walk

# Where channels are the second dimension, and where they are the last.
CHANNELS_SECOND = CONVOLUTIONS | TRANSPOSED | {aten.batch_norm.default, aten.group_norm.default, aten.instance_norm.default}
CHANNELS_LAST = {aten.linear.default, aten.layer_norm.default, aten.rms_norm.default}


@dataclass(frozen=True)
class Span:
    """Blocks in a row that were taken out, by node names: what ``student`` gives in the network without them (the value that was their
    entry, made by what was kept before) stands where ``teacher``, their last exit, stood in the network with them."""

    student: str
    teacher: str


@dataclass(frozen=True)
class Depth:
    """What to take out, in the graph's order. ``error``: sum |out - reference|^2 / sum |reference|^2 at the network's end, without any
    repair; ``macs`` and ``parameters``: the fractions that remain; ``path``: the steps of the greedy search, each with the error after it."""

    names: tuple[str, ...]
    error: float
    macs: float
    parameters: float
    path: tuple[tuple[str, float], ...]
    spans: tuple[Span, ...]


def spans(removed: Sequence[Block]) -> tuple[Span, ...]:
    """Where a repair has something to make equal, in the graph's order: one for all blocks that followed one another."""
    last: dict[fx.Node, fx.Node] = {}
    begins: dict[fx.Node, fx.Node] = {}
    for block in sorted(outermost(removed), key=lambda b: b.exit):
        begins[block.exit] = begins.get(block.entry, block.entry)
        last[begins[block.exit]] = block.exit
    return tuple(Span(entry.name, leaving.name) for entry, leaving in last.items())


def main_layers(found: Sequence[Block]) -> tuple[Block, ...]:
    """The blocks that one counts as a network's layers: the smallest ones of kind ``layer`` with a residual branch in them, or, in a
    network without these, the smallest of all."""
    layers = [block for block in found if block.kind == "layer"]
    branches = [block for block in found if block.kind == "branch"]
    residual = [layer for layer in layers if layer.exit.target in SUMS or any(layer.contains(branch) for branch in branches)]
    chosen = residual or layers
    return tuple(one for one in chosen if not any(other is not one and one.contains(other) for other in chosen))


def influence(network: Network, found: Sequence[Block], pieces: Sequence[list[Tensor]]) -> dict[str, float]:
    """Block influence: 1 - the mean cosine between entry and exit over all positions (Men et al. 2024, ShortGPT, arXiv 2403.03853).

    0: the block leaves every position's direction as it was. A position's vector runs along the channels: dimension 1 where the block
    begins with a convolution, else the last. Where the network has an input with "mask" in its name, of zeros and ones, and of the shape
    of the value's first dimensions, positions where it is 0 are padding and left out. ``pieces``: see :func:`statistics.chunks`.

    Raises:
        TaskError: no position was seen.
    """
    sums = {block: [0.0, 0.0] for block in found}
    entries: dict[fx.Node, Tensor] = {}
    ports = [number for number, port in enumerate(network.ports) if "mask" in port.name.lower()]
    for leaves in pieces:
        masks = [leaves[number] for number in ports if bool(((leaves[number] == 0) | (leaves[number] == 1)).all())]
        entries.clear()
        walk(network, leaves, {node: _meter(node, found, entries, masks, sums) for node in _ends(found)})
    if any(not count for _, count in sums.values()):
        raise TaskError("Block influence saw no position that is not padding; expected calibration data with some.")
    return {block.name: 1.0 - total / count for block, (total, count) in sums.items()}


def _ends(found: Sequence[Block]) -> set[fx.Node]:
    return {node for block in found for node in (block.entry, block.exit)}


def _meter(node: fx.Node, found: Sequence[Block], entries: dict[fx.Node, Tensor], masks: Sequence[Tensor], sums: dict[Block, list[float]]) -> Hook:
    """A hook that keeps a block's entry and, at its exit, adds the cosines to its sum and count."""
    starting = any(block.entry is node for block in found)
    ending = [block for block in found if block.exit is node]

    def measure(args: tuple[Any, ...], value: Tensor) -> None:
        if starting:
            entries[node] = value.clone()  # an operator in place may change it before the exit
        for block in ending:
            cosines = _cosines(entries[block.entry], value, _channels(block, value))
            kept = next((mask for mask in masks if mask.shape == cosines.shape[: mask.dim()]), None)
            cosines = cosines if kept is None else cosines[kept.bool()]
            sums[block][0] += float(cosines.sum())
            sums[block][1] += cosines.numel()

    return measure


def _channels(block: Block, value: Tensor) -> int:
    first = next((node.target for node in block.nodes if node.target in CHANNELS_SECOND | CHANNELS_LAST), None)
    return 1 if first in CHANNELS_SECOND and value.dim() > 1 else value.dim() - 1


def _cosines(one: Tensor, two: Tensor, dim: int) -> Tensor:
    """The cosine at every position, float64; two zero vectors have the cosine 1, one zero vector 0."""
    one, two = one.double(), two.double()
    lengths = one.norm(dim=dim) * two.norm(dim=dim)
    both_zero = ~(one.any(dim) | two.any(dim))
    return torch.where(lengths > 0, (one * two).sum(dim) / lengths.clamp(min=1e-300), both_zero.double())


def choose_blocks(
    network: Network,
    pieces: Sequence[list[Tensor]],
    *,
    macs: float | None = None,
    parameters: float | None = None,
    layers: int | None = None,
    among: Sequence[Block] | None = None,
    subsets: int = 64,
) -> Depth:
    """The blocks to take out, by least error at the network's end on ``pieces`` (held-back data, see :func:`statistics.chunks`).

    Exactly one amount: ``macs`` or ``parameters``, the largest fraction that may remain, or ``layers``, how many of the blocks in ``among``
    remain. ``among`` is by default everything that :func:`blocks` finds, for ``layers`` :func:`main_layers` of it.

    Greedy: the block that costs least error for what it saves goes, all that remain are measured anew, and so on; of all sets measured on
    the way that reach the amount the best is taken. Where the blocks have at most ``subsets`` subsets of that size, all of them are tried.

    Raises:
        SpecError: not exactly one amount, one that makes no sense, or one that cannot be reached (the message says how far one gets).
        TaskError: the network gives no float output to judge by.
    """
    found = blocks(network) if among is None else among
    candidates = list(main_layers(found) if among is None and layers is not None else found)
    amount, most = _amount(macs, parameters, layers, len(candidates))
    search = _Search(network, pieces, amount, candidates)
    chosen, path = search.greedily(most)
    if 1 < comb(len(candidates), len(chosen)) <= subsets:
        for other in combinations(candidates, len(chosen)):
            search.measure(other)
    best = search.best(most)
    taken, trial = [block for block in candidates if block.name in best], search.trials[best]
    return Depth(tuple(block.name for block in taken), trial.error, trial.left["macs"], trial.left["parameters"], path, spans(taken))


def _amount(macs: float | None, parameters: float | None, layers: int | None, count: int) -> tuple[str, float]:
    given = [(name, value) for name, value in (("macs", macs), ("parameters", parameters), ("layers", layers)) if value is not None]
    if len(given) != 1 or not (0 <= given[0][1] <= count if layers is not None else 0 < given[0][1] < 1):
        raise SpecError(
            f"Blocks are to be taken out with macs={macs}, parameters={parameters}, layers={layers}; expected one of them: a fraction between "
            f"0 and 1, or a number of layers that remain (the network has {count} that can go)."
        )
    return given[0]


@dataclass(frozen=True)
class _Trial:
    """A network without some blocks: its error, and which fraction of what remains (for ``layers``, how many)."""

    error: float
    left: dict[str, float]


class _Search:
    """Sets of blocks, each measured once."""

    def __init__(self, network: Network, pieces: Sequence[list[Tensor]], amount: str, candidates: Sequence[Block]) -> None:
        self.network, self.amount, self.candidates = network, amount, candidates
        self.macs = macs_by_node(network)
        self.totals = self._sizes(network)
        self.judge = Judge(network, pieces)
        if not any(output.is_floating_point() for outputs in self.judge.expected for output in outputs):
            raise TaskError("The network gives no float output on the calibration data; expected one to judge blocks by.")
        self.trials: dict[frozenset[str], _Trial] = {}
        self.measure(())

    def _sizes(self, network: Network) -> dict[str, float]:
        tensors = {id(tensor): tensor.numel() for _, tensor in network.named_tensors() if isinstance(tensor, Parameter)}
        return {"macs": sum(self.macs.get(node.name, 0) for node in network.graph.nodes), "parameters": sum(tensors.values())}

    def measure(self, chosen: Sequence[Block]) -> _Trial | None:
        """The trial without these blocks; None where two of them overlap or one lies in another."""
        names = frozenset(block.name for block in chosen)
        if names not in self.trials:
            if any(one.crosses(two) or one.contains(two) or two.contains(one) for one, two in combinations(chosen, 2)):
                return None
            made = without(self.network, chosen)
            error = self.judge(made)
            sizes = self._sizes(made)
            left = {key: sizes[key] / max(self.totals[key], 1) for key in sizes} | {"layers": float(len(self.candidates) - len(chosen))}
            self.trials[names] = _Trial(error if isfinite(error) else inf, left)
        return self.trials[names]

    def greedily(self, amount: float) -> tuple[list[Block], tuple[tuple[str, float], ...]]:
        """Take out blocks until what remains is at most ``amount``. Returns them, and each step with the error after it."""
        chosen: list[Block] = []
        path: list[tuple[str, float]] = []
        now = self.trials[frozenset()]
        while now.left[self.amount] > amount:
            step = min(self._steps(chosen, now), key=lambda step: step[0], default=None)
            if step is None:
                raise SpecError(f"{self.amount}={amount:g} cannot be reached by taking out blocks: {now.left[self.amount]:.3g} remain at the least.")
            _, chosen, now = step
            path.append((chosen[-1].name, now.error))
        return chosen, tuple(path)

    def _steps(self, chosen: list[Block], now: _Trial) -> Iterator[tuple[float, list[Block], _Trial]]:
        """What could go next, and how much error it adds for what it saves."""
        for block in self.candidates:
            # What lies in a larger block goes with it.
            rest = [other for other in chosen if not block.contains(other)]
            trial = self.measure([*rest, block]) if block not in chosen else None
            if trial is not None and (saved := now.left[self.amount] - trial.left[self.amount]) > 0:
                yield (trial.error - now.error) / saved, [*rest, block], trial

    def best(self, amount: float) -> frozenset[str]:
        """The set with the least error of those measured that reach the amount; of equals the one that saves more."""
        reached = [names for names, trial in self.trials.items() if trial.left[self.amount] <= amount]
        return min(reached, key=lambda names: (self.trials[names].error, self.trials[names].left[self.amount]))

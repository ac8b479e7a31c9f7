"""Rounding, biases and activation steps learned part by part, without labels: each part is to give what the float network gives there."""

# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false, reportOptionalMemberAccess=false
# pyright: reportGeneralTypeIssues=false
# (torch.fx types every argument as a union of everything)

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from ..network.frontier import Frontier, Joined
from ..network.network import Network
from ..numerics.rounding import annealed
from ..spool import Spool
from .fitting import Drop, Fitting
from .regions import Region, regions, twin_name

# The last of the steps train biases and activation steps alone, ever slower, with the weights on their grids.
SETTLED = 0.25


@dataclass(frozen=True)
class Reconstruction:
    """How parts are fitted.

    Fields:
        steps: of Adam for each part; none: nothing changes. ``rate``: of the variables of roundings; ``bias_rate``: of biases, in units of the
            norm of the weight's row; ``step_rate``: of activation steps, as a factor.
        elements: a batch has about so many elements of a part's input and output, and ``most_samples`` samples at most.
        firmness: weight of the regulariser that makes roundings hard (its mean over the weights), beside the error as a fraction of that before.
        drop: where activations are quantized, the probability with which an element of them, and of the part's input, is the float one.
            (Without quantized activations mixing the input was measured to make parts worse.)
        seed: of batches and dropping.
    """

    steps: int = 400
    rate: float = 0.1
    bias_rate: float = 1e-3
    step_rate: float = 1e-3
    elements: int = 2**21
    most_samples: int = 8
    firmness: float = 10.0
    drop: float = 0.5
    seed: int = 0


def reconstruct(
    reference: Network,
    quantized: Network,
    fit: Sequence[list[Tensor]],
    held: Sequence[list[Tensor]],
    settings: Reconstruction | None = None,
    progress: Callable[[str], None] | None = None,
) -> None:
    """Fit ``quantized`` to ``reference`` in place, part after part, each with the inputs that the parts before it give.

    Per part (see :func:`~downsize.quantization.regions.regions`) the rounding of weights (Nagel et al. 2020, arXiv 2004.10568), biases and
    the steps of activations are trained so that the part's output is the reference's (Li et al. 2021, arXiv 2102.05426), with inputs mixed
    of float and quantized ones (Wei et al. 2022, arXiv 2203.05740). It begins with the rounding that the weights have, and the result is
    kept where the error on held-back data is then lower: no part becomes worse there. Zeros of weights stay zero.

    Args:
        reference: the float network that was quantized, whose nodes have the same names.
        fit, held: flat inputs to fit on, and to decide by, see :func:`~downsize.network.statistics.chunks`.
        progress: is told, of each part, its name and its error before and after.
    """
    settings = settings or Reconstruction()
    if not settings.steps:
        return
    parts = regions(quantized)
    teacher = _Teacher(reference, parts, Joined(fit, held))
    parts = [part for part in parts if teacher.knows(part)]
    student = Frontier(quantized, Joined(fit, held))
    generator = torch.Generator().manual_seed(settings.seed)
    for part in parts:
        if student.next is not part.nodes[0]:
            student.advance(part.nodes[0])
        data = _Data.of(part, student.values(part.entry), teacher, len(fit), settings)
        before, after = _fit(Fitting(quantized, reference, part), data, settings, generator)
        if progress:
            progress(f"{part.name}: error {before:.3g} -> {after:.3g}")
    quantized.recompile()


class _Teacher:
    """The reference's values at the ends of parts, for every piece, as they are needed."""

    def __init__(self, reference: Network, parts: Sequence[Region], pieces: Sequence[list[Tensor]]) -> None:
        self.nodes = {node.name: node for node in reference.graph.nodes}
        self.frontier = Frontier(reference, pieces)
        self.uses: dict[str, int] = {}
        for part in parts:
            for name in (twin_name(part.entry), twin_name(part.exit)):
                self.uses[name] = self.uses.get(name, 0) + 1
        self.kept: dict[str, Spool] = {}

    def knows(self, part: Region) -> bool:
        """Whether the reference has both ends of the part."""
        return all(twin_name(node) in self.nodes for node in (part.entry, part.exit))

    def take(self, node: fx.Node) -> list[Tensor]:
        """The values of the node's twin; each part takes them once."""
        name = twin_name(node)
        if name not in self.kept:
            self._advance(self.nodes[name].next)
        views = self.kept[name].views()
        self.uses[name] -= 1
        if not self.uses[name]:
            del self.kept[name]
        return views

    def _advance(self, before: fx.Node) -> None:
        hooks, node = {}, self.frontier.next
        while node is not before:
            if node.name in self.uses:
                self.kept[node.name] = Spool()
                hooks[node] = _recorder(self.kept[node.name])
            node = node.next
        self.frontier.advance(before, hooks)


def _recorder(spool: Spool) -> Callable[[tuple[Any, ...], Any], None]:
    return lambda args, value: spool.append(value)


@dataclass(frozen=True)
class _Data:
    """Of each sample, or piece, the part's input in the quantized network, and its input and output in the float one; ``rows``: of a batch."""

    fit: list[tuple[Tensor, ...]]
    held: list[tuple[Tensor, ...]]
    rows: int

    @staticmethod
    def of(part: Region, entries: Iterable[Tensor], teacher: _Teacher, count: int, settings: Reconstruction) -> _Data:
        """``count``: how many pieces are to fit on; the others are held back."""
        spool = Spool()
        for entry in entries:
            spool.append(entry)
        pieces = list(zip(spool.views(), teacher.take(part.entry), teacher.take(part.exit), strict=True))
        fit, held = pieces[:count], pieces[count:]
        if not part.batched:
            return _Data(fit, held, 1)
        fit = [(x[i : i + 1], exact[i : i + 1], y[i : i + 1]) for x, exact, y in fit for i in range(len(x))]
        alike = len({tuple(one.shape for one in row) for row in fit}) == 1
        size = sum(one.numel() for one in fit[0][1:])
        return _Data(fit, held, max(1, min(settings.most_samples, settings.elements // max(1, size))) if alike else 1)

    def batch(self, generator: torch.Generator) -> tuple[Tensor, ...]:
        """Some of the samples at random, as one; or one piece."""
        chosen = torch.randint(len(self.fit), (self.rows,), generator=generator).tolist()
        return tuple(torch.cat(ones) if len(ones) > 1 else ones[0] for ones in zip(*(self.fit[i] for i in chosen), strict=True))

    def error(self, output: Callable[[Tensor], Tensor]) -> float:
        """The mean squared error of an output on the held-back pieces."""
        total, count = 0.0, 0
        with torch.no_grad():
            for quantized, _, target in self.held:
                total += float((output(quantized) - target).double().square().sum())
                count += target.numel()
        return total / max(1, count)


def _fit(fitting: Fitting, data: _Data, settings: Reconstruction, generator: torch.Generator) -> tuple[float, float]:
    """Train the part's variables, and keep them if that is better: the mean squared errors on the held-back pieces before and after."""
    before = data.error(fitting.output)
    if before == 0 or not (fitting.weights or fitting.biases or fitting.steps):
        return before, before
    roundings, others = list(fitting.v.values()), ([bias.moved for bias in fitting.biases.values()], list(fitting.steps.values()))
    rates = settings.rate, settings.bias_rate, settings.step_rate
    optimizer = torch.optim.Adam([{"params": params, "lr": rate} for params, rate in zip((roundings, *others), rates, strict=True)])
    drop = Drop(settings.drop, generator)
    last = round(SETTLED * settings.steps)
    for step in range(settings.steps):
        settled = step >= settings.steps - last
        quantized, exact, target = data.batch(generator)
        loss = (fitting.training(drop(quantized, exact) if fitting.steps else quantized, drop, settled) - target).square().mean() / before
        beta = None if settled else annealed(step, settings.steps - last)
        if beta is not None:
            loss = loss + settings.firmness * fitting.undecided(beta)
        if loss.requires_grad:  # else there are roundings alone, and they are settled
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        if settled:
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * (settings.steps - 1 - step) / last
    hard = fitting.hard()
    after = data.error(lambda x: fitting.output(x, hard))
    if after < before:
        fitting.keep(hard)
    return before, after

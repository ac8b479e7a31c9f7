"""Weights that become zero while the network trains: more and more of them, or the same number in places that move."""

# pyright: reportArgumentType=false
# (torch.fx types every argument as a union of everything)

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..network.network import Network
from ..network.rewrite import add_constant, insert_after
from ..numerics.sparsity import Pattern
from ..pruning.sparsifying import Wanted
from ..pruning.weights import Weight
from .hook import Hook, Learner
from .regrowth import moving, regrown

CHANGES, LONGEST = 100, 50  # of masks in a training at least, where it has as many steps; steps between two of them at most

# From the weights as matrices, and the share of them that stays, to how many stay in each.
Counts = Callable[[Sequence[Tensor], float], list[int]]


class _Masked(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, weight: Tensor, mask: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return weight * mask

    @staticmethod
    def backward(ctx: object, gradient: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return gradient, None


def masked(weight: Tensor, mask: Tensor) -> Tensor:
    """``weight * mask``, whose gradient reaches all of the weight as if there were no mask (straight through; Guo et al. 2016, arXiv
    1608.04493): what is masked can be judged by its gradient, and can come back."""
    return _Masked.apply(weight, mask)  # type: ignore[no-any-return]


def cubic(start: float, final: float, progress: float) -> float:
    """The share of zeros when ``progress``, 0 to 1, of the way is done: fast at first, slow at the end (Zhu & Gupta 2017, arXiv 1710.01878)."""
    return final + (start - final) * (1 - min(1.0, progress)) ** 3


class Gradual(Hook):
    """Masks in the graph, behind the weights, that the training changes and :meth:`settle` makes zeros of.

    ``growth``: ``none``: weights go and never come back. ``shadow``: the masked weights are trained as if they were there, and whichever are
    the largest count (Guo et al. 2016). ``gradient``: all zeros at once, then their places move (see :func:`~.regrowth.regrown`).
    Masks change in the steps that ``interval`` divides, until the share ``until`` of the training is done, then never again; without an
    interval some hundred times, as a short training in which many weights go at once recovers little. Zeros that the network had to keep
    before are never weights.

    Args:
        network: its graph is edited here, before training.
        weights: of it, that become sparse.
        sparsity: the share of all of them that is zero in the end. Not with a pattern.
        counts: how the weights that stay are spread over the layers.
        pattern: instead of a share: masks are by magnitude in every run, from the first step on.
    """

    def __init__(
        self,
        network: Network,
        weights: Sequence[Weight],
        counts: Counts,
        sparsity: float = 0.0,
        pattern: Pattern | None = None,
        growth: str = "none",
        until: float = 0.7,
        interval: int | None = None,
    ) -> None:
        self.weights, self.counts, self.sparsity, self.pattern = tuple(weights), counts, sparsity, pattern
        self.growth, self.until, self.interval = growth, until, interval
        matrices = self._matrices(network)
        some = [matrix != 0 if one.name in network.sparse else torch.ones_like(matrix, dtype=torch.bool) for one, matrix in self._pairs(matrices)]
        self.allowed = some
        self.start = 1 - sum(int(one.sum()) for one in some) / sum(one.numel() for one in some)
        self.masks = tuple(_insert(network, weight, weight.tensor(one)) for weight, one in zip(self.weights, some, strict=True))
        if pattern is not None or growth == "gradient" or until == 0:
            self._choose(network, sparsity)

    # What the loop calls ------------------------------------------------------------------------------------------------------------

    def begin(self, learner: Learner) -> None:
        if learner.steps == 0:
            self._choose(learner.network, self.sparsity)

    def before(self, learner: Learner) -> None:
        if self.growth != "gradient" and self._turn(learner):
            self._choose(learner.network, cubic(self.start, self.sparsity, self._progress(learner)))

    def gradients(self, learner: Learner) -> None:
        if self.growth == "shadow":
            return
        turn = self.growth == "gradient" and learner.step > 0 and self._turn(learner)
        for number, weight in enumerate(self.weights):
            parameter, mask = learner.parameters.get(weight.name), learner.network.tensor(self.masks[number])
            if parameter is None or parameter.grad is None:
                continue
            if turn:
                self._move(parameter, mask, number, moving(self._progress(learner)))
            parameter.grad.mul_(mask)

    def ready(self, learner: Learner) -> bool:
        return learner.step > self._end(learner) or learner.steps == 0

    # Masks --------------------------------------------------------------------------------------------------------------------------

    def settle(self, network: Network) -> None:
        """Make the masked weights of the trained network zeros that stay, in place, and take the masks out of its graph."""
        for weight, mask in zip(self.weights, self.masks, strict=True):
            with torch.no_grad():
                network.tensor(weight.name).mul_(network.tensor(mask))
        for node in list(network.graph.nodes):
            if node.op == "call_function" and node.target is masked and node.args[1].target in self.masks:
                node.replace_all_uses_with(node.args[0])
                network.graph.erase_node(node)
        network.recompile()
        for weight in self.weights:
            network.keep_zeros(*weight.names)

    def _end(self, learner: Learner) -> int:
        return int(self.until * learner.steps)

    def _turn(self, learner: Learner) -> bool:
        end = self._end(learner)
        interval = self.interval or max(1, min(LONGEST, end // CHANGES))
        return learner.step == end or (learner.step < end and learner.step % interval == 0)

    def _progress(self, learner: Learner) -> float:
        return learner.step / max(1, self._end(learner)) if self._end(learner) else 1.0

    def _matrices(self, network: Network) -> list[Tensor]:
        return [weight.matrix(network.tensor(weight.name).detach()) for weight in self.weights]

    def _pairs(self, matrices: Sequence[Tensor]) -> list[tuple[Weight, Tensor]]:
        return list(zip(self.weights, matrices, strict=True))

    def _choose(self, network: Network, sparsity: float) -> None:
        """Give every mask the largest weights there are."""
        tensors = [network.tensor(name) for name in self.masks]
        some = [one.to(tensor.device) for one, tensor in zip(self.allowed, tensors, strict=True)]
        if self.growth != "shadow":
            some = [weight.matrix(tensor) for weight, tensor in zip(self.weights, tensors, strict=True)]
        matrices = [matrix * one for matrix, one in zip(self._matrices(network), some, strict=True)]
        counts = [0] * len(matrices) if self.pattern else self.counts(matrices, 1 - sparsity)
        for weight, tensor, matrix, count, one in zip(self.weights, tensors, matrices, counts, some, strict=True):
            tensor.copy_(weight.tensor(Wanted(count, self.pattern, one).mask(matrix.abs())))

    def _move(self, parameter: Tensor, mask: Tensor, number: int, share: float) -> None:
        """Move a share of one mask's weights, in place; what has grown begins at zero."""
        weight = self.weights[number]
        assert parameter.grad is not None
        old, values = weight.matrix(mask), weight.matrix(parameter.detach())
        new = weight.tensor(regrown(old, values, weight.matrix(parameter.grad), share, self.allowed[number].to(mask.device)))
        with torch.no_grad():
            parameter.mul_(mask)
        mask.copy_(new)


def _insert(network: Network, weight: Weight, mask: Tensor) -> str:
    """Multiply a weight by a mask wherever it is read; returns the mask's name."""
    found = [node for node in network.graph.nodes if node.op == "get_attr" and node.target in weight.names]
    name = str(add_constant(network, f"{weight.name}_mask", mask.clone(), found[0]).target)
    for node in found:
        users = list(node.users)
        with network.graph.inserting_before(node):
            made = network.graph.get_attr(name)
        made.meta = dict(node.meta)
        insert_after(network, node, masked, (made,), users)
    network.recompile()
    return name

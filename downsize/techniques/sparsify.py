"""Weights set to zero, one by one or in patterns, and the others moved to make up for it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from itertools import chain
from typing import Any, Literal

import torch
from pydantic import Field

from ..errors import SpecError, TaskError
from ..network.fold import fold_constants, part_constants
from ..network.network import Network, batch_of
from ..network.statistics import Pieces
from ..numerics.sparsity import Pattern
from ..pruning.sparsifying import Solved, Wanted, by_magnitude, solve, spread
from ..pruning.weights import Errors, Weight, ends, has_columns, replace_weight, weights_of
from ..spec import frozen
from ..task import Task
from ..training.choosing import better
from ..training.gradual import Gradual
from ..training.plan import Training

METHODS = ("magnitude", "wanda", "sparsegpt", "surgeon")
# Layers that read more at each position go by magnitude: a Gram matrix takes the square of this in memory, factoring it the cube in time.
LARGEST_COLUMNS = 4608
QUANTIZERS = tuple(getattr(torch.ops.downsize, f"fake_quantize{kind}").default for kind in ("", "_dynamic", "_blocks", "_groups", "_levels"))


@frozen
class Sparsify:
    """Set weights of linear layers and convolutions to zero; biases, norms, embeddings and recurrent layers are left as they are.

    Layer after layer, weights are chosen on what the layer reads behind the layers done before, and those that stay are moved so that its
    outputs are nearest to the original's. The zeros are an invariant of the network from then on (``Network.masks``). They make a packed
    file smaller; today's CPU runtimes compute with them as with other numbers (see docs/sparsity.md).

    Fields:
        sparsity: the share of the weights of all layers taken that become zero (0.5). In every row, so for every output, one stays at least.
        pattern: instead of ``sparsity``: "2:4", "4:8" or any N:M: at most N of M neighbouring inputs are read. Layers whose inputs are no
            multiple of M stay dense.
        method: what decides which weights go, and the first values of those that stay: ``magnitude``, ``wanda``, ``sparsegpt``,
            ``surgeon`` (the cheapest go in rounds, all others solved for between them); ``auto``: in each layer the one with the least
            output error on held-back samples.
        allocation: how ``sparsity`` is spread over the layers: ``lamp`` (by each weight's share in the larger ones of its layer), ``erk``
            (by the layers' shapes), ``global`` (the smallest of all weights), ``uniform`` (the same share in each).
        polish: solve for the values of the weights that stay by least squares; kept where that lowers the error on held-back samples.
        samples: calibration samples used at most; 0: use no data, go by magnitude. ``holdout``: of so many, how many are held back.
        keep_ends: leave out the first and the last layer, which lose most.
        train: make the zeros while training, as the plan says (true: imitate the original model), instead of solving for them; magnitude
            decides, more and more weights go. Reaches much more than solving does, ``train=distill(epochs=5)``; where a short training
            does not, and there is data for "validate" to show it, the solved zeros are kept.
        growth: with ``train``: ``none``: what went is gone; ``shadow``: masked weights are trained on beside the others and come back where
            they become larger; ``gradient``: all zeros at once, then every while the smallest weights make way for those with the largest
            gradients. ``until``: behind this share of the training the zeros stay where they are. ``interval``: steps between
            changes; by default a hundredth of the steps in which there are any, at most 50.

    Example: ``sparsify(sparsity=0.8)``.
    """

    sparsity: float | None = Field(default=None, ge=0, lt=1)
    pattern: str | None = None
    method: Literal["auto", "magnitude", "wanda", "sparsegpt", "surgeon"] = "auto"
    allocation: Literal["lamp", "erk", "global", "uniform"] = "lamp"
    polish: bool = True
    samples: int = Field(default=512, ge=0)
    holdout: int = Field(default=128, ge=1)
    keep_ends: bool = True
    train: bool | Training = False
    growth: Literal["none", "shadow", "gradient"] = "none"
    until: float = Field(default=0.7, ge=0, lt=1)
    interval: int | None = Field(default=None, ge=1)

    def __post_init__(self) -> None:
        if self.pattern is not None:
            try:
                Pattern.parse(self.pattern)
            except ValueError as error:
                raise SpecError(f"sparsify: pattern={self.pattern!r} came; {error}.") from None
            if self.sparsity is not None or self.allocation != "lamp":
                raise SpecError("sparsify: a pattern says how many weights stay in every layer: leave sparsity and allocation out.")
        if not self.samples and self.method not in ("auto", "magnitude"):
            raise SpecError(f"sparsify: method={self.method!r} needs data; with samples=0 only magnitude works.")
        if self.train and self.method not in ("auto", "magnitude"):
            raise SpecError(f"sparsify: method={self.method!r} solves for what training finds: leave out method or train.")
        if self.pattern is not None and self.growth == "gradient":
            raise SpecError("sparsify: growth='gradient' moves weights out of their runs, which a pattern forbids: expected 'none' or 'shadow'.")

    def __call__(self, network: Network, task: Task) -> Network:
        """The sparse network, with other weights (those read in parts alone are parted); ``origin["sparsified"]`` tells how each was made.

        Raises:
            TaskError: there is nothing to make sparse, the network is quantized, there is too little calibration data, or it cannot be trained.
        """
        made = network.fork().eval()
        if any(node.target in QUANTIZERS for node in made.graph.nodes):
            raise TaskError("The network is quantized already, its weights are on grids: sparsify first, then quantize.")
        fold_constants(made)
        part_constants(made)
        if self.train:
            trained = self._trained(made, task, Training() if self.train is True else self.train)
            return better(task, trained, lambda: replace(self, train=False, growth="none")(network, task))
        wanted = self._wanted(made, self._weights(made))
        errors = None
        if self.samples and wanted:
            errors = Errors(made.fork(), made, split(made, lambda: task.batches("calibrate"), self.samples, self.holdout))
        told: dict[str, Any] = {}
        for weight, one in wanted:
            solved = self._solve(made, weight, one, errors)
            replace_weight(made, weight, solved.matrix)
            made.keep_zeros(*weight.names)
            zeros = weight.shape.numel() - made.sparse[weight.name]
            told[weight.name] = {"method": solved.method, "zeros": zeros, "of": weight.shape.numel(), "error": solved.error}
        made.origin["sparsified"] = told
        return made

    def _weights(self, network: Network) -> list[Weight]:
        found = weights_of(network)
        if not found:
            raise TaskError(
                "The network has no convolution or linear layer with a constant weight of its own (one that is read in another way too, as "
                "tied ones are, is left): there is nothing to make sparse."
            )
        left = ends(network, found) if self.keep_ends else set()
        taken = [weight for weight in found if weight.name not in left]
        if not taken:
            raise TaskError("The network has only a first and a last layer, which are left out: use sparsify(keep_ends=False).")
        return taken

    def _trained(self, network: Network, task: Task, plan: Training) -> Network:
        """The zeros made while training; ``network`` is edited."""
        pattern, density = self._amount()
        weights = self._fitting(self._weights(network), pattern)
        if pattern is None and density == 1:
            return network
        counts = partial(spread, self.allocation, weights)
        hook = Gradual(network, weights, counts, 1 - density, pattern, self.growth, self.until, self.interval)
        made = plan.train(network, task, hooks=[hook])
        hook.settle(made)
        sizes = {weight.name: weight.shape.numel() for weight in weights}
        how = "trained" if self.growth == "none" else f"trained, growth by {self.growth}"
        made.origin["sparsified"] = {
            name: {"method": how, "zeros": size - made.sparse[name], "of": size, "error": None} for name, size in sizes.items()
        }
        return made

    def _amount(self) -> tuple[Pattern | None, float]:
        """The pattern, and the share that stays where there is none."""
        return None if self.pattern is None else Pattern.parse(self.pattern), 1 - (0.5 if self.sparsity is None else self.sparsity)

    def _fitting(self, weights: list[Weight], pattern: Pattern | None) -> list[Weight]:
        """Those that can have the pattern."""
        if pattern is None:
            return weights
        found = [replace(weight, inputs_last=True) for weight in weights if weight.inputs % pattern.of == 0]
        if not found:
            raise TaskError(f"No layer reads a multiple of {pattern.of} inputs: none can have the pattern {self.pattern}.")
        return found

    def _wanted(self, network: Network, weights: list[Weight]) -> list[tuple[Weight, Wanted]]:
        """What is to be left of each weight that loses some."""
        pattern, density = self._amount()
        weights = self._fitting(weights, pattern)
        matrices = [weight.matrix(network.tensor(weight.name).detach()) for weight in weights]
        patterned = [matrix.numel() // pattern.of * pattern.keep for matrix in matrices] if pattern else None
        counts = patterned or spread(self.allocation, weights, matrices, density)
        found = []
        for weight, matrix, count in zip(weights, matrices, counts, strict=True):
            allowed = matrix != 0 if weight.name in network.sparse else torch.ones_like(matrix, dtype=torch.bool)
            if count < matrix.numel():
                found.append((weight, Wanted(count, pattern, allowed)))
        return found

    def _solve(self, network: Network, weight: Weight, wanted: Wanted, errors: Errors | None) -> Solved:
        matrix = weight.matrix(network.tensor(weight.name).detach())
        if errors is None or matrix.shape[2] > LARGEST_COLUMNS or not has_columns(network, weight):
            return by_magnitude(matrix, wanted)
        fit, held = errors(weight)
        return solve(matrix, wanted, fit, held, METHODS if self.method == "auto" else (self.method,), self.polish)


def split(network: Network, batches: Callable[[], Iterable[Any]], samples: int, holdout: int) -> tuple[Pieces, Pieces]:
    """Pieces of at most ``samples`` samples to fit on, and of others, spread evenly among them, to judge by: ``holdout`` of ``samples``.

    Raises:
        TaskError: there are fewer than two samples.
    """
    every = max(2, round(samples / holdout))
    parts = []
    for held in (False, True):
        chosen = _chosen(network, batches(), samples, every, held)
        first = next(chosen, None)
        if first is None:
            raise TaskError("There is only one calibration sample; expected some to fit on and others to judge by: give more, or use samples=0.")
        parts.append(Pieces.of(network, chain([first], chosen)))
    return parts[0], parts[1]


def _chosen(network: Network, batches: Iterable[Any], samples: int, every: int, held: bool) -> Iterator[tuple[Any, None]]:
    """Of the first samples each ``every``-th, or the others; whole batches where the network's batch is not open."""
    seen = 0
    for inputs, _ in batches:
        size = next((leaf.shape[0] for leaf, port in zip(network.flat(inputs), network.ports, strict=True) if port.dims[:1] == ("batch",)), None)
        rows = [i for i in range(min(size or 1, samples - seen)) if ((seen + i) % every == 1) is held]
        if rows:
            yield (inputs if size is None else batch_of(inputs, rows)), None
        seen += size or 1
        if seen >= samples:
            return

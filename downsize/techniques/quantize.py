"""int8 quantization after training: static, dynamic, or of the weights alone."""

from __future__ import annotations

from dataclasses import field
from typing import Any, Literal

from torch import fx

from ..errors import TaskError
from ..network.judge import Judge
from ..network.network import Network
from ..network.rewrite import aten, drop_identities, fold_batch_norm, fold_padding
from ..network.statistics import Pieces, distributions
from ..numerics.grids import SYMMETRIC_INT8, UINT8
from ..quantization.correction import correct_biases
from ..quantization.equalization import equalize
from ..quantization.insertion import quantize_activations, quantize_dynamically, quantize_weights, settle
from ..quantization.placement import Placement, place
from ..quantization.ranges import ESTIMATORS, Range, candidates, choose
from ..quantization.rounding import round_weights
from ..quantization.smoothing import smooth
from ..spec import frozen
from ..task import Task

# How many pieces (of one sample or a few) are enough to compare choices, and to solve for weights and biases.
TRIAL_PIECES = 8
ROUNDING_PIECES = 40
MEAN_PIECES = 64


@frozen
class Quantize:
    """Make weights and activations int8.

    ``quantize()`` folds batch norms, measures every activation on the calibration data, tries several ranges for each and keeps the one
    with the least error in the layers that read it, equalizes channels where that helps, and corrects the biases. Choices are judged on
    ``holdout`` samples that the ranges were not measured on, and the plain choice (full ranges, no correction) is kept when it is better.

    Fields:
        activations: ``static`` (ranges measured now: CNNs, and transformers that must be fast everywhere), ``dynamic`` (ranges measured
            at every run, linear layers only: fast in ONNX Runtime alone), ``none`` (only weights: a quarter of the bytes, no faster).
        ranges: which range estimators compete: minmax, percentile, mse, entropy.
        samples: calibration samples used at most. ``holdout``: of these, how many judge the choices.
        equalize: try cross-layer equalization. ``smooth``: try smoothing the inputs of linear layers. ``correct``: correct biases.
        embeddings: quantize embedding tables too, one scale a row.

    Example: ``quantize(activations='static', samples=128)``.
    """

    activations: Literal["static", "dynamic", "none"] = "static"
    ranges: tuple[Literal["minmax", "percentile", "mse", "entropy"], ...] = field(default=ESTIMATORS)
    samples: int = 200
    holdout: int = 16
    equalize: bool = True
    smooth: bool = True
    rounding: Literal["nearest", "gptq"] = "gptq"
    correct: bool = True
    embeddings: bool = True

    def __call__(self, network: Network, task: Task) -> Network:
        """The quantized network: the same function with fake quantizers in it, which a runtime's export turns into integers.

        Raises:
            TaskError: no calibration data, or NaN in it or in what the network makes of it.
        """
        plain = network.fork().eval()
        drop_identities(plain)
        fold_batch_norm(plain)
        fold_padding(plain)
        if self.activations != "static":
            return self._weights_only(plain)
        pieces = self._split(plain, task)
        judge = Judge(plain, pieces[1], settle)
        plain = self._balanced(plain, pieces, judge)
        made = self._static(plain, pieces, judge)
        made.origin["quantized"] = "int8 static"
        return made

    def _split(self, network: Network, task: Task) -> tuple[Pieces, Pieces]:
        """Calibration inputs to measure on, and others, spread evenly among them, to judge by."""
        pieces = Pieces.of(network, task.batches("calibrate"), self.samples)
        if len(pieces) < 2:
            return pieces, pieces
        return pieces.parted(max(2, len(pieces) // max(1, min(self.holdout, len(pieces) // 2))))

    def _balanced(self, plain: Network, pieces: tuple[Pieces, Pieces], judge: Judge) -> Network:
        """The network with scales moved between its layers, where plain rounding of it on full ranges then loses less; else as it came."""
        loss = None
        for balance, wanted in ((_equalized, self.equalize), (_smoothed, self.smooth)):
            balanced = plain.fork()
            if wanted and balance(balanced, pieces):
                loss = self._trial(plain, pieces, judge) if loss is None else loss
                if (lower := self._trial(balanced, pieces, judge)) < loss:
                    loss, plain = lower, balanced
        return plain

    def _trial(self, network: Network, pieces: tuple[Pieces, Pieces], judge: Judge) -> float:
        placement = place(network)
        measured = distributions(network, _spread(pieces[0], TRIAL_PIECES), _own(placement))
        return judge(self._build(network, placement, {node: (d.low, d.high) for node, d in measured.items()}))

    def _static(self, plain: Network, pieces: tuple[Pieces, Pieces], judge: Judge) -> Network:
        fit, held = pieces
        placement = place(plain)
        if not placement.layers:
            raise TaskError("The network has no convolution or linear layer with a constant weight: there is nothing to quantize.")
        measured = distributions(plain, fit, _own(placement))
        options = {node: candidates(found, UINT8, self.ranges) for node, found in measured.items()}
        chosen = choose(plain, placement.activations, options, _spread(held, TRIAL_PIECES), UINT8)
        full = {node: ranges[0] for node, ranges in options.items()}
        trials = [self._build(plain, placement, ranges) for ranges in ([full, chosen] if "minmax" in self.ranges else [chosen])]
        loss, best = min(((judge(trial), trial) for trial in trials), key=lambda pair: pair[0])
        for improve, wanted, count in ((round_weights, self.rounding == "gptq", ROUNDING_PIECES), (correct_biases, self.correct, MEAN_PIECES)):
            if wanted:
                improved = best.fork()
                improve(plain, improved, _spread(fit, count))
                if (lower := judge(improved)) < loss:
                    loss, best = lower, improved
        return best

    def _build(self, plain: Network, placement: Placement, ranges: dict[fx.Node, Range]) -> Network:
        made = plain.fork()
        moved = placement.on(made)
        by_name = {node.name: bounds for node, bounds in ranges.items()}
        quantize_activations(made, moved, {node: by_name[node.name] for node in _own(moved)}, UINT8)
        quantize_weights(made, self._tables(made, moved), SYMMETRIC_INT8)
        made.recompile()
        return made

    def _tables(self, network: Network, placement: Placement) -> list[Any]:
        def is_table(node: fx.Node) -> bool:
            return all(user.target is aten.embedding.default for user in node.users)

        return [point for point in placement.weights if self.embeddings or not is_table(point.node)]

    def _weights_only(self, plain: Network) -> Network:
        placement = place(plain)
        if self.activations == "dynamic":
            linear = [layer for layer in placement.layers if layer.target is aten.linear.default]
            if not linear:
                raise TaskError("The network has no linear layer; dynamic quantization is for those: use quantize(activations='static').")
            quantize_dynamically(plain, placement, linear)
        quantize_weights(plain, self._tables(plain, placement), SYMMETRIC_INT8)
        plain.recompile()
        plain.origin["quantized"] = f"int8 {self.activations}"
        return plain


def _equalized(network: Network, pieces: tuple[Pieces, Pieces]) -> int:
    return equalize(network)


def _smoothed(network: Network, pieces: tuple[Pieces, Pieces]) -> int:
    return smooth(network, place(network), _spread(pieces[0], ROUNDING_PIECES), _spread(pieces[1], TRIAL_PIECES))


def _spread(pieces: Pieces, count: int) -> Pieces:
    """At most ``count`` of the pieces, evenly over the data."""
    return pieces[:: max(1, -(-len(pieces) // count))]


def _own(placement: Placement) -> list[fx.Node]:
    return [point.node for point in placement.activations if point.like is None]

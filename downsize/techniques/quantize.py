"""Quantization of weights and activations to 8 bits and fewer: after training, and with training."""

from __future__ import annotations

from dataclasses import field, replace
from typing import Literal, cast

from pydantic import Field
from torch import fx

from ..errors import SpecError, TaskError
from ..network.judge import Judge
from ..network.network import Network
from ..network.rewrite import aten, drop_identities, fold_batch_norm, fold_padding
from ..network.statistics import Distribution, Pieces, distributions
from ..numerics.grids import UINT8, Grid
from ..numerics.lowbit import Levels
from ..quantization.bits import Bits
from ..quantization.correction import correct_biases, round_biases
from ..quantization.equalization import equalize
from ..quantization.formats import Format
from ..quantization.insertion import quantize_activations, quantize_dynamically, quantize_to_levels, quantize_weights, settle
from ..quantization.learned import learnable, settle_learned
from ..quantization.norms import fold, unfold
from ..quantization.placement import Placement, WeightPoint, place
from ..quantization.ranges import ESTIMATORS, Range, candidates, choose, mean_squared_error
from ..quantization.rounding import round_weights
from ..quantization.smoothing import smooth
from ..quantization.weight_only import Data, quantize_weight_only
from ..spec import frozen
from ..task import Task
from ..training.plan import Training
from ..training.quantizing import Quantizing

# How many pieces (of one sample or a few) are enough to compare choices, and to solve for weights and biases.
TRIAL_PIECES = 8
ROUNDING_PIECES = 40
MEAN_PIECES = 64
FLOAT = 32  # bits of what is not quantized
Width = Literal[2, 3, 4, 5, 6, 7, 8, 32]


@frozen
class Quantize:
    """Make weights and activations integers of 8 bits or fewer.

    ``quantize()`` folds batch norms, measures every activation on the calibration data, tries several ranges for each and keeps the one
    with the least error in the layers that read it, equalizes channels where that helps, and corrects the biases. Choices are judged on
    ``holdout`` samples that the ranges were not measured on, and the plain choice (full ranges, no correction) is kept when it is better.
    With ``train`` that is where training starts from.

    Fields:
        bits: of weights, 2 to 8; 32: all stay as they are, and with them the network. ``activation_bits``: of what layers read; not given:
            8, or 32 with other ``levels`` than uniform. ``ends``: of weights and inputs of the first and the last layer, and of tables.
            ``tables``: of embedding tables; not given: as the ends.
        group: columns of a row that share a scale, instead of the whole row; ``symmetric``: without zero points. Both for weights alone.
        levels: the values of weights: ``uniform`` (a grid of ``bits``), ``nf4`` (16, denser around zero; weights alone), ``twn`` and ``ttq``
            (three a row, evenly spaced or not), ``xnor`` and ``binary_connect`` (two a row; see ``numerics/lowbit.py``). The ends stay uniform.
        activations: ``static`` (ranges measured now: CNNs, and transformers that must be fast everywhere), ``dynamic`` (ranges measured
            at every run, linear layers only: fast in ONNX Runtime alone), ``none`` (only weights: a quarter of the bytes, no faster).
        train: train the rounded network. True: to imitate the original model, else as the plan says, e.g. ``finetune(epochs=3)``.
        warmup_share: the part of the training in which batch norms are still there, with moving statistics; then they are folded.
        ranges: which range estimators compete: minmax, percentile, mse, entropy.
        samples: calibration samples used at most. ``holdout``: of these, how many judge the choices.
        rounding: of weights: ``nearest``, ``hqq`` (no data is needed either; with zero points), ``gptq`` (errors made up for by later columns).
            ``refit``: with weights alone and GPTQ, fit layers to the original's outputs before they are rounded, one after another.
        equalize: try cross-layer equalization. ``smooth``: try smoothing the inputs of linear layers. ``correct``: correct biases.
        embeddings: quantize embedding tables too, one scale a row.

    Examples: ``quantize(bits=4, activation_bits=4, train=True)``; ``quantize(bits=4, group=32, tables=5, activations='none')``.
    """

    activations: Literal["static", "dynamic", "none"] = "static"
    ranges: tuple[Literal["minmax", "percentile", "mse", "entropy"], ...] = field(default=ESTIMATORS)
    samples: int = 200
    holdout: int = 16
    equalize: bool = True
    smooth: bool = True
    rounding: Literal["nearest", "hqq", "gptq"] = "gptq"
    refit: bool = True
    correct: bool = True
    embeddings: bool = True
    bits: Width = 8
    activation_bits: Width | None = None
    ends: Width = 8
    tables: Width | None = None
    group: Literal[16, 32, 64, 128, 256] | None = None
    symmetric: bool = True
    levels: Levels | Literal["nf4"] = "uniform"
    train: bool | Training = False
    warmup_share: float = Field(default=1 / 3, ge=0, lt=1)

    def __post_init__(self) -> None:
        if self.activations == "dynamic" and self.activation_bits not in (None, 8):
            raise SpecError(f"quantize: activation_bits={self.activation_bits} came; dynamic activations have 8 bits.")
        if self.activations == "none" and self.activation_bits not in (None, FLOAT):
            raise SpecError(f"quantize: activation_bits={self.activation_bits} came, and activations='none'; leave one out.")
        if self.bits == FLOAT and self.kind != "none":
            raise SpecError("quantize: bits=32 came with quantized activations, where runtimes round weights to 8 bits by themselves: use bits=8.")
        if self.levels != "uniform" and self.bits != 8:
            raise SpecError(f"quantize: bits={self.bits} came; levels={self.levels!r} says already how many values a weight has.")
        if self.activations == "dynamic" and self.plan is not None:
            raise SpecError("quantize: dynamic ranges are not trained; use activations='static' or 'none'.")
        alone = [
            name for name, used in (("group", self.group), ("symmetric=False", not self.symmetric), ("levels='nf4'", self.levels == "nf4")) if used
        ]
        if alone and (self.kind != "none" or self.plan is not None):
            raise SpecError(
                f"quantize: {alone[0]} is for weights alone, after training: integer kernels take one scale a row. Use activations='none'."
            )
        if self.rounding == "hqq" and (self.symmetric or self.kind != "none"):
            raise SpecError("quantize: rounding='hqq' places zero points; use symmetric=False with activations='none'.")

    def __call__(self, network: Network, task: Task) -> Network:
        """The quantized network: the same function with fake quantizers in it, which a runtime's export turns into integers.

        Raises:
            TaskError: no calibration data, or NaN in it or in what the network makes of it.
        """
        if self.bits == FLOAT:
            return network.fork()
        original = network.fork().eval()
        drop_identities(original)
        fold_padding(original)
        plain = original.fork()
        fold_batch_norm(plain)
        if self.kind == "dynamic" or (self.kind == "none" and self.is_plain):
            made = self._without_data(plain.fork())
        elif self.kind == "none" and self.levels in ("uniform", "nf4") and self.plan is None:
            made = self._weights_alone(plain, task)
        else:
            pieces = self._split(plain, task)
            judge = Judge(plain, pieces[1], settle)
            # Batch norms that training brings back know the channels as they were.
            keeps = self.plan is not None and self.warmup_share > 0 and _norms(original) > _norms(plain)
            plain = self._balanced(plain, pieces, judge, self.equalize and not keeps)
            made = self._fitted(plain, pieces, judge)
        made.origin["quantized"] = self._told()
        if self.plan is not None:
            made = self._trained(made, plain, original, self.plan, task)
        round_biases(made)
        return made

    # What is wanted --------------------------------------------------------------------------------------------------------------

    @property
    def kind(self) -> str:
        """``activations``, or "none" where their bits say so."""
        uniform = self.levels == "uniform"
        width = (8 if uniform else FLOAT) if self.activation_bits is None else self.activation_bits
        return "none" if width == FLOAT and self.activations == "static" else self.activations

    @property
    def is_plain(self) -> bool:
        """Whether weights are int8, all on the largest value's scale, so that no data is needed."""
        rows = self.levels == "uniform" and self.group is None and self.symmetric
        return rows and self.bits == self.ends == 8 and self.tables in (None, 8)

    @property
    def plan(self) -> Training | None:
        """How it is trained, if at all."""
        return (Training() if self.train else None) if isinstance(self.train, bool) else self.train

    @property
    def widths(self) -> Bits:
        """The bits of everything."""
        return Bits(self.bits, self.activation_bits or 8, self.ends)

    def _told(self) -> str:
        if self.is_plain and (self.kind == "none" or self.widths.activations == 8):
            return f"int8 {self.kind}"
        weights = str(self._inner_format) if self.levels in ("uniform", "nf4") else self.levels
        return f"weights {weights}, activations {self.kind if self.kind != 'static' else f'{self.widths.activations} bits'}, ends {self.ends} bits"

    # After training --------------------------------------------------------------------------------------------------------------

    def _split(self, network: Network, task: Task) -> tuple[Pieces, Pieces]:
        """Calibration inputs to measure on, and others, spread evenly among them, to judge by."""
        pieces = Pieces.of(network, task.batches("calibrate"), self.samples)
        if len(pieces) < 2:
            return pieces, pieces
        return pieces.parted(max(2, len(pieces) // max(1, min(self.holdout, len(pieces) // 2))))

    def _balanced(self, plain: Network, pieces: tuple[Pieces, Pieces], judge: Judge, equal: bool) -> Network:
        """The network with scales moved between its layers, where plain rounding of it on full ranges then loses less; else as it came."""
        loss = None
        for balance, wanted in ((_equalized, equal), (_smoothed, self.smooth and self.kind == "static")):
            balanced = plain.fork()
            if wanted and balance(balanced, pieces):
                loss = self._trial(plain, pieces, judge) if loss is None else loss
                if (lower := self._trial(balanced, pieces, judge)) < loss:
                    loss, plain = lower, balanced
        return plain

    def _trial(self, network: Network, pieces: tuple[Pieces, Pieces], judge: Judge) -> float:
        placement = self._place(network)
        measured = distributions(network, _spread(pieces[0], TRIAL_PIECES), _own(placement))
        grids = _grids(self.widths.groups(network, placement))
        return judge(self._build(network, placement, {node: _simple_range(found, grids[node]) for node, found in measured.items()}))

    def _fitted(self, plain: Network, pieces: tuple[Pieces, Pieces], judge: Judge) -> Network:
        fit, held = pieces
        placement = self._place(plain)
        if not placement.layers:
            raise TaskError("The network has no convolution or linear layer with a constant weight: there is nothing to quantize.")
        trials = [self._build(plain, placement, ranges) for ranges in self._ranges(plain, placement, fit, held)]
        loss, best = min(((judge(trial), trial) for trial in trials), key=lambda pair: pair[0])
        solve = self.rounding == "gptq" and self.levels == "uniform"
        for improve, wanted, count in ((round_weights, solve, ROUNDING_PIECES), (correct_biases, self.correct, MEAN_PIECES)):
            if wanted:
                improved = best.fork()
                improve(plain, improved, _spread(fit, count))
                if (lower := judge(improved)) < loss:
                    loss, best = lower, improved
        return best

    def _ranges(self, plain: Network, placement: Placement, fit: Pieces, held: Pieces) -> list[dict[fx.Node, Range]]:
        """Ranges of all activations to choose between: the full ones, and those that each cause the least error."""
        measured = distributions(plain, fit, _own(placement)) if placement.activations else {}
        full: dict[fx.Node, Range] = {}
        chosen: dict[fx.Node, Range] = {}
        for grid, part in self.widths.groups(plain, placement):
            options = {node: candidates(measured[node], grid, self.ranges) for node in _own(part)}
            full |= {node: ranges[0] for node, ranges in options.items()}
            chosen |= choose(plain, part.activations, options, _spread(held, TRIAL_PIECES), grid)
        return [full, chosen] if "minmax" in self.ranges and placement.activations else [chosen]

    def _place(self, network: Network) -> Placement:
        placement = place(network)
        groups = self.widths.groups(network, placement) if self.kind == "static" else []
        return replace(placement, activations=[point for _, part in groups for point in part.activations])

    def _build(self, plain: Network, placement: Placement, ranges: dict[fx.Node, Range]) -> Network:
        made = plain.fork()
        moved = placement.on(made)
        by_name = {node.name: bounds for node, bounds in ranges.items()}
        for grid, part in self.widths.groups(made, moved):
            quantize_activations(made, part, {node: by_name[node.name] for node in _own(part)}, grid)
        self._quantize_weights(made, moved)
        made.recompile()
        return made

    def _quantize_weights(self, network: Network, placement: Placement) -> None:
        at_ends, inner = self.widths.parts(network, placement, self._is_wanted)
        grids = self.widths.grids
        if self.ends != FLOAT:
            quantize_weights(network, at_ends, grids[0])
        if self.levels == "uniform":
            quantize_weights(network, inner, grids[1])
        else:
            quantize_to_levels(network, inner, cast(Levels, self.levels))

    def _is_wanted(self, point: WeightPoint) -> bool:
        return self.embeddings or not all(user.target is aten.embedding.default for user in point.node.users)

    # Weights alone ---------------------------------------------------------------------------------------------------------------

    @property
    def _inner_format(self) -> Format:
        return Format(4 if self.levels == "nf4" else self.bits, self.group, self.symmetric, "nf4" if self.levels == "nf4" else "uniform")

    def _formats(self, network: Network, placement: Placement) -> dict[str, Format]:
        """The format of each weight; of ends and tables with 8 bits one scale a row."""
        at_ends, inner = self.widths.parts(network, placement, self._is_wanted)
        tables = {node.args[0] for node in network.graph.nodes if node.target is aten.embedding.default}
        formats = {str(point.node.target): self._inner_format for point in inner}
        for point in at_ends:
            bits = self.tables if self.tables is not None and point.node in tables else self.ends
            if bits != FLOAT:
                formats[str(point.node.target)] = Format(8) if bits == 8 else Format(bits, self.group, self.symmetric)
        return formats

    def _weights_alone(self, plain: Network, task: Task) -> Network:
        placement = place(plain)
        formats = self._formats(plain, placement)
        if not formats:
            raise TaskError("The network has no convolution, linear layer or table with a constant weight: there is nothing to quantize.")
        if self.rounding != "gptq":
            return quantize_weight_only(plain, placement, formats, self.rounding, None)
        data = Data(*self._split(plain, task))
        ways = [quantize_weight_only(plain, placement, formats, "nearest", None)]
        ways += [quantize_weight_only(plain, placement, formats, "gptq", data, self.refit, task.progress)]
        return min(ways, key=Judge(plain, data.held, settle))

    def _without_data(self, plain: Network) -> Network:
        placement = place(plain)
        if self.kind == "dynamic":
            linear = [layer for layer in placement.layers if layer.target is aten.linear.default]
            if not linear:
                raise TaskError("The network has no linear layer; dynamic quantization is for those: use quantize(activations='static').")
            quantize_dynamically(plain, placement, linear)
        self._quantize_weights(plain, placement)
        plain.recompile()
        return plain

    # With training ---------------------------------------------------------------------------------------------------------------

    def _trained(self, made: Network, plain: Network, original: Network, plan: Training, task: Task) -> Network:
        """The quantized network with weights, steps and zero points trained: first with its batch norms, then with them folded."""
        _, inner = self.widths.parts(plain, self._place(plain), self._is_wanted)
        levels: dict[str, Levels] = {str(point.node.target): cast(Levels, self.levels) for point in inner} if self.levels != "uniform" else {}
        student = learnable(made, plain, levels)
        norms = unfold(student, original) if self.warmup_share else []
        if norms:
            student = plan.train(student, task, hooks=[Quantizing(plan.optimizer, norms)], share=(0.0, self.warmup_share))
            fold(student, norms)
            plan = replace(plan, norms="freeze")
        student = plan.train(student, task, hooks=[Quantizing(plan.optimizer)], share=(self.warmup_share if norms else 0.0, 1.0))
        settle_learned(student)
        return student


def _equalized(network: Network, pieces: tuple[Pieces, Pieces]) -> int:
    return equalize(network)


def _smoothed(network: Network, pieces: tuple[Pieces, Pieces]) -> int:
    return smooth(network, place(network), _spread(pieces[0], ROUNDING_PIECES), _spread(pieces[1], TRIAL_PIECES))


def _simple_range(distribution: Distribution, grid: Grid) -> Range:
    """The full range, or, where there are few codes, the one with the least squared error."""
    return (distribution.low, distribution.high) if grid == UINT8 else mean_squared_error(distribution, grid)


def _norms(network: Network) -> int:
    return sum(node.target is aten.batch_norm.default for node in network.graph.nodes)


def _spread(pieces: Pieces, count: int) -> Pieces:
    """At most ``count`` of the pieces, evenly over the data."""
    return pieces[:: max(1, -(-len(pieces) // count))]


def _own(placement: Placement) -> list[fx.Node]:
    return [point.node for point in placement.activations if point.like is None]


def _grids(groups: list[tuple[Grid, Placement]]) -> dict[fx.Node, Grid]:
    return {node: grid for grid, part in groups for node in _own(part)}

"""Quantization of weights and activations to 8 bits and fewer: after training, and with training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import field, replace
from functools import partial
from typing import Literal, cast

from pydantic import Field
from torch import fx

from ..errors import SpecError, TaskError
from ..network.judge import Judge
from ..network.network import Network
from ..network.rewrite import aten, fold_batch_norm
from ..network.statistics import Pieces
from ..numerics.lowbit import Levels
from ..pruning.latency_limit import need_clock
from ..quantization.balancing import ROUNDING_PIECES, balanced, equalized, smoothed
from ..quantization.bits import FLOAT, Bits
from ..quantization.blocks import compute_in_blocks, has_kernel
from ..quantization.building import Build, prepared
from ..quantization.choosing import plain_ranges, ranges_to_try, spread
from ..quantization.correction import correct_biases, round_biases
from ..quantization.floating import in_float
from ..quantization.formats import Format
from ..quantization.insertion import quantize_dynamically, settle
from ..quantization.keeping import without
from ..quantization.learned import learnable, settle_learned
from ..quantization.limits import Limits, bits_within
from ..quantization.mixed import By
from ..quantization.norms import fold, unfold
from ..quantization.placement import RECURRENT, Placement, place
from ..quantization.profiles import Profile, kernels, room, tell
from ..quantization.ranges import ESTIMATORS
from ..quantization.reconstruction import Reconstruction, reconstruct
from ..quantization.recurrent import compute_dynamically, dynamic_layers, matrices
from ..quantization.rounding import round_weights
from ..quantization.timing import file_clock
from ..quantization.weight_only import Data, quantize_weight_only
from ..spec import frozen
from ..task import Task
from ..training.plan import Training
from ..training.quantizing import Quantizing

# How many pieces (of one sample or a few) are enough to solve for biases.
MEAN_PIECES = 64
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
        group: columns of a row that share a scale, instead of the whole row; ``symmetric``: without zero points. Both for weights alone, or
            with dynamic activations, which then have a scale for each row (token) and as many columns.
        levels: the values of weights: ``uniform`` (a grid of ``bits``), ``nf4`` (16, denser around zero; weights alone), ``twn`` and ``ttq``
            (three a row, evenly spaced or not), ``xnor`` and ``binary_connect`` (two a row; see ``numerics/lowbit.py``). The ends stay uniform.
        activations: ``static`` (ranges measured now: CNNs, and transformers that must be fast everywhere), ``dynamic`` (ranges measured
            at every run, linear layers only: fast in ONNX Runtime alone; of the whole tensor, or, with a ``group``, of each row and block of
            columns, in weights of 2^16 elements and more), ``none`` (only weights: a quarter of the bytes, no faster).
        train: train the rounded network. True: to imitate the original model, else as the plan says, e.g. ``finetune(epochs=3)``.
        warmup_share: the part of the training in which batch norms are still there, with moving statistics; then they are folded.
        ranges: which range estimators compete: minmax, percentile, mse, entropy.
        samples: calibration samples used at most. ``holdout``: of these, how many judge the choices.
        rounding: of weights: ``nearest``; of weights alone ``hqq`` (no data, zero points) or ``awq`` (columns that large inputs meet are scaled up);
            ``gptq`` (later columns make up for errors). ``refit``: with gptq and weights alone, fit layers to the original's outputs before.
        reconstruct: so many steps of gradient descent on the roundings, biases and activation steps of each part of the network, to give what
            the float one gives there (AdaRound, BRECQ, QDrop; no labels); 0: none. 400 take minutes, and help at 4 bits and fewer.
        equalize: try cross-layer equalization. ``smooth``: try smoothing the inputs of linear layers. ``correct``: correct biases.
        embeddings: quantize embedding tables too, one scale a row.
        widths: bits to choose among for each weight, the ends and tables too (mixed precision), instead of ``bits``, so that the outputs lose
            least under ``size``: a part of what the weights take at 8 bits, or bytes ('3 MB') of all weights with their scales; and under
            ``bops``: a part of the bit operations (multiply-accumulates times bits of weight and activation) at 8 bits; or, of 8 and 32, under
            ``latency``: a part of the time of one sample in float, or a time ('3 ms'), measured in the target's runtime. 32: in float.
            ``by``: each width's ``loss``, measured; or ``fisher``, estimated from derivatives, in less time.
        profile: of the integer kernels. ``x86``: unsigned activations, asymmetric. ``avx2``: for x86 processors without VNNI, which add pairs
            of products in 16 bits: weights have at most 7 bits, so that no sum leaves that range. ``auto``: the one that this machine's
            processor needs. ``tensorrt``: signed symmetric activations, biases and tables in float, no integer operators beside
            QuantizeLinear and DequantizeLinear.
        keep: weights, or modules, that stay in float with the inputs of their layers, by name, ``*`` standing for anything.

    Examples: ``quantize(bits=4, activation_bits=4, train=True)``; ``quantize(bits=4, group=32, tables=5, activations='none')``;
    ``quantize(group=128, activations='dynamic')``;
    ``quantize(widths=[4, 5, 6, 8], size=60%, keep=['classifier'])``.
    """

    activations: Literal["static", "dynamic", "none"] = "static"
    ranges: tuple[Literal["minmax", "percentile", "mse", "entropy"], ...] = field(default=ESTIMATORS)
    samples: int = 200
    holdout: int = 16
    equalize: bool = True
    smooth: bool = True
    rounding: Literal["nearest", "hqq", "awq", "gptq"] = "gptq"
    refit: bool = True
    reconstruct: int = Field(default=0, ge=0)
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
    widths: tuple[Width, ...] = ()
    size: str | float | None = None
    bops: float | None = Field(default=None, gt=0, le=1)
    latency: str | float | None = None
    by: By = "loss"
    profile: Profile = "auto"
    keep: tuple[str, ...] = ()

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
        given = {"levels": "nf4", "rounding": "awq", "symmetric": False}
        alone = [f"{name}={value!r}" for name, value in given.items() if getattr(self, name) == value] + ["group"] * bool(self.group)
        if alone and not self.in_blocks and (self.kind != "none" or self.plan is not None):
            raise SpecError(
                f"quantize: {alone[0]} is for weights alone, or a group with 'dynamic', after training: use activations='none', and no train."
            )
        if self.rounding == "hqq" and (self.symmetric or not (self.kind == "none" or self.in_blocks)):
            raise SpecError("quantize: rounding='hqq' places zero points; use symmetric=False with activations='none', or 'dynamic' with a group.")
        plain = ("uniform", "auto", "x86")
        if self.in_blocks and (self.levels != "uniform" or self.profile not in plain or not has_kernel(self.bits, self.group or 0)):
            came = next(f"{name}={getattr(self, name)!r}" for name in ("levels", "profile", "bits") if getattr(self, name) not in plain)
            raise SpecError(
                f"quantize: {came} came with a group and dynamic activations, whose kernels take 4 or 8 bits, or 2 in groups of 32 to 128."
            )
        if self.profile not in plain and self.kind == "none":
            raise SpecError(f"quantize: profile={self.profile!r} came, and weights alone, which no integer kernel multiplies; leave one out.")
        if self.profile == "tensorrt" and (self.kind != "static" or self.plan is not None or self.activation_bits not in (None, 8)):
            raise SpecError("quantize: profile='tensorrt' is for static activations of 8 bits, after training: leave the other fields out.")
        self.limits.check(self.widths, self.kind, self.levels == "uniform" and self.bits == 8)

    def __call__(self, network: Network, task: Task) -> Network:
        """The quantized network: the same function with fake quantizers in it, which a runtime's export turns into integers.

        Raises:
            TaskError: no calibration data, NaN in it or in what the network makes of it, or ``latency`` without a clock.
            AllocationError: a limit cannot be reached; the message says what can.
        """
        if self.bits == FLOAT:
            return network.fork()
        if self.latency is not None:
            file_clock(need_clock(task.clock))
        tell(self.profile, self.wanted, self.most, task.progress)
        original = prepared(network)
        plain = original.fork()
        fold_batch_norm(plain)
        if self.in_blocks:
            made = self._weights_alone(plain, task)
            compute_in_blocks(made, self.group or 0, [node.name for node in dynamic_layers(plain, self._place(plain))])
        elif self.kind == "dynamic" or (self.kind == "none" and self.is_plain):
            made = self._without_data(plain.fork())
        elif self.kind == "none" and self.levels in ("uniform", "nf4") and self.plan is None:
            made = self._weights_alone(plain, task)
        else:
            pieces = self._split(plain, task)
            judge = Judge(plain, pieces[1], settle)
            # Batch norms that training brings back know the channels as they were.
            keeps = self.plan is not None and self.warmup_share > 0 and _norms(original) > _norms(plain)
            ways = [*[equalized] * (self.equalize and not keeps), *[smoothed] * (self.smooth and self.kind == "static")]
            plain = balanced(plain, pieces, partial(self._trial, pieces=pieces, judge=judge), ways)
            bits = self._mixed(network, plain, pieces, task)
            if bits and set(bits.values()) == {FLOAT}:
                return network.fork()
            made = replace(self, keep=(*self.keep, *in_float(bits)))._fitted(plain, pieces, judge, bits)
            made = self._reconstructed(plain, made, pieces, task)
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
    def in_blocks(self) -> bool:
        """Whether inputs are rounded at run time in the blocks that weights have scales for."""
        return self.kind == "dynamic" and self.group is not None

    @property
    def kernels(self) -> Profile:
        """``profile``, with ``auto`` resolved for this machine."""
        return kernels(self.profile, integers=self.kind != "none")

    @property
    def wanted(self) -> int:
        """The most bits that are asked for in a weight that is quantized."""
        return max(bits for bits in (self.bits, self.ends, self.tables or 2, *self.widths) if bits != FLOAT)

    @property
    def most(self) -> int:
        """The bits that these kernels have room for in a weight; those that multiply in blocks have room for all."""
        return 8 if self.in_blocks else room(8, self.kernels)

    @property
    def is_plain(self) -> bool:
        """Whether weights are int8, all on the largest value's scale, so that no data is needed."""
        rows = self.levels == "uniform" and self.group is None and self.symmetric
        return (
            rows
            and not self.reconstruct
            and set(self.widths) <= {8}
            and self.size is None
            and self.bits == self.ends == 8
            and self.tables in (None, 8)
        )

    @property
    def limits(self) -> Limits:
        """Under which ``widths`` are chosen."""
        return Limits(self.size, self.bops, self.latency, self.by, self.rounding == "gptq")

    @property
    def plan(self) -> Training | None:
        """How it is trained, if at all."""
        return (Training() if self.train else None) if isinstance(self.train, bool) else self.train

    @property
    def counts(self) -> Bits:
        """The bits of everything."""
        return Bits(self.bits, self.activation_bits or 8, self.ends, self.profile == "tensorrt", self.most)

    @property
    def build(self) -> Build:
        """What puts the quantizers in."""
        return Build(self.counts, self.levels, self.embeddings)

    def _told(self) -> str:
        if self.widths:
            among = ", ".join(map(str, sorted(set(self.widths))))
            return f"weights of {among} bits, activations {self.kind if self.kind != 'static' else f'{self.counts.activations} bits'}"
        if self.is_plain and (self.kind == "none" or self.counts.activations == 8):
            return f"int8 {self.kind}" + f", weights of {self.most} bits" * (self.most < 8)
        weights = str(self._inner_format) if self.levels in ("uniform", "nf4") else self.levels
        activations = self.kind if self.kind != "static" else f"{self.counts.activations} bits"
        return f"weights {weights}, activations {activations}, ends {self.counts.of_weights[0]} bits"

    # After training --------------------------------------------------------------------------------------------------------------

    def _split(self, network: Network, task: Task) -> tuple[Pieces, Pieces]:
        """Calibration inputs to measure on, and others, spread evenly among them, to judge by."""
        pieces = Pieces.of(network, task.batches("calibrate"), self.samples)
        if len(pieces) < 2:
            return pieces, pieces
        return pieces.parted(max(2, len(pieces) // max(1, min(self.holdout, len(pieces) // 2))))

    def _trial(self, network: Network, pieces: tuple[Pieces, Pieces], judge: Judge) -> float:
        placement = self._place(network)
        return judge(self.build(network, placement, plain_ranges(network, placement, self.counts, pieces[0]), {}))

    def _fitted(self, plain: Network, pieces: tuple[Pieces, Pieces], judge: Judge, bits: Mapping[str, int]) -> Network:
        placement = self._place(plain)
        if not placement.layers and not placement.recurrent:
            raise TaskError("The network has no convolution or linear layer with a constant weight, or keep has all: there is nothing to quantize.")
        trials = [self.build(plain, placement, ranges, bits) for ranges in ranges_to_try(plain, placement, self.counts, pieces, self.ranges)]
        loss, best = min(((judge(trial), trial) for trial in trials), key=lambda pair: pair[0])
        solve = self.rounding == "gptq" and self.levels == "uniform"
        for improve, wanted, count in ((round_weights, solve, ROUNDING_PIECES), (correct_biases, self.correct, MEAN_PIECES)):
            if wanted:
                improved = best.fork()
                improve(plain, improved, spread(pieces[0], count))
                if (lower := judge(improved)) < loss:
                    loss, best = lower, improved
        return best

    def _place(self, network: Network) -> Placement:
        placement = place(network)
        # TensorRT has no integer tables and recurrent layers; what a layer reads of one stays in float, too.
        tables = [str(p.node.target) for p in placement.weights if any(user.target in (aten.embedding.default, *RECURRENT) for user in p.node.users)]
        placement = without(placement, (*self.keep, *(tables if self.profile == "tensorrt" else ())))
        if self.kind == "dynamic":
            return placement
        groups = self.counts.groups(network, placement) if self.kind == "static" else []
        return replace(placement, activations=[point for _, part in groups for point in part.activations])

    # Weights alone ---------------------------------------------------------------------------------------------------------------

    @property
    def _inner_format(self) -> Format:
        return Format(4 if self.levels == "nf4" else self.bits, self.group, self.symmetric, "nf4" if self.levels == "nf4" else "uniform")

    def _mixed(self, original: Network, plain: Network, pieces: tuple[Pieces, Pieces], task: Task) -> dict[str, int]:
        """The bits of each weight, where ``widths`` leaves a choice."""
        if not self.widths:
            return {}
        widths = {bits if bits == FLOAT else min(bits, self.most) for bits in self.widths}
        return bits_within(original, plain, self._place(plain), self.build, self._inner_format, widths, self.limits, pieces, task)

    def _formats(self, network: Network, placement: Placement, bits: Mapping[str, int]) -> dict[str, Format]:
        """The format of each weight; of ends and tables with 8 bits one scale a row."""
        if bits:
            return {name: replace(self._inner_format, bits=count) for name, count in bits.items() if count != FLOAT}
        at_ends, inner = self.counts.parts(network, placement, self.build.takes)
        tables = {node.args[0] for node in network.graph.nodes if node.target is aten.embedding.default}
        formats = {str(point.node.target): self._inner_format for point in inner}
        for point in at_ends:
            count = self.tables if self.tables is not None and point.node in tables else self.ends
            if count != FLOAT:
                formats[str(point.node.target)] = Format(8) if count == 8 else Format(count, self.group, self.symmetric)
        # The integer operator for an LSTM takes one scale a row.
        states, bits_of_states = dynamic_layers(network, placement) if self.in_blocks else [], room(self.bits, self.kernels)
        return formats | {str(one.target): Format(bits_of_states) for node in states for one in matrices(network, node)}

    def _weights_alone(self, plain: Network, task: Task) -> Network:
        placement = self._place(plain)
        if self.in_blocks:
            _linear(placement)
        pieces = self._split(plain, task) if self.rounding in ("awq", "gptq") or self.widths or self.reconstruct else None
        bits = self._mixed(plain, plain, pieces, task) if pieces else {}
        formats = self._formats(plain, placement, bits)
        if bits and not formats:
            return plain
        if not formats:
            raise TaskError("The network has no convolution, linear layer or table with a constant weight, or keep=... has all: nothing to quantize.")
        plain.origin |= {"bits": bits} if bits else {}
        made = quantize_weight_only(plain, placement, formats, "hqq" if self.rounding == "hqq" else "nearest", None)
        if pieces is None:
            return made
        if self.rounding in ("awq", "gptq"):
            solved = quantize_weight_only(plain, placement, formats, self.rounding, Data(*pieces), self.refit, task.progress)
            made = min(made, solved, key=Judge(plain, pieces[1], settle))
        return self._reconstructed(plain, made, pieces, task)

    def _reconstructed(self, plain: Network, made: Network, pieces: tuple[Pieces, Pieces], task: Task) -> Network:
        if not self.reconstruct:
            return made
        improved, say = made.fork(), task.progress.say if task.progress else None
        reconstruct(plain, improved, *pieces, Reconstruction(steps=self.reconstruct), say)
        return min(made, improved, key=Judge(plain, pieces[1], settle))

    def _without_data(self, plain: Network) -> Network:
        placement = self._place(plain)
        if self.kind == "dynamic":
            quantize_dynamically(plain, placement, _linear(placement))
            compute_dynamically(plain, placement)
        self.build.weights(plain, placement, {})
        plain.recompile()
        return plain

    # With training ---------------------------------------------------------------------------------------------------------------

    def _trained(self, made: Network, plain: Network, original: Network, plan: Training, task: Task) -> Network:
        """The quantized network with weights, steps and zero points trained: first with its batch norms, then with them folded."""
        _, inner = self.counts.parts(plain, self._place(plain), self.build.takes)
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


def _linear(placement: Placement) -> list[fx.Node]:
    """The layers for dynamic activations beside recurrent ones, which are there without them."""
    linear = [layer for layer in placement.layers if layer.target is aten.linear.default]
    if not linear and not placement.recurrent:
        raise TaskError("The network has no linear layer or LSTM; dynamic quantization is for those: use quantize(activations='static').")
    return linear


def _norms(network: Network) -> int:
    return sum(node.target is aten.batch_norm.default for node in network.graph.nodes)

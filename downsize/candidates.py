"""Which recipes fit a target, and which of the measured files is the best."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from .facts import Attempt, Measurement
from .processor import adds_in_16_bits
from .target import Target, show

if TYPE_CHECKING:
    from .network.network import Network

RESOURCES = ("size", "latency", "latency_ratio", "memory")
# Of the multiply-accumulates, tried one after another where no file meets the limits: the two largest that could bring this about.
SHARES = (0.7, 0.5, 0.35, 0.25)
# Bytes and milliseconds may fall faster than multiply-accumulates, by this factor at best.
FASTER = 1.25
SPARE = 0.97  # of a limit of time is asked for, where two measurements of it must agree
DROP_WITHOUT_LIMIT = 0.01  # with no limit at all the smallest and fastest file is wanted, but not one that has lost its skill
# Elements of a weight from which on ONNX Runtime's integer kernel for weights in blocks of 128 columns took at most 0.8 times as long as floats.
LARGE_LAYER = 2**17
RECURRENT = ("aten.lstm",)
LINEAR, CONVOLUTION = ("aten.linear", "aten.addmm", "aten.mm", "aten.matmul"), ("aten.conv",)


def recipes_for(runtime: str, network: Network, features: Collection[str] = ()) -> list[str]:
    """The int8 recipes that ``runtime`` executes well enough to be worth a trial on a processor with these ``features``."""
    recipes = ["quantize()"]
    # OpenVINO runs the operators of dynamic quantization in float, more slowly than the original; convolutions have no such operator.
    if runtime == "onnxruntime" and _weights_of(network, LINEAR + RECURRENT) > _weights_of(network, CONVOLUTION):
        recipes.append("quantize(activations='dynamic')")
        # Without integer sums in 32 bits, blocks took up to 1.7 times as long as floats, and always longer than dynamic layers without them.
        if not adds_in_16_bits(features) and _is_made_of_large_layers(network):
            recipes.append("quantize(activations='dynamic', rounding='nearest', group=128)")
    return [*recipes, "quantize(activations='none')"]


def halves_for(precisions: Collection[str]) -> list[str]:
    """The recipes of 16 bits that are worth a trial where the runtime computes in these ``precisions`` beside float32."""
    return ["halve()", *(["halve(dtype='bfloat16', compute=True)"] if "bf16" in precisions else [])]


def floats_for(attempt: Attempt, target: Target) -> list[str]:
    """For an int8 file that meets the limits of time and loses more score than it may: as many of the layers in float as the time allows."""
    times = [one for one in (attempt.verdict.outcomes if attempt.verdict else ()) if one.limit.name in ("latency", "latency_ratio")]
    static = attempt.recipe.startswith("quantize(") and "activations" not in attempt.recipe
    allowed = DROP_WITHOUT_LIMIT if target.drop is None else target.drop
    if not (static and times and all(one.met for one in times)) or loss_of(attempt)[0] <= allowed:
        return []
    # The recipe's clock takes one sample, and measures apart from the verdict.
    limits = [f"{SPARE * target.latency * 1e3:.4g} ms"] if target.latency and target.batch == 1 else []
    limits += [f"{SPARE * target.latency_ratio:.3g}"] if target.latency_ratio and target.latency_ratio < 1 else []
    return [f"quantize(widths=[8, 32], latency={limit})" for limit in limits]


def shares_for(attempt: Attempt) -> tuple[float, ...]:
    """The shares of the multiply-accumulates with which an attempt might meet the limits of size, time and memory that it misses."""
    outcomes = attempt.verdict.outcomes if attempt.verdict is not None else ()
    excess = max((one.excess for one in outcomes if not one.met and one.limit.name in RESOURCES), default=0.0)
    return tuple(share for share in SHARES if share * (1 + excess) <= FASTER)[:2] if excess else ()


def smaller_for(network: Network, nearest: str, share: float) -> list[str]:
    """Recipes with fewer multiply-accumulates, of which that share stays, in front of the one that came nearest: for limits that bits alone do not
    meet."""
    if not _weights_of(network, LINEAR + CONVOLUTION):
        return []
    behind = nearest if nearest.startswith("quantize(") and " | " not in nearest else ""
    return [" | ".join(filter(None, [f"{word}(macs={share})", behind])) for word in ("prune", "factorize")]


def is_lossless(attempt: Attempt) -> bool:
    """Whether a file meets all limits and loses no score that counts: then more bits cannot be better."""
    return attempt.verdict is not None and attempt.verdict.met and loss_of(attempt)[0] == 0


def _weights_of(network: Network, operators: tuple[str, ...]) -> int:
    """The elements of the constant tensors that nodes of these operators read."""
    readers = [node for node in network.graph.nodes if node.op == "call_function" and str(node.target).startswith(operators)]
    names = {str(source.target) for node in readers for source in node.all_input_nodes if source.op == "get_attr"}
    return sum(network.tensor(name).numel() for name in names)


def _is_made_of_large_layers(network: Network) -> bool:
    """Whether most weights of linear layers are in ones in which a scale for each row and block of columns costs little time."""
    layers = [node for node in network.graph.nodes if str(node.target).startswith("aten.linear.") and node.args[1].op == "get_attr"]  # type: ignore[union-attr]
    sizes = [network.tensor(name).numel() for name in dict.fromkeys(str(node.args[1].target) for node in layers)]  # type: ignore[union-attr]
    return 2 * sum(size for size in sizes if size >= LARGE_LAYER) > sum(sizes)


def needs_speed(target: Target) -> bool:
    """Whether the target limits time or memory, for which a file that is not smaller may still be worth it."""
    return any(limit.name in ("latency", "latency_ratio", "memory") for limit in target.limits())


def why_not_worth_it(attempt: Attempt, baseline: Attempt) -> str | None:
    """Why a file does not pay beside the original, with the numbers; None when it does."""
    size, before = attempt.measurements["size"], baseline.measurements["size"]
    ratio = attempt.measurements.get("latency_ratio")
    if ratio is not None and ratio.low is not None and ratio.low > 1:
        return f"slower than the original: {ratio}"
    if size.value >= before.value:
        return f"not smaller than the original: {show(size.value, 'bytes', 4)} against {show(before.value, 'bytes', 4)}"
    return None


def best_of(attempts: Sequence[Attempt], target: Target) -> Attempt:
    """The best of the measured attempts, of which the first is the original.

    All limits met with the least loss; if none meets them, the smallest worst miss. What does not pay (slower, bigger) is taken only where
    nothing else comes as near. Where nothing but the score is limited, all that keep it are good, and the smallest and fastest is wanted.
    """
    baseline = attempts[0]
    measured = [attempt for attempt in attempts if attempt.verdict is not None]
    resources = any(limit.name in RESOURCES for limit in target.limits())

    def order(attempt: Attempt) -> tuple[float, ...]:
        assert attempt.verdict is not None
        excess = max((outcome.excess for outcome in attempt.verdict.outcomes if not outcome.met), default=0.0)
        idle = float(attempt is not baseline and why_not_worth_it(attempt, baseline) is not None)
        if resources:
            return (excess, idle, *loss_of(attempt), _shrink(attempt, baseline))
        drop = attempt.measurements.get("drop")
        lossy = float(target.drop is None and (drop is None or drop.value > DROP_WITHOUT_LIMIT))
        return (excess, lossy, idle, _shrink(attempt, baseline))

    return min(measured, key=order, default=baseline)


def loss_of(attempt: Attempt) -> tuple[float, float]:
    """What an attempt loses, as coarse as it is known: the drop of the score in steps of 0.1 %, then the outputs' error in powers of 2.

    A gain counts as no drop: it is noise. Where two files lose the same, the smaller and faster one is better.
    """
    drop = attempt.measurements.get("drop")
    error = attempt.agreement.relative_error if attempt.agreement else float("inf")
    return (
        round(max(drop.value, 0.0), 3) if drop else float("inf"),
        round(math.log2(error)) if 0 < error < float("inf") else error or -float("inf"),
    )


def _shrink(attempt: Attempt, baseline: Attempt) -> float:
    """The size times the latency, as a part of the original's."""
    ratio = attempt.measurements.get("latency_ratio")
    return attempt.measurements["size"].value / baseline.measurements["size"].value * (ratio.value if ratio else 1.0)


def explained(attempts: Sequence[Attempt], chosen: Attempt, target: Target) -> list[Attempt]:
    """The attempts with ``taken`` set and a reason with its numbers for each; those that failed keep theirs."""
    baseline = attempts[0]
    return [replace(attempt, taken=attempt is chosen, reason=attempt.reason or _reason(attempt, chosen, baseline, target)) for attempt in attempts]


def _reason(attempt: Attempt, chosen: Attempt, baseline: Attempt, target: Target) -> str:
    idle = None if attempt is baseline else why_not_worth_it(attempt, baseline)
    missed = [outcome.text for outcome in attempt.verdict.outcomes if not outcome.met] if attempt.verdict else []
    if attempt is chosen:
        return _why_taken(missed, idle, target)
    if idle or missed:
        return "; ".join([*([idle] if idle else []), *missed])
    if any(limit.name in RESOURCES for limit in target.limits()):
        worse = "loses more than" if loss_of(attempt) > loss_of(chosen) else "loses as much and is not as small and fast as"
        return f"meets the limits, but {worse} {chosen.name}: {_loss_text(attempt)} against {_loss_text(chosen)}"
    return f"keeps the score, but {chosen.name} is smaller and faster as a whole"


def _why_taken(missed: list[str], idle: str | None, target: Target) -> str:
    if missed:
        return "no file meets all limits; this one comes nearest: " + "; ".join(missed)
    why = "the smallest and fastest that keeps the score"
    if any(limit.name in RESOURCES for limit in target.limits()):
        why = "meets all limits with the least loss"
    return f"{why}, although it is {idle}" if idle else why


def _loss_text(attempt: Attempt) -> str:
    drop: Measurement | None = attempt.measurements.get("drop")
    error = "" if attempt.agreement is None else f", relative error {attempt.agreement.relative_error:.3g}"
    return (f"drop {show(drop.value, drop.unit)}" if drop else "drop not measured") + error

"""What an earlier step has taken from layers, given back in part by thin branches beside them."""

# pyright: reportAttributeAccessIssue=false, reportArgumentType=false

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field
from torch import fx

from ..errors import SpecError, TaskError, nearest
from ..factoring.branches import add_branches
from ..network.capture import capture
from ..network.columns import MATRIX_LAYERS
from ..network.judge import Judge
from ..network.network import Network
from ..network.rewrite import aten, fold_batch_norm
from ..progress import Progress
from ..pruning.pieces import collected
from ..pruning.structure import QUANTIZERS
from ..quantization.building import prepared
from ..quantization.insertion import settle
from ..quantization.keeping import is_named
from ..spec import frozen
from ..task import Task


@frozen
class Compensate:
    """Give every layer a branch of low rank that makes up for what rounding its weights, or zeros in them, have changed.

    ``quantize(bits=3, activations='none') | compensate(rank=16)`` is a quantized residual of low rank, ``sparsify(sparsity=0.8) |
    compensate(rank=16)`` sparse plus low rank. Branches are two plain layers and a sum, fitted on calibration data without labels; each
    stays only if it helps on held-back samples.

    Fields:
        rank: of every branch.
        bits: of the branch's weights: 8 or 32; not given: 8 where the network has quantized weights.
        layers: weights, or modules, whose layers get branches, by name, ``*`` standing for anything.
        samples: calibration samples used at most, of which every ``holdout``-th judges the choices.

    Example: ``compensate(rank=16, layers=['encoder*'])``.
    """

    rank: int = Field(default=8, ge=1)
    bits: Literal[8, 32] | None = None
    layers: tuple[str, ...] = ("*",)
    samples: int = Field(default=512, ge=2)
    holdout: int = Field(default=5, ge=2)

    def __call__(self, network: Network, task: Task) -> Network:
        """The network with branches; ``origin["compensated"]`` tells which layers have one, with their output errors without and with it.

        Raises:
            SpecError: a name is that of no layer's weight.
            TaskError: activations are quantized, where a sum beside a layer would leave the integers; no layer is one of the original's.
        """
        made = network.fork().eval()
        quantized = [node for node in made.graph.nodes if node.target in QUANTIZERS]
        if any(node.args[0].op != "get_attr" for node in quantized):
            raise TaskError(
                "The network has quantized activations, which a branch would leave: compensate weights alone, quantize(activations='none')."
            )
        original = self._original(made, task)
        data = collected(original, task, self.samples, self.holdout)
        bits = self.bits or (8 if quantized else 32)
        branches = add_branches(original, made, self._layers(made), self.rank, bits, data.fit, data.held, task.progress or Progress(quiet=True))
        told = {one.layer: f"error {one.before:.3g} -> {one.after:.3g}" for one in branches}
        judge = Judge(original, data.held, settle)
        before, after = judge(network), judge(made)
        if after >= before:
            made, told = network.fork().eval(), {}
        made.origin["compensated"] = {"rank": self.rank, "bits": bits, "outputs": f"error {before:.3g} -> {min(before, after):.3g}", "layers": told}
        return made

    def _layers(self, network: Network) -> list[str]:
        """Names of the nodes that read the weights asked for."""
        weights = {node.name: _weight(node) for node in network.graph.nodes if node.target in MATRIX_LAYERS and _weight(node)}
        if not weights:
            raise TaskError("The network has no convolution or linear layer with a constant weight: there is nothing to compensate.")
        for pattern in self.layers:
            if not any(is_named(name, [pattern]) for name in weights.values()):
                raise SpecError(f"compensate: layers={pattern!r} names none of the weights; {nearest(pattern, list(weights.values()))}")
        return [node for node, name in weights.items() if is_named(name, self.layers)]

    def _original(self, network: Network, task: Task) -> Network:
        """The original in the network's form: batch norms folded where the network has none."""
        made = prepared(capture(task.model, task.example, more=task.variations()))
        left, all_norms = _norms(network), _norms(made)
        if all_norms - left and left:
            raise TaskError(
                f"Some batch norms are folded and {len(left)} are not, so that layers cannot be compared: compensate before, or behind quantize()."
            )
        if not left:
            fold_batch_norm(made)
        return made


def _norms(network: Network) -> set[str]:
    return {node.name for node in network.graph.nodes if node.target is aten.batch_norm.default}


def _weight(layer: fx.Node) -> str:
    """The name of a layer's weight, quantized or not; empty if it is computed."""
    node: Any = layer.args[1]
    while node.op == "call_function" and node.target in QUANTIZERS:
        node = node.args[0]
    return str(node.target) if node.op == "get_attr" else ""

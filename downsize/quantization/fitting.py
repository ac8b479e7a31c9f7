"""One part of a quantized network while its roundings, biases and activation steps are trained."""

# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false, reportOptionalMemberAccess=false
# pyright: reportOptionalOperand=false
# (torch.fx types every argument as a union of everything)

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from ..network.network import Network
from ..network.rewrite import argument, constant, set_constant
from ..numerics.grids import per_axis
from ..numerics.groups import spread
from ..numerics.lowbit import learned_step
from ..numerics.rounding import Rounding, rectified_sigmoid, undecided
from .insertion import FAKE, grid_of
from .placement import WEIGHT_LAYERS
from .regions import Region

GROUPED = torch.ops.downsize.fake_quantize_groups.default
# Shorter rows (of depthwise convolutions) stay as they were rounded: a solver's few codes are good together, each is a large part of the
# output, and one that becomes hard last makes it many times worse; measured, the part as a whole ends better without.
FEWEST_COLUMNS = 32
# Grids with this code have so many that rounding up or down is not worth training; those of two learned levels, whose codes must stay, have it too.
MANY = 63


@dataclass(frozen=True)
class _Bias:
    """A bias as it was; ``unit``: what it moves by where its variable moves by one; ``moved``: the variable."""

    value: Tensor
    unit: Tensor
    moved: Tensor

    def now(self) -> Tensor:
        return self.value + self.unit * self.moved


class Fitting:
    """The variables of a part, and what it computes with them.

    Args:
        network: the quantized network; nothing in it is changed before :meth:`keep`.
        reference: the float one, whose weights of the same names say which neighbour a code has.
    """

    def __init__(self, network: Network, reference: Network, part: Region) -> None:
        self.network, self.part = network, part
        self.weights: dict[fx.Node, Rounding] = {}  # by quantizer of a weight
        self.v: dict[fx.Node, Tensor] = {}
        self.biases: dict[fx.Node, _Bias] = {}
        self.steps: dict[fx.Node, Tensor] = {}  # by the node of an activation's step its factor
        originals = dict(reference.named_tensors())
        for layer in part.layers:
            self._open(layer, originals)
        inside = set(part.nodes)
        for node in part.nodes:
            if node.target is FAKE and all(user in inside for user in node.args[1].users):
                self.steps[node.args[1]] = torch.ones_like(constant(network, node.args[1])).requires_grad_()
        self._constants: dict[fx.Node, Any] = {}

    def _open(self, layer: fx.Node, originals: Mapping[str, Tensor]) -> None:
        """Let the layer's weight and bias be trained, where it alone has them."""
        _, at_weight, at_bias, axis = WEIGHT_LAYERS[layer.target]
        fake = layer.args[at_weight]
        source = fake.args[0] if fake.target in (FAKE, GROUPED) else None
        weight = constant(self.network, source)
        if weight is None or len(fake.users) > 1 or len(source.users) > 1 or grid_of(fake).high >= MANY:
            return
        if str(source.target) in originals and weight.numel() >= FEWEST_COLUMNS * weight.shape[axis]:
            original = originals[str(source.target)].detach()
            self.weights[fake] = Rounding.of(weight.detach(), original, *self._steps_of(fake, weight), grid_of(fake))
            self.v[fake] = self.weights[fake].start.clone().requires_grad_()
        node = None if at_bias is None else argument(layer, at_bias, "bias")
        bias = constant(self.network, node)
        if bias is not None and len(node.users) == 1 and bias.dim() == 1:
            norms = weight.detach().transpose(0, axis).flatten(1).norm(dim=1)
            self.biases[node] = _Bias(bias.detach(), norms, torch.zeros_like(bias.detach()).requires_grad_())

    def _steps_of(self, fake: fx.Node, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Step and zero point of each element of a weight."""
        step, zero = (constant(self.network, node).detach() for node in fake.args[1:3])
        if fake.target is GROUPED:
            step, zero = (spread(each, weight[0].numel(), fake.args[3]).reshape(weight.shape) for each in (step, zero))
        else:
            step, zero = (per_axis(each, fake.args[3], weight.dim()) for each in (step, zero))
        return step, zero.to(step.dtype)

    def undecided(self, beta: float) -> Tensor:
        """The mean of the regulariser over all weights that may move."""
        count = sum(int(one.kept.sum()) for one in self.weights.values())
        sums = [(undecided(rectified_sigmoid(self.v[fake]), beta) * one.kept).sum() for fake, one in self.weights.items()]
        return torch.stack(sums).sum() / max(1, count) if sums else torch.zeros(())

    def output(self, x: Tensor, values: Mapping[fx.Node, Tensor] | None = None) -> Tensor:
        """The part's output as the network is, or with the values of :meth:`hard`."""
        return self._run(x, values or {}, None)

    def training(self, x: Tensor, drop: Drop, settled: bool) -> Tensor:
        """Its output with the variables, from which gradients come: weights between their codes or, once ``settled``, on them."""
        weights = {fake: one.hard(self.v[fake]) if settled else one.soft(rectified_sigmoid(self.v[fake])) for fake, one in self.weights.items()}
        return self._run(x, {**weights, **{node: bias.now() for node, bias in self.biases.items()}}, drop)

    def hard(self) -> dict[fx.Node, Tensor]:
        """By node what the variables stand for: weights on their grids, biases, and steps of activations."""
        with torch.no_grad():
            found = {fake: one.hard(self.v[fake]) for fake, one in self.weights.items()}
            found |= {node: bias.now() for node, bias in self.biases.items()}
            return found | {step: constant(self.network, step) * factor for step, factor in self.steps.items()}

    def keep(self, hard: Mapping[fx.Node, Tensor]) -> None:
        """Put them into the network."""
        for node, tensor in hard.items():
            set_constant(self.network, node.args[0] if node in self.weights else node, tensor)

    def _run(self, x: Tensor, given: Mapping[fx.Node, Tensor], drop: Drop | None) -> Tensor:
        known: dict[fx.Node, Any] = {self.part.entry: x, **given}

        def look(node: fx.Node) -> Any:
            return known[node] if node in known else self._constant(node)

        for node in self.part.nodes:
            args, kwargs = fx.map_arg((node.args, node.kwargs), look)
            if drop is not None and node.target is FAKE:
                factor = self.steps.get(node.args[1])
                quantized = node.target(*args) if factor is None else learned_step(*args[:2], factor, args[2], *args[3:])
                known[node] = drop(quantized, args[0])
            else:
                known[node] = node.target(*args, **kwargs)
        return known[self.part.exit]

    def _constant(self, node: fx.Node) -> Any:
        """The value of a node outside, which is a constant or computed from constants."""
        if node.op == "get_attr":
            return self.network.tensor(str(node.target)).detach()
        if node not in self._constants:
            with torch.no_grad():
                args, kwargs = fx.map_arg((node.args, node.kwargs), self._constant)
                self._constants[node] = node.target(*args, **kwargs)
        return self._constants[node]


@dataclass(frozen=True)
class Drop:
    """Takes elements of the float value instead of the quantized one, with a probability ``share`` (Wei et al. 2022, arXiv 2203.05740)."""

    share: float
    generator: torch.Generator

    def __call__(self, quantized: Tensor, exact: Tensor) -> Tensor:
        if not self.share:
            return quantized
        return torch.where(torch.rand(exact.shape, generator=self.generator) < self.share, exact, quantized)

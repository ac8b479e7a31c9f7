"""Quantizers that training can move: fake quantizers become functions with learned steps or levels, and afterwards fake quantizers again."""

# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false, reportOptionalMemberAccess=false
# (torch.fx types every argument as a union of everything)

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..network.network import Network
from ..network.parts import assign
from ..network.rewrite import add_constant, constant, set_constant
from ..numerics.grids import Grid, per_axis
from ..numerics.lowbit import SETTLED, TERNARY, TWO_SIDED, Levels, codes_of, learned_step, trained_ternary, whole_zero
from .insertion import FAKE, function_of, grid_of

# A weight's rounding is kept where its start is put this near to the middle between two codes, in steps.
NEARLY_HALF = 0.49


def learnable(quantized: Network, plain: Network, levels: Mapping[str, Levels]) -> Network:
    """A fork of a quantized network that computes the same and can be trained; it cannot be saved before :func:`settle_learned`.

    Args:
        plain: the network that was quantized; what a weight was before it was rounded is what training moves, as near to it as has the
            code that it was rounded to.
        levels: by name of the weight what its few levels are; the others have a uniform grid with a learned step.
    """
    made = quantized.fork()
    shared: dict[Any, Any] = {}
    for fake in [node for node in made.graph.nodes if node.target is FAKE]:
        name = str(fake.args[0].target)
        if constant(made, fake.args[0]) is None:
            _learn_activation(made, fake, shared)
        elif name in levels:
            _learn_levels(made, fake, plain.tensor(name).detach(), levels[name], shared)
        else:
            _learn_weight(made, fake, plain.tensor(name).detach(), shared)
    made.recompile()
    return made


def _learn_activation(network: Network, fake: fx.Node, shared: dict[Any, Any]) -> None:
    """A learned step, and a learned zero point where both signs occur; quantizers that share a step go on sharing it."""
    step, offset = fake.args[1:3]
    if step not in shared:
        scale, zero = constant(network, step), constant(network, offset)
        factor = _parameter(network, f"{step.target}_factor", torch.ones_like(scale), step)
        if int(zero):
            offset = _parameter(network, f"{offset.target}_learned", zero.float(), step)
        shared[step] = factor, offset
    fake.target, fake.args = learned_step, (fake.args[0], step, *shared[step], *fake.args[3:])


def _learn_weight(network: Network, fake: fx.Node, original: Tensor, shared: dict[Any, Any]) -> None:
    step, offset, axis = fake.args[1:4]
    scale = constant(network, step)
    _start_at(network, fake.args[0], _nearest_with_code(constant(network, fake.args[0]).detach(), original, scale, axis, grid_of(fake)), shared)
    factor = _parameter(network, f"{step.target}_factor", torch.ones_like(scale), step)
    fake.target, fake.args = learned_step, (fake.args[0], step, factor, offset, *fake.args[3:])


def _learn_levels(network: Network, fake: fx.Node, original: Tensor, levels: Levels, shared: dict[Any, Any]) -> None:
    weight, step, axis = fake.args[0], fake.args[1], fake.args[3]
    _start_at(network, weight, original, shared)
    function, _, *rest = function_of(levels, original, axis, str(weight.target) in network.sparse)
    if function is trained_ternary:
        start, factor = rest[:2]
        rest[:2] = add_constant(network, f"{step.target}_start", start, step), _parameter(network, f"{step.target}_factor", factor, step)
    elif isinstance(rest[0], Tensor):
        rest[0] = step
    fake.target, fake.args = function, (weight, *rest)


def _nearest_with_code(rounded: Tensor, original: Tensor, scale: Tensor, axis: int | None, grid: Grid) -> Tensor:
    """What is nearest to the original weight among all that has the codes of the rounded one."""
    step = per_axis(scale, axis, rounded.dim())
    codes = (rounded / step).round().clamp(grid.low, grid.high)
    low = torch.where(codes > grid.low, codes - NEARLY_HALF, -torch.inf)
    high = torch.where(codes < grid.high, codes + NEARLY_HALF, torch.inf)
    found = torch.minimum(torch.maximum(original / step, low), high) * step
    return torch.where((original / step >= low) & (original / step <= high), original, found)


def _start_at(network: Network, weight: fx.Node, tensor: Tensor, shared: dict[Any, Any]) -> None:
    """Let training move the weight from there; a tensor with several names stays one."""
    old = network.tensor(str(weight.target))
    if id(old) not in shared:
        shared[id(old)] = nn.Parameter(tensor.clone(), old.requires_grad) if isinstance(old, nn.Parameter) else tensor.clone()
    assign(network.graph_module, str(weight.target), shared[id(old)])


def _parameter(network: Network, name: str, tensor: Tensor, before: fx.Node) -> fx.Node:
    return add_constant(network, name, nn.Parameter(tensor), before)


def learned_nodes(network: Network) -> list[fx.Node]:
    """The quantizers of a learnable network."""
    return [node for node in network.graph.nodes if node.op == "call_function" and node.target in SETTLED]


def settle_learned(network: Network) -> None:
    """The inverse of :func:`learnable`, in place: weights take their grids' values, and functions become fake quantizers with the same values."""
    moved: dict[fx.Node, fx.Node] = {}
    for node in learned_nodes(network):
        tensors = [constant(network, argument) if isinstance(argument, fx.Node) else argument for argument in node.args]
        if tensors[0] is None:
            _settle_activation(network, node, moved)
        else:
            _settle_weight(network, node, tensors)
    network.recompile()


def _settle_activation(network: Network, node: fx.Node, moved: dict[fx.Node, fx.Node]) -> None:
    x, step, factor, zero, axis, low, high = node.args
    if step not in moved:
        tensors = [constant(network, argument).detach() for argument in (step, factor, zero)]
        moved[step] = add_constant(network, f"{step.target}_zero", whole_zero(tensors[2], low, high).int(), step)
        set_constant(network, step, tensors[0] * tensors[1])
    node.target, node.args = FAKE, (x, step, moved[step], axis, low, high)


def _settle_weight(network: Network, node: fx.Node, tensors: list[Any]) -> None:
    weight, name = node.args[0], str(node.args[0].target)
    codes, scale = codes_of(node.target, *[one.detach() if isinstance(one, Tensor) else one for one in tensors])
    axis = next(argument for argument in node.args if not isinstance(argument, fx.Node))
    grid = TERNARY
    if node.target is learned_step:
        grid = Grid(*node.args[-2:])
    elif node.target is trained_ternary:
        grid = TWO_SIDED
    set_constant(network, weight, codes * per_axis(scale, axis, codes.dim()))
    parts = ("step", scale), ("offset", torch.zeros_like(scale, dtype=torch.int32))
    made = [add_constant(network, f"{name}_{what}", tensor, weight) for what, tensor in parts]
    node.target, node.args = FAKE, (weight, *made, axis, grid.low, grid.high)

"""Networks whose weights are fake-quantized in given formats, by hand, and their files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import onnx
import torch
from onnx import numpy_helper
from small_nets import plain
from torch import Tensor, nn

from downsize.network.network import Network
from downsize.network.rewrite import add_constant, insert_after

ours = torch.ops.downsize


class Way(NamedTuple):
    """How a weight is quantized: to ``bits`` in groups (0: one scale a row), with zero points or without; or to ``levels`` given numbers."""

    bits: int
    group: int = 0
    asymmetric: bool = False
    levels: bool = False
    channels: bool = False

    def __str__(self) -> str:
        kind = "levels" if self.levels else "channels" if self.channels else f"groups of {self.group or 'all'}"
        return f"{self.bits} bits, {kind}{', asymmetric' if self.asymmetric else ''}"


def quantize(network: Network, ways: dict[str, Way]) -> Network:
    """Fake-quantize the weights by name, each scale such that the largest value of its group is covered."""
    for name, way in ways.items():
        node = next(node for node in network.graph.nodes if node.op == "get_attr" and node.target == name)
        target, parts, rest = _made(network.tensor(name).detach(), way)
        before = next(iter(node.users))
        constants = [add_constant(network, f"{name}_{what}", tensor, before) for what, tensor in zip(("step", "offset"), parts, strict=True)]
        insert_after(network, node, target, (*constants, *rest))
    network.recompile()
    return network


def _made(weight: Tensor, way: Way) -> tuple[Any, tuple[Tensor, Tensor], tuple[int | None, ...]]:
    matrix = weight.flatten(1)
    group = way.group or matrix.shape[1]
    missing = -matrix.shape[1] % group
    groups = torch.nn.functional.pad(matrix, (0, missing)).unflatten(1, (-1, group))
    if way.levels:
        levels = torch.linspace(-1, 1, 2**way.bits) ** 3
        return ours.fake_quantize_levels.default, (groups.abs().amax(2), levels), (group,)
    low, high = (0, 2**way.bits - 1) if way.asymmetric else (-(2 ** (way.bits - 1)), 2 ** (way.bits - 1) - 1)
    extent = groups.amax(2).clamp(min=0) - groups.amin(2).clamp(max=0) if way.asymmetric else 2 * groups.abs().amax(2)
    # As a file holds it: 16 bits.
    scale = (extent / 2**way.bits).half().float().clamp(min=2**-14)
    zero = (-groups.amin(2).clamp(max=0) / scale).round().clamp(low, high).int() if way.asymmetric else torch.zeros_like(scale, dtype=torch.int32)
    if way.channels:
        return ours.fake_quantize.default, (scale[:, 0].contiguous(), zero[:, 0].contiguous()), (0, low, high)
    return ours.fake_quantize_groups.default, (scale, zero), (group, low, high)


def quantized(build: Callable[[], nn.Module], example: Any, ways: dict[str, Way]) -> Network:
    torch.manual_seed(0)
    return quantize(plain(build().eval(), example), ways)


def initializers(path: Path) -> dict[str, Any]:
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in onnx.load(path).graph.initializer}

"""A walk over a graph on tensors without data: what shapes and types its values have."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode

from .network import Network
from .quiet import quiet
from .statistics import Hook, Walk, walk

META = torch.device("meta")
aten = torch.ops.aten
# How many sizes follow the channels.
TRANSPOSED = {aten.conv_transpose1d.default: 1, aten.conv_transpose2d.input: 2, aten.conv_transpose3d.input: 3}


def dry_walk(network: Network, hooks: Mapping[fx.Node, Hook], sizes: Sequence[Sequence[int]] | None = None) -> None:
    """Run the graph without data, and then call ``hooks[node](args, value)`` for each node named there, in the graph's order.

    Of the tensors that a hook gets, shape and type are right; they hold nothing, may say that they lie on another device, and may have
    other strides than in a run. What a hook returns is not used.

    Args:
        sizes: of the inputs, else those of the example.

    Raises: whatever a guard or an operator says of sizes that it does not take, or of values that it needs.
    """
    given = [tuple(size) for size in sizes or [port.example for port in network.ports]]
    with quiet():
        # Torch's fake tensors, which follow devices and constants, take three times as long: for the operators that need these.
        try:
            seen = _seen(_Meta, network, hooks, given, META)
        except Exception:
            with FakeTensorMode(allow_non_fake_inputs=True):
                seen = _seen(Walk, network, hooks, given, torch.device("cpu"))
    for node, args, value in seen:
        hooks[node](args, value)


def _seen(
    kind: type[Walk], network: Network, nodes: Collection[fx.Node], sizes: Sequence[tuple[int, ...]], device: torch.device
) -> list[tuple[fx.Node, tuple[Any, ...], Any]]:
    """The nodes with their arguments and values."""
    found: list[tuple[fx.Node, tuple[Any, ...], Any]] = []

    def recorder(node: fx.Node) -> Hook:
        return lambda args, value: found.append((node, args, value))

    with torch.no_grad():
        leaves = [torch.empty(size, dtype=port.dtype, device=device) for size, port in zip(sizes, network.ports, strict=True)]
        kind(network, {node: recorder(node) for node in nodes}).run(*leaves, enable_io_processing=False)
    return found


class _Meta(Walk):
    """Everything lies on the device that holds no data."""

    def fetch_attr(self, target: str) -> Any:
        value = super().fetch_attr(target)
        return value.to(META) if isinstance(value, Tensor) else value

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if target in TRANSPOSED and args[0].shape[-1 - TRANSPOSED[target]] != args[1].shape[0]:
            raise ValueError(f"{target}: {tuple(args[0].shape)} does not fit a weight {tuple(args[1].shape)}")  # the device does not see it
        if isinstance(target, torch._ops.OpOverload):
            for place, argument in enumerate(target._schema.arguments):
                if argument.name == "device" and place < len(args):
                    args = (*args[:place], META, *args[place + 1 :])
                elif argument.name == "device":
                    kwargs = {**kwargs, "device": META}
        return super().call_function(target, args, kwargs)


def shapes(network: Network) -> dict[fx.Node, tuple[int, ...]]:
    """The shape of every tensor node at the example's sizes: computed without data, or on zeros where a shape depends on values."""
    found: dict[fx.Node, tuple[int, ...]] = {}

    def recorder(node: fx.Node) -> Hook:
        def record(args: tuple[Any, ...], value: Any) -> None:
            if isinstance(value, Tensor):
                found[node] = tuple(value.shape)

        return record

    hooks = {node: recorder(node) for node in network.graph.nodes}
    try:
        dry_walk(network, hooks)
    except Exception:
        walk(network, [torch.zeros(port.example, dtype=port.dtype) for port in network.ports], hooks)
    return found

"""A walk over a graph on tensors without data: what shapes, types and layouts its values have."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode

from .network import Network
from .quiet import quiet
from .statistics import Hook, Walk

META = torch.device("meta")


def dry_walk(network: Network, hooks: Mapping[fx.Node, Hook], sizes: Sequence[Sequence[int]] | None = None) -> None:
    """Run the graph without data, calling ``hooks[node](args, value)`` behind each node named there, perhaps twice.

    Of the tensors that a hook gets, shape and type are right; they hold nothing, may say that they lie on another device, and may have
    other strides than in a run.

    Args:
        sizes: of the inputs, else those of the example.

    Raises: whatever a guard or an operator says of sizes that it does not take.
    """
    given = [tuple(size) for size in sizes or [port.example for port in network.ports]]
    with torch.no_grad(), quiet():
        # Torch's fake tensors, which follow devices and constants, take three times as long: for the operators that need these.
        with contextlib.suppress(Exception):
            leaves = [torch.empty(size, dtype=port.dtype, device=META) for size, port in zip(given, network.ports, strict=True)]
            _Meta(network, hooks).run(*leaves, enable_io_processing=False)
            return
        with FakeTensorMode(allow_non_fake_inputs=True):
            leaves = [torch.empty(size, dtype=port.dtype) for size, port in zip(given, network.ports, strict=True)]
            Walk(network, hooks).run(*leaves, enable_io_processing=False)


class _Meta(Walk):
    """Everything lies on the device that holds no data."""

    def fetch_attr(self, target: str) -> Any:
        value = super().fetch_attr(target)
        return value.to(META) if isinstance(value, Tensor) else value

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if isinstance(target, torch._ops.OpOverload):
            for place, argument in enumerate(target._schema.arguments):
                if argument.name == "device" and place < len(args):
                    args = (*args[:place], META, *args[place + 1 :])
                elif argument.name == "device":
                    kwargs = {**kwargs, "device": META}
        return super().call_function(target, args, kwargs)


def shapes(network: Network) -> dict[fx.Node, tuple[int, ...]]:
    """The shape of every tensor node at the example's sizes, computed without data."""
    found: dict[fx.Node, tuple[int, ...]] = {}

    def recorder(node: fx.Node) -> Hook:
        def record(args: tuple[Any, ...], value: Any) -> None:
            if isinstance(value, Tensor):
                found[node] = tuple(value.shape)

        return record

    dry_walk(network, {node: recorder(node) for node in network.graph.nodes})
    return found

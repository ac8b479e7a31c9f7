"""Weights in 16 bits, and computing in 16 bits where the target does."""

# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false
# (torch.fx types every argument as a union of everything)

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, fx

from ..errors import SpecError, TaskError, nearest
from ..network.dry import dry_walk
from ..network.lower_halves import ROUND
from ..network.memory import is_written
from ..network.network import Network
from ..network.rewrite import CONVOLUTIONS, TRANSPOSED, aten, constant, drop_identities, fold_batch_norm, fold_padding, insert_after
from ..network.statistics import Hook, chunks, walk
from ..numerics.halves import loss_of
from ..quantization.keeping import is_named
from ..spec import frozen
from ..task import Task

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}
# The node that widens a constant takes about as many bytes as 16 bits save in a tensor of this many numbers.
SMALLEST = 64
PRODUCTS = {
    *CONVOLUTIONS, *TRANSPOSED, aten.linear.default, aten.addmm.default, aten.mm.default, aten.matmul.default, aten.bmm.default,
    aten.baddbmm.default, aten.scaled_dot_product_attention.default,
}  # fmt: skip
LARGEST_HALF = 65504.0


@frozen
class Halve:
    """Store weights in 16 bits: half the file, without data, and computed in float32 from the rounded weights.

    Batch norms are folded first. Tensors of one dimension (biases, norms), small ones and quantized ones stay as they are. It comes last in a
    recipe: other techniques look for weights that are not rounded yet.

    Fields:
        dtype: ``float16`` (rounds to 1 part in 2048, up to 65504) or ``bfloat16`` (1 part in 256, the range of float32).
        compute: also compute in it where the runtime and the processor can: OpenVINO on CPUs with such products. What matrix products and
            convolutions read is then rounded in the network, too. ONNX Runtime goes on in float32, where it has no such kernels on CPUs.
        keep: weights, or modules, that stay in float32, by name, ``*`` standing for anything.
        samples: with ``compute`` and float16: calibration samples on which inner values are looked at for overflow.
    """

    dtype: Literal["float16", "bfloat16"] = "float16"
    compute: bool = False
    keep: tuple[str, ...] = ()
    samples: int = 64

    def __call__(self, network: Network, task: Task) -> Network:
        """The network with rounded weights, and, with ``compute``, rounded inputs of products.

        Raises:
            TaskError: a weight, or with ``compute`` an inner value on the calibration data, is beyond the range of the type.
            SpecError: ``keep`` names no weight.
        """
        made = network.fork().eval()
        drop_identities(made)
        fold_padding(made)
        fold_batch_norm(made)
        dtype = DTYPES[self.dtype]
        weights = self._weights(made)
        vanished = sum(_checked(node, made.tensor(str(node.target)), dtype) for node in weights)
        if self.compute:
            if dtype is torch.float16:
                _check_values(made, task, self.samples)
            _round_inputs(made, dtype)
        for node in weights:
            insert_after(made, node, ROUND, (dtype,))
        made.recompile()
        count = sum({str(node.target): made.tensor(str(node.target)).numel() for node in weights}.values())
        if vanished and task.progress is not None:
            task.progress.say(f"halve: {vanished} of {count} weights are so small that they are zero in {self.dtype}.")
        made.origin["halved"] = {"dtype": self.dtype, "computed in it": self.compute, "weights": count, "became zero": vanished}
        return made

    def _weights(self, network: Network) -> list[fx.Node]:
        """The nodes that read a weight to be rounded."""
        found = [node for node in network.graph.nodes if node.op == "get_attr" and _is_weight(network, node)]
        names = {str(node.target) for node in found}
        for pattern in self.keep:
            if not any(is_named(name, [pattern]) for name in names):
                raise SpecError(f"halve: keep={pattern!r} names none of the weights; {nearest(pattern, names)}")
        return [node for node in found if not is_named(str(node.target), self.keep)]


def _is_weight(network: Network, node: fx.Node) -> bool:
    tensor = network.tensor(str(node.target))
    plain = isinstance(tensor, torch.nn.Parameter) and tensor.dtype is torch.float32 and tensor.dim() > 1 and tensor.numel() >= SMALLEST
    # Quantized weights have fewer bits already.
    read = bool(node.users) and not any(user.op == "output" or _is_quantizer(user) for user in node.users)
    return plain and read and not is_written(node)


def _checked(node: fx.Node, weight: Tensor, dtype: torch.dtype) -> int:
    """How many of a weight's numbers become zero; refuses one with numbers beyond the range of ``dtype``."""
    loss = loss_of(weight, dtype)
    if loss.overflowed:
        raise TaskError(
            f"halve: {loss.overflowed} of {weight.numel()} numbers of {node.target} are beyond {_short(dtype)}, which ends at "
            f"{torch.finfo(dtype).max:g}: the largest is {loss.largest:g}. {_mend(dtype)}keep=['{node.target}'] leaves it in float32."
        )
    return loss.vanished


def _check_values(network: Network, task: Task, samples: int) -> None:
    """Refuse a network that has inner values beyond float16 on the calibration data."""
    largest: dict[fx.Node, float] = {}

    def record(node: fx.Node) -> Hook:
        def look(args: tuple[Any, ...], value: Any) -> None:
            if isinstance(value, Tensor) and value.dtype is torch.float32 and value.numel():
                # Infinite values are there on purpose, as in masks.
                largest[node] = max(largest.get(node, 0.0), float(torch.where(value.isfinite(), value, 0).abs().max()))

        return look

    hooks = {node: record(node) for node in network.graph.nodes if node.op == "call_function"}
    for leaves in chunks(network, task.batches("calibrate"), samples):
        walk(network, leaves, hooks)
    beyond = [node for node, value in largest.items() if value > LARGEST_HALF]
    if beyond:
        where = f"{beyond[0].name} ({beyond[0].meta.get('module') or 'the model'})"
        raise TaskError(
            f"halve: {where} reaches {largest[beyond[0]]:g} on the calibration data, beyond float16, which ends at {LARGEST_HALF:g} "
            f"({len(beyond)} inner values do). Use dtype='bfloat16', or compute=False, which stores 16 bits and computes in float32."
        )


def _round_inputs(network: Network, dtype: torch.dtype) -> None:
    """Round what float products read, constants and masks apart, once for all of them."""
    floats = _floats(network)
    readers: dict[fx.Node, list[fx.Node]] = {}
    for node in network.graph.nodes:
        if node.target in PRODUCTS and not any(_is_quantizer(source) for source in node.all_input_nodes):
            for source in dict.fromkeys(one for one in node.args[:3] if isinstance(one, fx.Node)):
                if source in floats and constant(network, source) is None:
                    readers.setdefault(source, []).append(node)
    for source, users in readers.items():
        insert_after(network, source, ROUND, (dtype,), users)


def _floats(network: Network) -> set[fx.Node]:
    """The nodes whose value is a float32 tensor."""
    found: set[fx.Node] = set()

    def record(node: fx.Node) -> Hook:
        return lambda args, value: found.add(node) if isinstance(value, Tensor) and value.dtype is torch.float32 else None

    dry_walk(network, {node: record(node) for node in network.graph.nodes})
    return found


def _is_quantizer(node: fx.Node) -> bool:
    return node.op == "call_function" and str(node.target).startswith("downsize.")


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _mend(dtype: torch.dtype) -> str:
    return "dtype='bfloat16' has the range of float32; " if dtype is torch.float16 else ""

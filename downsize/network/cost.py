# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false, reportOptionalSubscript=false
# pyright: reportOperatorIssue=false, reportOptionalMemberAccess=false
"""What a Network costs by arithmetic: multiply-accumulates, parameters and bytes, node by node, and what was not counted.

One MAC is one multiplication with its addition; FLOPs are 2 x MACs. Only products count (convolutions, linear layers, matrix products,
attention, recurrent cells); elementwise operators, normalisations, pooling and look-ups are listed as not counted, never silently dropped.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import Parameter

from ..numerics import grids, groups, recurrent  # noqa: F401  (they register torch.ops.downsize)
from .network import Network
from .rewrite import aten
from .statistics import Hook, walk

Shape = tuple[int, ...]
# Operators that move or view data, or make shapes: nothing to count, nothing to report.
_FREE = """
    view reshape flatten permute transpose squeeze unsqueeze contiguous expand expand_as clone detach alias slice select split
    split_with_sizes chunk cat stack pad constant_pad_nd dropout sym_size arange to _to_copy zeros ones full new_ones new_zeros empty t
    numpy_T unbind getitem unflatten repeat roll lift_fresh_copy type_as copy copy_ detach_ view_as reshape_as swapaxes swapdims movedim
    new_full zeros_like ones_like full_like empty_like broadcast_to concat concatenate narrow tensor_split unsafe_chunk unsafe_split tile
    """
FREE = frozenset(_FREE.split())
QUANTIZERS = tuple(getattr(torch.ops.downsize, name).default for name in ("fake_quantize", "fake_quantize_groups", "fake_quantize_levels"))


@dataclass(frozen=True)
class Row:
    """One operator: its node, the user's module path and source line, and its cost for the inputs that were given.

    ``parameters`` counts the elements of the trainable tensors it reads, ``bytes`` those of all its constant tensors (running statistics
    too); a tensor read twice is counted at its first reader. A weight that a quantizer reads has the bytes of its codes, packed.
    """

    node: str
    module: str
    source: str
    operator: str
    macs: int
    parameters: int
    bytes: int
    output_shape: Shape


@dataclass(frozen=True)
class Cost:
    """The cost of one run on the given inputs. ``not_counted`` maps operators that compute something else to how often they occur."""

    rows: tuple[Row, ...]
    macs: int
    flops: int
    parameters: int
    bytes: int
    not_counted: dict[str, int]


def _convolution(args: tuple[Any, ...], output: Tensor) -> int:
    weight = args[1]
    return output.numel() * prod(weight.shape[1:])


def _transposed(args: tuple[Any, ...], output: Tensor) -> int:
    # Every input position meets the whole kernel of its group.
    return args[0].numel() * prod(args[1].shape[1:])


def _linear(args: tuple[Any, ...], output: Tensor) -> int:
    return output.numel() * args[1].shape[-1]


def _product(left: int) -> Callable[[tuple[Any, ...], Tensor], int]:
    def count(args: tuple[Any, ...], output: Tensor) -> int:
        return output.numel() * args[left].shape[-1]

    return count


def _attention(args: tuple[Any, ...], output: Tensor) -> int:
    query, key, value = args[:3]
    return prod(query.shape[:-1]) * key.shape[-2] * (query.shape[-1] + value.shape[-1])


def _recurrent(args: tuple[Any, ...], output: Any) -> int:
    # Every time step meets every matrix of every layer and direction once.
    return prod(args[0].shape[:-1]) * sum(prod(weight.shape) for weight in args[2] if weight.dim() == 2)


def _inner(args: tuple[Any, ...], output: Tensor) -> int:
    return args[0].numel()


def _outer(args: tuple[Any, ...], output: Tensor) -> int:
    return output.numel()


def _einsum(args: tuple[Any, ...], output: Tensor) -> int:
    """All indices of all operands together, each once: exact for two operands, for more what the plain sum over all of them takes."""
    operands = args[1]
    if len(operands) < 2:
        return 0
    sizes: dict[str, int] = {}
    for term, operand in zip(args[0].replace(" ", "").split("->")[0].split(","), operands, strict=True):
        before, dots, behind = term.partition("...")
        hidden = [f".{i}" for i in range(operand.dim() - len(before) - len(behind), 0, -1)] if dots else []
        for label, size in zip([*before, *hidden, *behind], operand.shape, strict=True):
            sizes[label] = max(size, sizes.get(label, 1))
    return prod(sizes.values())


COUNTED: dict[object, Callable[[tuple[Any, ...], Any], int]] = {
    aten.conv1d.default: _convolution, aten.conv2d.default: _convolution, aten.conv3d.default: _convolution,
    aten.conv_transpose1d.default: _transposed, aten.conv_transpose2d.input: _transposed, aten.conv_transpose3d.input: _transposed,
    aten.linear.default: _linear,
    aten.matmul.default: _product(0), aten.bmm.default: _product(0), aten.mm.default: _product(0), aten.mv.default: _product(0),
    aten.addmm.default: _product(1), aten.baddbmm.default: _product(1), aten.addmv.default: _product(1),
    aten.dot.default: _inner, aten.outer.default: _outer, aten.einsum.default: _einsum,
    aten.scaled_dot_product_attention.default: _attention,
    aten.lstm.input: _recurrent, aten.gru.input: _recurrent, aten.rnn_tanh.input: _recurrent, aten.rnn_relu.input: _recurrent,
    torch.ops.downsize.dynamic_lstm.default: _recurrent,
}  # fmt: skip


def count(network: Network, inputs: Any) -> Cost:
    """Count one run of ``network`` on ``inputs`` (as a batch gives them).

    Raises:
        ArtifactError: the inputs do not fit the network.
    """
    rows: list[Row] = []
    not_counted: Counter[str] = Counter()
    owned = _first_readers(network)

    def recorder(node: fx.Node) -> Hook:
        def record(args: tuple[Any, ...], value: Any) -> None:
            tensors = [network.tensor(name) for name in owned.get(node, ())]
            macs = COUNTED[node.target](args, value) if node.target in COUNTED else 0
            name = _short(node)
            if node.target not in COUNTED and name not in FREE and _tensors_in(value):
                not_counted[name] += 1
            shape = tuple(value.shape) if isinstance(value, Tensor) else ()
            sizes = sum(t.numel() for t in tensors if isinstance(t, Parameter)), _bytes(network, node, owned.get(node, ()))
            rows.append(Row(node.name, node.meta.get("module", ""), node.meta.get("source", ""), name, macs, *sizes, shape))

        return record

    walk(network, network.flat(inputs), {node: recorder(node) for node in network.graph.nodes if node.op == "call_function"})
    macs = sum(row.macs for row in rows)
    return Cost(tuple(rows), macs, 2 * macs, sum(r.parameters for r in rows), sum(r.bytes for r in rows), dict(not_counted.most_common()))


def _bytes(network: Network, node: fx.Node, names: Iterable[str]) -> int:
    """Bytes of the constants of these names that a node reads."""
    total = 0
    for name in names:
        tensor = network.tensor(name)
        is_weight = node.target in QUANTIZERS and node.args[0].op == "get_attr" and network.tensor(node.args[0].target) is tensor
        total += -(-tensor.numel() * _bits(network, node) // 8) if is_weight else tensor.numel() * tensor.element_size()
    return total


def _bits(network: Network, quantizer: fx.Node) -> int:
    """How many bits the codes of a quantizer have."""
    if quantizer.target is torch.ops.downsize.fake_quantize_levels.default:
        return max((len(network.tensor(quantizer.args[2].target)) - 1).bit_length(), 1)
    return (quantizer.args[-1] - quantizer.args[-2]).bit_length()


def _tensors_in(value: Any) -> bool:
    return isinstance(value, Tensor) or (isinstance(value, (tuple, list)) and any(isinstance(item, Tensor) for item in value))


def _short(node: fx.Node) -> str:
    schema = getattr(node.target, "_schema", None)
    return schema.name.split("::")[1] if schema is not None else getattr(node.target, "__name__", str(node.target))


def _first_readers(network: Network) -> dict[fx.Node, list[str]]:
    """For every operator the constant tensors it is the first to read."""
    seen: set[int] = set()
    owned: dict[fx.Node, list[str]] = {}
    for node in network.graph.nodes:
        for source in node.all_input_nodes:
            if source.op == "get_attr" and id(network.tensor(source.target)) not in seen:
                seen.add(id(network.tensor(source.target)))
                owned.setdefault(node, []).append(source.target)
    return owned

"""Inputs of linear layers rounded at run time: one scale for each row and block of columns, in which the weight has scales of its own."""

# pyright: reportArgumentType=false, reportCallIssue=false, reportAttributeAccessIssue=false, reportOptionalMemberAccess=false
# pyright: reportReturnType=false
# (torch.fx types every argument as a union of everything)

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import fx

from ..network.lower_groups import INTEGER_KERNELS
from ..network.network import Network
from ..network.rewrite import aten, constant, insert_after
from .grouped import GROUPED
from .insertion import FAKE, grid_of
from .recurrent import DYNAMIC

BLOCKS = torch.ops.downsize.fake_quantize_blocks.default
# Elements of a weight below which ONNX Runtime's integer kernel took longer than floats: of 128 x 128 1.1 to 1.4 times as long (4 and 8 bits, 1 to
# 128 rows), of 256 x 256 0.9 to 1.2, of 384 x 384 0.7 to 1.05, of 384 x 1536 0.5 to 0.95 times.
SMALLEST = 2**16


def has_kernel(bits: int, group: int) -> bool:
    """Whether a runtime multiplies such weights with inputs rounded in the same blocks, in integers."""
    return any(group in kernels.get(bits, ()) for kernels in INTEGER_KERNELS.values())


def compute_in_blocks(network: Network, group: int, recurrent: Collection[str]) -> None:
    """Round the inputs of linear layers with quantized weights in blocks of ``group`` columns at run time, in place.

    ``origin["weights_alone"]`` names the layers whose inputs stay float beside a quantized weight: convolutions, weights below ``SMALLEST`` elements,
    of widths or groups that no integer kernel takes, or whose outputs do not lie along the first dimension.

    Args:
        recurrent: nodes of LSTM layers that take their inputs and states in 8 bits, each with one scale (see ``recurrent.py``).
    """
    for node in network.graph.nodes:
        node.target = DYNAMIC if node.name in recurrent else node.target
    readers: dict[fx.Node, list[fx.Node]] = {}
    alone: dict[str, None] = {}
    for fake in [node for node in network.graph.nodes if node.target in (FAKE, GROUPED) and constant(network, node.args[0]) is not None]:
        for layer in fake.users:
            if layer.target is aten.linear.default and layer.args[1] is fake and _fits(network, fake, group):
                readers.setdefault(layer.args[0], []).append(layer)
            elif layer.target not in (aten.embedding.default, DYNAMIC):
                alone[str(layer.meta.get("module") or layer.name)] = None
    for source, layers in readers.items():
        insert_after(network, source, BLOCKS, (group,), layers)
    network.origin |= {"weights_alone": list(alone)} if alone else {}
    network.recompile()


def _fits(network: Network, fake: fx.Node, group: int) -> bool:
    """Whether a kernel takes this weight with inputs in these blocks."""
    weight, _, zero = (constant(network, part) for part in fake.args[:3])
    grid = grid_of(fake)
    if weight.numel() < SMALLEST or not has_kernel((grid.high - grid.low).bit_length(), group):
        return False
    if fake.target is GROUPED:
        # The group of a shorter row is all of it.
        return fake.args[3] == min(group, weight.shape[1])
    return fake.args[3] == 0 and not bool(zero.any())

"""The order of images in memory: convolutions on the CPU are faster where a pixel's channels lie side by side."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..network.network import Network
from ..network.rewrite import aten
from ..spool import tree_map

CONVOLUTIONS = (aten.conv2d.default, aten.conv_transpose2d.input)
IMAGES = 4  # dimensions: samples, channels, height, width


def arrange(network: Network, leaves: list[Tensor]) -> bool:
    """Lay the kernels out with channels last, in place, if the network convolves images and its graph runs on images that lie so.

    Values and shapes stay what they are. A graph that views an image as another shape cannot run so; then nothing is changed.

    Returns: whether batches should be :func:`arranged`.
    """
    if not any(node.target in CONVOLUTIONS for node in network.graph.nodes) or not any(leaf.dim() == IMAGES for leaf in leaves):
        return False
    try:
        with torch.no_grad():
            network.fork().eval().graph_module(*arranged(leaves))
    except RuntimeError:
        return False
    for parameter in network.parameters():
        if parameter.dim() == IMAGES:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
    return True


def arranged(tree: Any) -> Any:
    """The same tensors, those of images laid out with channels last."""

    def one(leaf: Any) -> Any:
        is_image = isinstance(leaf, Tensor) and leaf.dim() == IMAGES and leaf.is_floating_point()
        return leaf.contiguous(memory_format=torch.channels_last) if is_image else leaf

    return tree_map(one, tree)

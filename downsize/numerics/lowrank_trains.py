"""A tensor as a train of small ones, for storage: Oseledets 2011, "Tensor-train decomposition"."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def train(tensor: Tensor, ranks: Sequence[int] | None = None, accuracy: float = 0.0) -> list[Tensor]:
    """Cores [r, n, s], one for each dimension of size n, whose product over the ranks between them is the tensor; the outermost are 1.

    Args:
        ranks: at most so many between a dimension and the next. None: no limit.
        accuracy: the error may be this part of the tensor's norm, and where a rank binds, larger. 0: no error but rounding.

    Returns: cores of the tensor's dtype, computed in double precision.

    Raises:
        ValueError: a scalar; or the ranks are not one less than the dimensions, or not positive.
    """
    shape = tensor.shape
    if not shape or (ranks is not None and (len(ranks) != len(shape) - 1 or min(ranks, default=1) < 1)):
        raise ValueError(f"ranks {ranks} came for a tensor {list(shape)}; expected {max(0, len(shape) - 1)} ranks of at least 1, and a dimension.")
    rest = tensor.double().reshape(1, -1)
    # The squared errors of the cuts add up.
    room = (accuracy * float(rest.norm())) ** 2 / max(1, len(shape) - 1)
    cores = []
    for number, size in enumerate(shape[:-1]):
        left, values, right = torch.linalg.svd(rest.reshape(rest.shape[0] * size, -1), full_matrices=False)
        lost = values.square().flip(0).cumsum(0).flip(0)
        rank = max(1, int((lost > room).sum()))
        if ranks is not None:
            rank = min(rank, ranks[number])
        cores.append(left[:, :rank].reshape(-1, size, rank).to(tensor.dtype))
        rest = values[:rank, None] * right[:rank]
    return [*cores, rest.reshape(-1, shape[-1], 1).to(tensor.dtype)]


def joined(cores: Sequence[Tensor]) -> Tensor:
    """The tensor that cores [r, n, s] stand for, computed in double precision, of their dtype."""
    whole = cores[0].double()
    for core in cores[1:]:
        whole = torch.tensordot(whole, core.double(), dims=1)
    return whole.squeeze(0).squeeze(-1).to(cores[0].dtype)

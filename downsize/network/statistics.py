"""One pass over calibration data: what every post-training solver needs to know about the tensors of a Network."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import frexp, gcd, isfinite, isnan, ldexp, nan
from typing import Any, overload

import torch
from torch import Tensor, fx

from ..errors import TaskError
from ..spool import Spool
from .network import Network
from .parts import Port

Hook = Callable[[tuple[Any, ...], Any], Any]
# Half the bins lie on each side of zero; the histogram's range is a power of two and doubles by merging neighbours.
BINS = 8192
# A tensor with more elements than this is sampled evenly for its histogram; its extremes are always exact.
HISTOGRAM_ELEMENTS = 2**18
# Inputs are run in pieces of about this many elements, so that calibration needs little more memory than one sample does.
CHUNK_ELEMENTS = 2**18
SMALLEST_LIMIT = 2.0**-100


class Walk(fx.Interpreter):
    """Calls ``hooks[node](args, value)`` behind each node named there, and frees tensors after their last reader; see :func:`walk`."""

    def __init__(self, network: Network, hooks: Mapping[fx.Node, Hook]) -> None:
        super().__init__(network.graph_module, garbage_collect_values=True)
        self.hooks = hooks

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        hook = self.hooks.get(n)
        if hook is None:
            return value
        args, _ = self.fetch_args_kwargs_from_env(n)
        replaced = hook(args, value)
        return value if replaced is None else replaced


def walk(network: Network, leaves: list[Tensor], hooks: Mapping[fx.Node, Hook], gradients: bool = False) -> tuple[Tensor, ...]:
    """Run the graph on flat inputs, calling ``hooks[node](args, value)`` behind each node named there.

    A hook that returns something replaces the node's value. Tensors are freed after their last reader. ``gradients``: record what is needed
    for derivatives. Returns the flat outputs.
    """
    with torch.set_grad_enabled(gradients):
        return Walk(network, hooks).run(*leaves, enable_io_processing=False)


class Pieces(Sequence[list[Tensor]]):
    """Calibration inputs, flat, in pieces of one sample or a few; kept in a temporary file, so that they take no memory.

    Indexing reads a piece; slicing gives the pieces of the slice over the same file.
    """

    def __init__(self, spool: Spool, numbers: Sequence[int]) -> None:
        self._spool, self._numbers = spool, numbers

    @staticmethod
    def of(network: Network, batches: Iterable[Any], samples: int | None = None) -> Pieces:
        """Keep the pieces of at most ``samples`` samples (see :func:`chunks`, and for what it raises)."""
        spool = Spool()
        for leaves in chunks(network, batches, samples):
            spool.append(list(leaves))
        return Pieces(spool, range(len(spool)))

    def __len__(self) -> int:
        return len(self._numbers)

    @overload
    def __getitem__(self, index: int) -> list[Tensor]: ...
    @overload
    def __getitem__(self, index: slice) -> Pieces: ...
    def __getitem__(self, index: int | slice) -> list[Tensor] | Pieces:
        if isinstance(index, slice):
            return Pieces(self._spool, self._numbers[index])
        return self._spool.read(self._numbers[index])

    def parted(self, every: int) -> tuple[Pieces, Pieces]:
        """The others, and each ``every``-th piece."""
        others = [number for i, number in enumerate(self._numbers) if i % every]
        return Pieces(self._spool, others), Pieces(self._spool, self._numbers[::every])


def chunks(network: Network, batches: Iterable[Any], samples: int | None = None) -> Iterator[list[Tensor]]:
    """Flat inputs of at most ``samples`` samples, in pieces small enough to keep activations in memory.

    Raises:
        TaskError: the data is empty, or an input has NaN or infinite values.
    """
    left = samples
    seen = 0
    for number, (inputs, _) in enumerate(batches):
        leaves = network.flat(inputs)
        for port, leaf in zip(network.ports, leaves, strict=True):
            if leaf.is_floating_point() and not bool(torch.isfinite(leaf).all()):
                raise TaskError(f"Calibration batch {number}: input {port.name} has NaN or infinite values; expected finite ones: clean the data.")
        rows = [leaf.shape[0] if _is_batched(port) else None for leaf, port in zip(leaves, network.ports, strict=True)]
        size = next((count for count in rows if count is not None), None)
        if size is None:
            yield leaves
            seen += 1
            continue
        size = size if left is None else min(size, left)
        step = max(1, CHUNK_ELEMENTS // max([1, *(leaf[:1].numel() for leaf, count in zip(leaves, rows, strict=True) if count)]))
        for start in range(0, size, step):
            stop = min(start + step, size)
            yield [leaf if count is None else leaf[start:stop] for leaf, count in zip(leaves, rows, strict=True)]
            seen += 1
        if left is not None:
            left -= size
            if left <= 0:
                break
    if not seen:
        raise TaskError("The calibration data is empty; expected at least one batch of (inputs, targets).")


def _is_batched(port: Port) -> bool:
    return bool(port.dims) and port.dims[0] == "batch"


@dataclass
class Distribution:
    """Exact extremes and a histogram of a tensor's values over the calibration data.

    ``counts[i]`` counts values in ``[-limit + i * width, -limit + (i + 1) * width)`` with ``width = 2 * limit / BINS``. Of a
    large tensor only some values are counted, each for as many as were skipped.
    """

    low: float = float("inf")
    high: float = float("-inf")
    limit: float = 0.0
    counts: Tensor = field(default_factory=lambda: torch.zeros(BINS, dtype=torch.float64))

    def add(self, value: Tensor) -> None:
        """Take in a tensor of any shape; once a value is NaN or infinite, so are the extremes."""
        if not value.numel():
            return
        low, high = (float(v) for v in torch.aminmax(value.detach()))
        if not isfinite(low + high) or isnan(self.limit):
            self.low = self.high = self.limit = nan
            return
        self.low, self.high = min(self.low, low), max(self.high, high)
        self._widen(max(abs(self.low), abs(self.high), SMALLEST_LIMIT))
        step = _step(value.numel())
        flat = value.detach().reshape(-1)[::step]
        # Scaling by a power of two is exact, so that a bin holds exactly the values between its bounds.
        flat = (flat if flat.dtype == torch.float64 else flat.float()) * (BINS / 2 / self.limit)
        self.counts += torch.bincount(torch.floor(flat).int() + BINS // 2, minlength=BINS).double() * step

    def _widen(self, extreme: float) -> None:
        """Double the range, merging neighbouring bins, until ``extreme`` lies inside."""
        if not self.limit:
            self.limit = ldexp(1.0, frexp(extreme)[1])
        while extreme >= self.limit:
            merged = self.counts.reshape(-1, 2).sum(1)
            self.counts = torch.zeros_like(self.counts)
            self.counts[BINS // 4 : 3 * BINS // 4] = merged
            self.limit *= 2.0

    def centers(self) -> Tensor:
        """The middle of every bin."""
        width = 2 * self.limit / BINS
        return -self.limit + width * (torch.arange(BINS, dtype=torch.float64) + 0.5)


def _step(elements: int) -> int:
    """Every how-manieth element is counted: prime to the number of elements, so that every channel, row and column has its share."""
    step = -(-elements // HISTOGRAM_ELEMENTS)
    while gcd(step, elements) > 1 and elements > step > 1:
        step += 1
    return step


def distributions(network: Network, pieces: Iterable[list[Tensor]], nodes: Iterable[fx.Node]) -> dict[fx.Node, Distribution]:
    """The distribution of every node's value over the pieces (see :func:`chunks`). Memory: one piece's activations, and 64 kB a node.

    Raises:
        TaskError: a value is NaN or infinite.
    """
    found = {node: Distribution() for node in nodes}
    hooks: dict[fx.Node, Hook] = {node: _recorder(distribution) for node, distribution in found.items()}
    for leaves in pieces:
        walk(network, leaves, hooks)
    for node, distribution in found.items():
        if not isfinite(distribution.low + distribution.high):
            where = node.meta.get("module") or "the model"
            raise TaskError(f"{node.name} ({where}) takes NaN or infinite values on the calibration data: the model or the data is broken.")
    return found


def _recorder(distribution: Distribution) -> Hook:
    def record(args: tuple[Any, ...], value: Any) -> None:
        distribution.add(value)

    return record
